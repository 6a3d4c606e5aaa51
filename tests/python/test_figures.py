"""Figures of reports: they are drawn from what the commands write, whole and of the right size."""

from __future__ import annotations

import itertools
import json
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from bench_testing import make_trace, sampling_params, simulator_config
from optimus.bench_serving import ServingSetup, bench_serving
from optimus.cli import main
from optimus.figure_parts import arm_label, arm_style, spread
from optimus.figures import draw_report, load_report, pareto_front
from optimus.load import Arrival
from optimus.serving import SimulatorBackend
from optimus.slo import Capacity, Slo


def offline_report(loads: tuple[int, ...] = (1, 8, 64)) -> dict[str, Any]:
    rows = []
    for load in loads:
        for i, mode in enumerate(["ar", "block", "chunk:2", "chunk:8/freeze", "schedule",
                                  "elastic", "elastic_per_request"]):  # fmt: skip
            rate = 100.0 * (i + 1) * load**0.7
            bins = [(100.0, 10.0 * j + 5, 10.0 * j) for j in range(10)] + [(0.0, 0.0, 0.0)]
            rows.append({
                "mode": mode, "concurrency": load, "num_prompts": 1000, "tokens_per_second": rate,
                "lowest": 0.9 * rate, "highest": 1.1 * rate,
                "accuracy": {"accuracy": 0.9 + 0.01 * i, "low": 0.88, "high": 0.97},
                "reliability": {"by_probability": bins, "by_rank": bins} if i > 4 else None,
            })  # fmt: skip
    return {"rows": rows, "machine": {"cpu": "a CPU", "cores": 2}, "arguments": {}}


def serving_report() -> dict[str, Any]:
    backends = {
        mode: SimulatorBackend(simulator_config(decode_mode=mode), [make_trace()],
                               sampling_params(1))
        for mode in ("block", "elastic", "elastic_per_request")
    }  # fmt: skip
    setup = ServingSetup(
        lambda rate: [Arrival(i / rate, None, 16, 32, i) for i in range(40)],
        lambda rate: 40 / rate,
        Slo(tpot_ms=5),
    )
    rows = [row.to_dict() for row in bench_serving(setup, backends, [100.0, 1000.0])]
    found = Capacity(12.5, 13.0, 0.9, True, []).to_dict()
    return {
        "kind": "serving", "rows": rows, "capacities": {"block": found, "elastic": found},
        "slo": {"ttft_ms": None, "tpot_ms": 5.0}, "machine": {}, "arguments": {"pattern": "ramp"},
    }  # fmt: skip


def check_files(files: list[Path], names: set[str]) -> None:
    assert {f.stem for f in files} == names and len(files) == 2 * len(names)
    for file in files:
        if file.suffix == ".png":
            head = file.read_bytes()[:24]
            assert head[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(head[16:20], "big") == 1800
        else:
            root = xml.etree.ElementTree.parse(file).getroot()
            assert root.tag.endswith("svg") and len(list(root.iter())) > 50


@pytest.mark.parametrize("loads", [(1, 8, 64), (4,)])
def test_offline_figures(tmp_path: Path, loads: tuple[int, ...]) -> None:
    report = json.loads(json.dumps(offline_report(loads)))
    files = draw_report(report, tmp_path / "new" / "directory")
    check_files(files, {"throughput", "accuracy_front", "accuracy", "reliability"})


def test_simulated_figures(tmp_path: Path) -> None:
    rows = [
        {"mode": mode, "concurrency": load, "tokens_per_second": load * rate}
        for load in (1, 2)
        for mode, rate in (("elastic", 90.0), ("oracle", 100.0))
    ]
    report = {"benchmark": "simulate", "rows": rows, "arguments": {"curve": "h200-dense-8b"}}
    check_files(draw_report(report, tmp_path), {"throughput"})


def test_serving_figures(tmp_path: Path) -> None:
    report = json.loads(json.dumps(serving_report()))
    files = draw_report(report, tmp_path, "x_")
    timelines = {f"x_timeline_{mode}_{rate}" for mode in ("elastic", "elastic_per_request")
                 for rate in (100, 1000)}  # fmt: skip
    check_files(files, {"x_capacity"} | timelines)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, out = tmp_path / "a.json", tmp_path / "figures"
    report.write_text(json.dumps(offline_report((2,))))
    with pytest.raises(SystemExit) as done:
        main(["bench", "figures", str(report), "--output", str(out)])
    assert not done.value.code and (out / "throughput.svg").exists()
    assert str(out / "accuracy.png") in capsys.readouterr().out
    for broken in ("{", "{}", '{"rows": []}', "[]"):
        report.write_text(broken)
        with pytest.raises(ValueError, match=r"a\.json is no benchmark report"):
            load_report(report)
    with pytest.raises(ValueError, match="kind must be one of offline, serving, simulate, got 'x'"):
        draw_report({"kind": "x", "rows": []}, tmp_path)


def test_pareto_front() -> None:
    points = [(1, 9), (2, 8), (2, 7), (3, 8), (4, 1), (0, 9), (4, 1)]
    assert pareto_front(points) == [(1, 9), (3, 8), (4, 1)]
    assert pareto_front([]) == []


def test_labels_move_apart_and_keep_their_order() -> None:
    assert spread([0.5], 0.1) == [0.5] and spread([], 0.1) == []
    assert spread([0.0, 1.0], 0.1) == [0.0, 1.0]
    assert spread([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
    placed = spread([0.52, 0.1, 0.5, 0.51, 0.12], 0.1)
    order = sorted(placed)
    assert all(b - a >= 0.1 - 1e-9 for a, b in itertools.pairwise(order))
    assert sorted(range(5), key=lambda i: placed[i]) == [1, 4, 2, 3, 0]


def test_arms_are_told_apart() -> None:
    modes = ["ar", "block", "schedule", "elastic", "elastic_per_request", "chunk:2", "chunk:16"]
    styles = [arm_style(mode, 16) for mode in modes]
    assert len({(s["color"], s["marker"]) for s in styles}) == len(modes)
    assert arm_label("elastic_per_request") == "elastic, per request"
    assert arm_label("chunk:4/freeze") == "chunk 4, freeze"
