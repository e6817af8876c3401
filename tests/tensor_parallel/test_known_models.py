"""Known layouts are those of the models' own code: every model that transformers ships is asked itself."""

import transformers as hf

from seqpar.tensor_parallel import check_layout, known_layout

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 8}
GPT = {"n_embd": 16, "n_layer": 1, "n_head": 4, "vocab_size": 8, "n_positions": 8}
BARK = {
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 4,
    "block_size": 8,
    "input_vocab_size": 8,
    "output_vocab_size": 8,
}


def falcon(**variant):
    config = hf.FalconConfig(**SMALL, **variant)
    return config, "h.0.self_attention.query_key_value", "h.0.self_attention.dense"


def bigcode(**variant):
    return hf.GPTBigCodeConfig(**GPT, **variant), "h.0.attn.c_attn", "h.0.attn.c_proj"


FAMILIES = {
    "Bloom": lambda: (
        hf.BloomConfig(**SMALL),
        "h.0.self_attention.query_key_value",
        "h.0.self_attention.dense",
    ),
    "Falcon, multi_query off": lambda: falcon(multi_query=False, alibi=True),
    "Falcon-7B: multi_query": lambda: falcon(multi_query=True, bias=True),
    "Falcon-40B: new_decoder_architecture": lambda: falcon(
        new_decoder_architecture=True, num_kv_heads=2
    ),
    "GPT-BigCode, multi_query off": lambda: bigcode(multi_query=False),
    "GPT-BigCode (StarCoder): multi_query": lambda: bigcode(multi_query=True),
    "GPT-NeoX": lambda: (
        hf.GPTNeoXConfig(**SMALL, intermediate_size=16),
        "layers.0.attention.query_key_value",
        "layers.0.attention.dense",
    ),
    "GPT-NeoX-Japanese": lambda: (
        hf.GPTNeoXJapaneseConfig(**SMALL, intermediate_multiple_size=1),
        "layers.0.attention.query_key_value",
        "layers.0.attention.dense",
    ),
    "Persimmon": lambda: (
        hf.PersimmonConfig(**SMALL, intermediate_size=16),
        "layers.0.self_attn.query_key_value",
        "layers.0.self_attn.dense",
    ),
    "DeBERTa": lambda: (
        hf.DebertaConfig(
            **SMALL,
            intermediate_size=16,
            relative_attention=True,
            pos_att_type="c2p|p2c",
            max_position_embeddings=8,
        ),
        "encoder.layer.0.attention.self.in_proj",
        "encoder.layer.0.attention.output.dense",
    ),
    "MPT": lambda: (
        hf.MptConfig(
            d_model=16,
            n_heads=4,
            n_layers=1,
            vocab_size=8,
            max_seq_len=8,
            expansion_ratio=1,
            attn_config={"clip_qkv": 1.0},
        ),
        "blocks.0.attn.Wqkv",
        "blocks.0.attn.out_proj",
    ),
    "ModernBERT": lambda: (
        hf.ModernBertConfig(
            **SMALL, intermediate_size=16, pad_token_id=0, global_attn_every_n_layers=1
        ),
        "layers.0.attn.Wqkv",
        "layers.0.attn.Wo",
    ),
    "GPT-2": lambda: (hf.GPT2Config(**GPT), "h.0.attn.c_attn", "h.0.attn.c_proj"),
    "GPT": lambda: (hf.OpenAIGPTConfig(**GPT), "h.0.attn.c_attn", "h.0.attn.c_proj"),
    "ImageGPT": lambda: (hf.ImageGPTConfig(**GPT), "h.0.attn.c_attn", "h.0.attn.c_proj"),
    "Decision Transformer": lambda: (
        hf.DecisionTransformerConfig(hidden_size=16, n_layer=1, n_head=4, n_positions=8),
        "encoder.h.0.attn.c_attn",
        "encoder.h.0.attn.c_proj",
    ),
    "Bark": lambda: (
        hf.BarkSemanticConfig(**BARK),
        "layers.0.attn.att_proj",
        "layers.0.attn.out_proj",
    ),
    "Phi-3, Phi-4": lambda: (
        hf.Phi3Config(**SMALL, num_key_value_heads=2, intermediate_size=16, pad_token_id=0),
        "layers.0.self_attn.qkv_proj",
        "layers.0.self_attn.o_proj",
    ),
    "DBRX": lambda: (
        hf.DbrxConfig(
            d_model=16,
            n_heads=4,
            n_layers=1,
            vocab_size=8,
            max_seq_len=8,
            attn_config={"kv_n_heads": 2, "clip_qkv": 8.0},
            ffn_config={"ffn_hidden_size": 16, "hidden_size": 16},
        ),
        "blocks.0.norm_attn_norm.attn.Wqkv",
        "blocks.0.norm_attn_norm.attn.out_proj",
    ),
    "CodeGen": lambda: (
        hf.CodeGenConfig(**{**GPT, "n_embd": 32, "n_head": 8}, rotary_dim=4),
        "h.0.attn.qkv_proj",
        "h.0.attn.out_proj",
    ),
}
