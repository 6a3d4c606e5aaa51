"""`optimus bench`: speed of the decode modes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .cli_options import (
    AsJson,
    BlockLength,
    Dtype,
    KvPolicy,
    MaskTokenId,
    MaxTokens,
    Model,
    Raw,
    Seed,
    Tasks,
    Temperature,
    Threads,
    Threshold,
    load_llm,
    print_json,
    sampling_params,
)

if TYPE_CHECKING:
    from . import _C

QualityFloor = Annotated[
    str, typer.Option(help="block, none or an accuracy in [0, 1]: what elastic arms must keep.")
]
MaxRows = Annotated[int, typer.Option(help="Most rows per step.")]
KvMemory = Annotated[str | None, typer.Option(help="Bytes, or like 512MiB.")]

bench_app = typer.Typer(help="Measure speed.", no_args_is_help=True)

_out = Console(highlight=False, soft_wrap=True)
_err = Console(stderr=True, highlight=False, soft_wrap=True)


@bench_app.command()
def offline(
    model: Model = None,
    tasks: Tasks = None,
    modes: Annotated[
        str,
        typer.Option(
            help="Comma-separated: ar, block, chunk:N, chunk:all, schedule, elastic, "
            "elastic_per_request; with /freeze or /refresh, that KV policy."
        ),
    ] = "ar,block,chunk:4,chunk:8,elastic",
    concurrency: Annotated[str, typer.Option(help="Comma-separated.")] = "1,4,16",
    num_prompts: Annotated[int, typer.Option(help="The first N tasks.")] = 32,
    rounds: Annotated[int, typer.Option(help="Runs of every arm, interleaved.")] = 1,
    schedule: Annotated[str | None, typer.Option(help="Of mode schedule: 1-16:16,17-:4.")] = None,
    quality_floor: QualityFloor = "block",
    target_tpot_ms: Annotated[float | None, typer.Option(help="For elastic arms.")] = None,
    max_num_batched_rows: MaxRows = 512,
    kv_cache_memory: KvMemory = None,
    kv_policy: KvPolicy = None,
    threshold: Threshold = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    threads: Threads = None,
    block_length: BlockLength = None,
    mask_token_id: MaskTokenId = None,
    raw: Raw = False,
    step_log: Annotated[Path | None, typer.Option(help="Append every step as JSON lines.")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Chrome trace of the last round: chrome://tracing.")
    ] = None,
    explain: Annotated[
        int | None,
        typer.Option(min=1, help="Explain this step (from 1) of every elastic arm's last round."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write JSON to this file.")] = None,
    json_output: AsJson = False,
) -> None:
    """Compare decode modes over a fixed set of prompts, in one process over one set of weights."""
    from . import display
    from .arms import parse_schedule_text
    from .bench import BenchRun, bench_offline, profile_to_dict
    from .evaluate import load_tasks
    from .machine import git_commit, machine
    from .summary import compare

    concurrencies = [_positive_int(c) for c in _split(concurrency)]
    floor = parse_floor(quality_floor)
    arguments = {
        "model": None if model is None else str(model), "modes": _split(modes),
        "concurrency": concurrencies, "num_prompts": num_prompts, "rounds": rounds,
        "schedule": schedule, "quality_floor": floor, "target_tpot_ms": target_tpot_ms,
        "max_num_batched_rows": max_num_batched_rows, "threshold": threshold,
        "max_tokens": max_tokens, "temperature": temperature, "seed": seed, "dtype": dtype,
        "threads": threads, "raw": raw, "tasks": None if tasks is None else str(tasks),
    }  # fmt: skip
    task_list = load_tasks(tasks, num_prompts)
    llm = load_llm(
        model, "elastic", None, kv_policy, seed=seed, dtype=dtype, num_threads=threads,
        block_length=block_length, mask_token_id=mask_token_id, quality_floor=floor,
        target_tpot_ms=target_tpot_ms, max_num_batched_rows=max_num_batched_rows,
        kv_cache_memory=kv_cache_memory,
    )  # fmt: skip
    log = RunLog(step_log, trace, explain, last_round=rounds - 1)

    def on_run(run: BenchRun) -> None:
        name = f"{run.arm.name} at {run.concurrency}"
        _err.print(f"[dim]{name}: {run.tokens_per_second:.0f} tok/s[/dim]")
        labels = {"mode": run.arm.name, "concurrency": run.concurrency, "round": run.round}
        log.add(name, labels, run.totals.records, run.arm.is_elastic)

    rows = bench_offline(
        llm, task_list, _split(modes), concurrencies,
        sampling_params(threshold, max_tokens, temperature), rounds=rounds,
        schedule=parse_schedule_text(schedule), raw=raw, on_run=on_run,
    )  # fmt: skip
    comparisons = compare(rows, floor)
    report = {
        "kind": "offline",
        "machine": machine(),
        "commit": git_commit(),
        "arguments": arguments | {"kv_policy": llm.options.kv_policy},
        "latency_profile": profile_to_dict(llm.latency_profile),
        "rows": [row.to_dict() for row in rows],
        "comparisons": [item.to_dict() for item in comparisons],
    }
    log.finish()
    write_report(report, output, json_output)
    if not json_output:
        _out.print(display.bench_table(rows))
        if comparisons:
            _out.print(display.comparison_table(comparisons))
        for text in log.explanations:
            _out.print(text, markup=False)


class RunLog:
    """The records of runs, for --step-log, --trace and --explain.

    explanations: of the step `explain` (from 1) of every elastic run of the last round.
    """

    def __init__(
        self, step_log: Path | None, trace: Path | None, explain: int | None, last_round: int
    ) -> None:
        self.step_log, self.trace, self.explain = step_log, trace, explain
        self.last_round = last_round
        self.explanations: list[str] = []
        self._lanes: dict[str, list[_C.StepRecord]] = {}

    def add(
        self,
        name: str,
        labels: dict[str, Any],
        records: Sequence[_C.StepRecord],
        is_elastic: bool,
    ) -> None:
        from .step_log import explain, write_json_lines

        if self.step_log is not None:
            write_json_lines(self.step_log, records, labels)
        if labels["round"] != self.last_round:
            return
        if self.trace is not None:
            self._lanes[name] = list(records)
        if self.explain is None or not is_elastic:
            return
        if self.explain <= len(records):
            self.explanations.append(f"{name}, {explain(records[self.explain - 1])}")
        else:
            self.explanations.append(f"{name}: the last round had {len(records)} steps")

    def finish(self) -> None:
        from .step_log import write_chrome_trace

        if self.trace is not None:
            write_chrome_trace(self.trace, self._lanes)


def parse_floor(text: str) -> float | str | None:
    """ "block", "none" or an accuracy. Raises ValueError."""
    if text in ("block", "none"):
        return text if text == "block" else None
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"[cli] --quality-floor takes block, none or an accuracy, got {text!r}"
        ) from None


def write_report(report: dict[str, Any], output: Path | None, json_output: bool) -> None:
    if output is not None:
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if json_output:
        print_json(report)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"[cli] --concurrency takes ints >= 1, got {text!r}")
    return int(text)
