"""What torchtitan trains in tests: sequences of documents, a loader of them, and small models.

torchtitan asks which accelerator there is when it is imported, and takes CUDA where there is none. So it is
imported here first, while torch answers "cpu".
"""

from dataclasses import dataclass
from unittest import mock

import torch
import torch._utils

with mock.patch.object(torch._utils, "_get_available_device_type", return_value="cpu"):
    from torchtitan.tools import utils

from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.models import gpt_oss, llama3, qwen3
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.llama3 import Llama3Model

assert utils.device_type == "cpu", "torchtitan was imported before"
LENGTH, VOCABULARY, BATCH = 24, 60, 4


def sequence(number):
    """Tokens, positions and labels of a sequence of one to three documents; a prompt has no labels."""
    draw = torch.Generator().manual_seed(number)
    tokens = torch.randint(1, VOCABULARY, (LENGTH + 1,), generator=draw)
    ends = sorted({LENGTH, *torch.randint(1, LENGTH, (number % 3,), generator=draw).tolist()})
    lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    positions = torch.cat([torch.arange(n) for n in lengths])
    labels = tokens[1:].clone()
    labels[torch.tensor(ends[:-1], dtype=torch.long) - 1] = -100
    labels[: number % 7] = -100
    return tokens[:-1], positions, labels


class Tokenizer(BaseTokenizer):
    """None: the loader has tokens."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config, **_):
        pass

    def encode(self, *_, **__):
        raise NotImplementedError

    decode = get_vocab_size = encode


class Loader(BaseDataLoader):
    """A replica's sequences, such that a step has the same ones for any number of replicas."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        infinite: bool = True

    def __init__(self, *, dp_world_size, dp_rank, local_batch_size, **_):
        self.stride, self.rank, self.size = dp_world_size, dp_rank, local_batch_size

    def __iter__(self):
        place = self.rank * self.size
        while True:
            numbers = range(place, place + self.size)
            tokens, positions, labels = map(torch.stack, zip(*map(sequence, numbers), strict=True))
            yield {"input": tokens, "positions": positions}, labels
            place += self.stride * self.size

    def state_dict(self):
        return {}

    def load_state_dict(self, state_dict):
        pass


def even_llama():
    """With 4 kv heads, which two ranks of tensor parallelism divide."""
    return small_llama(8, 4)


def small_llama(num_heads=6, num_kv_heads=3):
    """Two blocks; 3 kv heads, which two ranks do not divide."""
    e, d = 8 * num_heads, 8
    rope = ComplexRoPE.Config(dim=d, max_seq_len=4 * LENGTH, theta=1e4)
    layers = llama3._build_llama3_layers(
        n_layers=2, dim=e, n_heads=num_heads, n_kv_heads=num_kv_heads, hidden_dim=32, rope=rope,
        attn_backend="flex",
    )  # fmt: skip
    norm = RMSNorm.Config(normalized_shape=e, param_init={"weight": torch.nn.init.ones_})
    spec = llama3.model_registry("debugmodel")
    spec.model = Llama3Model.Config(
        dim=e,
        vocab_size=VOCABULARY,
        tok_embeddings=Embedding.Config(
            num_embeddings=VOCABULARY, embedding_dim=e, param_init=llama3._EMBEDDING_INIT
        ),
        norm=norm,
        lm_head=Linear.Config(
            in_features=e, out_features=VOCABULARY, param_init=llama3._output_linear_init(e)
        ),
        layers=layers,
    )
    return spec


def small_qwen3():
    """Two layers, whose head is the embedding and which normalise queries and keys."""
    spec = qwen3.model_registry("debugmodel", attn_backend="flex")
    spec.model.layers = spec.model.layers[:2]
    return spec


def varlen_gpt_oss():
    """The same model as `small_gpt_oss`, with the attention that torchtitan takes by default."""
    spec = small_gpt_oss("varlen")
    spec.model.layers[0].attention.inner_attention.window_size = (4, 0)
    return spec


def small_gpt_oss(backend="flex"):
    """Two layers with sinks and experts, one of which has a window of 5."""
    spec = gpt_oss.model_registry("debugmodel", attn_backend=backend)
    spec.model.layers = spec.model.layers[:2]
    spec.model.layers[0].attention.sliding_window_size = 5
    for layer in spec.model.layers:
        layer.moe.routed_experts.inner_experts.hidden_dim = 16
    return spec
