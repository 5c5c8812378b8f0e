"""What the modes work with: the request, its candidates, the judge, and the form that an answer must have."""
