"""Bugs in what a rank gets of a batch: labels, tokens ahead, tensors beside them, documents."""

from plants.plant import Plant

DATA, AHEAD = "seqpar/data.py", "seqpar/ahead.py"
MODELS = "seqpar/integrations/transformers"
TESTS_AHEAD, BESIDE = "tests/data/test_ahead.py", "tests/data/test_beside.py"
DOCUMENTS, OF_MODELS = "tests/integrations/test_documents.py", "tests/integrations/test_beside.py"
BATCHES = [
    Plant("labels sharded before they are shifted", DATA,
          "tokens_ahead(tensors[name], range(1, 2), ends, fill)",
          "tokens_ahead(tensors[name], range(0, 1), ends, fill)", "tests/data/test_data.py"),
    Plant("tokens ahead cross documents", AHEAD,
          "there = (source < ends[:, None])", "there = (source < length + 0 * ends[:, None])", TESTS_AHEAD),
    Plant("labels ahead are of the tokens that a block takes", DATA,
          "range(2, num + 1), ends, IGNORE", "range(1, num), ends, IGNORE", TESTS_AHEAD),
    Plant("a block takes the tokens that it predicts", DATA,
          "range(1, num), ends, 0", "range(2, num + 1), ends, 0", TESTS_AHEAD),
    Plant("labels ahead of labels that were shifted", DATA,
          "further = {} if labels_ahead is None else _further(batch, tensors, labels_ahead, ends)",
          "further = {} if labels_ahead is None else _further(batch, tensors | {\"labels\": tokens_ahead("
          "tensors[\"labels\"], range(1, 2), ends, IGNORE)[0]}, labels_ahead, ends)", TESTS_AHEAD),
    Plant("ranks need not look as far ahead", DATA,
          'claim |= {"labels": labels, "labels_ahead": labels_ahead}', 'claim["labels"] = labels',
          TESTS_AHEAD),
    Plant("what belongs to tokens stays with the rows", DATA,
          '{"labels", *shifted}', '{"labels"}', BESIDE),
    Plant("ranks need not shift the same", DATA,
          'claim |= {"sequences": sequences, "shifted": shifted}', "", BESIDE),
    Plant("names in the order of a set", DATA,
          "whole, sequences, shifted = map(sorted, (whole, sequences, shifted))",
          "whole, sequences, shifted = map(list, (whole, sequences, shifted))", BESIDE),
    Plant("a name that the batch lacks is passed over", "seqpar/batches.py",
          "missing = [n for n in named if batch.get(n) is None]", "missing = []", BESIDE),
    Plant("a name may be said twice", "seqpar/batches.py",
          "if counts[n] > 1]", "if counts[n] > 2]", BESIDE),
    Plant("the last document takes in the padding", "seqpar/packing.py",
          "(*mask.bounds, length)", "(*mask.bounds[:-1], length)", "tests/data/test_packing.py"),
    Plant("a loader does not pass on what is shifted", "seqpar/loader.py",
          "shifted=self.shifted,", "", "tests/data/test_loader.py"),
    Plant("transformers: positions of padding start documents", f"{MODELS}/documents.py",
          "for b in row if b < end} - set(packed)", "for b in row} - set(packed)", DOCUMENTS),
    Plant("transformers: a mask may hide what cu_seq_lens pack", f"{MODELS}/documents.py",
          "if mask is not None and not bool(mask[:, :end].all()):",
          "if mask is not None and not bool(mask.any()):", DOCUMENTS),
    Plant("transformers: labels of padding count", f"{MODELS}/documents.py",
          "bool((labels[:, end:] != IGNORE).any())", "bool((labels[:, end:] == 0).any())", DOCUMENTS),
    Plant("transformers: the model gets what is beside", f"{MODELS}/sharding.py",
          "arguments.pop(name) for name in (*sequences, *shifted)",
          "arguments[name] for name in (*sequences, *shifted)", OF_MODELS),
    Plant("transformers: ranks of tp need not shift the same", f"{MODELS}/setup.py",
          'claim |= {"sequences": sequences, "shifted": shifted}', "", OF_MODELS),
]  # fmt: skip
