"""Bugs in what stands between this package and the insides of torch and transformers."""

from __future__ import annotations

from plants.plant import Plant

KERNELS, HUGGING_FACE = "kernels/seqpar_kernels", "seqpar/integrations/transformers"
PROBE, TRIAL = f"{HUGGING_FACE}/probe", "tests/integrations/test_refusals.py"
PARTS, FIRST = "tests/block/test_torch_internals.py", "tests/packaging/test_first_call.py"
LIBRARIES = [
    Plant("op: a second derivative is nothing", f"{KERNELS}/torch_ops.py",
          "        raise NotImplementedError(\n", "        return (None,) * 19 + (\n",
          "tests/block/test_custom_ops.py"),
    Plant("op: a first call imports a compiler", f"{KERNELS}/torch_ops.py",
          'if "torch._dynamo" in sys.modules else', "if True else", FIRST),
    Plant("an attention that is not there is chosen", f"{KERNELS}/choice.py",
          'return reason and f"cannot be served: {reason}"', "return None", PARTS),
    Plant("compiled without what keeps the order", "seqpar/compiled.py",
          "torch_internals.parts(torch_internals.COMPILE)",
          "torch_internals.missing(torch_internals.COMPILE)", PARTS),
    Plant("another mask function is taken for none", f"{HUGGING_FACE}/internals.py",
          "    if absent:", "    if False:", "tests/integrations/test_internals.py"),
    Plant("a cache by its newer name is let in", f"{HUGGING_FACE}/attention/guard.py",
          '"cache", ', "", "tests/integrations/test_refusals.py"),
    Plant("packed texts are not named", f"{HUGGING_FACE}/attention/patterns.py",
          'if "packed_sequence_mask" in names', "if False", "tests/integrations/test_patterns.py"),
    Plant("CodeGen: sine for cosine", f"{HUGGING_FACE}/replace/families.py",
          '    sin, cos = given["position_embeddings"]', '    cos, sin = given["position_embeddings"]',
          "tests/tensor_parallel/test_replace.py"),
    Plant("CodeGen of another release", f"{HUGGING_FACE}/replace/families.py",
          "    when=lambda m: not _has_own_table(m),", "    when=lambda m: _has_own_table(m),",
          "tests/tensor_parallel/test_replace.py"),
    Plant("trial: what one device gives not compared", f"{PROBE}/trial.py",
          "            _check_equal(inner, known, ours[WHOLE])\n", "            pass\n", TRIAL),
    Plant("trial: rows that depend on each other let through", f"{PROBE}/trial.py",
          "    at_fault = list(trace.culprits)\n", "    at_fault = []\n", TRIAL),
    Plant("trial: layers that other tokens run let through", f"{PROBE}/trial.py",
          "    if trace.attending != again.attending:\n", "    if False:\n", TRIAL),
    Plant("trial: all models pack", f"{PROBE}/trial.py",
          "packs = difference(known.packed, ours[PACKED], PACKED_AT) is None", "packs = True", TRIAL),
    Plant("trial: no model counts what is seen", f"{PROBE}/trial.py",
          "counts_seen = difference(ours[APART], rows_of(masked, 0), PACKED_AT) is not None",
          "counts_seen = False", TRIAL),
    Plant("trial: rows stay where they are", f"{PROBE}/tokens.py",
          "self.others if i == MOVED else self.tokens", "self.tokens", TRIAL),
    Plant("trial: no special tokens", f"{PROBE}/tokens.py",
          "new, special = others[0::2], _special_tokens(inner)", "new, special = others[0::2], []", TRIAL),
]  # fmt: skip
