"""README tables about the CUDA backend, from the JSON files of its benchmarks in bench/results/."""

from __future__ import annotations

from typing import Any

Result = dict[str, Any]


def attention_table(report: Result) -> str:
    """Microseconds of block_attention beside a plain read of the same keys and values."""
    by_name = {result["name"]: result for result in report["results"]}
    lines = [
        "| keys | masks a request | 1 request | 8 | 32 | 128 |",
        "|---|---|---|---|---|---|",
    ]
    for kv in (1024, 4096):
        for c in (1, 4, 8, 16, 32):
            cells = []
            for batch in (1, 8, 32, 128):
                result = by_name.get(f"kv {kv} c {c} b {batch}")
                if result is None:
                    cells.append("")
                    continue
                share = 100 * result["floor_us"] / result["layer_us"]
                cells.append(f"{result['layer_us']:.0f} ({share:.0f}%)")
            lines.append(f"| {kv} | {c} | {' | '.join(cells)} |")
    return "\n".join(lines)


def steps_table(report: Result) -> str:
    """A whole step of the grown 8B model against its GEMMs alone and its KV bytes."""
    lines = [
        "| rows | step, ms | GEMMs alone, ms | reading KV, ms | step / (GEMMs + KV) |",
        "|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        lines.append(
            f"| {row['rows']} | {row['step_ms']:.2f} | {row['gemm_ms']:.2f} | {row['kv_ms']:.2f} "
            f"| {row['over_floor']:.2f} |"
        )
    return "\n".join(lines)


def throughput_table(report: Result) -> str:
    """Tokens per second and exact match of the grown 8B model."""
    rows = {(row["concurrency"], row["mode"]): row for row in report["rows"]}
    loads = sorted({load for load, _ in rows})
    modes = list(dict.fromkeys(row["mode"] for row in report["rows"]))
    lines = [f"| requests at once | {' | '.join(modes)} |", "|---" * (len(modes) + 1) + "|"]
    for load in loads:
        cells = []
        for mode in modes:
            row = rows.get((load, mode))
            cells.append(
                ""
                if row is None
                else f"{row['tokens_per_second']:,.0f} ({100 * row['accuracy']:.1f}%)"
            )
        lines.append(f"| {load} | {' | '.join(cells)} |")
    return "\n".join(lines)
