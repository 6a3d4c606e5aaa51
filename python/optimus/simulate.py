"""Closed loops in the simulator: the engine's scheduler and policies under a virtual clock.

The commit process is that of the demo model (`traces`), the step times are a stated curve
(`curves`), everything else is the engine's own C++ code. Hours of traffic take seconds.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from .arms import Arm

if TYPE_CHECKING:
    from . import _C
    from .traces import Trace

ORACLE = "oracle"
_TRACED_BLOCK = 32


@dataclass(frozen=True)
class Workload:
    """Requests of a closed loop.

    prompt_len, output_len: tokens; None is the recorded answers' own (about 75 and 85).
    thresholds: confidence thresholds, dealt out in turn. families: tasks to draw from; None = all.
    """

    prompt_len: int | None = None
    output_len: int | None = None
    thresholds: Sequence[float] = (0.99,)
    families: Sequence[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompt_len", "output_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"[simulate] {name} must be at least 1, got {value}")
        if not self.thresholds:
            raise ValueError("[simulate] thresholds must not be empty")
        if self.seed < 0:
            raise ValueError(f"[simulate] seed must not be negative, got {self.seed}")


@dataclass(frozen=True)
class SimulatedRow:
    """One arm at one load. Tokens and seconds over the whole run, warm-up and tail included.

    oracle_seconds, oracle_rows_per_step, oracle_rows_per_token: of the same steps with only the
    rows that turned out to be needed.
    wall_s: seconds the simulation itself took. chunk_histogram: masks evaluated by a request in a
    step -> steps.
    """

    mode: str
    concurrency: int
    num_requests: int
    num_tokens: int
    seconds: float
    tokens_per_second: float
    num_steps: int
    ms_per_step: float
    rows_per_step: float
    tokens_per_forward: float
    rows_per_token: float
    oracle_seconds: float
    oracle_rows_per_step: float
    oracle_rows_per_token: float
    wall_s: float
    chunk_histogram: dict[int, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def simulated_engine(
    arm: Arm,
    *,
    max_num_seqs: int,
    max_model_len: int = 2048,
    kv_policy: str = "freeze",
    schedule: Sequence[tuple[int, int]] = (),
    step_log_size: int = 0,
    **options: Any,
) -> _C.EngineConfig:
    """An engine configuration for the simulator: enough rows and pages for every arm, no prefix
    cache. options: further EngineConfig fields. Raises AttributeError for an unknown one.
    """
    from .native import _C

    config = _C.EngineConfig()
    config.decode_mode = arm.decode_mode
    config.kv_policy = arm.kv_policy or kv_policy
    config.block_length = _TRACED_BLOCK
    config.chunk_length = arm.chunk_length or 4
    config.chunk_schedule = list(schedule)
    config.max_num_seqs = max_num_seqs
    config.max_num_batched_rows = max_num_seqs * (2 * _TRACED_BLOCK + 1) + 1024
    config.max_model_len = max_model_len
    config.page_size = _TRACED_BLOCK
    config.num_pages = max_num_seqs * (max_model_len // _TRACED_BLOCK + 1)
    config.enable_prefix_cache = False
    config.step_log_size = step_log_size
    for name, value in options.items():
        getattr(config, name)  # no field is made up
        setattr(config, name, value)
    return config


def simulate_closed_loop(
    arm: Arm,
    curve: _C.LatencyProfile,
    traces: Sequence[Trace],
    concurrency: int,
    num_requests: int,
    workload: Workload | None = None,
    *,
    log: list[_C.StepRecord] | None = None,
    simulator: Mapping[str, Any] | None = None,
    **engine: Any,
) -> SimulatedRow:
    """`num_requests` requests, `concurrency` of them at a time.

    curve: what steps take, and what the engine believes at the start. log: receives the step
    records. simulator, engine: further SimulatorConfig and EngineConfig fields.
    """
    from .native import _C

    workload = workload or Workload()
    pool = [t for t in traces if workload.families is None or t.family in workload.families]
    if not pool:
        raise ValueError(f"[simulate] no trace is of the families {workload.families!r}")
    longest = (
        max(t.prompt_len for t in pool) if workload.prompt_len is None else workload.prompt_len
    )
    output = workload.output_len or max(t.num_tokens for t in pool)
    max_model_len = -(-(longest + output) // _TRACED_BLOCK + -1) * _TRACED_BLOCK
    config = _C.SimulatorConfig()
    config.engine = simulated_engine(
        arm, max_num_seqs=concurrency, max_model_len=max_model_len,
        step_log_size=1 << 22 if log is not None else 0, **engine,
    )  # fmt: skip
    config.latency, config.seed = curve, workload.seed
    for name, value in (simulator or {}).items():
        getattr(config, name)
        setattr(config, name, value)
    loop = _C.Simulator(config, [t.to_native() for t in pool])
    _add_requests(loop, pool, num_requests, workload)
    start = time.perf_counter()
    num_steps = loop.run(float("inf"), 1 << 60)
    wall_s = time.perf_counter() - start
    if log is not None:
        log.extend(loop.step_records())
    return _row(arm.name, concurrency, loop, num_steps, wall_s)


def oracle_row(rows: Sequence[SimulatedRow]) -> SimulatedRow:
    """The best that can be made of the recorded confidences at one load, from what arms made of
    them: every arm charged only for the rows that turned out to be needed; the fastest of them.
    No arm is faster: it would have to do what it did, and more.
    """
    best = max(rows, key=lambda row: row.num_tokens / row.oracle_seconds)
    return replace(
        best,
        mode=ORACLE,
        seconds=best.oracle_seconds,
        tokens_per_second=best.num_tokens / best.oracle_seconds,
        ms_per_step=best.oracle_seconds * 1e3 / max(1, best.num_steps),
        rows_per_step=best.oracle_rows_per_step,
        rows_per_token=best.oracle_rows_per_token,
    )


def _add_requests(
    loop: _C.Simulator, pool: Sequence[Trace], num_requests: int, workload: Workload
) -> None:
    """Answers in random order, each about as often; the same for every arm."""
    from .native import _C

    order = [i % len(pool) for i in range(num_requests)]
    random.Random(workload.seed).shuffle(order)
    params = _C.SamplingParams()
    params.ignore_eos = True
    for i, at in enumerate(order):
        trace = pool[at]
        prompt_len = trace.prompt_len
        if workload.prompt_len is not None:
            # As recorded, the answer meets the block grid.
            prompt_len = workload.prompt_len // _TRACED_BLOCK * _TRACED_BLOCK
            prompt_len += trace.prompt_len % _TRACED_BLOCK - _TRACED_BLOCK
            prompt_len += _TRACED_BLOCK if prompt_len < 1 else 0
        params.max_tokens = workload.output_len or trace.num_tokens
        params.confidence_threshold = workload.thresholds[i % len(workload.thresholds)]
        loop.add_request(0.0, prompt_len, at, params)


def _row(
    mode: str, concurrency: int, loop: _C.Simulator, num_steps: int, wall_s: float
) -> SimulatedRow:
    finished = loop.take_finished()
    histogram: dict[int, int] = {}
    for request in finished:
        for length, steps in request.metrics.chunk_histogram.items():
            histogram[length] = histogram.get(length, 0) + steps
    num_tokens = sum(r.num_tokens for r in finished)
    decode_rows = sum(r.metrics.decode_rows for r in finished)
    prefill_rows = sum(r.metrics.prefill_rows for r in finished)
    return SimulatedRow(
        mode=mode,
        concurrency=concurrency,
        num_requests=len(finished),
        num_tokens=num_tokens,
        seconds=loop.now_s,
        tokens_per_second=num_tokens / loop.now_s,
        num_steps=num_steps,
        ms_per_step=loop.now_s * 1e3 / max(1, num_steps),
        rows_per_step=(decode_rows + prefill_rows) / max(1, num_steps),
        tokens_per_forward=num_tokens / max(1, sum(r.metrics.nfe for r in finished)),
        rows_per_token=decode_rows / max(1, num_tokens),
        oracle_seconds=loop.oracle_s,
        oracle_rows_per_step=loop.needed_rows / max(1, num_steps),
        oracle_rows_per_token=(loop.needed_rows - prefill_rows) / max(1, num_tokens),
        wall_s=wall_s,
        chunk_histogram=dict(sorted(histogram.items())),
    )
