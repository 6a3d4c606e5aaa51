"""What the policies do over loads, in the simulator: the figures behind the README's claims.

    python bench/simulate_policies.py --output bench/results/simulate_policies.json

Sweeps of closed loops on stated step-time curves (dense 8B, mixture of experts, long contexts, an
A100-like curve), requests that differ (thresholds, tasks), and load that ramps and bursts. Every
arm sees the same requests. `oracle` computes only the rows that turned out to be needed, of the arm
where that is fastest: no arm can be faster.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optimus.arms import Arm, parse_arm
from optimus.curves import load_curve
from optimus.machine import git_commit, machine
from optimus.native import _C
from optimus.simulate import ORACLE, Workload, oracle_row, simulate_closed_loop, simulated_engine
from optimus.traces import Trace, load_traces

FIXED = ["chunk:2", "chunk:4", "chunk:8", "chunk:16", "chunk:32"]
ARMS = ["ar", "block", *FIXED, "elastic", "elastic_per_request"]
LOADS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SETTLE_STEPS = 20

# name -> (curve, loads, requests per slot, workload, engine options)
Sweep = tuple[str, Sequence[int], int, Workload, dict[str, Any]]
SWEEPS: dict[str, Sweep] = {
    "h200 dense 8B": ("h200-dense-8b", LOADS, 12, Workload(), {}),
    "h200 dense 8B, long answers": (
        "h200-dense-8b", LOADS[:9], 4, Workload(prompt_len=1024, output_len=512), {},
    ),
    "mixed thresholds": (
        "h200-dense-8b", LOADS, 12, Workload(thresholds=(0.7, 1.0)),
        {"chunk_arms": [1, 2, 4, 8, 16, 32]},
    ),
    # In block mode 9.0 and 2.8 tokens a step: the fastest and the slowest family.
    "mixed tasks": (
        "h200-dense-8b", LOADS, 12, Workload(families=("dates", "lists")), {},
    ),
    # 4.8 both: other answers, the same pace.
    "mixed tasks, alike": (
        "h200-dense-8b", LOADS, 12, Workload(families=("json_extract", "word_problems")), {},
    ),
    "h200 dense 8B, padded to graphs": (
        "h200-dense-8b-graphs", LOADS[:9], 12, Workload(), {},
    ),
    "h200 mixture of experts, padded to graphs": (
        "h200-moe-mini-graphs", LOADS[:9], 12, Workload(), {},
    ),
    "h200 mixture of experts": ("h200-moe-mini", LOADS, 12, Workload(), {}),
    "h200 dense 8B, 16k contexts": (
        "h200-dense-8b", (1, 4, 16, 64), 3, Workload(prompt_len=16384, output_len=1024), {},
    ),
    "a100-like dense 8B": ("a100-dense-8b", LOADS, 12, Workload(), {}),
    "a100-like dense 8B, long answers": (
        "a100-dense-8b", LOADS[:9], 4, Workload(prompt_len=64, output_len=512), {},
    ),
}  # fmt: skip


def sweep(name: str, traces: Sequence[Trace]) -> list[dict[str, Any]]:
    curve_name, loads, per_slot, workload, engine = SWEEPS[name]
    curve = load_curve(curve_name)
    arms = ARMS + ["chunk:1"] * ("chunk_arms" in engine)
    results = []
    for load in loads:
        count = max(600 if workload.output_len is None else 48, per_slot * load)
        rows = {
            arm: simulate_closed_loop(
                parse_arm(arm), curve, traces, load, count, workload, **engine
            )
            for arm in arms
        }
        # AR is no way to choose chunks: what it could save is kept apart.
        chunk_oracle = oracle_row([row for arm, row in rows.items() if arm != "ar"])
        rows[ORACLE] = oracle_row(list(rows.values()))
        speed = {arm: row.tokens_per_second for arm, row in rows.items()}
        fixed = [arm for arm in speed if arm.startswith("chunk:")]
        best = max(fixed, key=speed.__getitem__)
        result = {
            "load": load,
            "best_fixed": best,
            "elastic_vs_best": speed["elastic"] / speed[best],
            "per_request_vs_best": speed["elastic_per_request"] / speed[best],
            "oracle_vs_best": speed[ORACLE] / speed[best],
            "chunk_oracle_vs_best": chunk_oracle.tokens_per_second / speed[best],
            "elastic_vs_ar": speed["elastic"] / speed["ar"],
            "elastic_vs_block": speed["elastic"] / speed["block"],
            "per_request_vs_ar": speed["elastic_per_request"] / speed["ar"],
            "per_request_vs_block": speed["elastic_per_request"] / speed["block"],
            "rows": [row.to_dict() for row in rows.values()],
        }
        results.append(result)
        print(
            f"{load:>5}  best {best:<8} {speed[best]:>7.0f} tok/s   elastic "
            f"{result['elastic_vs_best']:.3f}  per request {result['per_request_vs_best']:.3f}  "
            f"oracle {result['oracle_vs_best']:.3f} "
            f"(chunks {result['chunk_oracle_vs_best']:.3f})   "
            f"elastic/ar {result['elastic_vs_ar']:.2f}  "
            f"elastic/block {result['elastic_vs_block']:.2f}",
            flush=True,
        )
    return results


def stages(mode: str, traces: Sequence[Trace], groups: Sequence[tuple[int, float, int]]) -> Any:
    """Groups of (requests, arrival second, tokens each) on the dense curve; every step's load and
    chunk length, and the steps until the chunk length of a stage settled.

    A stage is a stretch in which the number of decoding requests changes by less than a third.
    Settled: from the first step on from which the chunk length stays within a factor of two of the
    stage's median for SETTLE_STEPS steps. `share_off`: of the later steps, how many left that range
    (trials of lengths that were not run for long, and load that is about to change).
    """
    config = _C.SimulatorConfig()
    config.engine = simulated_engine(
        Arm(mode, mode), max_num_seqs=sum(count for count, _, _ in groups), max_model_len=16384,
        step_log_size=1 << 22,
    )  # fmt: skip
    config.latency = load_curve("h200-dense-8b")
    simulator = _C.Simulator(config, [t.to_native() for t in traces])
    params = _C.SamplingParams()
    params.ignore_eos, params.confidence_threshold = True, 0.99
    index = 0
    for count, arrival_s, tokens in groups:
        for _ in range(count):
            trace = index % len(traces)
            params.max_tokens = tokens
            simulator.add_request(arrival_s, traces[trace].prompt_len, trace, params)
            index += 1
    simulator.run(float("inf"), 1 << 60)
    steps = [
        (r.start_s, r.num_decoding, r.chunk_length)
        for r in simulator.step_records()
        if r.num_decoding > 0
    ]
    # Rows by marginal gain have no chunk length of the batch that could settle.
    return {"steps": steps, "stages": _settling(steps) if mode == "elastic" else []}


def _settling(steps: Sequence[tuple[float, int, int]]) -> list[dict[str, float]]:
    found: list[dict[str, float]] = []
    begin = 0
    for i in range(1, len(steps) + 1):
        load = steps[begin][1]
        if i < len(steps) and 2 / 3 < steps[i][1] / load < 3 / 2:
            continue
        stage = steps[begin:i]
        if len(stage) >= 3 * SETTLE_STEPS:
            lengths = [step[2] for step in stage]
            usual = sorted(lengths)[len(lengths) // 2]
            off = [not usual / 2 <= length <= usual * 2 for length in lengths]
            settled = next(k for k in range(len(off) + 1) if not any(off[k : k + SETTLE_STEPS]))
            late = lengths[settled:]
            changes = sum(a != b for a, b in itertools.pairwise(late))
            found.append(
                {
                    "start_s": stage[0][0], "load": stage[len(stage) // 2][1],
                    "num_steps": len(stage), "usual_chunk_length": usual,
                    "settled_after_steps": settled,
                    "share_off": sum(off[settled:]) / max(1, len(late)),
                    "changes_per_100_steps": 100 * changes / max(1, len(late)),
                }
            )  # fmt: skip
        begin = i
    return found


RAMPS = {
    "ramp 1 to 400 and back": [
        (1, 0.0, 12000),
        (49, 4.0, 2600),
        (150, 12.0, 900),
        (200, 18.0, 500),
    ],
    "bursts": [(4, 0.0, 8000), (120, 3.0, 200), (120, 9.0, 200), (120, 15.0, 200)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", help="sweeps whose name contains this")
    arguments = parser.parse_args()
    traces = load_traces()
    report: dict[str, Any] = {
        "benchmark": "simulate_policies", "commit": git_commit(), "machine": machine(),
        "sweeps": {}, "ramps": {},
    }  # fmt: skip
    for name in SWEEPS:
        if arguments.only is None or arguments.only in name:
            print(name)
            report["sweeps"][name] = sweep(name, traces)
    for name, groups in RAMPS.items():
        if arguments.only is None or arguments.only in name:
            for mode in ("elastic", "elastic_per_request"):
                report["ramps"][f"{name}, {mode}"] = result = stages(mode, traces, groups)
                print(f"{name}, {mode}")
                for stage in result["stages"]:
                    print("  ", {k: round(v, 2) for k, v in stage.items()})
    if arguments.output:
        arguments.output.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
