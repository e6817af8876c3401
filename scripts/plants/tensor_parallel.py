"""Bugs in tensor parallelism: fused weights, the layer, policies."""

from __future__ import annotations

from plants.plant import Plant

FOLDER, TESTS = "seqpar/tensor_parallel", "tests/tensor_parallel"
LAYER, REFUSALS = f"{TESTS}/test_layer.py", f"{TESTS}/test_layer_refusals.py"
TENSOR_PARALLEL = [
    Plant("copies of a kv head learn apart", f"{FOLDER}/shared_heads.py",
          "        _add_copies_(total, group, dealt)\n", "", LAYER),
    Plant("a rank's share of a kv head counted twice", f"{FOLDER}/shared_heads.py",
          "            total += own", "            total += 2 * own", LAYER),
    Plant("k and v of copies exchanged", f"{FOLDER}/shared_heads.py",
          "own = torch.stack([k, v])", "own = torch.stack([v, k])", LAYER),
    Plant("dx of this rank's heads only", f"{FOLDER}/layer.py",
          "            x = replicate(x, self.tp)\n", "            pass\n", LAYER),
    Plant("the result of this rank's heads only", f"{FOLDER}/layer.py",
          "            y = all_reduce(y, self.tp)\n", "            pass\n", LAYER),
    Plant("the output's bias added by every rank", f"{FOLDER}/layer.py",
          "y = F.linear(out.flatten(2), self.out_weight)",
          "y = F.linear(out.flatten(2), self.out_weight, self.out_bias)", LAYER),
    Plant("kv heads shared unevenly taken as even", f"{FOLDER}/layer.py",
          "    if len(set(runs)) == 1:\n", "    if sum(runs) % len(runs) == 0:\n", LAYER),
    Plant("norms learn from this rank's heads only", f"{FOLDER}/layer.py",
          "{name: replicate(p, self.tp) for", "{name: p for", LAYER),
    Plant("slopes learn from this rank's heads only", f"{FOLDER}/layer.py",
          "replicate(term, self.tp) if shared else term", "term", LAYER),
    Plant("every rank has the slopes of the first", f"{FOLDER}/layer.py",
          "whole.of_heads(self.first_head,", "whole.of_heads(0,", LAYER),
    Plant("every rank drops as the first", f"{FOLDER}/layer.py",
          "first_head=self.first_head)", "first_head=0)", LAYER),
    Plant("clipped before the bias", f"{FOLDER}/layer.py",
          "fused = F.linear(x, weight, bias)\n        if self.clip is not None:\n"
          "            fused = fused.clamp(-self.clip, self.clip)\n",
          "fused = F.linear(x, weight)\n        if self.clip is not None:\n"
          "            fused = fused.clamp(-self.clip, self.clip)\n"
          "        fused = fused if bias is None else fused + bias\n", LAYER),
    Plant("rotary pairs the other way", f"{FOLDER}/rotary.py",
          "if self.interleaved else", "if not self.interleaved else", LAYER),
    Plant("rotary turns backward", f"{FOLDER}/rotary.py",
          "[one * cos - two * sin, two * cos + one * sin]",
          "[one * cos + two * sin, two * cos - one * sin]", LAYER),
    Plant("output weight cut where another rank's heads are", f"{FOLDER}/whole_weights.py",
          "for n in layer.dealt.q[tp.rank])", "for n in layer.dealt.q[0])", LAYER),
    Plant("a state is not agreed on", f"{FOLDER}/layer.py",
          'with self._agreed("load_whole"):', 'with agreed(Group.alone(), "load_whole"):', REFUSALS),
    Plant("refusals reach the ranks of tp only", f"{FOLDER}/layer.py",
          "with agreed(sp, operation), agreed(", "with agreed(", REFUSALS),
    Plant("copies that differ are merged", f"{FOLDER}/fused_qkv.py",
          "if not torch.equal(mine.detach(), theirs.detach()):", "if False:", REFUSALS),
    Plant("heads attended apart drop as the first", "seqpar/strategies/ring.py",
          "first = plan.first_head + head", "first = head", "tests/strategies/test_first_head.py"),
    Plant("blocks of heads attended apart drop as the first", "seqpar/strategies/plan.py",
          "head, drops, packed = self.first_head + head,", "head, drops, packed = head,",
          "tests/strategies/test_first_head.py"),
    Plant("stored weights of heads apart drop as the first", "kernels/seqpar_kernels/dense.py",
          "keeps(batch, head + cells.head,", "keeps(batch, head,",
          "tests/strategies/test_first_head.py"),
    Plant("compiled: the first head left out", "seqpar/compiled.py",
          "        first,\n    )", "        0,\n    )", "tests/strategies/test_first_head.py"),
    Plant("parts of a replicated gradient taken for the whole", "seqpar/loss.py",
          "    return grad.redistribute(placements=p.placements)\n", "    return grad\n",
          "tests/data/test_sharded_gradients.py"),
    Plant("a shard is not written back", "seqpar/loss.py",
          "                here.copy_(wide)\n", "", "tests/data/test_sharded_gradients.py"),
]  # fmt: skip
