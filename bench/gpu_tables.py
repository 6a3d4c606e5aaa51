"""README tables about the CUDA backend, from the JSON files of its benchmarks in bench/results/."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Result = dict[str, Any]

STEP_LAYERS = 36  # of SDAR-8B, which share a schedule


def attention_grid(cell: Callable[[str], str]) -> str:
    """A table of bench_block_attention_cuda's cases; `cell` gives the text of one by its name."""
    lines = [
        "| keys | masks a request | 1 request | 8 | 32 | 128 |",
        "|---|---|---|---|---|---|",
    ]
    for kv in (1024, 4096):
        for c in (1, 4, 8, 16, 32):
            cells = [cell(f"kv {kv} c {c} b {batch}") for batch in (1, 8, 32, 128)]
            lines.append(f"| {kv} | {c} | {' | '.join(cells)} |")
    return "\n".join(lines)


def attention_table(report: Result) -> str:
    """Microseconds of block_attention beside a plain read of the same keys and values."""
    by_name = {result["name"]: result for result in report["results"]}

    def cell(name: str) -> str:
        result = by_name.get(name)
        if result is None:
            return ""
        share = 100 * result["floor_us"] / result["layer_us"]
        return f"{result['layer_us']:.0f} ({share:.0f}%)"

    return attention_grid(cell)


def layer_us(result: Result) -> float:
    """Of block_attention, with a layer's part of the schedule of a step."""
    us: float = result["layer_us"] + result["schedule_us"] / STEP_LAYERS
    return us


def peers_table(report: Result, peers: Result) -> str:
    """block_attention beside the fastest other paged attention on the same machine, microseconds: a
    layer with its part of the schedule, of which others' is not counted."""
    ours = {result["name"]: layer_us(result) for result in report["results"]}
    both = {name: us for name, us in peers["results"].items() if us and name in ours}
    best = {name: min(us, key=us.__getitem__) for name, us in both.items()}
    ratios = [ours[name] / us[best[name]] for name, us in both.items()]

    def cell(name: str) -> str:
        if name not in both:
            return ""
        return f"{ours[name]:.1f} / {both[name][best[name]]:.1f} {best[name]}"

    low, high = min(ratios), max(ratios)
    found = f"All {len(ratios)} cells measured: {low:.2f} to {high:.2f} of the best other's."
    return f"{attention_grid(cell)}\n\n{found}"


def unequal_table(report: Result) -> str:
    """Microseconds of block_attention over unequal requests, and equal ones of the same bytes: a
    layer with its part of the schedule, which unequal requests make longer."""
    by_name = {result["name"]: result for result in report["results"]}
    cases = [
        ("32: 1 to 32 masks, 2,048 keys on average", "mixed b 32", "uniform like mixed b 32"),
        ("128: the same", "mixed b 128", "uniform like mixed b 128"),
        ("64: 320 keys, but one 32,000", "one 100x longer", "uniform like outlier"),
    ]
    lines = ["| requests | unequal | equal | ratio |", "|---|---|---|---|"]
    for label, *names in cases:
        unequal, equal = (layer_us(by_name[name]) for name in names)
        lines.append(f"| {label} | {unequal:.0f} | {equal:.0f} | {unequal / equal:.2f} |")
    return "\n".join(lines)


def prompts_table(report: Result) -> str:
    """Milliseconds of block_attention over prompts, and its arithmetic beside that of a product."""
    lines = [
        "| prompt | a layer, ms | TFLOP/s | of a product of 8192 x 8192 |",
        "|---|---|---|---|",
    ]
    for result in report["results"]:
        if "gemm_tflops" not in result:
            continue
        tflops = result["flops"] / result["layer_us"] * 1e-6
        lines.append(
            f"| {result['name'].removeprefix('prefill ')} | {result['layer_us'] * 1e-3:.3f} "
            f"| {tflops:.0f} | {100 * tflops / result['gemm_tflops']:.0f}% |"
        )
    return "\n".join(lines)


def steps_table(report: Result) -> str:
    """A whole step of the grown 8B model against its GEMMs alone and its KV bytes."""
    lines = [
        "| rows | step, ms | GEMMs alone, ms | reading KV, ms | step / (GEMMs + KV) |",
        "|---|---|---|---|---|",
    ]
    names = [(row, f"{row['rows']}") for row in report["rows"]]
    names += [(row, f"{row['rows']} of {row['num_seqs']} unequal") for row in report["unequal"]]
    for row, name in names:
        lines.append(
            f"| {name} | {row['step_ms']:.2f} | {row['gemm_ms']:.2f} | {row['kv_ms']:.2f} "
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


def kernels_table(report: Result) -> str:
    """The products and the kernels between them at SDAR-8B's shapes: microseconds, and a share of
    what the machine allows."""
    columns = (1, 32, 64, 128, 256, 512)
    found = {(r["op"], r["shape"], r["rows"]): r for r in report["results"]}
    products = [
        r["shape"] for r in report["results"]
        if r["op"] == "gemm" and r["shape"].startswith("SDAR-8B ") and r["rows"] == 1
    ]  # fmt: skip
    lines = [
        f"| kernel, at rows: | {' | '.join(map(str, columns))} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for shape in products:
        cells = [found["gemm", shape, rows] for rows in columns]
        shares = [f"{r['us']:.1f} ({r['percent_of_ceiling']:.0f}%)" for r in cells]
        name = shape.removeprefix("SDAR-8B ")
        lines.append(f"| gemm {name} | {' | '.join(shares)} |")
    small = (
        ("rms_norm", "SDAR-8B + residual"),
        ("qk_norm_rope_kv_write", "SDAR-8B"),
        ("silu_mul", "SDAR-8B"),
        ("unmask", "151936 greedy"),
    )
    for op, shape in small:
        cells = [found[op, shape, rows] for rows in columns]
        shares = [f"{r['us']:.1f} ({r['percent_of_copy']:.0f}%)" for r in cells]
        lines.append(f"| {op} | {' | '.join(shares)} |")
    return "\n".join(lines)
