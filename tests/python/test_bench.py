"""The closed-loop benchmark: arms, interleaving, statistics, what it writes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from checkpoints import make_checkpoint
from optimus import LLM, SamplingParams
from optimus.arms import Arm, parse_arm, parse_arms, parse_schedule_text
from optimus.bench import BenchRow, BenchRun, bench_offline, rotated
from optimus.cli import main
from optimus.evaluate import DEMO_TASKS, Score, load_tasks, wilson_interval
from optimus.summary import compare, paired_difference, passes_floor, percentile, pooled_score


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    return make_checkpoint(path, tokenizer=True, max_position_embeddings=2048)


def test_arms() -> None:
    assert parse_arm("chunk:4/freeze") == Arm("chunk:4/freeze", "chunk", 4, "freeze")
    names = [arm.name for arm in parse_arms(["ar", "block", "chunk:all", "elastic"], 32)]
    assert names == ["ar", "block", *(f"chunk:{c}" for c in (2, 4, 8, 16, 32)), "elastic"]
    assert [arm.name for arm in parse_arms(["chunk:all/refresh"], 6)] == [
        "chunk:2/refresh", "chunk:4/refresh"
    ]  # fmt: skip
    schedule = parse_schedule_text("1-16:16, 17-:4")
    assert schedule == {"1-16": 16, "17-": 4}
    [arm] = parse_arms(["schedule"], 32, schedule)
    assert arm.options(schedule)["chunk_schedule"] == schedule
    assert parse_arm("block").is_fixed and not parse_arm("ar").is_fixed
    assert parse_arm("elastic_per_request").is_elastic and not parse_arm("schedule").is_elastic


@pytest.mark.parametrize(
    "modes, message",
    [
        (["warp"], "'warp'"),
        (["chunk:4/thaw"], "KV policy .* got 'chunk:4/thaw'"),
        (["chunk:4", "chunk:all"], "'chunk:4' is given 2 times"),
        (["schedule"], "needs a schedule"),
        ([], "no mode"),
    ],
)
def test_bad_arms(modes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arms(modes, 32)


@pytest.mark.parametrize("text", ["1-16", "1-16:x", "1-16:4,"])
def test_bad_schedules(text: str) -> None:
    with pytest.raises(ValueError, match="must look like"):
        parse_schedule_text(text)


def test_percentile_is_nearest_rank() -> None:
    values = [15.0, 20.0, 35.0, 40.0, 50.0]
    assert [percentile(values, p) for p in (5, 30, 40, 50, 100)] == [15, 20, 20, 35, 50]
    assert percentile([3.0], 99) == 3 and percentile([], 50) is None
    assert percentile([1.0] * 9 + [math.inf], 90) == 1
    assert percentile([1.0] * 9 + [math.inf], 91) == math.inf
    assert percentile(list(map(float, range(1, 101))), 99) == 99


def test_pooled_score_counts_prompts_once() -> None:
    score = pooled_score([[True, False, True, True], [True, True, True, False]])
    assert (score.correct, score.total, score.accuracy) == (6, 8, 0.75)
    assert (score.low, score.high) == wilson_interval(3, 4)


def test_paired_difference_by_hand() -> None:
    """Differences 1, 0, 0, -0.5: mean 0.125, variance 0.3958..., n = 4."""
    before = [[False, True, False, True], [False, True, False, True]]
    after = [[True, True, False, True], [True, True, False, False]]
    mean, low, high = paired_difference(before, after)
    half = 1.959964 * math.sqrt((0.875**2 + 2 * 0.125**2 + 0.625**2) / 3 / 4)
    assert mean == 0.125
    assert (low, high) == pytest.approx((mean - half, mean + half))
    assert paired_difference([[True]], [[True]]) == (0, -1, 1)  # one prompt says nothing


def row(mode: str, rounds: list[float], correct: str, **changes: Any) -> BenchRow:
    """A row of made-up figures."""
    values: dict[str, Any] = dict.fromkeys(BenchRow.__dataclass_fields__)
    right = [c == "1" for c in correct]
    values |= {
        "mode": mode, "concurrency": 4, "rounds": rounds, "accuracy": pooled_score([right]),
        "accuracy_vs_block": (0.0, -0.1, 0.1), "correct": [correct],
    }  # fmt: skip
    return BenchRow(**(values | changes))


def test_regret_by_hand() -> None:
    rows = [
        row("ar", [50, 50, 50], "1111"),
        row("block", [80, 100, 60], "1110"),
        row("chunk:2", [100, 125, 100], "1111"),
        row("chunk:4", [200, 200, 100], "1000", accuracy_vs_block=(-0.5, -0.9, -0.1)),
        row("elastic", [150, 100, 110], "1111"),
    ]
    [item] = compare(rows, "block")
    assert item.mode == "elastic" and item.concurrency == 4
    assert item.against_all is not None and item.against_good is not None
    assert item.against_all.best == "chunk:4" and item.against_all.best_tokens_per_second == 200
    assert item.against_all.regret == 0.25  # ratios 0.75, 0.5, 1.1
    assert (item.against_all.low, item.against_all.high) == pytest.approx((-0.1, 0.5))
    assert item.against_good.best == "chunk:2"
    assert item.against_good.regret == pytest.approx(-0.1)  # ratios 1.5, 0.8, 1.1
    assert item.over_block == pytest.approx(110 / 60) and item.over_ar == pytest.approx(2.2)


def test_floors() -> None:
    below = row("chunk:4", [1], "1000", accuracy_vs_block=(-0.5, -0.9, -0.1))
    assert not passes_floor(below, "block") and passes_floor(below, None)
    assert passes_floor(replace(below, accuracy_vs_block=None), "block")
    assert passes_floor(below, 0.25) and not passes_floor(below, 0.26)
    assert compare([row("elastic", [1], "1")], 0.5)[0].against_all is None


def test_rounds_rotate_and_interleave(checkpoint: Path) -> None:
    llm = LLM(checkpoint, decode_mode="block", num_threads=1)
    seen: list[tuple[int, str]] = []

    def on_run(run: BenchRun) -> None:
        seen.append((run.round, run.arm.name))
        assert len(run.totals.records) == run.totals.num_steps > 0

    modes = ["ar", "chunk:4/freeze", "elastic_per_request"]
    rows = bench_offline(
        llm, load_tasks(DEMO_TASKS, 2), modes, [1, 2],
        SamplingParams(max_tokens=8, ignore_eos=True), rounds=3, raw=True, on_run=on_run,
    )  # fmt: skip
    assert rotated(3, 4) == [1, 2, 0]
    per_load = [(r, modes[(i + r) % 3]) for r in range(3) for i in range(3)]
    assert seen == per_load * 2
    for entry in rows:
        assert len(entry.rounds) == 3 and entry.lowest <= entry.tokens_per_second <= entry.highest
        assert entry.tokens_per_second == sorted(entry.rounds)[1]
        assert entry.num_tokens == 16 and entry.accuracy == Score(0, 6, 0, *wilson_interval(0, 2))
        assert entry.accuracy_vs_block is None and entry.correct == ["00"] * 3
        assert (entry.reliability is not None) == (entry.mode == "elastic_per_request")
    assert [entry.kv_policy for entry in rows[:3]] == ["auto", "freeze", "auto"]


def test_command_line(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, steps, trace = (tmp_path / n for n in ("report.json", "steps.jsonl", "trace.json"))
    arguments = [
        "bench", "offline", "--model", checkpoint, "--raw", "--modes", "block,chunk:4,elastic",
        "--num-prompts", 2, "--concurrency", 2, "--max-tokens", 16, "--rounds", 2,
        "--threads", 1, "--step-log", steps, "--trace", trace, "--explain", 100000,
        "--output", report,
    ]  # fmt: skip
    with pytest.raises(SystemExit) as done:
        main([str(a) for a in arguments])
    assert not done.value.code
    out = capsys.readouterr().out
    assert "elastic at 2: the last run had" in out
    assert [line for line in out.splitlines() if len(line) > 80] == []
    written = json.loads(report.read_text())
    assert written["kind"] == "offline" and len(written["rows"]) == 3
    [comparison] = written["comparisons"]
    assert comparison["against_all"]["best"] in ("block", "chunk:4")
    lines = [json.loads(line) for line in steps.read_text().splitlines()]
    assert {(line["mode"], line["round"]) for line in lines} == {
        (mode, r) for mode in ("block", "chunk:4", "elastic") for r in (0, 1)
    }
    events = json.loads(trace.read_text())["traceEvents"]
    lanes = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert sorted(lanes) == ["block at 2", "chunk:4 at 2", "elastic at 2"]
    arguments[arguments.index(100000)] = 3
    with pytest.raises(SystemExit):
        main([str(a) for a in arguments])
    out = capsys.readouterr().out
    assert "elastic at 2, step" in out and " measured (" in out
