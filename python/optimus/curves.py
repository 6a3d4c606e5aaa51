"""Step-time curves of GPUs and models, for the simulator: measured where there was a machine."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import _C

_Points = list[tuple[int, float]]

# GEMMs of a step of SDAR-8B (36 layers, hidden 4096), bf16, distinct weights per layer, one CUDA
# graph, measured on one NVIDIA H200.
_H200_DENSE_8B: _Points = [
    (1, 4.06), (32, 4.24), (64, 4.28), (128, 4.65), (192, 5.57), (256, 6.86), (512, 12.2),
    (1024, 23.3), (4096, 93.6),
]  # fmt: skip
# Expert GEMMs of a step of LLaDA2.0-mini (19 layers, 256 experts, top 8), measured on one H200.
_H200_MOE_MINI: _Points = [
    (1, 0.72), (4, 1.8), (16, 4.8), (32, 7.3), (64, 9.3), (128, 10.1), (2048, 10.1), (4096, 15.3),
]  # fmt: skip
_H200_COPY_BYTES_PER_MS = 4.2e9


def _kv(layers: int, kv_heads: int, head_dim: int, bytes_per_ms: float) -> _Points:
    """Reading K and V in bf16 at copy bandwidth: linear, so one point says it."""
    tokens = 1 << 20
    return [(tokens, tokens * layers * 2 * kv_heads * head_dim * 2 / bytes_per_ms)]


def _h200_dense_8b() -> tuple[_Points, _Points]:
    return _H200_DENSE_8B, _kv(36, 8, 128, _H200_COPY_BYTES_PER_MS)


def _h200_moe_mini() -> tuple[_Points, _Points]:
    return _H200_MOE_MINI, _kv(20, 4, 128, _H200_COPY_BYTES_PER_MS)


def _a100_dense_8b() -> tuple[_Points, _Points]:
    """Not measured: the larger of streaming the weights (the H200's 4.06 ms by the ratio of
    bandwidths, 4.8 to 2.04 TB/s) and arithmetic (the H200's 22.9 us a row by the ratio of dense
    bf16 peaks, 989 to 312 TFLOP/s), with a smooth knee (the fourth-power mean of both)."""
    flat, slope = 4.06 * 4.8 / 2.04, 0.0229 * 989 / 312
    rows = [1, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 1024, 4096, 16384]
    points = [(r, round((flat**4 + (slope * r) ** 4) ** 0.25, 3)) for r in rows]
    return points, _kv(36, 8, 128, _H200_COPY_BYTES_PER_MS * 2.04 / 4.8)


def _as_graphs(curve: tuple[_Points, _Points]) -> tuple[_Points, _Points]:
    """As the CUDA runner executes a curve's steps: rows padded to the sizes of its graphs
    (csrc/engine/runner.cpp), which are a step function to the policies."""
    decode, kv = curve
    rows, sizes = 1, []
    while rows < decode[-1][0]:
        sizes.append(rows)
        steps = ((8, rows), (32, 8), (256, 16), (512, 64), (decode[-1][0], 128))
        rows += next(step for below, step in steps if rows < below)
    return [(r, _between(decode, r)) for r in [*sizes, decode[-1][0]]], kv


def _between(points: _Points, rows: int) -> float:
    for (r0, ms0), (r1, ms1) in itertools.pairwise(points):
        if r0 <= rows <= r1:
            return round(ms0 + (ms1 - ms0) * (rows - r0) / (r1 - r0), 4)
    raise AssertionError("unreachable: rows lie within the points")


CURVES: dict[str, Callable[[], tuple[_Points, _Points]]] = {
    "h200-dense-8b": _h200_dense_8b,
    "h200-moe-mini": _h200_moe_mini,
    "a100-dense-8b": _a100_dense_8b,
    "h200-dense-8b-graphs": lambda: _as_graphs(_h200_dense_8b()),
    "h200-moe-mini-graphs": lambda: _as_graphs(_h200_moe_mini()),
}


def load_curve(name: str | Path) -> _C.LatencyProfile:
    """A named curve, or a JSON file {"decode": [[rows, ms], ...], "prefill": ..., "kv": [[keys,
    extra ms], ...], "is_padded": false}; all but decode may be missing. Raises ValueError.
    """
    from .native import _C

    profile = _C.LatencyProfile()
    if str(name) in CURVES:
        profile.decode, profile.kv = CURVES[str(name)]()
        profile.is_padded = str(name).endswith("-graphs")
        return profile
    if not Path(name).is_file():
        raise ValueError(
            f"[simulate] curve must be one of {', '.join(CURVES)} or a JSON file, got {str(name)!r}"
        )
    try:
        content = json.loads(Path(name).read_text(encoding="utf-8"))
        unknown = set(content) - {"decode", "prefill", "kv", "is_padded"}
        if unknown:
            raise ValueError(f"unknown keys {sorted(unknown)}")
        profile.decode = [(int(rows), float(ms)) for rows, ms in content["decode"]]
        profile.prefill = [(int(rows), float(ms)) for rows, ms in content.get("prefill", [])]
        profile.kv = [(int(keys), float(ms)) for keys, ms in content.get("kv", [])]
        profile.is_padded = bool(content.get("is_padded", False))
        profile.validate()
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"[simulate] {name}: {error}") from None
    return profile
