"""`optimus bench offline`: the decode modes side by side over a fixed set of prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .evaluate import Score, Task, generate_answers, summarise
from .llm import LLM
from .options import parse_mode
from .sampling_params import SamplingParams

if TYPE_CHECKING:
    from . import _C


@dataclass(frozen=True)
class BenchRow:
    """One mode at one concurrency. Times are wall time of the whole run.

    ms_per_step: seconds of the run by engine steps. forward_ms: mean time in the model;
    host_ms: the rest of a step, Python included. rows_per_step: prompt rows included.
    """

    mode: str
    concurrency: int
    num_prompts: int
    num_tokens: int
    seconds: float
    tokens_per_second: float
    num_steps: int
    ms_per_step: float
    forward_ms: float
    host_ms: float
    rows_per_step: float
    tokens_per_forward: float
    rows_per_token: float
    accuracy: Score

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def bench_offline(
    llm: LLM,
    tasks: Sequence[Task],
    modes: Sequence[str],
    concurrencies: Sequence[int],
    params: SamplingParams,
    *,
    raw: bool = False,
    on_row: Callable[[BenchRow], None] | None = None,
) -> list[BenchRow]:
    """Runs every mode ("ar", "block", "chunk:4", "elastic") at every concurrency.

    All engines share `llm`'s weights; the prefix cache is off, so that no arm profits from the one
    before. One short request warms every engine up. on_row: called as rows get ready.
    Raises ValueError for a bad mode or concurrency before anything runs.
    """
    arms = [(mode, *parse_mode(mode)) for mode in modes]
    for concurrency in concurrencies:
        if concurrency < 1:
            raise ValueError(f"[bench] concurrency must be at least 1, got {concurrency}")
    rows = []
    for concurrency in concurrencies:
        for name, decode_mode, chunk_length in arms:
            engine = llm.with_options(
                decode_mode=decode_mode,
                chunk_length=chunk_length,
                max_num_seqs=concurrency,
                enable_prefix_cache=False,
            )
            rows.append(_run(engine, name, concurrency, tasks, params, raw))
            if on_row is not None:
                on_row(rows[-1])
    return rows


def _run(
    llm: LLM, name: str, concurrency: int, tasks: Sequence[Task], params: SamplingParams, raw: bool
) -> BenchRow:
    generate_answers(llm, tasks[:1], params, raw=raw)
    num_steps = num_rows = 0
    forward_ms = 0.0

    def on_step(record: _C.StepRecord) -> None:
        nonlocal num_steps, num_rows, forward_ms
        num_steps += 1
        num_rows += record.rows
        forward_ms += record.forward_ms

    llm.on_step = on_step
    start = time.perf_counter()
    outputs = generate_answers(llm, tasks, params, raw=raw)
    seconds = time.perf_counter() - start
    result = summarise(tasks, outputs, seconds)
    return BenchRow(
        mode=name,
        concurrency=concurrency,
        num_prompts=len(tasks),
        num_tokens=result.num_tokens,
        seconds=seconds,
        tokens_per_second=result.tokens_per_second,
        num_steps=num_steps,
        ms_per_step=seconds * 1e3 / num_steps,
        forward_ms=forward_ms / num_steps,
        host_ms=(seconds * 1e3 - forward_ms) / num_steps,
        rows_per_step=num_rows / num_steps,
        tokens_per_forward=result.tokens_per_forward,
        rows_per_token=result.rows_per_token,
        accuracy=result.overall,
    )


def profile_to_dict(profile: _C.LatencyProfile | None) -> dict[str, Any] | None:
    """[(rows, ms)] of decode and prefill steps, [(KV tokens, further ms)]."""
    if profile is None:
        return None
    return {name: getattr(profile, name) for name in ("decode", "prefill", "kv", "is_padded")}
