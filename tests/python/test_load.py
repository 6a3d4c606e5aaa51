"""When requests arrive and what they ask: rates, shapes, seeds, recorded traces, bad input."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from pathlib import Path

import pytest

from optimus.load import (
    Arrival,
    Lengths,
    Pattern,
    arrival_times,
    at_rate,
    load_trace,
    mean_rate,
    random_arrivals,
    task_arrivals,
)


def gaps(times: list[float]) -> list[float]:
    return [b - a for a, b in itertools.pairwise(times)]


def variation(values: list[float]) -> float:
    """Squared coefficient of variation."""
    return statistics.variance(values) / statistics.fmean(values) ** 2


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_constant_rate(burstiness: float) -> None:
    """20,000 gaps: their mean is known to about 1%, their variation to a few percent."""
    times = arrival_times(Pattern(burstiness=burstiness), 50.0, 400.0, seed=3)
    assert times == sorted(times) and times[0] >= 0 and times[-1] < 400
    assert len(times) == pytest.approx(20_000, rel=0.05)
    assert variation(gaps(times)) == pytest.approx(1 / burstiness, rel=0.12)


def test_bursts_keep_the_mean_and_have_their_share() -> None:
    pattern = Pattern("burst", burst_factor=4, burst_share=0.2, period_s=10)
    times = arrival_times(pattern, 20.0, 500.0, seed=1)
    assert len(times) == pytest.approx(10_000, rel=0.05)
    in_burst = sum(t % 10 >= 8 for t in times)
    assert in_burst / len(times) == pytest.approx(0.8, abs=0.02)
    silent = arrival_times(Pattern("burst", burst_factor=5, burst_share=0.2), 20.0, 100.0, seed=1)
    assert all(t % 10 >= 8 - 1e-9 for t in silent)


def test_ramp_rises_and_falls_in_proportion() -> None:
    """A tent from 0 to the peak: a quarter of the requests in each outer quarter would be flat;
    here the outer quarters hold 1/8 each."""
    times = arrival_times(Pattern("ramp", ramp_from=0.0), 100.0, 200.0, seed=2)
    assert len(times) == pytest.approx(10_000, rel=0.05)
    quarters = [sum(q * 50 <= t < (q + 1) * 50 for t in times) / len(times) for q in range(4)]
    assert quarters == pytest.approx([1 / 8, 3 / 8, 3 / 8, 1 / 8], abs=0.015)


def test_evenly_spaced_times_follow_the_rate_exactly() -> None:
    """Gaps of a huge shape are all 1: the n-th request is where the cumulative rate is n."""
    tent = arrival_times(Pattern("ramp", burstiness=1e9, ramp_from=0.0), 2.0, 10.0, seed=0)
    rising = [math.sqrt(5 * n) for n in range(1, 6)]
    assert tent[:5] == pytest.approx(rising, rel=1e-2)
    assert tent[5:9] == pytest.approx([10 - t for t in rising[3::-1]], rel=1e-2)


@pytest.mark.parametrize("kind", ["poisson", "burst", "ramp"])
def test_seeds_decide_and_rates_rescale(kind: str) -> None:
    pattern = Pattern(kind)
    times = arrival_times(pattern, 5.0, 20.0, seed=7)
    assert times == arrival_times(pattern, 5.0, 20.0, seed=7)
    assert times != arrival_times(pattern, 5.0, 20.0, seed=8)
    if kind != "burst":  # whose period is in seconds
        twice = arrival_times(pattern, 10.0, 10.0, seed=7)
        assert twice == pytest.approx([t / 2 for t in times])


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"kind": "waves"}, "pattern must be one of"),
        ({"burstiness": 0}, "burstiness must be a number > 0, got 0"),
        ({"burstiness": math.nan}, "burstiness"),
        ({"burst_share": 1.0}, r"burst_share must be in \(0, 1\), got 1.0"),
        ({"burst_factor": 6.0}, "at most 1"),
        ({"ramp_from": 1.5}, "ramp_from"),
        ({"period_s": -1}, "period_s"),
    ],
)
def test_bad_patterns(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pattern(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("rate, duration", [(0.0, 1.0), (1.0, 0.0), (-1, 1), (math.inf, 1.0)])
def test_bad_rates(rate: float, duration: float) -> None:
    with pytest.raises(ValueError, match="must be a number > 0"):
        arrival_times(Pattern(), rate, duration, 0)
    with pytest.raises(ValueError, match="are more than"):
        arrival_times(Pattern(), 1e6, 1e6, 0)


def test_tasks_come_once_before_any_comes_twice() -> None:
    items = [item for _, item in task_arrivals([0.1 * i for i in range(25)], 10, seed=4)]
    assert sorted(items[:10]) == sorted(items[10:20]) == list(range(10))
    assert items[:10] != items[10:20]
    assert items == [i for _, i in task_arrivals([0.0] * 25, 10, seed=4)]


def test_random_prompts() -> None:
    lengths = Lengths.parse("3-9", "prompt_len")
    arrivals = random_arrivals([0.0] * 200, lengths, Lengths(5, 5), 100, seed=0)
    assert {a.prompt_len for a in arrivals} == set(range(3, 10))
    for a in arrivals:
        assert a.prompt is not None and len(a.prompt) == a.prompt_len and a.output_len == 5
        assert all(0 <= i < 100 for i in a.prompt)  # type: ignore[operator]
    bare = random_arrivals([0.0] * 5, lengths, Lengths(5, 5), None, seed=0)
    assert all(a.prompt is None and a.prompt_len for a in bare)


@pytest.mark.parametrize("text", ["", "x", "5-", "9-3", "0", "-4", "1.5"])
def test_bad_lengths(text: str) -> None:
    with pytest.raises(ValueError, match="prompt_len must"):
        Lengths.parse(text, "prompt_len")


def test_recorded_trace(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    lines = [
        {"arrival_s": 10.0, "prompt_len": 7, "output_len": 3},
        {"arrival_s": 10.5, "prompt": "hello", "output_len": 4},
        {"arrival_s": 14.0, "prompt": [1, 2, 3]},
    ]
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    arrivals = load_trace(file)
    assert arrivals == [
        Arrival(0.0, None, 7, 3, 0),
        Arrival(0.5, "hello", None, 4, 1),
        Arrival(4.0, [1, 2, 3], 3, None, 2),
    ]
    assert mean_rate(arrivals) == 0.5
    faster = at_rate(arrivals, 2.0)
    assert [a.arrival_s for a in faster] == [0.0, 0.125, 1.0]
    assert faster[1].prompt == "hello" and mean_rate(faster) == 2.0


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "JSONDecodeError"),
        ("3", "TypeError"),
        ('{"prompt_len": 3, "output_len": 1}', "arrival_s"),
        ('{"arrival_s": 2, "output_len": 1}', "prompt_len"),
        ('{"arrival_s": 2, "prompt_len": 3}', "output_len"),
        ('{"arrival_s": 0.5, "prompt_len": 3, "output_len": 1}', "must not descend"),
        ('{"arrival_s": -2, "prompt_len": 3, "output_len": 1}', "must be a number >= 0"),
        ('{"arrival_s": NaN, "prompt_len": 3, "output_len": 1}', "must be a number >= 0"),
        ('{"arrival_s": 2, "prompt_len": 0, "output_len": 1}', "prompt_len must be an int >= 1"),
        ('{"arrival_s": 2, "prompt_len": 3, "output_len": 1.5}', "output_len must be an int"),
        ('{"arrival_s": 2, "prompt": {}, "output_len": 1}', "prompt_len must be an int >= 1"),
    ],
)
def test_broken_traces(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text('{"arrival_s": 1, "prompt_len": 3, "output_len": 1}\n' + line)
    with pytest.raises(ValueError, match=rf"trace\.jsonl, line 2: .*{message}"):
        load_trace(file)


def test_traces_that_say_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        load_trace(tmp_path / "missing.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no requests"):
        load_trace(tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match="at least two requests"):
        at_rate([Arrival(0.0, "x", None, None)], 1.0)
