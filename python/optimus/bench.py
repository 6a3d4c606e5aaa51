"""`optimus bench offline`: decode modes side by side over a fixed set of prompts (closed loop)."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from .arms import Arm, parse_arms
from .evaluate import Score, Task, generate_answers, is_correct, summarise
from .llm import LLM
from .sampling_params import SamplingParams
from .summary import paired_difference, percentile, pooled_score

if TYPE_CHECKING:
    from . import _C


@dataclass
class StepTotals:
    """Sums over the steps of a run, taken while it runs.

    full_*: of the steps with every slot taken, where the load is what the row says it is.
    time_errors: |measured / predicted - 1| per step with a prediction.
    chunks: masks that a request evaluated in a step -> how often.
    """

    num_slots: int
    num_steps: int = 0
    num_rows: int = 0
    forward_ms: float = 0.0
    full_ms: float = 0.0
    full_commits: int = 0
    expected_commits: float = 0.0
    realised_commits: int = 0
    time_errors: list[float] = field(default_factory=list)
    chunks: Counter[int] = field(default_factory=Counter)
    records: list[_C.StepRecord] = field(default_factory=list)

    def add(self, record: _C.StepRecord) -> None:
        self.num_steps += 1
        self.num_rows += record.rows
        self.forward_ms += record.forward_ms
        if record.num_seqs == self.num_slots:
            self.full_ms += record.step_ms
            self.full_commits += record.commits
        if record.expected_commits > 0:
            self.expected_commits += record.expected_commits
            self.realised_commits += record.commits
        if record.predicted_ms > 0:
            self.time_errors.append(abs(record.step_ms / record.predicted_ms - 1))
        self.chunks.update(record.chunk_lengths)
        self.records.append(record)


@dataclass(frozen=True)
class BenchRun:
    """One arm at one concurrency in one round. correct: per prompt."""

    arm: Arm
    concurrency: int
    round: int
    seconds: float
    num_tokens: int
    tokens_per_forward: float
    rows_per_token: float
    tpot_ms: list[float]
    correct: list[bool]
    totals: StepTotals

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds


@dataclass(frozen=True)
class BenchRow:
    """One mode at one concurrency: its median round (of an even number, the lower of the middle).

    tokens_per_second: wall time, of the whole run; rounds: of every round, in their order;
    lowest, highest: of the rounds. full_tokens_per_second: over the steps with every slot taken
    (without the drain at the end); None if there were none.
    ms_per_step: seconds of the run by engine steps. forward_ms: mean time in the model;
    host_ms: the rest of a step, Python included. rows_per_step: prompt rows included.
    tpot_p50_ms, tpot_p99_ms: per request, time per output token after the first.
    accuracy: over all rounds; its interval counts each prompt once.
    accuracy_vs_block: paired difference from "block" at the same concurrency: mean, and its 95%
    interval.
    chunk_histogram: masks that a request evaluated in a step -> how often.
    commits_vs_expected: realised by expected commits; time_error: median of |measured / predicted
    - 1| over steps. None where nothing was predicted.
    reliability: of the commit model after the last round, by_probability and by_rank: (how many
    masks, sum of predictions, commits).
    correct: per round, a 0 or 1 for every prompt.
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
    kv_policy: str
    rounds: list[float]
    lowest: float
    highest: float
    full_tokens_per_second: float | None
    tpot_p50_ms: float | None
    tpot_p99_ms: float | None
    accuracy_vs_block: tuple[float, float, float] | None
    chunk_histogram: dict[int, int]
    commits_vs_expected: float | None
    time_error: float | None
    reliability: dict[str, list[tuple[float, float, float]]] | None
    correct: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def bench_offline(
    llm: LLM,
    tasks: Sequence[Task],
    modes: Sequence[str],
    concurrencies: Sequence[int],
    params: SamplingParams,
    *,
    rounds: int = 1,
    schedule: Mapping[str, int] | None = None,
    raw: bool = False,
    on_run: Callable[[BenchRun], None] | None = None,
) -> list[BenchRow]:
    """Runs every mode ("ar", "block", "chunk:4", "chunk:all", "schedule", "elastic",
    "elastic_per_request") at every concurrency.

    Arms are interleaved: each round runs all of them, in an order that rotates from round to round,
    so that a machine that drifts drifts for all. All engines share `llm`'s weights; the prefix
    cache is off, so that no arm profits from the one before. One short request warms every engine
    up. schedule: of mode "schedule". on_run: called after every run.
    Raises ValueError for a bad mode or concurrency before anything runs.
    """
    arms = parse_arms(modes, llm.checkpoint.block_length, schedule)
    if rounds < 1:
        raise ValueError(f"[bench] rounds must be at least 1, got {rounds}")
    for concurrency in concurrencies:
        if concurrency < 1:
            raise ValueError(f"[bench] concurrency must be at least 1, got {concurrency}")
        if concurrency > len(tasks):
            raise ValueError(
                f"[bench] a concurrency of {concurrency} needs as many prompts, got {len(tasks)}"
            )
    rows: list[BenchRow] = []
    for concurrency in concurrencies:
        engines = [_engine(llm, arm, concurrency, schedule) for arm in arms]
        for engine in engines:
            generate_answers(engine, tasks[:1], params, raw=raw)
        runs: list[list[BenchRun]] = [[] for _ in arms]
        for round_idx in range(rounds):
            for i in rotated(len(arms), round_idx):
                run = _run(engines[i], arms[i], concurrency, round_idx, tasks, params, raw)
                if on_run is not None:
                    on_run(run)
                run.totals.records.clear()
                runs[i].append(run)
        block = next((r for r in runs if r[0].arm.name == "block"), None)
        rows += [_row(engines[i], runs[i], block) for i in range(len(arms))]
    return rows


def rotated(count: int, round_idx: int) -> list[int]:
    """0..count-1, begun one further in every round."""
    return [(i + round_idx) % count for i in range(count)]


def _engine(llm: LLM, arm: Arm, concurrency: int, schedule: Mapping[str, int] | None) -> LLM:
    return llm.with_options(
        max_num_seqs=concurrency, enable_prefix_cache=False, **arm.options(schedule)
    )


def _run(
    llm: LLM,
    arm: Arm,
    concurrency: int,
    round_idx: int,
    tasks: Sequence[Task],
    params: SamplingParams,
    raw: bool,
) -> BenchRun:
    totals = StepTotals(concurrency)
    llm.on_step = totals.add
    start = time.perf_counter()
    outputs = generate_answers(llm, tasks, params, raw=raw)
    seconds = time.perf_counter() - start
    llm.on_step = None
    result = summarise(tasks, outputs, seconds)
    per_token = [o.metrics.time_per_output_token for o in outputs]
    return BenchRun(
        arm=arm,
        concurrency=concurrency,
        round=round_idx,
        seconds=seconds,
        num_tokens=result.num_tokens,
        tokens_per_forward=result.tokens_per_forward,
        rows_per_token=result.rows_per_token,
        tpot_ms=[1e3 * t for t in per_token if t is not None],
        correct=[is_correct(output, task) for output, task in zip(outputs, tasks, strict=True)],
        totals=totals,
    )


def _row(llm: LLM, runs: Sequence[BenchRun], block: Sequence[BenchRun] | None) -> BenchRow:
    run = sorted(runs, key=lambda r: r.tokens_per_second)[(len(runs) - 1) // 2]
    totals, rates = run.totals, [r.tokens_per_second for r in runs]
    correct = [r.correct for r in runs]
    return BenchRow(
        mode=run.arm.name,
        concurrency=run.concurrency,
        num_prompts=len(run.correct),
        num_tokens=run.num_tokens,
        seconds=run.seconds,
        tokens_per_second=run.tokens_per_second,
        num_steps=totals.num_steps,
        ms_per_step=run.seconds * 1e3 / totals.num_steps,
        forward_ms=totals.forward_ms / totals.num_steps,
        host_ms=(run.seconds * 1e3 - totals.forward_ms) / totals.num_steps,
        rows_per_step=totals.num_rows / totals.num_steps,
        tokens_per_forward=run.tokens_per_forward,
        rows_per_token=run.rows_per_token,
        accuracy=pooled_score(correct),
        kv_policy=llm.options.kv_policy,
        rounds=rates,
        lowest=min(rates),
        highest=max(rates),
        full_tokens_per_second=(
            totals.full_commits / totals.full_ms * 1e3 if totals.full_ms > 0 else None
        ),
        tpot_p50_ms=percentile(run.tpot_ms, 50),
        tpot_p99_ms=percentile(run.tpot_ms, 99),
        accuracy_vs_block=(
            None if block is None else paired_difference([r.correct for r in block], correct)
        ),
        chunk_histogram=dict(sorted(totals.chunks.items())),
        commits_vs_expected=(
            totals.realised_commits / totals.expected_commits
            if totals.expected_commits > 0
            else None
        ),
        time_error=statistics.median(totals.time_errors) if totals.time_errors else None,
        reliability=llm.engine.reliability() if run.arm.is_elastic else None,
        correct=["".join("01"[c] for c in r.correct) for r in runs],
    )
