"""Hugging Face models on sharded sequences: `SequenceParallel` makes a model attend over all ranks.

Nothing is patched. Two names are registered with transformers, an attention function and a mask function;
what they need travels with every call as one keyword argument of the model, `seqpar=`.
"""

from seqpar.requires import require

require("transformers", by="seqpar.integrations.transformers", extra="transformers")

from seqpar.integrations.transformers.inputs import Inputs
from seqpar.integrations.transformers.replace.replace_attention import replace_attention
from seqpar.integrations.transformers.replace.replaced import ReplacedModel
from seqpar.integrations.transformers.setup import SequenceParallel

__all__ = ["Inputs", "ReplacedModel", "SequenceParallel", "replace_attention"]
