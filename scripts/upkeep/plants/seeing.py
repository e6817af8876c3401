"""Bugs in how models that see are sharded."""

from __future__ import annotations

from plants.plant import Plant

HUGGING_FACE, SEEING = "seqpar/integrations/transformers", "tests/integrations/test_seeing.py"
BOUNDARY, BLOCKS = f"{HUGGING_FACE}/boundary.py", f"{HUGGING_FACE}/attention/blocks.py"
CALL, SHARDING = f"{HUGGING_FACE}/attention/call.py", f"{HUGGING_FACE}/sharding.py"
SEES = [
    Plant("seeing: positions one off", BOUNDARY,
          "positions = torch.arange(layout.length, device=tokens.device)",
          "positions = torch.arange(layout.length, device=tokens.device).roll(1)", SEEING),
    Plant("seeing: features of the first images on every rank", BOUNDARY,
          "[x[here] for x in", "[x[: len(here)] for x in", SEEING),
    Plant("seeing: what is not known is handed on", BOUNDARY,
          "    if unknown:\n", "    if False:\n", SEEING),
    Plant("seeing: blocks are not in the window", BLOCKS,
          "seen if self.window is None else seen & band(1 - self.window)", "seen", SEEING),
    Plant("seeing: blocks of the first row", BLOCKS,
          "[self._mask(row) for row in self.rows]", "[self._mask(self.rows[0]) for _ in self.rows]",
          SEEING),
    Plant("seeing: masks that are handed on are forgotten", CALL,
          "self.handed if isinstance(self.handed, Pattern) else layer.mask", "layer.mask", SEEING),
    Plant("seeing: layers that contradict their mask", CALL,
          'getattr(pattern, "blocks", None) is not None', "True", SEEING),
    Plant("seeing: all images are seen", CALL,
          "mask = layer.mask.to(q.dtype)", "mask = layer.mask.to(q.dtype) * 0", SEEING),
    Plant("seeing: images are not compared", SHARDING,
          '(tuple(x.shape), content_hash(x))', "tuple(x.shape)", SEEING),
]  # fmt: skip
