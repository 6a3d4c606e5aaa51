"""Safetensors files into a C++ model, one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from .config import read_json

if TYPE_CHECKING:
    from . import _C

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: its file, shape in elements, and safetensors dtype ("BF16")."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def read_headers(path: Path) -> dict[str, TensorInfo]:
    """Names, shapes and dtypes of all tensors of a checkpoint directory; reads no data.

    Raises ValueError for a missing, truncated or unreadable file, or a name in two files.
    """
    headers: dict[str, TensorInfo] = {}
    for file in _weight_files(path):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    if name in headers:
                        raise ValueError(
                            f"[weights] {name} is in {headers[name].file.name} and in {file.name}"
                        )
                    view = tensors.get_slice(name)
                    headers[name] = TensorInfo(file, tuple(view.get_shape()), view.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"[weights] {file} ({file.stat().st_size} bytes) is truncated or no safetensors "
                f"file: {error}"
            ) from None
    return headers


def problems(
    headers: dict[str, TensorInfo], expected: dict[str, tuple[int, ...]], *, tied: bool
) -> list[str]:
    """What keeps `headers` from filling a model that needs `expected`; empty if nothing."""
    found = []
    for name, shape in expected.items():
        info = headers.get(name)
        if info is not None and info.shape != tuple(shape):
            found.append(
                f"{name} has a wrong shape: expected {list(shape)}, got {list(info.shape)} "
                f"in {info.file.name}"
            )
        elif info is not None and info.dtype not in _DTYPES:
            found.append(f"{name} has dtype {info.dtype}, supported: {', '.join(_DTYPES)}")
    missing = [name for name in expected if name not in headers]
    if missing:
        found.append(f"{len(missing)} tensors are missing: {_some(missing)}")
    extra = [n for n in headers if n not in expected and not _harmless(n, tied)]
    if extra:
        found.append(f"{len(extra)} tensors are unexpected: {_some(extra)}")
    return found


def load_weights(model: _C.Model, path: Path) -> None:
    """Copies every tensor the model needs out of the memory-mapped files of `path`.

    Shapes are checked before any data is read. Raises ValueError with names and values for missing
    or damaged files and for missing, misshapen or unexpected tensors.
    """
    headers = read_headers(path)
    expected = model.expected_tensors()
    found = problems(headers, expected, tied=model.config.tie_word_embeddings)
    if found:
        raise ValueError(f"[weights] {path}: " + "; ".join(found))
    for file in sorted({info.file for info in headers.values()}):
        with safe_open(file, framework="pt") as tensors:
            for name in (n for n, info in headers.items() if info.file == file and n in expected):
                model.load_tensor(name, as_numpy(tensors.get_tensor(name)))
    model.finish_loading()


def num_elements(headers: dict[str, TensorInfo]) -> int:
    """Number of stored weights."""
    return sum(math.prod(info.shape) for info in headers.values())


def _weight_files(path: Path) -> list[Path]:
    index = read_json(path / INDEX_FILE)
    if index is None:
        if not (path / SINGLE_FILE).exists():
            raise ValueError(f"[weights] {path} has neither {SINGLE_FILE} nor {INDEX_FILE}")
        return [path / SINGLE_FILE]
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"[weights] {path / INDEX_FILE} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    strangers = [n for n in names if Path(n).name != n]
    if strangers:
        raise ValueError(f"[weights] {path / INDEX_FILE} names files elsewhere: {_some(strangers)}")
    missing = [n for n in names if not (path / n).exists()]
    if missing:
        raise ValueError(
            f"[weights] {path}: {len(missing)} of {len(names)} files of {INDEX_FILE} are missing: "
            f"{_some(missing)}"
        )
    return [path / n for n in names]


def _harmless(name: str, tied: bool) -> bool:
    return name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")


def _some(names: Sequence[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """No copy: bfloat16 goes through as its uint16 bits."""
    tensor = tensor.contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
