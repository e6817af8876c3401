"""accelerate's own loop on shared sequences: batches, gathered metrics and steps are those of one device."""

from functools import partial

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader, IterableDataset
from under_torchrun import as_torchrun_has_it

import seqpar
from seqpar.integrations.accelerate import Replicas, share_sequences
from seqpar.integrations.transformers import SequenceParallel
from seqpar.testing.models.fused import FUSED
from seqpar.testing.models.tiny import VOCABULARY


def accelerator_of(group, **options):
    """As a script under torchrun gets it."""
    as_torchrun_has_it(group)
    return Accelerator(cpu=True, **options)


def sequences(count=7):
    generator = torch.Generator().manual_seed(2)
    return list(torch.randint(VOCABULARY, (count, 11), generator=generator))


def as_batch(rows):
    ids = torch.stack(list(rows))
    return {"input_ids": ids, "labels": ids}


def trained(model, batches, optimizer, step):
    for batch in batches:
        step(batch)
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def on_shared_sequences(group):
    model = FUSED["persimmon"].make()
    accelerator = accelerator_of(group)
    sp = SequenceParallel.from_accelerator(model, accelerator, seqpar.UlyssesAttention)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(sequences(), batch_size=2, collate_fn=as_batch)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    assert sp.model is prepared, "DDP came later, and is what is called"
    weights = trained(
        model, loader, optimizer, lambda batch: accelerator.backward(sp.loss(batch, gradients="mean"))
    )  # fmt: skip
    gathered = [accelerator.gather_for_metrics(batch["input_ids"]) for batch in loader]
    return weights, torch.cat(gathered)


def test_a_loop_of_accelerate_equals_one_device(unused_processes):
    model = FUSED["persimmon"].make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = DataLoader(sequences(), batch_size=2, collate_fn=as_batch)

    def step(batch):
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten()).backward()

    want = trained(model, batches, optimizer, step)
    for weights, gathered in unused_processes(2).run(on_shared_sequences):
        assert torch.equal(gathered, torch.stack(sequences()))
        for name, weight in want.items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-10, atol=1e-10)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(sequences(8))


def dealt(group, neighbours):
    """What each of four processes is given, where neighbours share sequences, or others do."""
    pairs = [[0, 1], [2, 3]] if neighbours else [[0, 2], [1, 3]]
    mine, _ = torch.distributed.new_subgroups_by_enumeration(pairs)
    accelerator = accelerator_of(group)
    attend = seqpar.RingAttention(seqpar.Group.of(mine))
    _, replicas = share_sequences(accelerator, attend)
    assert share_sequences(accelerator, attend)[1] is replicas  # as for a second model
    with pytest.raises(ValueError, match=r"shares sequences among .* already"):
        share_sequences(accelerator, seqpar.RingAttention(seqpar.Group.of()))
    scheduler = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD([torch.zeros(1)]))
    with pytest.raises(NotImplementedError, match="ConstantLR must not be given"):
        accelerator.prepare(scheduler)
    found = {}
    for kind, data in (("map", sequences(8)), ("stream", Stream())):
        init = partial(print, rank=group.rank)  # as Trainer has workers seeded
        loader = DataLoader(data, batch_size=2, collate_fn=as_batch, worker_init_fn=init)
        loader = accelerator.prepare(loader)
        assert loader.worker_init_fn.keywords == {"rank": replicas.index}
        assert accelerator.prepare(loader) is loader
        batches = [batch["input_ids"] for batch in loader]
        everything = [accelerator.gather_for_metrics(x) for x in batches]
        found[kind] = torch.cat(batches), torch.cat(everything)
    with pytest.raises(NotImplementedError, match="objects are not gathered"):
        accelerator.gather_for_metrics(["a"], use_gather_object=True)
    one = accelerator.gather_for_metrics({"rank": torch.tensor(group.rank)})
    return replicas.index, found, one["rank"].tolist()


@pytest.mark.parametrize("neighbours", [True, False])
def test_processes_that_share_sequences_are_given_the_same_batches(unused_processes, neighbours):
    whole = torch.stack(sequences(8)).unflatten(0, (2, 2, 2))  # turn, replica, row
    results = unused_processes(4).run(dealt, neighbours)
    assert [index for index, _, _ in results] == ([0, 0, 1, 1] if neighbours else [0, 1, 0, 1])
    for index, found, one in results:
        for batches, everything in found.values():
            assert torch.equal(batches, whole[:, index].flatten(0, 1))
            assert torch.equal(everything, whole.flatten(0, 2))
        assert one == ([0, 2] if neighbours else [0, 1])


def refused(group):
    """What is said of groups that do not fit, and of what came too early."""
    found = []
    for named in ([[0, 1], [0, 1], [2]], [[0, 1], [1, 2], [1, 2]]):  # by process
        groups = {str(ranks): torch.distributed.new_group(ranks) for ranks in named}
        mine = seqpar.Group.of(groups[str(named[group.rank])])
        with pytest.raises(ValueError, match="process") as caught:
            Replicas.of(mine, seqpar.Group.of())
        found.append(str(caught.value))
    accelerator = accelerator_of(group)
    accelerator.prepare(DataLoader(sequences(), batch_size=2))
    with pytest.raises((ValueError, seqpar.DesyncError), match="before accelerator"):
        share_sequences(accelerator, seqpar.RingAttention)
    dispatched = accelerator_of(
        group, dataloader_config=DataLoaderConfiguration(dispatch_batches=True)
    )
    with pytest.raises((ValueError, seqpar.DesyncError), match="dispatch_batches=True"):
        share_sequences(dispatched, seqpar.RingAttention)
    return found


def test_groups_that_do_not_fit_are_refused_by_all(unused_processes):
    for sizes, overlap in unused_processes(3).run(refused):
        assert "by as many processes" in sizes
        assert "must all name the same group" in overlap
