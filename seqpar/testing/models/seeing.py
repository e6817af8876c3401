"""Tiny models that see: a vision tower beside text layers, with batches of images and text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from seqpar.testing.models.tiny import GROUPED, NORMS, WINDOW, Family

TEXT = GROUPED | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = TEXT | {"model_type": "llama"}
MROPE = TEXT | {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
}
TOWER = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip
SIGLIP = TOWER | {"model_type": "siglip_vision_model"}
# Qwen's towers take pixels as rows of patches, and turn q and k in float32.
PATCHES = {
    "depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "in_channels": 3,
}  # fmt: skip
WIDE = PATCHES | {"intermediate_size": 32, "out_hidden_size": 32}
PLACES = {
    "image_token_id": 50, "video_token_id": 51, "vision_start_token_id": 52, "vision_end_token_id": 53,
}  # fmt: skip
IMAGE, START, FEATURES = (
    50,
    5,
    4,
)  # the token of an image, where the first image is, and of how many tokens


def squares(batch: int, images: int) -> dict[str, Tensor]:
    """Pixels `[images 3 8 8]` of all images of a batch."""
    return {"pixel_values": _drawn(batch * images, 3, 8, 8)}


def nested(batch: int, images: int) -> dict[str, Tensor]:
    """Pixels `[b n 3 8 8]`, for models that take images by row."""
    return {"pixel_values": _drawn(batch, images, 3, 8, 8)}


def patches(batch: int, images: int) -> dict[str, Tensor]:
    """Pixels as rows of patches, and how many patches an image is wide and high."""
    count = batch * images
    pixels, grid = _drawn(16 * count, 3 * 2 * 4 * 4), torch.tensor([[1, 4, 4]] * count)
    return {"pixel_values": pixels, "image_grid_thw": grid}


def _drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@dataclass(frozen=True)
class Seeing(Family):
    """A family whose models see images among their tokens.

    Args:
        pixels: makes those of a batch of so many sequences, of so many images each.
        features: how many tokens an image is.
        image: the token that stands for it.
        types: the name under which the model is told which tokens are of images, if any.
        prefix: whether images and what is between them and the text are a prefix that sees itself.
    """

    pixels: Callable[[int, int], dict[str, Tensor]] = squares
    features: int = FEATURES
    image: int = IMAGE
    types: str | None = None
    prefix: bool = False

    def seen(self, batch: dict[str, Tensor], images: int = 2) -> dict[str, Tensor]:
        """A batch of text in which images have taken the place of some tokens, which have no labels."""
        ids, labels = batch["input_ids"].clone(), batch["labels"].clone()
        ids[ids >= IMAGE] = 3  # the tokens around images are among these
        start = 0 if self.prefix else START
        ends = [start + n * (self.features + 3) for n in range(images)]
        for at in ends:
            ids[:, at : at + self.features] = self.image
        is_image = ids == self.image
        labels[is_image] = -100
        marks = is_image.long()
        if self.prefix:  # 0 is the prefix
            marks = (
                (torch.arange(ids.shape[1]) >= ends[-1] + self.features + 2).long().expand_as(ids)
            )
        if self.types == "cross_attention_mask":  # `[b s n 1]`: a token sees the images before it
            marks = (is_image.long().cumsum(1)[..., None] > torch.arange(images)).long()[..., None]
        told = {} if self.types is None else {self.types: marks}
        return batch | {"input_ids": ids, "labels": labels} | told | self.pixels(len(ids), images)


def tiles(batch: int, images: int) -> dict[str, Tensor]:
    """Pixels `[b n 1 3 8 8]` of images of one tile."""
    ones = torch.ones(batch, images, dtype=torch.long)
    pixels = _drawn(batch, images, 1, 3, 8, 8)
    return {"pixel_values": pixels, "aspect_ratio_ids": ones, "aspect_ratio_mask": ones[..., None]}


TOWERS = ("visual.", "vision_tower.", "vision_model.")
SEEING = {
    "llava": Seeing(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": LLAMA, "vision_config": TOWER | {"model_type": "clip_vision_model"},
            "image_token_index": IMAGE, "image_seq_length": FEATURES,
        },
    ),
    "idefics3": Seeing(
        "Idefics3ForConditionalGeneration",
        "Idefics3Config",
        {
            "text_config": LLAMA, "vision_config": TOWER, "image_token_id": IMAGE, "scale_factor": 2,
            "pad_token_id": 0,
        },
        pixels=nested,
        features=1,
    ),
    "qwen2_vl": Seeing(
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        PLACES | {
            "text_config": MROPE, "vision_config": PATCHES | {"embed_dim": 32, "mlp_ratio": 1},
        },
        float32=TOWERS,
        pixels=patches,
        types="mm_token_type_ids",
    ),
    "qwen2_5_vl": Seeing(
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        PLACES | {
            "text_config": MROPE, "vision_config": WIDE | {"fullatt_block_indexes": [0], "window_size": 16},
        },
        float32=TOWERS,
        pixels=patches,
        types="mm_token_type_ids",
    ),
    "qwen3_vl": Seeing(
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        PLACES | {
            "text_config": MROPE,
            "vision_config": WIDE | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        },
        float32=TOWERS,
        pixels=patches,
        types="mm_token_type_ids",
    ),
    "gemma3_vl": Seeing(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": TEXT | {
                "sliding_window": WINDOW - 2, "layer_types": ["sliding_attention", "full_attention"],
            },
            "vision_config": SIGLIP, "mm_tokens_per_image": FEATURES, "image_token_index": IMAGE,
            "boi_token_index": 51, "eoi_token_index": 52,
        },
        float32=(*NORMS, "vision_tower."),
        types="token_type_ids",
    ),
    "paligemma": Seeing(
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        {
            "text_config": TEXT | {"model_type": "gemma"}, "vision_config": SIGLIP | {"projection_dim": 32},
            "image_token_index": 70, "projection_dim": 32, "hidden_size": 32,
        },
        float32=NORMS,
        image=70,
        types="token_type_ids",
        prefix=True,
    ),
    "paligemma2": Seeing(
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        {
            "text_config": TEXT | {
                "model_type": "gemma2", "sliding_window": WINDOW,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "vision_config": SIGLIP | {"projection_dim": 32}, "image_token_index": 70,
            "projection_dim": 32, "hidden_size": 32,
        },
        float32=NORMS,
        image=70,
        types="token_type_ids",
        prefix=True,
    ),
    "mllama": Seeing(
        "MllamaForConditionalGeneration",
        "MllamaConfig",
        {
            "text_config": TEXT | {
                "num_hidden_layers": 3, "cross_attention_layers": [1], "tie_word_embeddings": False,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            },
            "vision_config": {
                "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_global_layers": 1,
                "attention_heads": 2, "image_size": 8, "patch_size": 4, "vision_output_dim": 64,
                "max_num_tiles": 1, "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]],
            },
            "image_token_index": IMAGE,
        },
        float32=("vision_model.", "multi_modal_projector", "cross_attn.k_"),
        pixels=tiles,
        features=1,
        types="cross_attention_mask",
    ),
}  # fmt: skip
