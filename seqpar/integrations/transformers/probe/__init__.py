"""What is found out about a model before it is sharded, from its config and by running it."""
