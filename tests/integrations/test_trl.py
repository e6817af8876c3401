"""SFT, DPO and GRPO of TRL on shared sequences take the steps that they take on one device."""

import copy
from dataclasses import dataclass, field

import peft
import pytest
import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from under_torchrun import among_neighbours, as_torchrun_has_it

import seqpar
import seqpar.integrations.trl as ours
from seqpar.testing.models.fused import FUSED

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning"),
]
WORDS = 60
PAD, END, UNKNOWN = WORDS, WORDS + 1, WORDS + 2


def tokenizer():
    """Words are tokens."""
    known = {f"w{n}": n for n in range(WORDS)} | {"<pad>": PAD, "<end>": END, "<unk>": UNKNOWN}
    words = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )


def text(length, seed):
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{n}" for n in torch.randint(WORDS, (length,), generator=generator).tolist())


def examples(kind):
    """Prompts and answers of several lengths."""
    for n in range(8):
        example = {"prompt": text(3 + n % 4, n)}
        if kind == "SFT":
            example["completion"] = " " + text(5 + 3 * n % 5, n + 100)
        if kind == "DPO":
            example |= {
                "chosen": " " + text(5 + n % 5, n + 100),
                "rejected": " " + text(4 + n % 3, n + 200),
            }
        yield example


def reward(completions, **_):
    """A number that depends on every word."""
    return [float(sum(int(w[1:]) % 7 for w in c.split() if w[0] == "w")) for c in completions]


SPECIAL = {
    "SFT": {"max_length": 64, "completion_only_loss": True},
    "DPO": {"beta": 0.5},
    "GRPO": {
        "num_generations": 2, "max_completion_length": 6, "beta": 0.1, "num_iterations": 2,
        "steps_per_generation": 2,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """How to train; `path` has the model that GRPO makes its reference of."""

    kind: str
    folder: str
    path: str
    replicas: int = 1
    batch: int = 4
    accumulate: int = 2
    lora: bool = False
    options: dict = field(default_factory=dict)


def model_of():
    model = FUSED["persimmon"].make()
    model.config.pad_token_id, model.config.eos_token_id = PAD, END
    model.generation_config.pad_token_id = model.config.pad_token_id
    model.generation_config.eos_token_id = END
    return model


def given(group, run, model=None):
    """What a trainer is made of, where torchrun started so many processes."""
    as_torchrun_has_it(group)
    options = SPECIAL[run.kind] | {
        "output_dir": run.folder, "per_device_train_batch_size": run.batch, "logging_steps": 1,
        "gradient_accumulation_steps": run.accumulate, "max_steps": 4, "learning_rate": 1e-2, "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "bf16": False, "seed": 3, "save_strategy": "no",
        "adam_epsilon": 1e-4, "max_grad_norm": 0.5, "gradient_checkpointing": False,
        "dataloader_pin_memory": False, "ddp_find_unused_parameters": False,
    } | run.options  # fmt: skip
    if group.size > 1:
        options["ddp_backend"] = "gloo"
    model = model or model_of()
    keywords = {
        "model": model, "args": getattr(trl, f"{run.kind}Config")(**options),
        "train_dataset": Dataset.from_list(list(examples(run.kind))), "processing_class": tokenizer(),
    }  # fmt: skip
    if run.lora:
        keywords["peft_config"] = peft.LoraConfig(r=2, target_modules=["query_key_value"])
    elif run.kind == "DPO":
        keywords["ref_model"] = copy.deepcopy(model)
    if run.kind == "GRPO":
        model.config._name_or_path = run.path
        keywords["reward_funcs"] = reward
    return keywords


def report(trainer):
    trainer.train()
    logs = [x for x in trainer.state.log_history if "loss" in x]
    names = {name for x in logs for name in x if name in LOGGED}
    logged = {name: [x[name] for x in logs if name in x] for name in names}
    model = trainer.accelerator.unwrap_model(trainer.model)
    return logged, {n: p.detach().clone() for n, p in model.named_parameters()}


# Means over tokens and over sequences, which are the same whoever has them; not all trainers have all.
LOGGED = {
    "loss", "grad_norm", "learning_rate", "entropy", "mean_token_accuracy", "rewards/chosen",
    "rewards/margins", "reward", "kl", "completions/mean_length",
}  # fmt: skip


def by_trl(group, run, model=None):
    return report(getattr(trl, f"{run.kind}Trainer")(**given(group, run, model)))


def by_trl_twice(group, run):
    model = model_of()
    by_trl(group, run, model)
    return by_trl(group, run, model)


def shared_twice(group, run):
    model = model_of()
    shared(group, run, model)
    return shared(group, run, model)


def shared(group, run, model=None):
    keywords = given(group, run, model)
    attend = among_neighbours(seqpar.RingAttention, group, run.replicas)
    return report(getattr(ours, f"{run.kind}Trainer")(attend=attend, **keywords))


@pytest.fixture
def train(unused_processes, tmp_path):
    """Trains in so many processes, and gives what the first reports."""
    path = str(tmp_path / "model")
    model_of().save_pretrained(path)
    tokenizer().save_pretrained(path)

    def run(size, fn, **problem):
        folder = str(tmp_path / f"{fn.__name__}_{size}")
        problem = Run(folder=folder, path=path, **problem)
        return unused_processes(size).run(fn, problem, timeout=240)[0]

    return run


def assert_alike(got, want):
    (logged, weights), (of_one, of_weights) = got, want
    assert logged.keys() == of_one.keys()
    for name, values in of_one.items():
        assert logged[name] == pytest.approx(values, rel=1e-5, abs=1e-6), name
    for name, weight in of_weights.items():
        torch.testing.assert_close(
            weights[name], weight, rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    ("kind", "lora"), [("SFT", False), ("DPO", False), ("DPO", True), ("GRPO", False)]
)
def test_steps_equal_one_device(train, kind, lora):
    """Without its adapter a model is its own reference."""
    want = train(1, by_trl, kind=kind, lora=lora)
    assert_alike(train(2, shared, kind=kind, lora=lora), want)


def test_packed_texts_and_a_second_trainer_of_a_model_equal_those_of_trl(train):
    """The first trainer's hooks are gone, or outputs would be joined twice."""
    options = {"packing": True, "max_length": 24}
    want = train(1, by_trl_twice, kind="SFT", options=options)
    assert_alike(train(2, shared_twice, kind="SFT", options=options), want)


def test_replicas_that_sample_equal_those_of_trl(train):
    """Each of two replicas draws its own completions, as two processes do."""
    want = train(2, by_trl, kind="GRPO")
    assert_alike(train(4, shared, kind="GRPO", replicas=2), want)


def refused(group, run):
    with pytest.raises((NotImplementedError, seqpar.DesyncError)) as caught:
        shared(group, run)
    return str(caught.value)


REFUSED = {
    "scale_rewards='batch'": {"scale_rewards": "batch"},
    "top_entropy_quantile": {"top_entropy_quantile": 0.5},
    "multi_objective_aggregation": {"multi_objective_aggregation": "normalize_then_sum"},
    "8 completions by process, which hold no whole number of the 16": {"num_generations": 16},
}


def refused_all(group, run, problems):
    return [refused(group, Run(run.kind, run.folder, run.path, options=o)) for o in problems]


@pytest.mark.usefixtures("train")
def test_comparisons_over_all_processes_are_refused(unused_processes, tmp_path):
    run = Run("GRPO", str(tmp_path), str(tmp_path / "model"))
    for found in unused_processes(2).run(refused_all, run, list(REFUSED.values()), timeout=240):
        for text, message in zip(found, REFUSED, strict=True):
            assert message in text
