"""What a finished request looks like."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import _C


@dataclass(frozen=True)
class RequestMetrics:
    """Cost of one request.

    nfe: forward evaluations that held decode rows of it.
    num_output_tokens: tokens in `token_ids`.
    tokens_per_forward: output tokens per forward evaluation.
    rows_per_token: decode rows computed per output token (autoregressive decoding: 1).
    chunk_histogram: mask rows evaluated in a step -> number of steps.
    decode_rows, prefill_rows: rows computed; recomputation after preemption included.
    cached_prompt_tokens: prompt tokens found in the prefix cache.
    time_to_first_token: seconds from arrival to the first committed token; None without one.
    time_per_output_token: seconds per token after the first; None below two tokens.
    latency: seconds from arrival to the end.
    """

    nfe: int
    num_output_tokens: int
    tokens_per_forward: float
    rows_per_token: float
    chunk_histogram: dict[int, int]
    decode_rows: int
    prefill_rows: int
    cached_prompt_tokens: int
    num_preemptions: int
    time_to_first_token: float | None
    time_per_output_token: float | None
    latency: float

    @classmethod
    def from_native(cls, native: _C.RequestMetrics, num_tokens: int) -> RequestMetrics:
        first = native.first_token_s - native.arrival_s if num_tokens else None
        rest = native.finish_s - native.first_token_s
        return cls(
            nfe=native.nfe,
            num_output_tokens=num_tokens,
            tokens_per_forward=num_tokens / max(1, native.nfe),
            rows_per_token=native.decode_rows / max(1, num_tokens),
            chunk_histogram=dict(native.chunk_histogram),
            decode_rows=native.decode_rows,
            prefill_rows=native.prefill_rows,
            cached_prompt_tokens=native.cached_prompt_tokens,
            num_preemptions=native.num_preemptions,
            time_to_first_token=first,
            time_per_output_token=rest / (num_tokens - 1) if num_tokens > 1 else None,
            latency=native.finish_s - native.arrival_s,
        )


@dataclass(frozen=True)
class CompletionOutput:
    """One generated continuation.

    text: decoded output without the final EOS or stop token and cut before a stop string; None
        without a tokenizer.
    token_ids: all output tokens, the final EOS or stop token included.
    logprobs: log-probability of each token under the temperature-scaled distribution, if asked for.
    confidences: probability of each token when it was committed.
    steps: the request's forward evaluation, from 1, that committed each token.
    finish_reason: "stop" (EOS, stop token or stop string), "length" or "abort".
    stop_reason: the stop string or stop token id that ended it; None for EOS and otherwise.
    """

    index: int
    text: str | None
    token_ids: list[int]
    logprobs: list[float] | None
    confidences: list[float]
    steps: list[int]
    finish_reason: str
    stop_reason: str | int | None


@dataclass(frozen=True)
class RequestOutput:
    """A finished request. prompt is None when the prompt came as token ids."""

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts and numbers, for JSON."""
        return asdict(self)
