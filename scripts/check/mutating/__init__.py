"""Small changes to the package that tests should notice: which there are, and which tests try them."""
