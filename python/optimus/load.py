"""Load for the serving benchmark: when requests arrive, and what they ask.

Knows no engine: the same arrivals drive the real one and the simulator. Everything follows from a
seed, and a change of rate moves the same requests closer together, so that two rates are compared
on the same draw.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATTERNS = ("poisson", "burst", "ramp")
_MAX_REQUESTS = 1_000_000


@dataclass(frozen=True)
class Arrival:
    """A request and when it arrives, in seconds from the start of the run.

    prompt: text, token ids, or None where only lengths count (a simulator). prompt_len: tokens;
    None = as long as the text turns out. output_len: tokens to generate, whatever the model says;
    None = up to the model's end of text. item: which task or trace it came from.
    """

    arrival_s: float
    prompt: str | Sequence[int] | None
    prompt_len: int | None
    output_len: int | None
    item: int = 0


@dataclass(frozen=True)
class Pattern:
    """How the rate of arrivals changes over a run.

    kind: "poisson" (constant rate), "burst" (every `period_s`, for `burst_share` of it, the rate is
    `burst_factor` times the mean; lower in between, so that the mean stays), "ramp" (from
    `ramp_from` of the peak up to the peak at half time and down again; the rate is the peak's).
    burstiness: shape of the Gamma-distributed gaps: 1 = exponential (Poisson), below 1 burstier
    (squared coefficient of variation 1 / burstiness), large = evenly spaced.
    Raises ValueError, naming field and value.
    """

    kind: str = "poisson"
    burstiness: float = 1.0
    burst_factor: float = 4.0
    burst_share: float = 0.2
    period_s: float = 10.0
    ramp_from: float = 0.05

    def __post_init__(self) -> None:
        if self.kind not in PATTERNS:
            raise ValueError(
                f"[load] pattern must be one of {', '.join(PATTERNS)}, got {self.kind!r}"
            )
        for name in ("burstiness", "burst_factor", "period_s"):
            check_positive(name, getattr(self, name))
        if not 0 < self.burst_share < 1:
            raise ValueError(f"[load] burst_share must be in (0, 1), got {self.burst_share!r}")
        if self.burst_factor * self.burst_share > 1 + 1e-9:
            raise ValueError(
                "[load] burst_factor x burst_share must be at most 1 (bursts exceed the mean), "
                f"got {self.burst_factor!r} x {self.burst_share!r}"
            )
        if not 0 <= self.ramp_from <= 1:
            raise ValueError(f"[load] ramp_from must be in [0, 1], got {self.ramp_from!r}")

    def corners(self, duration_s: float) -> list[tuple[float, float]]:
        """(second, rate relative to the nominal one); linear in between, jumps where a second is
        there twice."""
        if self.kind == "poisson":
            return [(0.0, 1.0), (duration_s, 1.0)]
        if self.kind == "ramp":
            return [(0.0, self.ramp_from), (duration_s / 2, 1.0), (duration_s, self.ramp_from)]
        low = max(0.0, (1 - self.burst_factor * self.burst_share) / (1 - self.burst_share))
        corners, begin = [], 0.0
        while begin < duration_s:  # a period ends with its burst
            burst, end = begin + (1 - self.burst_share) * self.period_s, begin + self.period_s
            corners += [(begin, low), (burst, low), (burst, self.burst_factor)]
            corners += [(end, self.burst_factor)]
            begin = end
        return corners


def arrival_times(pattern: Pattern, rate: float, duration_s: float, seed: int) -> list[float]:
    """Seconds at which requests arrive in [0, duration_s), ascending.

    rate: requests per second, the mean ("ramp": at the peak). Gaps are drawn at rate 1 and
    stretched by the pattern's cumulative rate. Raises ValueError.
    """
    check_positive("rate", rate)
    check_positive("duration_s", duration_s)
    if pattern.kind == "burst" and duration_s / pattern.period_s > _MAX_REQUESTS:
        raise ValueError(
            f"[load] period_s {pattern.period_s} makes more than {_MAX_REQUESTS} bursts in "
            f"{duration_s} s"
        )
    if rate * duration_s * max(1.0, pattern.burst_factor) > _MAX_REQUESTS:
        raise ValueError(
            f"[load] {rate} requests per second for {duration_s} s are more than {_MAX_REQUESTS}"
        )
    source = random.Random(seed)
    gaps = itertools.repeat(pattern.burstiness)
    expected = itertools.accumulate(source.gammavariate(shape, 1 / shape) for shape in gaps)
    times: list[float] = []
    target = next(expected)
    done = 0.0  # requests expected up to the current piece
    for (begin, first), (end, last) in itertools.pairwise(pattern.corners(duration_s)):
        area = rate * (first + last) / 2 * (end - begin)
        while target <= done + area:
            times.append(begin + _solve(rate * first, rate * last, end - begin, target - done))
            target = next(expected)
        done += area
    return [t for t in times if t < duration_s]


def _solve(first: float, last: float, length: float, area: float) -> float:
    """Where the integral of a line from `first` to `last` over `length` reaches `area`."""
    slope = (last - first) / length
    if abs(slope) * length <= 1e-12 * max(first, last):
        return area / first
    root = math.sqrt(max(0.0, first * first + 2 * slope * area))
    return min(length, max(0.0, 2 * area / (first + root)))


@dataclass(frozen=True)
class Lengths:
    """A length, or a range of them drawn evenly: "128" or "64-512". Raises ValueError."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str, name: str) -> Lengths:
        low, dash, high = text.strip().partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()):
            raise ValueError(f"[load] {name} must look like '128' or '64-512', got {text!r}")
        lengths = cls(int(low), int(high) if dash else int(low))
        if not 1 <= lengths.low <= lengths.high:
            raise ValueError(f"[load] {name} must ascend from at least 1, got {text!r}")
        return lengths

    def draw(self, source: random.Random) -> int:
        return source.randint(self.low, self.high)


def task_arrivals(times: Sequence[float], num_items: int, seed: int) -> Iterator[tuple[float, int]]:
    """Arrival times, each with an item (a task, a trace): all items in a shuffled order, and again
    in another one when they have run out."""
    source = random.Random(seed)
    order: list[int] = []
    for time_s in times:
        if not order:
            order = source.sample(range(num_items), num_items)
        yield time_s, order.pop()


def random_arrivals(
    times: Sequence[float],
    prompt_len: Lengths,
    output_len: Lengths,
    vocab_size: int | None,
    seed: int,
) -> list[Arrival]:
    """Random token ids of drawn lengths; no two prompts share a prefix worth caching.

    vocab_size: None = lengths only.
    """
    source = random.Random(seed)
    arrivals = []
    for i, time_s in enumerate(times):
        length, num_tokens = prompt_len.draw(source), output_len.draw(source)
        ids = None if vocab_size is None else [source.randrange(vocab_size) for _ in range(length)]
        arrivals.append(Arrival(time_s, ids, length, num_tokens, i))
    return arrivals


def load_trace(path: str | Path) -> list[Arrival]:
    """A recorded trace: JSONL of {"arrival_s", "prompt_len" or "prompt", "output_len"}.

    arrival_s must not descend; the first request arrives at 0 of the run. prompt: text or token
    ids. output_len may be missing next to a prompt (up to the model's end of text).
    Raises ValueError naming file and line.
    """
    file = Path(path)
    if not file.exists():
        raise ValueError(f"[load] {file} does not exist")
    arrivals: list[Arrival] = []
    origin = 0.0
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"[load] {file} cannot be read: {error}") from None
    for number, line in enumerate(text.split("\n"), 1):  # JSON may hold other line separators
        if not line.strip():
            continue
        try:
            arrival = _parse_trace_line(json.loads(line), len(arrivals))
            if not arrivals:
                origin = arrival.arrival_s
            elif arrival.arrival_s - origin < arrivals[-1].arrival_s:
                raise ValueError(f"arrival_s must not descend, got {arrival.arrival_s!r}")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"[load] {file}, line {number}: {error!r}") from None
        arrivals.append(at_time(arrival, arrival.arrival_s - origin))
    if not arrivals:
        raise ValueError(f"[load] {file} holds no requests")
    return arrivals


def _parse_trace_line(entry: Any, item: int) -> Arrival:
    arrival_s = entry["arrival_s"]
    if isinstance(arrival_s, bool) or not 0 <= float(arrival_s) < math.inf:
        raise ValueError(f"arrival_s must be a number >= 0, got {arrival_s!r}")
    prompt = entry.get("prompt")
    if prompt is not None and not isinstance(prompt, str):
        prompt = [int(i) for i in prompt]
    prompt_len = entry["prompt_len"] if prompt is None else entry.get("prompt_len")
    if prompt is not None and not isinstance(prompt, str):
        prompt_len = len(prompt)
    output_len = entry["output_len"] if prompt is None else entry.get("output_len")
    for name, value in (("prompt_len", prompt_len), ("output_len", output_len)):
        if value is not None and (
            not isinstance(value, int) or isinstance(value, bool) or value < 1
        ):
            raise ValueError(f"{name} must be an int >= 1, got {value!r}")
    return Arrival(float(arrival_s), prompt, prompt_len, output_len, item)


def at_rate(arrivals: Sequence[Arrival], rate: float) -> list[Arrival]:
    """A recorded trace sped up or slowed down to `rate` requests per second on average."""
    check_positive("rate", rate)
    factor = mean_rate(arrivals) / rate
    return [at_time(a, a.arrival_s * factor) for a in arrivals]


def mean_rate(arrivals: Sequence[Arrival]) -> float:
    """Requests per second over the time of arrivals. Raises ValueError below two of them."""
    last_s = arrivals[-1].arrival_s if arrivals else 0.0
    if len(arrivals) < 2 or last_s <= 0:
        raise ValueError("[load] a rate needs at least two requests at different times")
    return (len(arrivals) - 1) / last_s


def at_time(arrival: Arrival, arrival_s: float) -> Arrival:
    return Arrival(arrival_s, arrival.prompt, arrival.prompt_len, arrival.output_len, arrival.item)


def check_positive(name: str, value: float) -> None:
    """Raises ValueError unless value is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"[load] {name} must be a number > 0, got {value!r}")
