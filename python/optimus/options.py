"""Engine options: checking them, and the arithmetic of KV memory."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import _C
    from .config import Checkpoint

DECODE_MODES = ("ar", "block", "chunk", "schedule", "elastic", "elastic_per_request")
ELASTIC_MODES = ("elastic", "elastic_per_request")
# Where a step can be planned without the results of the step before.
ASYNC_MODES = ("ar", "block", "chunk", "schedule", "elastic")
KV_POLICIES = ("freeze", "refresh", "auto")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
DEFAULT_KV_POLICY = "auto"
DEFAULT_CHUNK_LENGTH = 4
DEFAULT_KV_CACHE_BYTES = 1 << 30  # most that is taken unless one request needs more

_UNITS = {"": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Options of one engine; `LLM` documents them. Raises ValueError with name and value."""

    decode_mode: str = "elastic"
    chunk_length: int | None = None
    chunk_arms: Sequence[int] = ()
    chunk_schedule: Mapping[str, int] | None = None
    quality_floor: float | str | None = "block"
    target_tpot_ms: float | None = None
    target_ttft_ms: float | None = None
    recompute_block: bool = False
    kv_policy: str = DEFAULT_KV_POLICY
    max_num_seqs: int = 32
    max_num_batched_rows: int = 512
    kv_cache_memory: int | str | None = None
    gpu_memory_utilization: float = 0.9
    cuda_graphs: bool = True
    async_scheduling: bool | None = None
    max_model_len: int | None = None
    page_size: int | None = None
    enable_prefix_cache: bool = True
    num_threads: int | None = None
    step_log_size: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        _check_choice("decode_mode", self.decode_mode, DECODE_MODES)
        _check_choice("kv_policy", self.kv_policy, KV_POLICIES)
        sizes = ("chunk_length", "max_num_seqs", "max_num_batched_rows", "max_model_len",
                 "page_size", "num_threads")  # fmt: skip
        for name in sizes:
            _check_int(name, getattr(self, name), 1)
        _check_int("seed", self.seed, 0, 2**64)
        _check_int("step_log_size", self.step_log_size, 0)
        for name in ("seed", "step_log_size", "max_num_seqs", "max_num_batched_rows"):
            if getattr(self, name) is None:
                raise ValueError(f"[llm] {name} must be an int, got None")
        for name in ("target_tpot_ms", "target_ttft_ms"):
            _check_positive(name, getattr(self, name))
        _check_floor(self.quality_floor)
        _check_positive("gpu_memory_utilization", self.gpu_memory_utilization)
        if self.gpu_memory_utilization > 1:
            raise ValueError(
                "[llm] gpu_memory_utilization must be in (0, 1], got "
                f"{self.gpu_memory_utilization!r}"
            )
        if (self.decode_mode == "schedule") != (self.chunk_schedule is not None):
            raise ValueError(
                "[llm] chunk_schedule and decode_mode 'schedule' go together, got "
                f"chunk_schedule={self.chunk_schedule!r} with decode_mode {self.decode_mode!r}"
            )
        if self.chunk_schedule is not None and not isinstance(self.chunk_schedule, Mapping):
            raise ValueError(
                "[llm] chunk_schedule must be like {'1-16': 16, '17-': 4}, got "
                f"{self.chunk_schedule!r}"
            )
        for arm in self.chunk_arms:
            _check_int("chunk_arms", arm, 1)
        for name in ("recompute_block", "enable_prefix_cache", "cuda_graphs"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"[llm] {name} must be a bool, got {getattr(self, name)!r}")
        if self.async_scheduling not in (None, False, True):
            raise ValueError(
                f"[llm] async_scheduling must be a bool or None, got {self.async_scheduling!r}"
            )
        for name, value, modes in (
            ("chunk_length", self.chunk_length, ("chunk",)),
            ("recompute_block", self.recompute_block or None, ("chunk",)),
            ("chunk_arms", tuple(self.chunk_arms) or None, ELASTIC_MODES),
            ("async_scheduling", self.async_scheduling or None, ASYNC_MODES),
        ):
            if value is not None and self.decode_mode not in modes:
                raise ValueError(
                    f"[llm] {name}={value!r} has a meaning in decode_mode "
                    f"{' or '.join(map(repr, modes))} only, got decode_mode {self.decode_mode!r}"
                )

    def uses_latency_profile(self) -> bool:
        """Whether the engine weighs rows against time, and so needs a profile."""
        chunked = self.decode_mode == "chunk" and not self.recompute_block
        chunked = chunked or self.decode_mode == "schedule"
        return self.decode_mode in ELASTIC_MODES or (chunked and self.kv_policy == "auto")

    def to_native(self, checkpoint: Checkpoint, dtype: str, device: str = "cpu") -> _C.EngineConfig:
        """The C++ form for one checkpoint; raises ValueError where the two do not fit."""
        from .native import _C

        if self.decode_mode != "ar":
            checkpoint.check_diffusion(self.decode_mode)
        plan = plan_kv_cache(checkpoint, self, dtype)
        native = _C.EngineConfig()
        native.decode_mode = self.decode_mode
        native.kv_policy = self.kv_policy
        native.block_length = block = checkpoint.block_length or 1
        _check_chunk("chunk_length", self.chunk_length, block)
        for arm in self.chunk_arms:
            _check_chunk("chunk_arms", arm, block)
        native.chunk_length = self.chunk_length or min(DEFAULT_CHUNK_LENGTH, block)
        native.recompute_block = self.recompute_block
        native.chunk_arms = list(self.chunk_arms)
        native.chunk_schedule = parse_schedule(self.chunk_schedule, block)
        if isinstance(self.quality_floor, float | int):
            native.quality_floor = float(self.quality_floor)
        native.target_tpot_ms = self.target_tpot_ms or 0.0
        native.target_ttft_ms = self.target_ttft_ms or 0.0
        native.step_log_size = self.step_log_size
        native.max_num_seqs = self.max_num_seqs
        native.max_num_batched_rows = self.max_num_batched_rows
        native.max_model_len = plan.max_model_len
        native.page_size = plan.page_size
        # On CUDA the engine takes what is free, unless it was told how much.
        measures_room = device == "cuda" and self.kv_cache_memory is None
        native.num_pages = 0 if measures_room else plan.num_pages
        native.gpu_memory_utilization = float(self.gpu_memory_utilization)
        native.cuda_graphs = self.cuda_graphs
        # On the CPU there is nothing to keep busy.
        goes_ahead = device == "cuda" and self.decode_mode in ASYNC_MODES
        native.async_scheduling = (
            goes_ahead if self.async_scheduling is None else self.async_scheduling
        )
        native.enable_prefix_cache = self.enable_prefix_cache
        native.num_threads = self.num_threads or 0
        native.eos_token_ids = list(checkpoint.eos_token_ids)
        return native


@dataclass(frozen=True)
class KvPlan:
    """page_size in tokens, max_model_len in tokens (prompt and output), page_bytes over all
    layers, pages_per_request for a request of max_model_len."""

    page_size: int
    num_pages: int
    max_model_len: int
    page_bytes: int
    pages_per_request: int


def plan_kv_cache(checkpoint: Checkpoint, options: EngineOptions, dtype: str) -> KvPlan:
    """How many pages of which size. Raises ValueError if one request of max_model_len cannot fit.

    Without kv_cache_memory: room for max_num_seqs requests of max_model_len, at most 1 GiB, at
    least one request.
    """
    block = 1 if options.decode_mode == "ar" else checkpoint.block_length or 1
    max_len = options.max_model_len or checkpoint.max_position_embeddings
    if max_len > checkpoint.max_position_embeddings:
        raise ValueError(
            f"[llm] max_model_len {max_len} is above the model's max_position_embeddings "
            f"{checkpoint.max_position_embeddings}"
        )
    page_size = options.page_size or block * -(-16 // block)
    if page_size % block and block % page_size:
        raise ValueError(
            f"[llm] page_size must be a multiple of block_length {block} or divide it, got "
            f"{page_size}"
        )
    page_bytes = page_size * kv_bytes_per_token(checkpoint, dtype)
    needed = -(-(-(-max_len // block) * block) // page_size)
    if options.kv_cache_memory is None:
        wanted = min(options.max_num_seqs * needed, DEFAULT_KV_CACHE_BYTES // page_bytes)
        return KvPlan(page_size, max(needed, wanted), max_len, page_bytes, needed)
    memory = parse_bytes(options.kv_cache_memory)
    num_pages = memory // page_bytes
    if num_pages >= 2**31:
        raise ValueError(f"[llm] kv_cache_memory {memory} bytes is {num_pages} pages, too many")
    if num_pages < needed:
        raise ValueError(
            f"[llm] kv_cache_memory {memory} bytes holds {num_pages} pages of {page_size} tokens "
            f"({page_bytes} bytes each); one request of max_model_len {max_len} needs {needed} "
            f"pages, {needed * page_bytes} bytes"
        )
    return KvPlan(page_size, num_pages, max_len, page_bytes, needed)


def kv_bytes_per_token(checkpoint: Checkpoint, dtype: str) -> int:
    """K and V of one token over all layers."""
    elements = 2 * checkpoint.num_layers * checkpoint.num_kv_heads * checkpoint.head_dim
    return elements * DTYPE_BYTES[dtype]


def parse_bytes(value: int | str) -> int:
    """Bytes of 4096 or "512MiB" (units KiB, MiB, GiB, KB, MB, GB). Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
    if isinstance(value, str) and match and match[2].lower() in _UNITS:
        return int(float(match[1]) * _UNITS[match[2].lower()])
    raise ValueError(
        f"[llm] kv_cache_memory must be bytes or a string like '512MiB', got {value!r}"
    )


def resolve_device(device: str) -> str:
    """ "auto" is "cuda" where the build has it and a GPU answers, else "cpu".

    Raises ValueError for an unknown device, or one that cannot be used here, saying why.
    """
    from .native import _C

    _check_choice("device", device, ("auto", "cpu", "cuda"))
    problem = _C.cuda_problem()
    if device == "cuda" and problem:
        raise ValueError(f"[llm] device 'cuda' cannot be used: {problem}; use 'auto' or 'cpu'")
    return device if device != "auto" else "cpu" if problem else "cuda"


def resolve_dtype(dtype: str, device: str = "cpu") -> str:
    """ "auto" is float32 on the CPU, where results then do not depend on what else is in the batch,
    and bfloat16 on CUDA, which computes in nothing else."""
    _check_choice("dtype", dtype, ("auto", *DTYPE_BYTES))
    if device == "cuda" and dtype == "float32":
        raise ValueError("[llm] on device 'cuda' dtype must be auto or bfloat16, got 'float32'")
    return dtype if dtype != "auto" else "bfloat16" if device == "cuda" else "float32"


def parse_mode(text: str) -> tuple[str, int | None]:
    """ "elastic" -> ("elastic", None); "chunk:4" -> ("chunk", 4). Raises ValueError."""
    mode, colon, length = text.strip().partition(":")
    _check_choice("mode", mode, DECODE_MODES)
    if not colon:
        return mode, None
    if mode != "chunk" or not length.isdecimal() or int(length) < 1:
        raise ValueError(f"[llm] mode must look like 'chunk:4' to carry a length, got {text!r}")
    return mode, int(length)


def parse_schedule(schedule: Mapping[str, int] | None, block: int) -> list[tuple[int, int]]:
    """{"1-16": 16, "17-64": 8, "65-": 4} -> [(16, 16), (64, 8), (2**31 - 1, 4)].

    Keys are ranges of the number of decoding requests, ascending without gaps from 1; values are
    chunk lengths. The last range may be open. Raises ValueError.
    """
    entries: list[tuple[int, int]] = []
    if schedule is not None and not schedule:
        raise ValueError(f"[llm] chunk_schedule must hold at least one range, got {schedule!r}")
    for key, length in (schedule or {}).items():
        expected = entries[-1][0] + 1 if entries else 1
        match = re.fullmatch(r"([0-9]{1,9})(-([0-9]{1,9})?)?", str(key))
        first = int(match[1]) if match else 0
        most = int(match[3]) if match and match[3] else 2**31 - 1 if match and match[2] else first
        if first != expected or most < first:
            raise ValueError(
                f"[llm] chunk_schedule ranges must ascend without gaps like '1-16', got {key!r} "
                f"where a range from {expected} should be"
            )
        _check_int("chunk_schedule", length, 1)
        _check_chunk("chunk_schedule", length, block)
        entries.append((most, length))
    return entries


def _check_positive(name: str, value: float | None) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (number and 0 < value < math.inf):
        raise ValueError(f"[llm] {name} must be a number > 0, got {value!r}")


def _check_floor(floor: float | str | None) -> None:
    if floor is None or floor == "block":
        return
    if isinstance(floor, bool) or not isinstance(floor, int | float) or not 0 <= floor <= 1:
        raise ValueError(
            f"[llm] quality_floor must be 'block', an accuracy in [0, 1] or None, got {floor!r}"
        )


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"[llm] {name} must be one of {', '.join(choices)}, got {value!r}")


def _check_int(name: str, value: int | None, low: int, high: int = 2**31) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"[llm] {name} must be an int >= {low}, got {value!r}")
    if value >= high:
        raise ValueError(f"[llm] {name} must be an int < {high}, got {value!r}")


def _check_chunk(name: str, value: int | None, block: int) -> None:
    if value is not None and value > block:
        raise ValueError(f"[llm] {name} must be in [1, block_length {block}], got {value}")
