"""`optimus bench`: speed of the decode modes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    sampling_params,
)
from .cli_report import (
    Explain,
    KvMemory,
    MaxRows,
    Modes,
    Output,
    QualityFloor,
    RunLog,
    Schedule,
    StepLog,
    TargetTpot,
    Trace,
    check_output,
    parse_floor,
    parse_positive_ints,
    split_list,
    write_report,
)
from .cli_serving import serving

bench_app = typer.Typer(help="Measure speed.", no_args_is_help=True)
bench_app.command()(serving)

_out = Console(highlight=False, soft_wrap=True)
_err = Console(stderr=True, highlight=False, soft_wrap=True)


@bench_app.command()
def offline(
    model: Model = None,
    tasks: Tasks = None,
    modes: Modes = "ar,block,chunk:4,chunk:8,elastic",
    concurrency: Annotated[str, typer.Option(help="Comma-separated.")] = "1,4,16",
    num_prompts: Annotated[int, typer.Option(help="The first N tasks.")] = 32,
    rounds: Annotated[int, typer.Option(help="Runs of every arm, interleaved.")] = 1,
    schedule: Schedule = None,
    quality_floor: QualityFloor = "block",
    target_tpot_ms: TargetTpot = None,
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
    step_log: StepLog = None,
    trace: Trace = None,
    explain: Explain = None,
    output: Output = None,
    json_output: AsJson = False,
) -> None:
    """Compare decode modes over a fixed set of prompts, in one process over one set of weights."""
    from . import display
    from .arms import parse_schedule_text
    from .bench import BenchRun, bench_offline
    from .evaluate import load_tasks
    from .machine import git_commit, machine
    from .profiles import profile_to_dict
    from .summary import compare

    check_output(output, step_log, trace)
    concurrencies = parse_positive_ints(concurrency, "--concurrency")
    names = split_list(modes, "--modes")
    floor = parse_floor(quality_floor)
    arguments = {
        "model": None if model is None else str(model), "modes": names,
        "concurrency": concurrencies, "num_prompts": num_prompts, "rounds": rounds,
        "schedule": schedule, "quality_floor": floor, "target_tpot_ms": target_tpot_ms,
        "max_num_batched_rows": max_num_batched_rows, "threshold": threshold,
        "max_tokens": max_tokens, "temperature": temperature, "seed": seed, "dtype": dtype,
        "threads": threads, "raw": raw, "tasks": None if tasks is None else str(tasks),
        "kv_cache_memory": kv_cache_memory, "block_length": block_length,
        "mask_token_id": mask_token_id,
    }  # fmt: skip
    task_list = load_tasks(tasks, num_prompts)
    llm = load_llm(
        model, "elastic", None, kv_policy, seed=seed, dtype=dtype, num_threads=threads,
        block_length=block_length, mask_token_id=mask_token_id, quality_floor=floor,
        target_tpot_ms=target_tpot_ms, max_num_batched_rows=max_num_batched_rows,
        kv_cache_memory=kv_cache_memory,
    )  # fmt: skip
    log = RunLog(step_log, trace, explain)

    def on_run(run: BenchRun) -> None:
        name = f"{run.arm.name} at {run.concurrency}"
        _err.print(f"[dim]{name}: {run.tokens_per_second:.0f} tok/s[/dim]")
        labels = {"mode": run.arm.name, "concurrency": run.concurrency, "round": run.round}
        log.add(
            name, labels, run.totals.records, is_elastic=run.arm.is_elastic,
            is_last=run.round == rounds - 1,
        )  # fmt: skip

    rows = bench_offline(
        llm, task_list, names, concurrencies,
        sampling_params(threshold, max_tokens, temperature), rounds=rounds,
        schedule=parse_schedule_text(schedule), raw=raw, on_run=on_run,
    )  # fmt: skip
    comparisons = compare(rows, floor)
    report = {
        "kind": "offline",
        "machine": machine(),
        "commit": git_commit(),
        "grown_from": llm.checkpoint.grown_from,
        "arguments": arguments | {"kv_policy": llm.options.kv_policy},
        "latency_profile": llm.latency_profile and profile_to_dict(llm.latency_profile),
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


@bench_app.command()
def figures(
    reports: Annotated[list[Path], typer.Argument(help="JSON of bench offline or serving.")],
    output: Annotated[Path, typer.Option(help="Directory of the PNG and SVG files.")],
) -> None:
    """Draw reports (needs the extra "bench"). Several reports: their names come first in files."""
    try:
        from .figures import draw_report, load_report
    except ImportError as error:
        raise RuntimeError(
            f"[cli] figures need matplotlib: install optimus-dllm[bench] ({error})"
        ) from None

    loaded = [(path, load_report(path)) for path in reports]
    for path, report in loaded:
        prefix = f"{path.stem}_" if len(loaded) > 1 else ""
        for file in draw_report(report, output, prefix):
            _out.print(str(file), markup=False)
