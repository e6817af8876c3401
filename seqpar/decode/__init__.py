"""Decoding over keys and values that stay on the ranks that hold them. No gradients here."""

from seqpar.decode.cache import KVCache
from seqpar.decode.volume import decode_volume

__all__ = ["KVCache", "decode_volume"]
