"""torchtitan: `parallelize` puts seqpar's attention in the place of torchtitan's own context parallelism.

Its trainer shards tokens, labels and positions along the mesh axis "cp", and its function for a model applies
tensor parallelism, checkpointing, compilation and FSDP. Both stay as they are. Only the inner attention of
each block is another, and what rows may see is read from the positions of documents. Not documented by
torchtitan are `Module._sharding_config`, and what `attention_masks` may be between a model and its blocks.
"""

from seqpar.requires import require

require("torchtitan", by="seqpar.integrations.torchtitan", extra="torchtitan")

from seqpar.integrations.torchtitan.applied import parallelize

__all__ = ["parallelize"]
