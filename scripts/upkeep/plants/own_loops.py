"""Bugs in what training loops of one's own call: groups, kinds of layouts, blocks of backwards."""

from __future__ import annotations

from plants.plant import Plant

AGREE, RANKS, KINDS = "seqpar/comm/agree.py", "seqpar/comm/ranks.py", "seqpar/layout/kinds.py"
FITS, GRADIENTS, LOSS = "seqpar/layout/fits.py", "seqpar/gradients.py", "seqpar/loss.py"
SETUP = "seqpar/integrations/transformers/setup.py"
NESTED, OF_RANKS = "tests/comm/test_nested_blocks.py", "tests/comm/test_ranks.py"
OF_KINDS, DTENSORS = "tests/layout/test_kinds.py", "tests/data/test_dtensors.py"
TYPING = "tests/packaging/test_typing.py"
BLOCKS, REFUSED = "tests/data/test_summed_gradients.py", "tests/data/test_refused_steps.py"
BACKWARD = "tests/integrations/test_backward.py"
OWN_LOOPS = [
    Plant("an error is told to ranks that have gone", AGREE,
          "not any(_ranks(axis) <= ranks for ranks in heard)", "True", NESTED),
    Plant("an error is taken for told where some have heard it", AGREE,
          "_ranks(axis) <= ranks", "_ranks(axis) & ranks", NESTED),
    Plant("an error that is raised of another is told again", AGREE,
          "        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)\n",
          "        cause = None\n", NESTED),
    Plant("an error of the wire is told on it", AGREE,
          "    if cause is None and isinstance(error, DesyncError):\n", "    if False:\n", NESTED),
    Plant("an error that cannot be told is lost", AGREE,
          "        except DesyncError as lost:", "        except KeyError as lost:", NESTED),
    Plant("every module has a group of its own", RANKS,
          "    made = _GROUPS.get(processes)\n", "    return Group.of(processes)\n", OF_RANKS),
    Plant("a mesh has a group of its own", RANKS,
          "Grid.of(ranks, group_of(process_group_of(None)))", "Grid.of(ranks)", OF_RANKS),
    Plant("a mesh is taken for a group", AGREE,
          '        if not hasattr(axis, "transport"):', "        if False:", OF_RANKS),
    Plant("balanced is not asked for by its function", KINDS,
          'kind == "balanced" or kind is balanced', 'kind == "balanced"', OF_KINDS),
    Plant("a layout of another length is let in", KINDS,
          "    if layout.length != length:\n", "    if False:\n", OF_KINDS),
    Plant("a layout that is cut elsewhere is let in", KINDS,
          "not layout.is_cut_at(multiple_of)", "False", OF_KINDS),
    Plant("a loader does not look at its kind", "seqpar/loader.py",
          "        check_kind(kind)\n", "", OF_KINDS),
    Plant("options are not typed", "seqpar/module.py",
          "group: Ranks, *, head_chunks: int = 1, **options: Unpack[Options]",
          "group: Ranks, *, head_chunks: int = 1, **options: Any", TYPING),
    Plant("kinds are not typed", "seqpar/data.py",
          '    kind: LayoutKind = "zigzag",\n', '    kind: Any = "zigzag",\n', TYPING),
    Plant("ranks with other layouts", "seqpar/data.py",
          "        claim |= told(layout=layout)\n", "", OF_KINDS),
    Plant("a DTensor is taken for rows", "seqpar/calls/check_tensors.py",
          "        check_local(x, name)\n", "", DTENSORS),
    Plant("uneven DTensors are cut evenly", FITS,
          'if length % size else ""', 'if False else ""', DTENSORS),
    Plant("a DTensor that is cut elsewhere is taken for rows", FITS,
          "is_shard(dim % ndim)", "is_shard()", DTENSORS),
    Plant("summed although a rank raised", GRADIENTS,
          '        agreed(group, operation="summed_gradients") as claim,\n',
          '        agreed(operation="summed_gradients") as claim,\n', BLOCKS),
    Plant("ranks in the middle of a call are not told", GRADIENTS,
          '        agreed(*axes, operation="summed_gradients"),\n',
          '        agreed(operation="summed_gradients"),\n', BLOCKS),
    Plant("gradients of an earlier step are summed again", GRADIENTS,
          "        if any(_is_summed(p, group) for p in params):\n", "        if False:\n", REFUSED),
    Plant("FSDP: parameters as they are before backward", GRADIENTS,
          "        params = _learning(given)\n        claim |= _check(params, group)\n",
          "        claim |= _check(params, group)\n", REFUSED),
    Plant("a step without a gradient", GRADIENTS,
          "    if not _sum(params, group):\n", "    _sum(params, group)\n    if False:\n", REFUSED),
    Plant("DDP is not looked for", GRADIENTS, "sorted(names & REDUCES)", "sorted(set())", REFUSED),
    Plant("a loss that was made before its step", GRADIENTS,
          "        check_reduction(loss)\n", "", REFUSED),
    Plant("losses for wrappers are summed", LOSS,
          '    if summed and gradients == "mean" and group.size > 1:\n', "    if False:\n", REFUSED),
    Plant("losses over other ranks are summed", LOSS,
          "    if summed and ranks not in summed:\n", "    if False:\n", REFUSED),
    Plant("a block in a block forgets the outer one", LOSS,
          "_SUMMING.set((*_SUMMING.get(), group))", "_SUMMING.set((group,))", BLOCKS),
    Plant("a model's step is of the ranks of a sequence", SETUP,
          "summed_gradients(model, everyone or self.group, axes=axes)",
          "summed_gradients(model, self.group, axes=axes)", BACKWARD),
    Plant("ranks that share heads are not told", SETUP,
          "axes = self._axes if everyone else (self.tp,)", "axes = ()", BACKWARD),
]  # fmt: skip
