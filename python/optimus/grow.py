"""Grows a checkpoint into a larger one that computes the same function (how: grow_tensors.py)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .config import Checkpoint, load_checkpoint, read_json
from .grow_tensors import check_fits, grow_tensors, tensor_shapes
from .shards import DEFAULT_SHARD_BYTES, write_shards
from .weights import as_numpy, read_headers

if TYPE_CHECKING:
    from . import _C

# Shapes of published SDAR models; vocabulary and untied head as theirs.
PRESETS: dict[str, dict[str, int]] = {
    "sdar-1.7b": {
        "hidden_size": 2048, "num_layers": 28, "num_q_heads": 16, "intermediate_size": 6144,
    },
    "sdar-4b": {
        "hidden_size": 2560, "num_layers": 36, "num_q_heads": 32, "intermediate_size": 9728,
    },
    "sdar-8b": {
        "hidden_size": 4096, "num_layers": 36, "num_q_heads": 32, "intermediate_size": 12288,
    },
}  # fmt: skip
_PRESET_COMMON = {"num_kv_heads": 8, "head_dim": 128, "vocab_size": 151936}

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_COPIED_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "heldout.jsonl",
)  # fmt: skip


def grown_checkpoint(parent: Checkpoint, target: Checkpoint, path: Path) -> Checkpoint:
    """What the grown model at `path` is: the target's shapes, everything else the parent's.

    Raises ValueError naming every shape the parent does not fit into.
    """
    check_fits(parent, target)
    return dataclasses.replace(
        parent,
        path=path,
        vocab_size=target.vocab_size,
        hidden_size=target.hidden_size,
        intermediate_size=target.intermediate_size,
        num_layers=target.num_layers,
        num_q_heads=target.num_q_heads,
        num_kv_heads=target.num_kv_heads,
        head_dim=target.head_dim,
        max_position_embeddings=target.max_position_embeddings,
        tie_word_embeddings=target.tie_word_embeddings,
        rms_norm_eps=parent.rms_norm_eps * parent.hidden_size / target.hidden_size,
    )


def load_target(to: str | Path, parent: Checkpoint) -> Checkpoint:
    """The target shapes: a name of PRESETS, or the path of a config.json or its directory.

    A preset keeps the parent's max_position_embeddings: it was trained for no more.
    """
    if str(to) in PRESETS:
        shapes: dict[str, Any] = {**PRESETS[str(to)], **_PRESET_COMMON}
        return dataclasses.replace(parent, tie_word_embeddings=False, **shapes)
    path = Path(to)
    if not path.exists():
        raise ValueError(
            f"[grow] unknown target {str(to)!r}: neither a preset ({', '.join(PRESETS)}) nor the "
            "path of a config.json"
        )
    if path.is_file() and path.name != "config.json":
        raise ValueError(f"[grow] a target file must be named config.json, got {path}")
    return load_checkpoint(path.parent if path.is_file() else path)


def grow(
    parent_dir: str | Path,
    to: str | Path,
    out_dir: str | Path,
    *,
    seed: int = 0,
    dtype: str = "bfloat16",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    on_tensor: Callable[[str, int, int], None] | None = None,
) -> Checkpoint:
    """Writes the parent, grown to the shapes of `to`, into the new or empty directory `out_dir`.

    to: see `load_target`. seed: of the random weights. dtype: of the weights written.
    on_tensor: called with name, index and number of tensors, after each.
    One tensor is in memory at a time. Raises ValueError for shapes that do not fit.
    """
    if dtype not in DTYPES:
        raise ValueError(f"[grow] dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    parent, out = load_checkpoint(parent_dir), Path(out_dir)
    target = grown_checkpoint(parent, load_target(to, parent), out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"[grow] {out} exists and is no empty directory")
    out.mkdir(parents=True, exist_ok=True)
    for name in _COPIED_FILES:
        if (parent.path / name).exists():
            shutil.copyfile(parent.path / name, out / name)
    shapes = tensor_shapes(target)

    def counted() -> Any:
        for i, (name, tensor) in enumerate(grow_tensors(parent, target, seed, DTYPES[dtype])):
            yield name, tensor
            if on_tensor is not None:
                on_tensor(name, i + 1, len(shapes))

    write_shards(counted(), shapes, DTYPES[dtype], out, max_shard_bytes)
    # Last: a directory without a config.json is an interrupted one.
    config = _grown_config(parent, target, dtype, str(to), seed)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return load_checkpoint(out)


def weights_sha256(path: Path) -> str:
    """SHA-256 of a checkpoint's safetensors files, in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted({info.file for info in read_headers(path).values()}):
        with file.open("rb") as data:
            while part := data.read(1 << 24):
                digest.update(part)
    return digest.hexdigest()


def grown_in_memory(parent: Checkpoint, to: str | Path) -> Checkpoint:
    """What the parent is once grown to the shapes of `to`, in the parent's directory: tokenizer and
    tasks are read from there, weights come from `load_grown_weights`."""
    target = grown_checkpoint(parent, load_target(to, parent), parent.path)
    return dataclasses.replace(target, grown_from=_origin(parent, to, seed=0))


def load_grown_weights(model: _C.Model, parent: Checkpoint, target: Checkpoint, dtype: str) -> None:
    """Fills `model`, of the shapes of `target`, with the grown parent; a few tensors at a time."""
    for name, tensor in grow_tensors(parent, target, 0, DTYPES[dtype], in_order=False):
        model.load_tensor(name, as_numpy(tensor))
    model.finish_loading()


def _origin(parent: Checkpoint, to: str | Path, seed: int) -> dict[str, Any]:
    return {
        "name": parent.path.resolve().name,
        "weights_sha256": weights_sha256(parent.path),
        "to": str(to) if str(to) in PRESETS else Path(to).resolve().name,
        "seed": seed,
    }


def _grown_config(
    parent: Checkpoint, target: Checkpoint, dtype: str, to: str, seed: int
) -> dict[str, Any]:
    """The parent's config.json with the target's shapes and its origin."""
    config = read_json(parent.path / "config.json") or {}
    for per_layer in ("layer_types", "max_window_layers", "dtype"):
        config.pop(per_layer, None)
    return config | {
        "vocab_size": target.vocab_size,
        "true_vocab_size": target.true_vocab_size,
        "hidden_size": target.hidden_size,
        "intermediate_size": target.intermediate_size,
        "num_hidden_layers": target.num_layers,
        "num_attention_heads": target.num_q_heads,
        "num_key_value_heads": target.num_kv_heads,
        "head_dim": target.head_dim,
        "max_position_embeddings": target.max_position_embeddings,
        "rms_norm_eps": target.rms_norm_eps,
        "tie_word_embeddings": target.tie_word_embeddings,
        "torch_dtype": dtype,
        "grown_from": _origin(parent, to, seed),
    }
