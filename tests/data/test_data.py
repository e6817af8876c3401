"""Shard and restore, batches, losses and gradients: P ranks train like one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import seqpar
from seqpar import DesyncError, simulate
from seqpar.layout import LAYOUTS, balanced, zigzag

KINDS = st.sampled_from(list(LAYOUTS))


@given(KINDS, st.integers(0, 40), st.integers(1, 8), st.sampled_from([0, 1, 2, -1]))
def test_unshard_is_the_inverse_of_shard(kind, length, size, dim):
    shape = [3, 2, 4]
    shape[dim] = length
    x = torch.arange(int(torch.tensor(shape).prod())).view(shape)
    layout = LAYOUTS[kind](length, size)

    def fn(group):
        mine = seqpar.shard_sequence(x, layout, group.rank, dim=dim)
        assert mine.is_contiguous()
        assert mine.shape[dim] == layout.rows[group.rank]
        return seqpar.unshard_sequence(mine, layout, group, dim=dim)

    for whole in simulate(size, fn):
        assert torch.equal(whole, x)


def test_gradients_pass_through_shard_and_unshard():
    x = torch.randn(2, 7, dtype=torch.float64)
    w = torch.randn(2, 7, dtype=torch.float64)

    def fn(group):
        layout, leaf = zigzag(7, group.size), x.clone().requires_grad_()
        whole = seqpar.unshard_sequence(
            seqpar.shard_sequence(leaf, layout, group.rank), layout, group
        )
        return torch.autograd.grad((whole * w).sum(), leaf)[0]

    results = simulate(3, fn)
    for rank, dx in enumerate(results):
        mine = zigzag(7, 3).positions(rank)
        expected = torch.zeros_like(w)
        expected[:, mine] = 3 * w[:, mine]  # every rank computed the loss from the whole
        torch.testing.assert_close(dx, expected)


def test_wrong_shapes_are_refused():
    layout = zigzag(8, 2)
    with pytest.raises(ValueError, match="8 long along dim 1"):
        seqpar.shard_sequence(torch.ones(1, 7), layout, 0)
    with pytest.raises(ValueError, match=r"one of 0 \.\.\. 1, got 2"):
        seqpar.shard_sequence(torch.ones(1, 8), layout, 2)

    def fn(group):
        rows = 4 if group.rank == 0 else 3
        seqpar.unshard_sequence(torch.ones(1, rows), layout, group)

    with pytest.raises(ValueError, match=r"must hold 4 of the .* along dim 1"):
        simulate(2, fn)
    with pytest.raises(ValueError, match="for the 3 ranks"):
        simulate(3, lambda g: seqpar.unshard_sequence(torch.ones(1, 4), layout, g))
    with pytest.raises(ValueError, match="no dim 2"):
        simulate(2, lambda g: seqpar.unshard_sequence(torch.ones(1, 4), layout, g, dim=2))


def text_batch(length=10):
    ids = torch.arange(100, 100 + 2 * length).view(2, length)
    return {"input_ids": ids, "labels": ids.clone(), "name": "text"}


@given(KINDS, st.integers(1, 20), st.integers(1, 6))
def test_labels_are_shifted_before_they_are_sharded(kind, length, size):
    def fn(group):
        return seqpar.shard_batch(text_batch(length), group, kind)

    for rank, (batch, layout) in enumerate(simulate(size, fn)):
        positions = layout.positions(rank)
        assert torch.equal(batch["position_ids"], positions.expand(2, -1))
        assert torch.equal(batch["input_ids"], text_batch(length)["input_ids"][:, positions])
        following = torch.where(positions + 1 < length, batch["input_ids"] + 1, -100)
        assert torch.equal(batch["labels"], following)
        assert batch["name"] == "text"


def test_batches_are_cut_at_multiples_and_balanced_under_a_mask():
    mask = seqpar.Mask(causal=True, documents=(0, 40, 44, 64))

    def fn(group, kind):
        return seqpar.shard_batch(text_batch(64), group, kind, multiple_of=4, mask=mask)

    for kind in (*LAYOUTS, "balanced"):
        for rank, (batch, layout) in enumerate(simulate(3, fn, kind)):
            positions = layout.positions(rank)
            assert torch.equal(batch["input_ids"], text_batch(64)["input_ids"][:, positions])
            assert layout.is_cut_at(4)
            expected = balanced(64, 3, mask, multiple_of=4)
            if kind != "balanced":
                expected = LAYOUTS[kind](64, 3, multiple_of=4)
            assert layout == expected


def test_ranks_agree_on_multiples_and_mask():
    def raises(error, match, kind, **options):
        def fn(group):
            mine = {name: values[group.rank] for name, values in options.items()}
            seqpar.shard_batch(text_batch(), group, kind, **mine)

        with pytest.raises(error, match=match):
            simulate(2, fn)

    masks = [seqpar.Mask(documents=(0, n, 10)) for n in (3, 5)]
    short = seqpar.Mask(documents=(0, 8))
    raises(DesyncError, "multiple_of", "zigzag", multiple_of=[2, 4])
    raises(DesyncError, "mask", "balanced", mask=masks)
    raises(ValueError, "pass it as mask=", "balanced", mask=[None, None])
    raises(ValueError, "end where the sequence does, at 10, got 8", "balanced", mask=[short, short])
    raises(ValueError, "got multiple_of=0", "striped", multiple_of=[0, 0])


def test_padding_only_when_asked_and_never_a_label():
    def fn(group):
        return seqpar.shard_batch(
            text_batch(), group, "contiguous", pad_to_multiple_of=8, pad_token_id=7
        )

    (first, layout), (second, _) = simulate(2, fn)
    assert layout.length == 16
    ids = torch.cat([first["input_ids"], second["input_ids"]], 1)
    labels = torch.cat([first["labels"], second["labels"]], 1)
    assert (ids[:, 10:] == 7).all()
    assert (labels[:, 9:] == -100).all()
    assert torch.equal(second["position_ids"][0], torch.arange(8, 16))


def test_given_positions_are_kept_and_whole_tensors_pass():
    def fn(group):
        batch = text_batch(6) | {
            "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]] * 2),
            "style": torch.ones(2),
        }
        return seqpar.shard_batch(batch, group, "striped", whole=["style"])[0]

    results = simulate(2, fn)
    assert results[1]["position_ids"].tolist() == [[1, 0, 2]] * 2
    assert results[1]["style"].shape == (2,)


def test_batches_that_would_train_on_nonsense_are_refused():
    def raises(error, match, change, **options):
        def fn(group):
            batch = {n: x for n, x in (text_batch() | change(group)).items() if x is not None}
            seqpar.shard_batch(batch, group, **options)

        with pytest.raises(error, match=match):
            simulate(3, fn)

    hides = torch.ones(2, 10)
    hides[0, -1] = 0
    raises(NotImplementedError, "attention_mask hides", lambda g: {"attention_mask": hides})
    raises(ValueError, "is \\['style'\\] a sequence", lambda g: {"style": torch.ones(2, 10)})
    raises(ValueError, r"all \[b s \.\.\.\]", lambda g: {"labels": torch.ones(2, 9)})
    raises(ValueError, r"all \[b s \.\.\.\]", lambda g: {"labels": None, "input_ids": None})
    raises(ValueError, "kind must be one of", lambda g: {}, kind="round")
    raises(ValueError, "pad_token_id", lambda g: {}, pad_to_multiple_of=4)
    raises(ValueError, "is \\['loss_mask'\\]", lambda g: {"loss_mask": torch.ones(2, 10)})
    other = torch.full((2, 10), 5)
    raises(
        DesyncError, "batch\\['input_ids'\\]", lambda g: {"input_ids": other} if g.rank == 1 else {}
    )


def one_step(group, weights, ids, kind, valid_from):
    """Loss and summed gradient of a linear model over this rank's tokens."""
    weight = weights.clone().requires_grad_()
    batch, _ = seqpar.shard_batch({"input_ids": ids, "labels": ids}, group, kind)
    logits = weight[batch["input_ids"]]
    labels = batch["labels"]
    valid = (labels != -100) & (batch["position_ids"] >= valid_from)
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100
    ).view_as(labels)
    loss = seqpar.mean_loss(losses, group, valid=valid)
    loss.backward()
    seqpar.sum_gradients([weight], group)
    return loss.detach(), weight.grad


@given(KINDS, st.integers(1, 12), st.integers(1, 6), st.integers(0, 12))
def test_loss_and_gradient_equal_one_rank(kind, length, size, valid_from):
    """Ranks without a valid token, or without a token, included; so is a batch where nobody has one."""
    weights = torch.randn(9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(9, (2, length), generator=torch.Generator().manual_seed(1))
    (loss, grad), *_ = simulate(1, one_step, weights, ids, kind, valid_from)
    for got_loss, got_grad in simulate(size, one_step, weights, ids, kind, valid_from):
        torch.testing.assert_close(got_loss, loss, rtol=1e-13, atol=0)
        torch.testing.assert_close(got_grad, grad, rtol=1e-12, atol=1e-15)
    assert loss.isfinite()


def test_losses_that_do_not_count_may_be_nan():
    def fn(group):
        losses = torch.tensor([1.0, float("nan")]).requires_grad_()
        loss = seqpar.mean_loss(losses, group, valid=torch.tensor([True, False]))
        loss.backward()
        return float(loss.detach()), losses.grad.tolist()

    assert simulate(2, fn) == [(1.0, [0.5, 0.0])] * 2


def test_a_missing_gradient_counts_as_zero():
    def fn(group):
        p = torch.nn.Parameter(torch.ones(2))
        if group.rank == 0:
            (3 * p).sum().backward()
        seqpar.sum_gradients([p], group)
        return p.grad.tolist()

    assert simulate(2, fn) == [[3.0, 3.0]] * 2


def test_gradients_nobody_has_and_parameters_named_twice():
    def fn(group):
        unused, used = (torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)) for _ in range(2))
        used.grad = torch.tensor([256.0, 1.0], dtype=torch.bfloat16) if group.rank == 0 else None
        if group.rank > 0:
            used.grad = torch.tensor([1.0, 1.0], dtype=torch.bfloat16)
        seqpar.sum_gradients([unused, used, used], group)
        return unused.grad, used.grad.tolist()

    assert simulate(3, fn) == [(None, [258.0, 3.0])] * 3


def test_sparse_gradients_and_masks_of_numbers_are_refused_on_all_ranks():
    def sparse(group):
        table = torch.nn.Embedding(3, 2, sparse=group.rank == 1)
        table(torch.tensor([0])).sum().backward()
        seqpar.sum_gradients(table.parameters(), group)

    with pytest.raises(NotImplementedError, match="sparse"):
        simulate(2, sparse)
    with pytest.raises(TypeError, match="valid must be bool"):
        simulate(2, lambda g: seqpar.mean_loss(torch.ones(2), g, valid=torch.ones(2).int()))


def test_disagreeing_losses_and_parameters_are_refused():
    with pytest.raises(ValueError, match="shape of token_losses"):
        simulate(
            2, lambda g: seqpar.mean_loss(torch.ones(2), g, valid=torch.ones(3, dtype=torch.bool))
        )
    with pytest.raises(DesyncError, match="parameters"):
        simulate(2, lambda g: seqpar.sum_gradients([torch.ones(g.rank + 1, requires_grad=True)], g))


def over_processes(group):
    weights, ids = torch.eye(9, dtype=torch.float64), torch.arange(9).repeat(2, 1)
    return one_step(group, weights, ids, "zigzag", 3)


def test_loss_and_gradient_over_processes(worlds):
    (loss, grad), *_ = simulate(1, over_processes)
    for got_loss, got_grad in worlds.run(4, over_processes):
        torch.testing.assert_close(got_loss, loss)
        torch.testing.assert_close(got_grad, grad)


def test_labels_of_masked_models_are_not_shifted():
    ids = torch.arange(10, 17)[None]

    def on_rank(group):
        shard, _ = seqpar.shard_batch({"input_ids": ids, "labels": ids}, group, labels="own")
        assert torch.equal(shard["labels"], shard["input_ids"])
        with pytest.raises(ValueError, match="labels must be one of"):
            seqpar.shard_batch({"input_ids": ids}, group, labels="previous")

    seqpar.simulate(2, on_rank)


@pytest.mark.parametrize("name", ["labels", "position_ids", "attention_mask"])
def test_a_sequence_that_is_no_tensor_is_refused(name):
    """It would be passed on whole, or replaced: position_ids by those of the layout."""
    batch = {"input_ids": torch.ones(1, 4), name: [[0, 1, 0, 1]]}
    with pytest.raises(TypeError, match=f"must be tensors .*'{name}': 'list'"):
        seqpar.shard_batch(batch, seqpar.Group.alone())
    seqpar.shard_batch({"input_ids": torch.ones(1, 4), name: None}, seqpar.Group.alone())
