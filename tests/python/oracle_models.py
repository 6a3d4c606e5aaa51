"""Random transformers models: the oracle of logits. Needs no engine."""

from __future__ import annotations

import os
import secrets
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from checkpoints import random_tensors

torch.set_num_threads(1)

ROPE_THETA = 10000.0
RMS_NORM_EPS = 1e-6


def fresh_seed() -> int:
    """A new seed per run, printed so that a failure can be repeated (OPTIMUS_TEST_SEED=...)."""
    seed = int(os.environ.get("OPTIMUS_TEST_SEED", secrets.randbits(31)))
    print(f"OPTIMUS_TEST_SEED={seed}")
    return seed


def random_oracle(
    seed: int,
    *,
    vocab_size: int = 64,
    hidden_size: int = 32,
    intermediate_size: int = 48,
    num_hidden_layers: int = 2,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 2,
    head_dim: int = 16,
    tie_word_embeddings: bool = False,
    logit_scale: float = 4.0,
) -> Qwen3ForCausalLM:
    """A random fp32 model in eval mode with sdpa attention (a boolean mask must mask)."""
    shape: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "head_dim": head_dim,
        "tie_word_embeddings": tie_word_embeddings,
    }
    config = Qwen3Config(
        **shape,
        max_position_embeddings=2048,
        rms_norm_eps=RMS_NORM_EPS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        attention_bias=False,
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        attn_implementation="sdpa",
    )
    model = Qwen3ForCausalLM(config).eval()
    tensors = random_tensors(**shape, logit_scale=logit_scale, seed=seed)
    if tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, strict=True)
    return model
