"""From options to what a serving benchmark runs: arrivals at a rate, and a backend per arm."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arms import Arm
from .config import Checkpoint
from .evaluate import Task
from .llm import LLM
from .load import (
    Arrival,
    Lengths,
    Pattern,
    arrival_times,
    at_rate,
    mean_rate,
    random_arrivals,
    task_arrivals,
)
from .options import ELASTIC_MODES, EngineOptions
from .sampling_params import SamplingParams
from .serving import EngineBackend, SimulatorBackend

if TYPE_CHECKING:
    from . import _C


@dataclass(frozen=True)
class Workload:
    """Requests at any rate. What they are, the first that is there: a recorded trace; random ids of
    given lengths; tasks; the simulator's traces as they were recorded.

    duration_s: over which requests arrive; of a recorded trace its own, stretched to the rate.
    vocab_size: of random ids; None = lengths only, for the simulator.
    """

    pattern: Pattern
    duration_s: float
    seed: int
    recorded: Sequence[Arrival] | None = None
    prompt_len: Lengths | None = None
    output_len: Lengths | None = None
    tasks: Sequence[Task] | None = None
    num_traces: int = 0
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if (self.prompt_len is None) != (self.output_len is None):
            raise ValueError("[serving] prompt_len and output_len go together")

    def arrivals_at(self, rate: float) -> list[Arrival]:
        if self.recorded is not None:
            return self._with_prompts(at_rate(self.recorded, rate))
        times = arrival_times(self.pattern, rate, self.duration_s, self.seed)
        if self.prompt_len is not None and self.output_len is not None:
            return random_arrivals(
                times, self.prompt_len, self.output_len, self.vocab_size, self.seed
            )
        if self.tasks is not None:
            items = task_arrivals(times, len(self.tasks), self.seed)
            return [Arrival(t, self.tasks[i].prompt, None, None, i) for t, i in items]
        items = task_arrivals(times, self.num_traces, self.seed)
        return [Arrival(t, None, None, None, i) for t, i in items]

    def duration_at(self, rate: float) -> float:
        """Seconds over which the requests of `rate` arrive."""
        return self.duration_s if self.recorded is None else len(self.recorded) / rate

    def own_rate(self) -> float | None:
        """A recorded trace's, in requests per second."""
        return None if self.recorded is None else mean_rate(self.recorded)

    def _with_prompts(self, arrivals: Sequence[Arrival]) -> list[Arrival]:
        """Random ids where a recorded trace has only a length, the same at every rate."""
        if self.vocab_size is None:
            return list(arrivals)
        source = random.Random(self.seed)
        filled = []
        for arrival in arrivals:
            if arrival.prompt is None:
                ids = [source.randrange(self.vocab_size) for _ in range(arrival.prompt_len or 1)]
                arrival = replace(arrival, prompt=ids)
            filled.append(arrival)
        return filled


def engine_backends(
    llm: LLM,
    arms: Sequence[Arm],
    params: SamplingParams,
    *,
    schedule: Mapping[str, int] | None = None,
    raw: bool = False,
) -> dict[str, EngineBackend]:
    """An engine per arm over `llm`'s weights, without a prefix cache (arms see the same prompts
    one after the other)."""
    return {
        arm.name: EngineBackend(
            llm.with_options(enable_prefix_cache=False, **arm.options(schedule)), params, raw=raw
        )
        for arm in arms
    }


def simulator_backends(
    checkpoint: Checkpoint,
    arms: Sequence[Arm],
    params: SamplingParams,
    latency: _C.LatencyProfile,
    traces: Sequence[_C.CommitTrace],
    options: EngineOptions,
    *,
    schedule: Mapping[str, int] | None = None,
    host_ms: float = 0.0,
    measured_arms: Sequence[_C.MeasuredArm] = (),
    seed: int = 0,
) -> dict[str, SimulatorBackend]:
    """A simulator per arm: the engine of `checkpoint` with these options, at another speed.

    latency: what steps take, and what the engine believes. measured_arms: for elastic arms. Without
    kv_cache_memory there is room for every request that runs.
    """
    from .native import _C

    backends = {}
    for arm in arms:
        arm_options = replace(options, **arm.options(schedule), enable_prefix_cache=False)
        config = _C.SimulatorConfig()
        engine = arm_options.to_native(checkpoint, "float32")
        if options.kv_cache_memory is None:
            engine.num_pages = engine.max_num_seqs * -(-engine.max_model_len // engine.page_size)
            engine.num_pages += engine.max_num_seqs
        if arm.decode_mode in ELASTIC_MODES:
            engine.measured_arms = list(measured_arms)
        config.engine = engine
        config.latency = latency
        config.host_ms = host_ms
        config.seed = seed
        backends[arm.name] = SimulatorBackend(
            config, traces, params.to_native(checkpoint.generation, seed)
        )
    return backends


def load_latency(name: str) -> _C.LatencyProfile:
    """A curve of `curves` by name, its JSON file, or a report with a "latency_profile" in it.

    Raises ValueError.
    """
    from .curves import load_curve
    from .profiles import profile_from_dict

    path = Path(name)
    if path.is_file():
        try:
            found: Any = json.loads(path.read_text(encoding="utf-8"))
            if found.get("latency_profile") is not None:
                return profile_from_dict(found["latency_profile"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"[serving] {path} holds no latency profile: {error!r}") from None
    return load_curve(name)
