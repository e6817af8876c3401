"""Bugs of biases: what is looked up for a score, where its gradient goes, and what is refused."""

from __future__ import annotations

from plants.plant import Plant

TERMS, STRATEGIES = "kernels/seqpar_kernels/terms", "seqpar/strategies"
EQUIVALENCE, BIASES = "tests/strategies/test_equivalence.py", "tests/strategies/test_biases.py"
BAD_INPUT, T5 = "tests/strategies/test_bad_input.py", "tests/integrations/test_biases.py"
BIAS_PLANTS = [
    Plant("a bias of the first batch entries for all", f"{TERMS}/table.py",
          "x[place.batch : place.batch + num]", "x[:num]", EQUIVALENCE),
    Plant("a bias of the first heads for all", f"{TERMS}/table.py",
          "whole[:, heads]", "whole[:, : heads.stop - heads.start]", EQUIVALENCE),
    Plant("biases: the gradient of a tensor that is another one too", f"{TERMS}/table.py",
          "            if x is self.value:\n", "            if x.shape == self.value.shape:\n", BIASES),
    Plant("a bias that hides is taken", f"{TERMS}/table.py",
          "    if has_numbers and not", "    if False and not", BAD_INPUT),
    Plant("a bias broadcasts whatever its shape", f"{TERMS}/table.py",
          "    if any(n not in (1, m) for n, m in pairs):\n", "    if False:\n", BAD_INPUT),
    Plant("a relative bias ends before its last distance", f"{TERMS}/relative_bias.py",
          ".clamp_(-reach, reach) + reach", ".clamp_(-reach, max(reach - 1, 0)) + reach", EQUIVALENCE),
    Plant("a relative bias from the column", f"{TERMS}/relative_bias.py",
          "(place.col - place.row[:, None])", "(place.row[:, None] - place.col)", EQUIVALENCE),
    Plant("a relative bias does not ask where rows stand", f"{TERMS}/relative_bias.py",
          "    compares_positions = True\n", "", BIASES),
    Plant("an even number of distances is taken", f"{TERMS}/relative_bias.py",
          "        if value.shape[-1] % 2 == 0:\n", "        if False:\n", BIASES),
    Plant("biases before the softcap", f"{TERMS}/__init__.py",
          "    Softcap, ScoreMod, Bias, RelativeBias,", "    Bias, RelativeBias, Softcap, ScoreMod,",
          EQUIVALENCE),
    Plant("a tensor in two places has its gradient twice", f"{STRATEGIES}/loop.py",
          "found |= {name: totals.pop(id(x)) for", "found |= {name: totals[id(x)] for", BIASES),
    Plant("a tensor in two places has its gradient twice: stored scores", f"{STRATEGIES}/materialised.py",
          "learned |= {name: totals.pop(id(x)) for", "learned |= {name: totals[id(x)] for", BIASES),
    Plant("one rank alone: the gradient of a bias begins anew", "kernels/seqpar_kernels/custom_ops.py",
          "sums = [pair for x in tables.values() for pair in sums_for([x])]",
          "sums = [pair for x in tables.values() for pair in sums_for([x[:0]])]",
          "tests/block/test_custom_ops.py"),
    Plant("ranks do not compare how a bias broadcasts", "seqpar/calls/options.py",
          "return (x.dtype, tuple(x.shape)) if name in TABLES else x.dtype", "return x.dtype", BIASES),
    Plant("invariant bits of biases that learn", "seqpar/calls/check_tensors.py",
          "(learns or score.captured)", "score.captured", BIASES),
    Plant("a bias under rows that stand elsewhere", "seqpar/calls/check_tensors.py",
          "    if score.bias is not None and plan.masks[0].shift != (0, 0):\n", "    if False:\n", BIASES),
    Plant("T5: exact buckets reach one too far", "seqpar/biases.py", "apart < near", "apart <= near + 1", T5),
    Plant("T5: decoders have buckets for what is ahead", "seqpar/biases.py",
          "(distance > 0) * num if both else 0", "(distance > 0) * (num - 1)", T5),
    Plant("T5: the last bucket is missing", "seqpar/biases.py",
          "clamp(max=num - 1)", "clamp(max=num - 2)", T5),
    Plant("ALiBi by numbers has no sign", "seqpar/biases.py",
          "return -_slopes(slopes) * _distances(slopes, length).abs()",
          "return _slopes(slopes) * _distances(slopes, length).abs()", BIASES),
    Plant("an attn_mask of floats replaces a bias", "seqpar/multihead_masks.py",
          "bias if plan.score.bias is None else bias + plan.score.bias", "bias", "tests/multihead"),
]  # fmt: skip
