"""Sharded data loaders: ranks that share a sequence get one batch, replicas get others."""

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler

import seqpar
from seqpar import DesyncError, simulate


class Sentences(Dataset):
    """Sentence n is 100 n, 100 n + 1, ..."""

    def __init__(self, count, length=10):
        self.ids = torch.arange(count)[:, None] * 100 + torch.arange(length)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, n):
        return {"input_ids": self.ids[n], "labels": self.ids[n]}


def loaders(group, replicas, count=8, **options):
    """(sharded loader, layout of the ranks) of this rank."""
    grid = group.grid(ring=replicas)
    replica = grid.index_of(group.rank)[0]
    sampler = DistributedSampler(Sentences(count), num_replicas=replicas, rank=replica)
    loader = DataLoader(Sentences(count), batch_size=2, sampler=sampler)
    return seqpar.ShardedLoader(loader, grid.ulysses, everyone=group, **options), grid


def epochs(group, replicas):
    """The sentences of every batch of two epochs, restored, by epoch."""
    loader, grid = loaders(group, replicas)
    seen = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        batches = [
            seqpar.unshard_sequence(batch["input_ids"], layout, grid.ulysses)
            for batch, layout in loader
        ]
        assert len(batches) == len(loader)
        seen.append(torch.cat(batches))
    return seen


def check(results, replicas, whole):
    by_replica = [results[n :: len(results)] for n in range(len(results))]
    for epoch in range(2):
        ranks = [r[0][epoch] for r in by_replica]
        sharers = len(results) // replicas
        for rank, rows in enumerate(ranks):
            assert torch.equal(rows, ranks[rank // sharers * sharers]), "one batch for a replica"
        rows = torch.cat(ranks[::sharers])
        assert torch.equal(rows[rows[:, 0].sort()[1]], whole), "every sentence once in an epoch"
    assert not torch.equal(results[0][0], results[0][1]), "another order in every epoch"


def test_a_replica_shares_its_batches_and_others_have_others():
    check(simulate(6, epochs, 2), 2, Sentences(8).ids)


def test_replicas_load_over_processes(worlds):
    check(worlds.run(4, epochs, 2), 2, Sentences(8).ids)


def test_a_mask_in_the_batch_is_used_and_passed_on():
    mask = seqpar.Mask(causal=True, documents=(0, 4, 10))
    ids = torch.arange(10)[None]
    batches = [{"input_ids": ids, "labels": ids, "mask": mask}, {"input_ids": ids, "labels": ids}]

    def fn(group):
        loader = seqpar.ShardedLoader(
            batches, group, "balanced", mask=seqpar.Mask(causal=True), labels="next"
        )
        (first, one), (second, other) = loader
        assert first["mask"] is mask
        assert "mask" not in second
        assert one == seqpar.balanced(10, group.size, mask)
        assert other == seqpar.balanced(10, group.size, seqpar.Mask(causal=True))

    simulate(2, fn)


def test_options_reach_shard_batch():
    ids = torch.arange(10)[None]
    batch = {"input_ids": ids, "labels": ids, "style": torch.ones(3)}

    def fn(group):
        options = {"multiple_of": 4, "pad_to_multiple_of": 8, "pad_token_id": 0, "labels": "own"}
        options |= {"whole": ["style"]}
        (got, layout), *_ = seqpar.ShardedLoader([batch], group, "striped", **options)
        expected, other = seqpar.shard_batch(batch, group, "striped", **options)
        assert layout == other
        for name, x in expected.items():
            assert torch.equal(got[name], x)

    simulate(2, fn)


def test_what_is_ahead_and_beside_reaches_shard_batch():
    ids = torch.arange(10)[None]
    beside = {"advantages": ids / 8, "logprobs": ids / 4}
    mask = seqpar.Mask(causal=True, documents=(0, 4, 10))
    options = {"mask": mask, "labels": "next_in_document", "labels_ahead": 3}
    options |= {"sequences": ["logprobs"], "shifted": ["advantages"]}

    def fn(group):
        batches = [{"input_ids": ids, "labels": ids} | beside] * 2
        names = {n: iter(x) if n in ("sequences", "shifted") else x for n, x in options.items()}
        got = [batch for batch, _ in seqpar.ShardedLoader(batches, group, "balanced", **names)]
        expected, _ = seqpar.shard_batch(batches[0], group, "balanced", **options)
        assert len(got) == 2
        for batch in got:
            assert batch.keys() == expected.keys()
            assert all(torch.equal(batch[n], x) for n, x in expected.items())

    simulate(2, fn)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("labels_ahead", (2, 3)),
        ("labels_ahead", (None, 2)),
        ("sequences", ((), ("more",))),
        ("shifted", ((), ("more",))),
    ],
)
def test_a_loader_with_other_options_is_told_on_every_rank(name, values):
    ids = torch.arange(10)[None]

    def fn(group):
        batch = {"input_ids": ids, "labels": ids, "more": ids}
        value = values[group.rank == 1]
        whole = () if value == ("more",) else ("more",)
        loader = seqpar.ShardedLoader([batch], group, whole=whole, **{name: value})
        with pytest.raises(DesyncError, match=f"{name} is .* on ranks 0, 2.* on rank 1"):
            list(loader)
        return True

    assert simulate(3, fn) == [True] * 3


def test_processes_that_are_sampled_as_replicas_are_found():
    def fn(group):
        sampler = DistributedSampler(Sentences(8), num_replicas=group.size, rank=group.rank)
        loader = DataLoader(Sentences(8), batch_size=2, sampler=sampler)
        next(iter(seqpar.ShardedLoader(loader, group)))

    with pytest.raises(DesyncError, match=r"batch\['input_ids'\]"):
        simulate(2, fn)


def test_replicas_that_end_at_different_steps_are_found():
    def fn(group):
        replica = group.grid(ring=2)
        count = 2 + replica.index_of(group.rank)[0]
        batches = [{"input_ids": torch.ones(1, 4)}] * count
        for _ in seqpar.ShardedLoader(batches, replica.ulysses, everyone=group):
            pass

    with pytest.raises(DesyncError, match="has a batch is False on ranks 0, 1, True on ranks 2, 3"):
        simulate(4, fn)


def test_a_batch_that_fails_on_one_rank_fails_on_all():
    def fn(group):
        def batches():
            yield {"input_ids": torch.ones(1, 4)}
            if group.rank == 1:
                raise OSError("the disk is gone")
            yield {"input_ids": torch.ones(1, 4)}

        with pytest.raises((OSError, DesyncError), match="the disk is gone"):
            list(seqpar.ShardedLoader(batches(), group))

    simulate(3, fn)


def test_a_batch_that_one_replica_refuses_fails_on_all():
    def fn(group):
        replicas = group.grid(ring=2)
        mine = torch.ones(1, 4)
        batch = {"input_ids": mine, "attention_mask": mine.clone()}
        batch["attention_mask"][0, 0] = replicas.index_of(group.rank)[0]
        loader = seqpar.ShardedLoader([batch], replicas.ulysses, everyone=group)
        with pytest.raises((NotImplementedError, DesyncError), match="attention_mask hides tokens"):
            list(loader)

    simulate(4, fn)


def test_epochs_reach_every_sampler_and_are_not_lost():
    group = seqpar.Group.alone()
    sampler = DistributedSampler(Sentences(8), num_replicas=2, rank=0)
    by_batch = DataLoader(Sentences(8), batch_sampler=BatchSampler(sampler, 2, drop_last=False))
    seqpar.ShardedLoader(by_batch, group).set_epoch(3)
    assert sampler.epoch == 3
    with pytest.raises(TypeError, match="set_epoch"):
        seqpar.ShardedLoader(DataLoader(Sentences(8)), group).set_epoch(1)
    with pytest.raises(TypeError, match="set_epoch"):
        seqpar.ShardedLoader([], group).set_epoch(1)
