"""Tiny models of many families, and their steps on one device and on sharded sequences.

Needs transformers. Importing `seqpar.testing` does not import this package.
"""

from seqpar.requires import require

require("transformers", by="seqpar.testing.models", extra="transformers")
