"""What transformers does not document is there; where it is not, a sentence says so."""

from types import SimpleNamespace

import pytest
from transformers import masking_utils

import seqpar
from seqpar.integrations.transformers import SequenceParallel
from seqpar.integrations.transformers.internals import MASKS, attention_name, mask_forms
from seqpar.testing.models.tiny import FAMILIES


def test_this_release_has_every_part():
    assert set(mask_forms(None, None)) == {(True, None, None), (False, None, None)}
    assert set(mask_forms(4, None)) == {(True, 4, None), (False, 5, None), (True, None, 4)}
    assert attention_name(FAMILIES["llama"].make().config) == "sdpa"


def test_a_config_that_keeps_its_attention_elsewhere_is_refused():
    with pytest.raises(NotImplementedError, match=r"config\._attn_implementation of transformers"):
        attention_name(SimpleNamespace())


@pytest.mark.parametrize("name", MASKS[1:])  # the first is called by transformers itself
def test_a_release_with_other_mask_functions_is_refused_when_a_model_is_set_up(name, monkeypatch):
    monkeypatch.delattr(masking_utils, name)
    with pytest.raises(
        NotImplementedError, match=rf"masking_utils\.{name} of transformers, which 5"
    ):
        SequenceParallel(FAMILIES["llama"].make(), seqpar.RingAttention(seqpar.Group.alone()))
