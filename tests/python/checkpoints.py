"""Small random Hugging Face checkpoints, written without transformers.

`make_checkpoint` writes a directory that both Optimus and transformers can load. Weights are scaled
so that logits are spread and confidences vary from position to position: a model whose
distribution is nearly flat would hide most decoding bugs.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] }}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|MASK|>"]
TOKENIZER_VOCAB_SIZE = 256 + 4 + len(SPECIAL_TOKENS)  # bytes, merges, specials


def random_tensors(
    *,
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    head_dim: int,
    tie_word_embeddings: bool,
    logit_scale: float,
    seed: int,
) -> dict[str, torch.Tensor]:
    """Weights under Qwen3's names, fp32; logits get a standard deviation of about `logit_scale`."""
    rng = torch.Generator().manual_seed(seed)

    def matrix(rows: int, cols: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, cols, generator=rng) * (gain / math.sqrt(cols))

    def gains(size: int, mean: float = 1.0) -> torch.Tensor:
        return mean * (1.0 + 0.2 * torch.randn(size, generator=rng))

    q_size, kv_size = num_attention_heads * head_dim, num_key_value_heads * head_dim
    tensors = {"model.embed_tokens.weight": matrix(vocab_size, hidden_size, logit_scale)}
    for layer in range(num_hidden_layers):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "input_layernorm.weight": gains(hidden_size),
            prefix + "self_attn.q_proj.weight": matrix(q_size, hidden_size),
            prefix + "self_attn.k_proj.weight": matrix(kv_size, hidden_size),
            prefix + "self_attn.v_proj.weight": matrix(kv_size, hidden_size, 2.0),
            prefix + "self_attn.o_proj.weight": matrix(hidden_size, q_size, 2.0),
            prefix + "self_attn.q_norm.weight": gains(head_dim, 1.5),
            prefix + "self_attn.k_norm.weight": gains(head_dim, 1.5),
            prefix + "post_attention_layernorm.weight": gains(hidden_size),
            prefix + "mlp.gate_proj.weight": matrix(intermediate_size, hidden_size),
            prefix + "mlp.up_proj.weight": matrix(intermediate_size, hidden_size),
            prefix + "mlp.down_proj.weight": matrix(hidden_size, intermediate_size, 2.0),
        }
    tensors["model.norm.weight"] = gains(hidden_size)
    if not tie_word_embeddings:
        tensors["lm_head.weight"] = matrix(vocab_size, hidden_size, logit_scale)
    return tensors


def make_tokenizer(path: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """Writes a byte-level BPE tokenizer of TOKENIZER_VOCAB_SIZE entries into `path`.

    Ids 0..255 are bytes, then a few merges, then SPECIAL_TOKENS.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)}
    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("a", "n")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    assert tokenizer.get_vocab_size() == TOKENIZER_VOCAB_SIZE
    tokenizer.save(str(path / "tokenizer.json"))
    config: dict[str, Any] = {"eos_token": "<|im_end|>", "mask_token": "<|MASK|>"}
    if chat_template is not None:
        config["chat_template"] = chat_template
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def save_sharded(tensors: dict[str, torch.Tensor], path: Path, shards: int) -> None:
    """Writes model.safetensors, or `shards` files and their index."""
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        part = names[i::shards]
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({n: tensors[n] for n in part}, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def make_checkpoint(
    path: Path,
    *,
    architecture: str = "SDARForCausalLM",
    vocab_size: int | None = None,
    hidden_size: int = 64,
    intermediate_size: int = 96,
    num_hidden_layers: int = 2,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 2,
    head_dim: int = 16,
    max_position_embeddings: int = 512,
    rms_norm_eps: float = 1e-6,
    rope_theta: float = 10000.0,
    tie_word_embeddings: bool = False,
    dtype: str = "float32",
    seed: int = 0,
    logit_scale: float = 4.0,
    block_size: int | None = 8,
    mask_token_id: int | None = -1,
    eos_token_id: int | list[int] | None = None,
    shards: int = 1,
    tokenizer: bool = False,
    generation_config: dict[str, Any] | None = None,
    config_overrides: dict[str, Any] | None = None,
) -> Path:
    """Writes a random checkpoint into the directory `path` (made if missing) and returns it.

    vocab_size: default 97, or the tokenizer's 264 with `tokenizer`.
    block_size, mask_token_id: None leaves them out of config.json, as published SDAR configs do;
        mask_token_id -1 means the last id of the vocabulary.
    eos_token_id: None means no EOS at all (with `tokenizer`: <|im_end|>), so that random models
        run to max_tokens.
    config_overrides: written over config.json's entries; a value of ... (Ellipsis) removes the key.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    if vocab_size is None:
        vocab_size = TOKENIZER_VOCAB_SIZE if tokenizer else 97
    if tokenizer:
        make_tokenizer(path)
        if eos_token_id is None:
            eos_token_id = 260 + SPECIAL_TOKENS.index("<|im_end|>")
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": {"SDARForCausalLM": "sdar"}.get(architecture, "qwen3"),
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "head_dim": head_dim,
        "max_position_embeddings": max_position_embeddings,
        "rms_norm_eps": rms_norm_eps,
        "rope_theta": rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "tie_word_embeddings": tie_word_embeddings,
        "torch_dtype": dtype,
    }
    if eos_token_id is not None:
        config["eos_token_id"] = eos_token_id
    if architecture == "SDARForCausalLM":
        if block_size is not None:
            config["block_size"] = block_size
        if mask_token_id is not None:
            config["mask_token_id"] = vocab_size - 1 if mask_token_id == -1 else mask_token_id
    config |= config_overrides or {}
    config = {k: v for k, v in config.items() if v is not ...}
    (path / "config.json").write_text(json.dumps(config, indent=2))
    if generation_config is not None:
        (path / "generation_config.json").write_text(json.dumps(generation_config, indent=2))
    tensors = random_tensors(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=head_dim,
        tie_word_embeddings=tie_word_embeddings,
        logit_scale=logit_scale,
        seed=seed,
    )
    tensors = {name: t.to(_DTYPES[dtype]).contiguous() for name, t in tensors.items()}
    save_sharded(tensors, path, shards)
    return path
