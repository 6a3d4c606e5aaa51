"""Writes safetensors files one tensor at a time, so that no file ever lies in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from .weights import INDEX_FILE, SINGLE_FILE

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
DEFAULT_SHARD_BYTES = 4 << 30

Shapes = Mapping[str, tuple[int, ...]]


def write_shards(
    tensors: Iterable[tuple[str, torch.Tensor]],
    shapes: Shapes,
    dtype: torch.dtype,
    path: Path,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> list[Path]:
    """Writes `tensors` into model.safetensors, or into numbered files and their index.

    shapes: of all tensors, in the order in which `tensors` yields them: a file's header stands
    before its data. Only the tensor being written is in memory.
    Raises ValueError for a tensor that is not the one announced.
    """
    parts = list(_split(shapes, dtype, max_shard_bytes))
    names = [SINGLE_FILE]
    if len(parts) > 1:
        count = len(parts)
        names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    source = iter(tensors)
    for file, part in zip(names, parts, strict=True):
        with (path / file).open("wb") as out:
            header = json.dumps(_header(part, dtype), separators=(",", ":")).encode()
            header += b" " * (-len(header) % 8)  # data begin aligned
            out.write(len(header).to_bytes(8, "little") + header)
            for name, shape in part.items():
                got, tensor = next(source, ("", torch.empty(0)))
                if (got, tuple(tensor.shape), tensor.dtype) != (name, shape, dtype):
                    raise ValueError(
                        f"[shards] {file}: expected {name} {list(shape)} {dtype}, got "
                        f"{got!r} {list(tensor.shape)} {tensor.dtype}"
                    )
                flat = tensor.contiguous().view(-1).view(torch.uint8)
                out.write(flat.numpy().data)
    if (extra := next(source, None)) is not None:
        raise ValueError(f"[shards] a tensor that was not announced: {extra[0]}")
    if len(parts) > 1:
        index = {
            "metadata": {"total_size": _num_bytes(shapes, dtype)},
            "weight_map": {n: file for file, part in zip(names, parts, strict=True) for n in part},
        }
        (path / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return [path / name for name in names]


def _split(shapes: Shapes, dtype: torch.dtype, max_bytes: int) -> Iterator[Shapes]:
    """Runs of tensors of at most `max_bytes`; a larger tensor is a file of its own."""
    part: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if part and _num_bytes(part, dtype) + _num_bytes({name: shape}, dtype) > max_bytes:
            yield part
            part = {}
        part[name] = tuple(shape)
    yield part


def _num_bytes(shapes: Shapes, dtype: torch.dtype) -> int:
    return sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize


def _header(part: Shapes, dtype: torch.dtype) -> dict[str, object]:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in part.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end],
        }  # fmt: skip
        offset = end
    return header
