"""Runs of torchtitan's Trainer on CPUs, by itself or with `parallelize`, and what is compared of them.

Compiled FlexAttention cannot go backward on CPUs: in its place the mask that torchtitan made is written out.
"""

import gc
import logging
import math
import os
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from titan_problem import BATCH, LENGTH, Loader, Tokenizer, small_llama
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention.flex_attention import AuxOutput, create_block_mask
from torchtitan.components import metrics
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.distributed import utils as dist_utils
from torchtitan.models.common import attention
from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts
from torchtitan.models.llama3 import parallelize as of_llama
from torchtitan.trainer import Trainer

import seqpar
from seqpar.integrations.torchtitan import parallelize


def wide_experts(self, rows, counts):
    """Experts of gpt-oss in the type of the rows; its own compute in bfloat16."""
    params = (self.mlp1_weight_EGD, self.mlp1_bias_EG, self.mlp2_weight_EDF, self.mlp2_bias_ED)
    params = (p.to_local() if isinstance(p, DTensor) else p for p in params)
    chosen = zip(rows.split(counts.tolist()), *params, strict=True)
    return torch.cat([F.glu(x @ w.T + b) @ v.T + c for x, w, b, v, c in chosen])


def dense_flex(q, k, v, *, block_mask, scale, enable_gqa, **_):
    """What compiled FlexAttention gives, of a mask that is written out; `[b h s d]`."""
    mask = block_mask.mask_mod
    b, s = q.shape[0], q.shape[2]
    at = torch.arange
    seen = mask(at(b)[:, None, None], at(1)[0], at(s)[:, None], at(s)).expand(b, s, s)[:, None]
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = (scale * q @ k.mT).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v, AuxOutput(lse=scores.logsumexp(-1))


def clip_whole(params, max_norm, **_):
    """Clips gradients of weights that all ranks hold whole."""
    seqpar.sum_gradients(params, seqpar.Group.of())
    return torch.nn.utils.clip_grad_norm_(params, max_norm)


class NoMonitor:
    device_name = "cpu"

    def get_peak_stats(self):
        return metrics.DeviceMemStats(0, 0, 0, 0, 0, 0)

    def reset_peak_stats(self):
        pass


@dataclass(frozen=True)
class Run:
    """One way to train; all ways of one problem must end alike."""

    model: object = small_llama
    strategy: object = None  # of seqpar; None is torchtitan by itself
    steps: int = 20
    micro_batches: int = 2  # of a replica's sequences
    parallelism: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)


def config_of(run, folder):
    spec = run.model()
    if run.strategy is not None:
        spec.parallelize_fn = parallelize(spec.parallelize_fn, run.strategy)
    degrees = ParallelismConfig(**run.parallelism)
    replicas = dist.get_world_size() // (
        degrees.context_parallel_degree
        * degrees.pipeline_parallel_degree
        * degrees.tensor_parallel_degree
    )
    training = TrainingConfig(
        local_batch_size=BATCH // replicas // run.micro_batches,
        global_batch_size=BATCH,
        seq_len=LENGTH,
        steps=run.steps,
        mixed_precision_param="float32",
        disable_cuda_graphs=True,
        max_norm=0.5,
    )
    options = {"activation_checkpoint": None, "loss": CrossEntropyLoss.Config()} | run.options
    return Trainer.Config(
        model_spec=spec,
        dump_folder=folder,
        tokenizer=Tokenizer.Config(),
        dataloader=Loader.Config(),
        optimizer=default_adamw(lr=3e-2, eps=1e-2),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=2),
        training=replace(training, **run.training),
        parallelism=degrees,
        metrics=metrics.MetricsProcessor.Config(log_freq=1),
        **options,
    )


@contextmanager
def on_cpus(run):
    """What torchtitan does otherwise on CPUs, while a run lasts."""
    with ExitStack() as stack:
        patch = lambda *args: stack.enter_context(mock.patch.object(*args))  # noqa: E731
        stack.enter_context(mock.patch.dict(os.environ, LOCAL_RANK="0"))
        patch(attention.FlexAttention, "_compiled_flex_attn", dense_flex)
        patch(attention, "_compiled_create_block_mask", create_block_mask)
        patch(metrics, "build_device_memory_monitor", NoMonitor)
        patch(GptOssGroupedExperts, "forward", wide_experts)
        if dist.get_world_size() > 1 and run.parallelism.get("spmd_backend") == "spmd_types":
            # FSDP of released versions of torch takes no weights of this backend: they stay whole.
            patch(of_llama, "apply_fsdp_to_decoder", lambda *_, **__: None)
            patch(dist_utils, "clip_grad_norm_", clip_whole)
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
            gc.enable()  # which a Trainer turns off


def set_weights(part):
    """Weights that do not depend on the number of ranks."""
    for name, p in named(part):
        draw = torch.Generator().manual_seed(sum(map(ord, name)))
        full = torch.randn(p.shape, generator=draw) / p.shape[-1] ** 0.5
        if "norm" in name:
            full += 1
        with torch.no_grad():
            if isinstance(p, DTensor):
                shard = distribute_tensor(full, p.device_mesh, p.placements)
                p.to_local().copy_(shard.to_local())
            else:
                p.copy_(full)


def named(part):
    """Its parameters, whatever wraps its blocks."""
    wrappers = ("_checkpoint_wrapped_module.", "_orig_mod.")
    for name, p in part.named_parameters():
        for wrapper in wrappers:
            name = name.replace(wrapper, "")
        yield name, p


def trained(_, run, folder):
    """Losses, gradient norms and tokens seen by step, the loss of an evaluation, weights at the end."""
    steps, evaluated = [], []
    with on_cpus(run):
        trainer = Trainer(config_of(run, folder))
        for part in trainer.model_parts:
            set_weights(part)
            for module in part.modules():
                if isinstance(module, FSDPModule):  # gloo has no PREMUL_SUM
                    module.set_force_sum_reduction_for_comms(True)

        def log(_, loss, __, norm, extra_metrics):
            steps.append((loss, norm, extra_metrics["n_tokens_seen"]))

        trainer.metrics_processor.log = log
        trainer.metrics_processor.log_validation = lambda loss, **_: evaluated.append(loss)
        batches = trainer.batch_generator(trainer.dataloader)
        for _ in range(run.steps):
            trainer.step += 1
            trainer.train_step(batches)
        if trainer.config.validator.enable:
            trainer.validator.validate(trainer.model_parts, trainer.step)
        weights = {
            name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
            for part in trainer.model_parts
            for name, p in named(part)
        }
        trainer.close()
    return {"steps": steps, "evaluated": evaluated, "weights": weights}
