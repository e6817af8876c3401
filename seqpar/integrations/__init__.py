"""Adapters to libraries that seqpar does not need; importing seqpar imports none of them."""
