"""Bugs where sequence parallelism meets pipelines and experts."""

from __future__ import annotations

from plants.plant import Plant

ORDER, PIPELINE = "tests/strategies/test_backward_order.py", "tests/training/test_pipeline.py"
PARALLELISMS = [
    Plant("groups of one process group count apart", "seqpar/comm/group.py",
          "return _CALLS.setdefault(process_group, Calls())", "return Calls()", ORDER),
    Plant("views of the same ranks count apart", "seqpar/comm/group.py",
          "return self.views.setdefault(members, Calls(of=self))", "return Calls(of=self)", ORDER),
    Plant("a backward that begins at a loop is not agreed on", "seqpar/strategies/loop.py",
          "        ctx.arrive()\n", "", ORDER),
    Plant("a backward that begins at stored scores is not agreed on",
          "seqpar/strategies/materialised.py", "        ctx.arrive()\n", "", ORDER),
    Plant("a backward is agreed on twice", "seqpar/comm/backward.py",
          "        ctx.way.num_agreed += 1\n", "", ORDER),
    Plant("what is no copy is summed", "seqpar/gradients.py",
          "        if group.size > 1 and ranks not in _COMPARED.get(p, ())\n", "        if False\n",
          "tests/training/test_experts.py"),
    Plant("copies are compared at every sum", "seqpar/gradients.py",
          "        _COMPARED.setdefault(p, set()).add(ranks)\n", "        pass\n",
          "tests/data/test_loss.py"),
    Plant("micro-batches: each a mean of its own", "seqpar/loss.py",
          "    if num_tokens is None:\n", "    if True:\n", PIPELINE),
    Plant("what is recomputed sends again", "seqpar/comm/replay.py",
          '    if replay.mode == "play":\n        return replay.take(num)\n', "", PIPELINE),
]  # fmt: skip
