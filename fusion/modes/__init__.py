"""What is done with the members' answers: the modes, the judge and their parts."""
