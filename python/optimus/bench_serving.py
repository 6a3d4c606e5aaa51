"""`optimus bench serving`: arms side by side under the same arrivals (open loop)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from .bench import rotated
from .evaluate import Score, Task
from .load import Arrival
from .serving import Backend, FinishedRequest
from .slo import Capacity, MissCounter, ServingSummary, Slo, find_capacity, summarise_serving
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from . import _C

ArrivalsAt = Callable[[float], list[Arrival]]  # of a rate in requests per second
NUM_BINS = 100


@dataclass
class _Bin:
    ms: float = 0.0
    decoding_ms: float = 0.0
    waiting_ms: float = 0.0
    rows: int = 0
    steps: int = 0
    commits: int = 0
    chosen: Counter[int] = field(default_factory=Counter)
    chunks: Counter[int] = field(default_factory=Counter)


class Timeline:
    """Load and chunk length over a run, in bins of `bin_s` seconds by the end of a step."""

    def __init__(self, bin_s: float) -> None:
        self.bin_s = bin_s
        self.num_steps = 0
        self._bins: dict[int, _Bin] = {}

    def add(self, end_s: float, record: _C.StepRecord) -> None:
        self.num_steps += 1
        entry = self._bins.setdefault(int(max(0.0, end_s) / self.bin_s), _Bin())
        entry.ms += record.step_ms
        entry.decoding_ms += record.num_decoding * record.step_ms
        entry.waiting_ms += record.num_waiting * record.step_ms
        entry.rows += record.rows
        entry.steps += 1
        entry.commits += record.commits
        entry.chunks.update(record.chunk_lengths)
        if record.num_decoding:
            entry.chosen[record.chunk_length] += 1

    @property
    def chunk_histogram(self) -> dict[int, int]:
        """Masks that a request evaluated in a step -> how often, over the run."""
        total: Counter[int] = Counter()
        for entry in self._bins.values():
            total.update(entry.chunks)
        return dict(sorted(total.items()))

    def to_dict(self, arrivals: Sequence[Arrival]) -> dict[str, Any]:
        """One list per quantity, an entry per bin from the start to the last step or arrival.

        time_s: middle of the bin. arrivals, tokens: per second. decoding, waiting: requests, mean
        over the time in steps. rows: mean per step. chosen: the policy's chunk length, mean over
        steps (per request: the longest). chunk_mean, chunk_p10, chunk_p90: masks that a request
        really evaluated in a step, fewer at the end of its block. None in a bin without decoding.
        """
        arriving = Counter(int(a.arrival_s / self.bin_s) for a in arrivals)
        columns: dict[str, list[float | None]] = {
            name: []
            for name in ("time_s", "arrivals", "tokens", "decoding", "waiting", "rows",
                         "chosen", "chunk_mean", "chunk_p10", "chunk_p90")
        }  # fmt: skip
        for i in range(1 + max([*self._bins, *arriving], default=0)):
            entry = self._bins.get(i, _Bin())
            values = {
                "time_s": (i + 0.5) * self.bin_s,
                "arrivals": arriving[i] / self.bin_s,
                "tokens": entry.commits / self.bin_s,
                "decoding": entry.decoding_ms / entry.ms if entry.ms > 0 else 0.0,
                "waiting": entry.waiting_ms / entry.ms if entry.ms > 0 else 0.0,
                "rows": entry.rows / entry.steps if entry.steps else 0.0,
                "chosen": _counted_mean(entry.chosen),
                "chunk_mean": _counted_mean(entry.chunks),
                "chunk_p10": _counted_percentile(entry.chunks, 10),
                "chunk_p90": _counted_percentile(entry.chunks, 90),
            }
            for name, value in values.items():
                columns[name].append(None if value is None else round(value, 4))
        return {"bin_s": self.bin_s, **columns}


def _counted_mean(counts: Counter[int]) -> float | None:
    total = counts.total()
    return sum(value * count for value, count in counts.items()) / total if total else None


def _counted_percentile(counts: Counter[int], percent: float) -> float | None:
    """`summary.percentile` of values with counts."""
    rank = math.ceil(percent / 100 * counts.total() - 1e-9)
    for value, count in sorted(counts.items()):
        rank -= count
        if rank <= 0:
            return value
    return None


@dataclass(frozen=True)
class ServingRow:
    """One arm at one rate. accuracy: of the finished answers to tasks, where there are any."""

    mode: str
    rate: float
    num_steps: int
    summary: ServingSummary
    accuracy: Score | None
    chunk_histogram: dict[int, int]
    timeline: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Grader:
    """Scores answers to `tasks` by exact match; an arrival's item is its task."""

    tasks: Sequence[Task]
    tokenizer: Tokenizer

    def score(self, requests: Sequence[FinishedRequest]) -> Score:
        return Score.of([self._is_correct(r) for r in requests if r.is_finished])

    def _is_correct(self, request: FinishedRequest) -> bool:
        answer = self.tasks[request.arrival.item].answer
        return self.tokenizer.decode(request.token_ids).strip() == answer.strip()


@dataclass(frozen=True)
class ServingSetup:
    """What all arms of a serving benchmark share.

    arrivals_at: requests at a rate. duration_s: over which they arrive at that rate. drain_s: how
    long a run goes on after the last arrival. on_step: (arm, rate, record), for every step.
    """

    arrivals_at: ArrivalsAt
    duration_at: Callable[[float], float]
    slo: Slo
    drain_s: float = 60.0
    grader: Grader | None = None
    on_step: Callable[[str, float, _C.StepRecord], None] | None = None


def bench_serving(
    setup: ServingSetup,
    backends: Mapping[str, Backend],
    rates: Sequence[float],
    *,
    on_row: Callable[[ServingRow], None] | None = None,
) -> list[ServingRow]:
    """Every arm at every rate, under the same arrivals; the order of arms rotates from rate to
    rate. One request warms every arm up. Raises ValueError before anything runs."""
    loads = [setup.arrivals_at(rate) for rate in rates]
    for rate, arrivals in zip(rates, loads, strict=True):
        if not arrivals:
            raise ValueError(f"[serving] no request arrives at a rate of {rate}: run for longer")
    names = list(backends)
    for name in names:
        warm_up(backends[name], loads[0] if loads else [])
    rows: dict[tuple[int, str], ServingRow] = {}
    for i, (rate, arrivals) in enumerate(zip(rates, loads, strict=True)):
        for k in rotated(len(names), i):
            row = _serve(setup, names[k], backends[names[k]], rate, arrivals)
            rows[i, names[k]] = row
            if on_row is not None:
                on_row(row)
    return [rows[i, name] for i in range(len(rates)) for name in names]


def warm_up(backend: Backend, arrivals: Sequence[Arrival]) -> None:
    """One request by itself."""
    first = arrivals[:1]
    backend.run([Arrival(0.0, a.prompt, a.prompt_len, a.output_len, a.item) for a in first])


def _serve(
    setup: ServingSetup, name: str, backend: Backend, rate: float, arrivals: list[Arrival]
) -> ServingRow:
    duration_s = setup.duration_at(rate)
    timeline = Timeline(duration_s / NUM_BINS)

    def on_step(end_s: float, record: _C.StepRecord) -> None:
        timeline.add(end_s, record)
        if setup.on_step is not None:
            setup.on_step(name, rate, record)

    requests = backend.run(arrivals, on_step=on_step, drain_s=setup.drain_s)
    return ServingRow(
        mode=name,
        rate=rate,
        num_steps=timeline.num_steps,
        summary=summarise_serving(requests, setup.slo, duration_s),
        accuracy=None if setup.grader is None else setup.grader.score(requests),
        chunk_histogram=timeline.chunk_histogram,
        timeline=timeline.to_dict(arrivals),
    )


def serving_capacity(
    setup: ServingSetup,
    backend: Backend,
    start_rate: float,
    *,
    share: float = 0.9,
    tolerance: float = 0.05,
    max_runs: int = 12,
) -> Capacity:
    """The highest rate at which `share` of the requests meet the SLO (see `find_capacity`).

    A run ends as soon as too many requests have missed it.
    """
    if not setup.slo.is_set:
        raise ValueError("[serving] a capacity needs an SLO: set a limit for TTFT or TPOT")

    def attainment(rate: float) -> float:
        arrivals = setup.arrivals_at(rate)
        if not arrivals:
            raise ValueError(f"[serving] no request arrives at a rate of {rate}: run for longer")
        stop = MissCounter(setup.slo, len(arrivals), share)
        requests = backend.run(arrivals, drain_s=setup.drain_s, stop=stop)
        return sum(setup.slo.meets(r) for r in requests) / len(requests)

    return find_capacity(
        attainment, start_rate, share=share, tolerance=tolerance, max_runs=max_runs
    )
