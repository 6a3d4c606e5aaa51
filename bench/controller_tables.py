"""README tables about the controller, from bench/results/simulate_policies.json."""

from __future__ import annotations

from typing import Any

Result = dict[str, Any]


def _speed(result: Result, mode: str) -> float:
    return next(r["tokens_per_second"] for r in result["rows"] if r["mode"] == mode)


def loads_table(report: Result, sweep: str) -> str:
    """One line per load: tokens per second of every kind of arm."""
    lines = [
        "| requests at once | AR | block of 32 | best fixed chunk | elastic | elastic per request "
        "| oracle |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in report["sweeps"][sweep]:
        best = result["best_fixed"]
        lines.append(
            f"| {result['load']} | {_speed(result, 'ar'):,.0f} | {_speed(result, 'block'):,.0f} "
            f"| {_speed(result, best):,.0f} (c = {best.partition(':')[2]}) "
            f"| {_speed(result, 'elastic'):,.0f} | {_speed(result, 'elastic_per_request'):,.0f} "
            f"| {_speed(result, 'oracle'):,.0f} |"
        )
    return "\n".join(lines)


def _range(values: list[float]) -> str:
    return f"{min(values):.3f} to {max(values):.3f}"


def _largest(results: list[Result], key: str) -> str:
    best = max(results, key=lambda result: result[key])
    return f"{best[key]:.1f}x at {best['load']}"


def _ar_wins(results: list[Result]) -> str:
    loads = [r["load"] for r in results if max(r["elastic_vs_ar"], r["per_request_vs_ar"]) < 1]
    return ", ".join(map(str, loads)) or "nowhere"


def sweeps_table(report: Result) -> str:
    """One line per sweep: against the best fixed chunk length, AR and fixed blocks."""
    lines = [
        "| curve, requests | elastic / best fixed | per request / best fixed "
        "| oracle of chunks / best fixed | elastic / AR, most | elastic / block, most "
        "| AR wins at |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, results in report["sweeps"].items():
        columns = [
            _range([r[f"{key}_vs_best"] for r in results])
            for key in ("elastic", "per_request", "chunk_oracle")
        ]
        columns += [_largest(results, "elastic_vs_ar"), _largest(results, "elastic_vs_block")]
        lines.append(f"| {name} | {' | '.join(columns)} | {_ar_wins(results)} |")
    return "\n".join(lines)


def settling_table(report: Result) -> str:
    """Stages of the ramp and the bursts, the batch-wide policy."""
    lines = [
        "| load | requests decoding | steps | chunk length | settled after, steps |",
        "|---|---|---|---|---|",
    ]
    for name, ramp in report["ramps"].items():
        title, _, mode = name.rpartition(", ")
        if mode != "elastic":
            continue
        for stage in ramp["stages"]:
            lines.append(
                f"| {title} | {stage['load']} | {stage['num_steps']} "
                f"| {stage['usual_chunk_length']} | {stage['settled_after_steps']} |"
            )
    return "\n".join(lines)


def capacity_table(report: Result) -> str:
    """Highest request rate that still meets the SLO, per arm."""
    names = list(report["capacities"])
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    rates = [report["capacities"][name]["rate"] for name in names]
    lines.append(f"| requests per second | {' | '.join(f'{rate:.0f}' for rate in rates)} |")
    return "\n".join(lines)
