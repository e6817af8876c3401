"""What a model's mask shows is what the pattern taken from it shows: the borders of windows, above all."""

import re

import pytest
import torch
from transformers import LlamaConfig
from transformers import masking_utils as masks

from seqpar import Mask
from seqpar.integrations.transformers.attention.patterns import Pattern, pattern_mask
from seqpar.integrations.transformers.attention.registration import register
from seqpar.testing import oracle
from seqpar.testing.models.tiny import GROUPED

MAKERS = {
    "causal": masks.create_causal_mask,
    "window": masks.create_sliding_window_causal_mask,
    "bidirectional": masks.create_bidirectional_mask,
    "two-sided window": masks.create_bidirectional_sliding_window_mask,
}


@pytest.fixture(scope="module", autouse=True)
def registered():
    """Twice, as for two models."""
    register()
    register()


def masked_by(maker, attention, window, length, **options):
    config = LlamaConfig(**GROUPED, sliding_window=window)
    config._attn_implementation = attention
    rows = torch.empty(1, length, 4)
    seen = options.pop("attention_mask", torch.ones(1, length, dtype=torch.long))
    no_cache = None  # by place: its name is another from transformers 5.24 on
    return MAKERS[maker](config, rows, seen, no_cache, **options)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("window", [1, 2, 5, 11, 12, 40])
def test_shows_what_the_mask_of_one_device_shows(maker, window):
    length = 12
    pattern = masked_by(maker, "seqpar", window, length)
    expected = masked_by(maker, "eager", window, length)
    expected = torch.ones(length, length) if expected is None else expected[0, 0] == 0
    shown = oracle.visible(length, pattern.causal, pattern.window)
    assert torch.equal(shown, expected.bool())
    band = Mask(pattern.causal, pattern.window).layers[0].band(0, 0, 1)
    assert all(
        bool(shown[i, j])
        == ((band.lower is None or i + band.lower <= j) and (band.upper is None or j <= i + band.upper))
        for i in range(length)
        for j in range(length)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"or_mask_function": masks.sliding_window_overlay(3)}, "or_masks.*sliding_window_overlay"),
        ({"and_mask_function": masks.sliding_window_overlay(3)}, "and_masks"),
        ({"attention_mask": torch.ones(1, 15)}, r"15 keys|\(1, 15\)"),
        (
            {"attention_mask": None, "position_ids": torch.tensor([[*range(6), *range(6)]])},
            r"made of and_masks\(.*\) for texts that position_ids pack",
        ),
    ],
)
def test_other_forms_are_not_guessed_at(options, message):
    pattern = masked_by("causal", "seqpar", None, 12, **options)
    assert pattern.unknown is not None
    assert re.search(message, pattern.unknown)


def test_patterns_say_what_they_are():
    assert str(Pattern(causal=True, window=4)) == "causal with a window of 4"
    assert str(Pattern()) == "bidirectional"
    assert pattern_mask(2, 3, masks.causal_mask_function).unknown is not None
