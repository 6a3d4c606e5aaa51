"""Arguments of benchmarks and simulations that are refused: each with its name and value."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optimus.arms import parse_arm, parse_schedule_text
from optimus.calibration import CalibrationSource
from optimus.cli_report import check_output, parse_positive_ints, split_list
from optimus.config import DEMO_MODEL, load_checkpoint
from optimus.curves import load_curve
from optimus.load import Pattern, arrival_times, load_trace
from optimus.simulate import Workload, simulate_closed_loop
from optimus.slo import find_capacity
from optimus.traces import load_traces


def simulate(**options: Any) -> None:
    curve, traces = load_curve("h200-dense-8b"), load_traces()
    simulate_closed_loop(parse_arm("block"), curve, traces, 1, 1, simulator=options)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: parse_arm("chunk:0"), "mode must look like 'chunk:4' .*, got 'chunk:0'"),
        (lambda: parse_schedule_text("1-16:16,1-16:8,17-:4"), "a schedule holds '1-16' twice"),
        (lambda: simulate(jitter=-1.0), "jitter must be between 0 and 2, got -1"),
        (lambda: simulate(jitter=math.nan), "jitter must be between 0 and 2, got .*nan"),
        (lambda: simulate(host_ms=-5.0), "host_ms must be between 0 and .*, got -5"),
        (lambda: simulate(host_ms=math.inf), "host_ms must be between 0 and .*, got inf"),
        (lambda: simulate(outlier_share=1.5), "outlier_share must be between 0 and 1, got 1.5"),
        (lambda: Workload(output_len=0), "output_len must be at least 1, got 0"),
        (lambda: Workload(thresholds=()), "thresholds must not be empty"),
        (lambda: Workload(seed=-1), "seed must not be negative, got -1"),
        (lambda: find_capacity(lambda rate: 1.0, 1.0, share=0.0), r"in \(0, 1\], got 0.0"),
        (lambda: find_capacity(lambda rate: 1.0, 1.0, share=math.nan), "got nan"),
        (
            lambda: arrival_times(Pattern("burst", period_s=1e-7), 10, 30, 0),
            "period_s 1e-07 makes more than .* bursts in 30 s",
        ),
        (lambda: split_list(" , ", "--modes"), "--modes takes a comma-separated list, got ' , '"),
        (lambda: parse_positive_ints("4,3.7", "--lengths"), "--lengths takes ints >= 1, got '3.7'"),
        (lambda: check_output(Path("/no/such/x.json")), "no folder /no/such"),
    ],
)
def test_bad_arguments(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_recorded_traces_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be read"):
        load_trace(tmp_path)
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\n")
    with pytest.raises(ValueError, match=r"binary\.jsonl cannot be read"):
        load_trace(binary)
    # A separator that is a line's end to Python, and not to JSON.
    separator = tmp_path / "separator.jsonl"
    separator.write_text('{"arrival_s": 0, "prompt": "a\u2028b"}\n', encoding="utf-8")
    [arrival] = load_trace(separator)
    assert arrival.prompt == "a\u2028b"


def test_a_floor_that_nothing_reaches_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    source = CalibrationSource(load_checkpoint(DEMO_MODEL), "auto")
    with caplog.at_level(logging.WARNING):
        assert source.measured_arms(0.9) and not caplog.records
        assert source.measured_arms(1.0) and source.measured_arms(1.0)
    assert [record.getMessage() for record in caplog.records] == [
        f"no chunk length of {DEMO_MODEL} reaches quality_floor=1.0: the most accurate is used"
    ]
