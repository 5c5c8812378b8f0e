"""The combiner: weighs who gave which answer, and says how probable it is that the leading answer is right."""
