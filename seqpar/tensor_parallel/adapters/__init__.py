"""What stands in for the attention of the models of transformers; needs transformers."""
