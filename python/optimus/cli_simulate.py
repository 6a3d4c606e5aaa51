"""`optimus simulate`: policies over loads on stated step-time curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .cli_report import check_output, parse_positive_ints, split_list

_out = Console(highlight=False, soft_wrap=True)


def simulate(
    curve: Annotated[
        str, typer.Option(help="h200-dense-8b, h200-moe-mini, a100-dense-8b, or a JSON file.")
    ] = "h200-dense-8b",
    modes: Annotated[
        str, typer.Option(help="Comma-separated; chunk:all is every power of two.")
    ] = "ar,block,chunk:all,elastic,elastic_per_request,oracle",
    concurrency: Annotated[str, typer.Option(help="Comma-separated.")] = "1,8,32,128,512",
    num_requests: Annotated[int, typer.Option(help="Per load, at least; 12 per slot else.")] = 600,
    prompt_len: Annotated[int | None, typer.Option(help="Default: the recorded answers'.")] = None,
    output_len: Annotated[int | None, typer.Option(help="Default: the recorded answers'.")] = None,
    thresholds: Annotated[str, typer.Option(help="Dealt out in turn.")] = "0.99",
    traces: Annotated[Path | None, typer.Option(help="Default: the demo model's.")] = None,
    jitter: Annotated[float, typer.Option(help="Relative deviation of step times.")] = 0.0,
    seed: int = 0,
    output: Annotated[Path | None, typer.Option(help="Write JSON to this file.")] = None,
) -> None:
    """Simulate closed loops: the engine's own scheduler and policies, a virtual clock, recorded
    confidences and a stated step-time curve."""
    from .arms import parse_arms
    from .curves import load_curve
    from .machine import git_commit, machine
    from .simulate import (
        ORACLE,
        SimulatedRow,
        Workload,
        oracle_row,
        simulate_closed_loop,
    )
    from .traces import load_traces

    check_output(output)
    names = split_list(modes, "--modes")
    arms = parse_arms([n for n in names if n != ORACLE], 32)
    profile, recorded = load_curve(curve), load_traces(traces)
    try:
        dealt = tuple(float(t) for t in split_list(thresholds, "--thresholds"))
    except ValueError:
        raise ValueError(f"[cli] --thresholds takes numbers, got {thresholds!r}") from None
    workload = Workload(prompt_len, output_len, dealt, seed=seed)
    rows: list[SimulatedRow] = []
    for load in parse_positive_ints(concurrency, "--concurrency"):
        count = max(num_requests, 12 * load)
        truth = {"jitter": jitter}
        of_load = [
            simulate_closed_loop(arm, profile, recorded, load, count, workload, simulator=truth)
            for arm in arms
        ]
        rows += of_load
        if ORACLE in names:
            rows.append(oracle_row(of_load))
    table = Table(title=f"simulated, {curve}", box=None)
    for column in ("load", "mode", "tok/s", "ms/step", "rows/step", "tok/fwd", "rows/tok"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    for row in rows:
        table.add_row(
            str(row.concurrency), row.mode, f"{row.tokens_per_second:.0f}",
            f"{row.ms_per_step:.2f}", f"{row.rows_per_step:.0f}", f"{row.tokens_per_forward:.2f}",
            f"{row.rows_per_token:.2f}",
        )  # fmt: skip
    _out.print(table)
    if output is not None:
        report = {
            "benchmark": "simulate",
            "machine": machine(),
            "commit": git_commit(),
            "arguments": {
                "curve": curve, "modes": names, "concurrency": concurrency,
                "num_requests": num_requests, "prompt_len": prompt_len, "output_len": output_len,
                "thresholds": thresholds, "jitter": jitter, "seed": seed,
            },
            "rows": [row.to_dict() for row in rows],
        }  # fmt: skip
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
