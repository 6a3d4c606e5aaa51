"""How one request is decoded."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import _C
    from .config import GenerationDefaults

UNMASKING_STRATEGIES = (
    "low_confidence_dynamic",
    "low_confidence_static",
    "sequential",
    "entropy_bounded",
)
DEFAULT_CONFIDENCE_THRESHOLD = 0.9


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Decoding parameters of a request. None means: the model's recommendation, else the default.

    max_tokens: most output tokens; None = up to the context length.
    temperature: 0 = greedy. None = generation_config.json's, else 0.
    top_k: sample among the k most likely; 0 or -1 = off. None = generation_config.json's, else off.
    top_p: sample within this probability mass, in (0, 1]. None = generation_config.json's, else 1.
    seed: 64-bit; a seeded request draws the same tokens whatever else runs. None = drawn from the
        LLM's seed and the request's number.
    stop: strings that end the output; the string itself is cut off `text`.
    stop_token_ids: ids that end the output beside the model's EOS; kept in `token_ids`.
    ignore_eos: go on after EOS until max_tokens.
    confidence_threshold: `low_confidence_dynamic` commits masks above it, in [0, 1]. None =
        generation_config.json's, else 0.9.
    unmasking_strategy: one of UNMASKING_STRATEGIES.
    entropy_bound: `entropy_bounded` commits by ascending entropy (nats) while the sum is below it.
    denoising_steps: most forwards per block, sets the number committed at least per forward, in
        [1, block length]. None = block length.
    logprobs: True, 0 or 1 returns the log-probability of each committed token; None or False does
        not. (Alternatives are not computed.)

    Raises ValueError, naming field and value, for anything out of range.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    confidence_threshold: float | None = None
    unmasking_strategy: str = "low_confidence_dynamic"
    entropy_bound: float = 0.3
    denoising_steps: int | None = None
    logprobs: bool | int | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else _as_tuple("stop", self.stop)
        object.__setattr__(self, "stop", stop)
        stop_token_ids = _as_tuple("stop_token_ids", self.stop_token_ids)
        object.__setattr__(self, "stop_token_ids", stop_token_ids)
        _check_int("max_tokens", self.max_tokens, 1)
        _check_float(
            "temperature",
            self.temperature,
            "0 (greedy) or in [0.0001, 1000000]",
            lambda t: t == 0 or 1e-4 <= t <= 1e6,
        )
        _check_int("top_k", self.top_k, -1)
        _check_float("top_p", self.top_p, "in (0, 1]", lambda p: 0 < p <= 1)
        _check_int("seed", self.seed, 0, 2**64)
        _check_strings("stop", stop)
        for token_id in self.stop_token_ids:
            _check_int("stop_token_ids", token_id, 0)
        _check_bool("ignore_eos", self.ignore_eos)
        _check_float(
            "confidence_threshold", self.confidence_threshold, "in [0, 1]", lambda c: 0 <= c <= 1
        )
        if self.unmasking_strategy not in UNMASKING_STRATEGIES:
            names = ", ".join(UNMASKING_STRATEGIES)
            _fail("unmasking_strategy", f"be one of {names}", self.unmasking_strategy)
        _check_float("entropy_bound", self.entropy_bound, ">= 0", lambda e: e >= 0, required=True)
        _check_int("denoising_steps", self.denoising_steps, 1)
        if self.logprobs is not None and self.logprobs not in (0, 1):
            _fail("logprobs", "be None, a bool, 0 or 1 (the committed token's)", self.logprobs)

    @property
    def wants_logprobs(self) -> bool:
        """`logprobs=0` asks for the committed token's alone, as elsewhere; False does not."""
        return self.logprobs is not None and self.logprobs is not False

    def to_native(self, defaults: GenerationDefaults, seed: int) -> _C.SamplingParams:
        """The C++ form: None replaced by `defaults`; `seed` is used if this one has none."""
        from .native import _C

        threshold = _first(
            self.confidence_threshold, defaults.confidence_threshold, DEFAULT_CONFIDENCE_THRESHOLD
        )
        native = _C.SamplingParams()
        native.temperature = _first(self.temperature, defaults.temperature)
        native.top_k = max(0, _first(self.top_k, defaults.top_k))
        native.top_p = _first(self.top_p, defaults.top_p)
        native.seed = _first(self.seed, seed)
        native.max_tokens = _first(self.max_tokens, -1)
        native.ignore_eos = self.ignore_eos
        native.stop_token_ids = list(self.stop_token_ids)
        native.unmasking_strategy = self.unmasking_strategy
        native.confidence_threshold = threshold
        native.entropy_bound = self.entropy_bound
        native.denoising_steps = _first(self.denoising_steps, 0)
        return native


def _first(*values: Any) -> Any:
    return next(v for v in values if v is not None)


def _fail(name: str, rule: str, value: Any) -> None:
    raise ValueError(f"[sampling_params] {name} must {rule}, got {value!r}")


def _check_int(name: str, value: Any, low: int, high: int = 2**31) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        _fail(name, "be an int", value)
    if value < low:
        _fail(name, f"be >= {low}", value)
    if value >= high:
        _fail(name, f"be < {high}", value)


def _as_tuple(name: str, values: Any) -> tuple[Any, ...]:
    if values is None:
        return ()
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        _fail(name, "be a list", values)
    return tuple(values)


def _check_strings(name: str, values: Sequence[Any]) -> None:
    for value in values:
        if not isinstance(value, str) or not value:
            _fail(name, "hold non-empty strings", value)


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        _fail(name, "be a bool", value)


def _check_float(
    name: str, value: Any, rule: str, accepts: Callable[[float], bool], required: bool = False
) -> None:
    if value is None and not required:
        return
    if not isinstance(value, int | float) or isinstance(value, bool):
        _fail(name, "be a number", value)
    if abs(value) > sys.float_info.max or not math.isfinite(value) or not accepts(value):
        _fail(name, f"be {rule}", value)


def params_of_each(
    params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> list[SamplingParams]:
    """One for every prompt, whether one was given, one each, or none. Raises ValueError for what is
    neither."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num_prompts
    if not isinstance(params, Iterable):
        raise ValueError(f"[llm] sampling_params must be SamplingParams, got {params!r}")
    found = list(params)
    for p in found:
        if not isinstance(p, SamplingParams):
            raise ValueError(f"[llm] sampling_params must hold SamplingParams, got {p!r}")
    if len(found) != num_prompts:
        raise ValueError(f"[llm] {num_prompts} prompts but {len(found)} sampling_params")
    return found


def check_params(params: SamplingParams, vocab_size: int, block_length: int | None) -> None:
    """Raises ValueError for what a model with these sizes cannot decode with."""
    steps = params.denoising_steps
    if steps is not None and block_length and steps > block_length:
        raise ValueError(
            f"[llm] denoising_steps must be in [1, block_length {block_length}], got {steps}"
        )
    for token_id in params.stop_token_ids:
        if token_id >= vocab_size:
            raise ValueError(f"[llm] stop_token_ids must be in [0, {vocab_size}), got {token_id}")
