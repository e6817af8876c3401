"""This package's attention in the place of a model's own, and who has which."""
