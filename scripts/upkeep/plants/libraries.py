"""Bugs in what stands between this package and the insides of torch and transformers."""

from __future__ import annotations

from plants.plant import Plant

KERNELS, HUGGING_FACE = "kernels/seqpar_kernels", "seqpar/integrations/transformers"
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
]  # fmt: skip
