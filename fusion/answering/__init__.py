"""What every mode works with: the request and its candidates, agreement, the judge, fences, and the answer's form."""
