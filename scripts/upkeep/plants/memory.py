"""Bugs in what lowers memory: tiles of rows, losses of tiles, saved tensors on the host."""

from __future__ import annotations

from plants.plant import Plant

TILES, LOSS, HOST = "seqpar/row_tiles.py", "seqpar/head_loss.py", "seqpar/host_memory.py"
MODULES = "seqpar/tiled_modules.py"
TILED, LOSSES = "tests/memory/test_tiled.py", "tests/memory/test_tiled_loss.py"
ON_HOST, TOGETHER = "tests/memory/test_saved_on_host.py", "tests/memory/test_all_together.py"
MEMORY = [
    Plant("dropout in tiles is drawn anew", TILES,
          "with ctx.again(), run.casts(), torch.enable_grad():",
          "with run.casts(), torch.enable_grad():", TILED),
    Plant("a module that is not given is not looked for", TILES,
          "if leaf is not None and id(leaf) not in given:", "if False:", TILED),
    Plant("sums over tiles in 16 bits", TILES,
          "wide = accumulation_dtype(grad.dtype)", "wide = grad.dtype", TILED),
    Plant("the last tile alone is learned from", TILES,
          "                    grads[n] += grad\n",
          "                    grads[n] = grad.to(grads[n].dtype)\n", TILED),
    Plant("hooks on parameters see tiles", TILES,
          "return [a.requires_grad_(x.requires_grad) for a, x in zip(aliases, tensors, strict=True)]",
          "return [*(a.requires_grad_(x.requires_grad) for a, x in zip(parts, tensors)), "
          "*tensors[self.num_rows :]]", TILED),
    Plant("backward without autocast", TILES, "with ctx.again(), run.casts(),", "with ctx.again(),", TILED),
    Plant("a DTensor is tiled", TILES,
          '    if any(hasattr(x, "full_tensor") for x in tensors):\n', "    if False:\n", TOGETHER),
    Plant("a copy of a tiled module is its original", MODULES,
          "MethodType(forward, module)", "(lambda *x, m=module, **y: forward(m, *x, **y))", TILED),
    Plant("smoothing is forgotten in backward", LOSS,
          "dz -= head.smoothing / len(weight)", "pass", LOSSES),
    Plant("the slope of a softcap is forgotten", LOSS, "dz *= slope", "pass", LOSSES),
    Plant("rows without a label are learned from", LOSS,
          ".masked_fill(labels == IGNORE, 0.0).unsqueeze(1)", ".unsqueeze(1)", LOSSES),
    Plant("a loss in tiles knows no autocast", LOSS,
          "return torch.get_autocast_dtype(kind)", "return hidden.dtype", LOSSES),
    Plant("labels that are no class", LOSS, "    if wrong.any():\n", "    if False:\n", LOSSES),
    Plant("what comes back is used before it is there", HOST,
          "        self._lane.computing.wait_event(arrived)\n", "", ON_HOST),
    Plant("what comes back is written to the memory of another", HOST,
          "        self._back.wait_stream(self.computing)", "        pass", ON_HOST),
    Plant("what came back for nobody is freed before its copy", HOST,
          "        if self._coming is not None:\n", "        if False:\n", ON_HOST),
    Plant("a tensor is written to while it leaves", HOST,
          "            if version(x) != before:\n", "            if False:\n", ON_HOST),
    Plant("parameters move to the host", HOST, "is_plain and not is_held", "is_plain", ON_HOST),
    Plant("a tensor moves once for each block", HOST,
          "        if known is not None:\n", "        if False:\n", ON_HOST),
    Plant("nothing comes back ahead", HOST, "                moved.begin()\n",
          "                pass\n", ON_HOST),
    Plant("what attention gave stays on the device", "seqpar/checkpointing.py",
          "Replay() if host is None else", "Replay() if True else", ON_HOST),
]  # fmt: skip
