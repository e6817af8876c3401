"""Bugs in the replacement of a model's attention."""

from __future__ import annotations

from plants.plant import Plant

HUGGING_FACE, TESTS = "seqpar/integrations/transformers", "tests/tensor_parallel/test_replace"
REPLACE = f"{HUGGING_FACE}/replace"
EQUAL, CALLS, STATE = f"{TESTS}.py", f"{TESTS}_calls.py", f"{TESTS}_state.py"
REFUSALS = f"{TESTS}_refusals.py"
SAVING, OWN_LOSS = "tests/tensor_parallel/test_saving.py", "tests/integrations/test_own_loss.py"
REPLACED = [
    Plant("replaced: every rank drops as the first", f"{REPLACE}/replaced.py",
          'terms["first_head"] = self.layer.first_head', 'terms["first_head"] = 0', CALLS),
    Plant("replaced: slopes of the first heads", f"{REPLACE}/replaced.py",
          "slopes[self.layer.heads_here]",
          "slopes[: self.layer.dealt.num_q(self.layer.tp.rank)]", EQUAL),
    Plant("replaced: clip forgotten", f"{REPLACE}/replaced.py",
          "clip=family.clip(module),", "clip=None,", EQUAL),
    Plant("replaced: the residual left out", f"{REPLACE}/families.py",
          ' + given["residual"]', "", EQUAL),
    Plant("replaced: Falcon drops no weights", f"{REPLACE}/families.py",
          "return m.attention_dropout.p if m.config.alibi else 0.0", "return 0.0", CALLS),
    Plant("replaced: masks do not carry the plan", f"{HUGGING_FACE}/attention/replacement.py",
          "            self._plans[mask] = plan\n", "            pass\n", CALLS),
    Plant("replaced: padding not told", f"{HUGGING_FACE}/attention/patterns.py",
          "hidden = as_bytes(attention_mask)", "hidden = None", CALLS),
    Plant("replaced: state in another order", f"{REPLACE}/replaced.py",
          "return {name: state[name] for name in self._names}", "return state", STATE),
    Plant("replaced: missing names let through", "seqpar/tensor_parallel/check_state.py",
          "    if missing or unexpected:", "    if unexpected:", STATE),
    Plant("replaced: originals keep their weights", f"{REPLACE}/replaced.py",
          "parameter.data = parameter.data.new_empty(0)", "pass", STATE),
    Plant("replaced: frozen weights learn", f"{REPLACE}/replaced.py",
          "parameter.requires_grad_(learns)", "pass", STATE),
    Plant("replaced: not put back", f"{REPLACE}/replace_attention.py",
          "        replaced.restore()\n        raise", "        raise", STATE),
    Plant("replaced: layers not compared", f"{REPLACE}/replace_attention.py",
          "        if not same_rows(x, y):", "        if False:", STATE),
    Plant("replaced: weights of ranks not compared", f"{REPLACE}/replace_attention.py",
          "            if not same_rows(mine, theirs):", "            if False:", STATE),
    Plant("replaced: calls not agreed on over tp", f"{HUGGING_FACE}/attention/guard.py",
          'agreed(self.tp, operation="a call, over tp")',
          'agreed(Group.alone(), operation="a call")', REFUSALS),
    Plant("replaced: batches not agreed on over tp", f"{HUGGING_FACE}/setup.py",
          'agreed(self.tp, operation="shard, over tp")',
          'agreed(Group.alone(), operation="shard")', REFUSALS),
    Plant("replaced: hooks lost", f"{REPLACE}/original.py",
          "        if hooks:", "        if False:", REFUSALS),
    Plant("replaced: gradients lost", f"{REPLACE}/original.py",
          "            if parameter.grad is not None:", "            if False:", REFUSALS),
    Plant("saving: the stand-in's names", f"{REPLACE}/replaced.py",
          "        self._saving.put()\n", "", SAVING),
    Plant("saving: a trainer's state as it is", "seqpar/tensor_parallel/saving.py",
          "if state is None or not self._is_whole(state):", "if state is None:", SAVING),
    Plant("saving: shards of a policy", "seqpar/tensor_parallel/apply.py",
          "    guard_saving(model)\n", "", SAVING),
    Plant("optimizers of given up weights step", f"{REPLACE}/given_up.py",
          "        if held:", "        if False:", SAVING),
    Plant("optimizers of put back weights step", f"{REPLACE}/replaced.py",
          'GivenUp(weights, "restore() has put', '(weights, "restore() has put', SAVING),
    Plant("loss: labels by the name of the class", f"{HUGGING_FACE}/probe/own_loss.py",
          "if not given or loss is None:", "if True:", OWN_LOSS),
    Plant("loss: another one taken for cross entropy", f"{HUGGING_FACE}/probe/own_loss.py",
          "named if named in found else None", "named", OWN_LOSS),
]  # fmt: skip
