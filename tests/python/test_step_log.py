"""Step records: dumps, traces, explanations."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest

from bench_testing import run_simulator
from checkpoints import make_checkpoint
from optimus import _C, LLM, SamplingParams
from optimus.step_log import (
    chrome_trace,
    chunk_histogram,
    explain,
    record_to_dict,
    write_chrome_trace,
    write_json_lines,
)


def engine_records(directory: Path, mode: str) -> list[_C.StepRecord]:
    llm = LLM(
        make_checkpoint(directory, tokenizer=True, max_position_embeddings=128), decode_mode=mode
    )
    llm.generate(["one", "two two", "three"], SamplingParams(max_tokens=12, ignore_eos=True))
    return llm.step_records()


@pytest.fixture(params=["engine", "simulator"])
def records(request: pytest.FixtureRequest, tmp_path: Path) -> list[_C.StepRecord]:
    if request.param == "simulator":
        return run_simulator().step_records()
    return engine_records(tmp_path, "elastic")


def test_records_add_up(records: list[_C.StepRecord]) -> None:
    assert [r.step for r in records] == list(range(records[0].step, records[0].step + len(records)))
    for record in records:
        entry = record_to_dict(record)
        assert entry["rows"] >= entry["prefill_rows"] + entry["logit_rows"] + entry["refresh_rows"]
        assert sum(entry["chunk_lengths"]) == entry["logit_rows"]
        assert len(entry["arms"]) > 1 or entry["num_decoding"] == 0
    assert sum(n * count for n, count in chunk_histogram(records).items()) == sum(
        r.logit_rows for r in records
    )


def test_json_lines_append(records: list[_C.StepRecord], tmp_path: Path) -> None:
    file = tmp_path / "steps.jsonl"
    write_json_lines(file, records, {"mode": "elastic"})
    write_json_lines(file, records[:1])
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == len(records) + 1
    assert lines[0]["mode"] == "elastic" and "mode" not in lines[-1]
    assert lines[1] == {"mode": "elastic", **record_to_dict(records[1])}


def test_chrome_trace_schema(records: list[_C.StepRecord], tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    write_chrome_trace(file, {"first": records, "nothing": [], "second": records[:2]})
    trace = json.loads(file.read_text())
    assert trace == json.loads(json.dumps(chrome_trace({"first": records, "nothing": [],
                                                        "second": records[:2]})))  # fmt: skip
    events = trace["traceEvents"]
    for event in events:
        assert {"ph", "name", "pid", "tid", "ts"} <= set(event)
        assert event["ts"] >= 0 and event["ph"] in "MXC"
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert list(names.values()) == ["first", "nothing", "second"]
    steps = [e for e in events if e["ph"] == "X" and names[e["pid"]] == "first"]
    assert [s["args"]["step"] for s in steps] == [r.step for r in records]
    for step, following in itertools.pairwise(steps):  # one lane: slices must not overlap
        assert step["ts"] + step["dur"] <= following["ts"] + 1e-3
    counters = [e for e in events if e["ph"] == "C"]
    assert {c["name"] for c in counters} == {"chunk length", "requests", "commits"}
    assert all(isinstance(v, int | float) for c in counters for v in c["args"].values())


def test_explanation_names_every_arm(records: list[_C.StepRecord]) -> None:
    record = next(r for r in reversed(records) if r.arms)
    text = explain(record)
    assert all(len(line) <= 80 for line in text.splitlines())
    table = [line.split() for line in text.splitlines() if line.split()[0].isdecimal()]
    assert len(table) == len(record.arms)
    scores = {" ".join(cells[8:]): float(cells[7]) for cells in reversed(table)}
    assert set(scores) <= {"chosen", "lower score", "too close", "other KV", "above target"}
    assert scores["chosen"] >= scores.get("lower score", -math.inf)
    assert sum(cells[-1] == "chosen" for cells in table) == 1
    assert (
        record.reason in text and "predicted" in text and "against the best other estimate" in text
    )


@pytest.mark.parametrize("mode", ["ar", "block", "chunk"])
def test_explanation_without_a_choice(mode: str) -> None:
    records = run_simulator(decode_mode=mode, kv_policy="refresh").step_records()
    text = explain(next(r for r in records if r.num_decoding))
    assert "none compared" in text and "chunks" in text
