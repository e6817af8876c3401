"""Tiny models of many families, on one device and on sharded sequences, for tests and scripts."""
