"""How exact results are: errors in 16 bits, and which bits depend on the number of ranks."""
