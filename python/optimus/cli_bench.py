"""`optimus bench`: speed of the decode modes."""

from __future__ import annotations

import json
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
    print_json,
    sampling_params,
)

bench_app = typer.Typer(help="Measure speed.", no_args_is_help=True)

_out = Console(highlight=False, soft_wrap=True)
_err = Console(stderr=True, highlight=False, soft_wrap=True)


@bench_app.command()
def offline(
    model: Model = None,
    tasks: Tasks = None,
    modes: Annotated[
        str, typer.Option(help="Comma-separated.")
    ] = "ar,block,chunk:4,chunk:8,elastic",
    concurrency: Annotated[str, typer.Option(help="Comma-separated.")] = "1,4,16",
    num_prompts: Annotated[int, typer.Option(help="The first N tasks.")] = 32,
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
    output: Annotated[Path | None, typer.Option(help="Write JSON to this file.")] = None,
    json_output: AsJson = False,
) -> None:
    """Compare decode modes over a fixed set of prompts, in one process over one set of weights."""
    from . import display
    from .bench import bench_offline, profile_to_dict
    from .evaluate import load_tasks
    from .machine import git_commit, machine

    concurrencies = [_positive_int(c) for c in _split(concurrency)]
    arguments = {
        "model": None if model is None else str(model), "modes": _split(modes),
        "concurrency": concurrencies,
        "num_prompts": num_prompts, "threshold": threshold, "max_tokens": max_tokens,
        "temperature": temperature, "seed": seed, "dtype": dtype, "threads": threads, "raw": raw,
        "tasks": None if tasks is None else str(tasks),
    }  # fmt: skip
    task_list = load_tasks(tasks, num_prompts)
    llm = load_llm(
        model, "elastic", None, kv_policy, seed=seed, dtype=dtype, num_threads=threads,
        block_length=block_length, mask_token_id=mask_token_id,
    )  # fmt: skip
    rows = bench_offline(
        llm, task_list, _split(modes), concurrencies,
        sampling_params(threshold, max_tokens, temperature), raw=raw,
        on_row=lambda row: _err.print(
            f"[dim]{row.mode} at {row.concurrency}: {row.tokens_per_second:.0f} tok/s[/dim]"
        ),
    )  # fmt: skip
    report = {
        "machine": machine(),
        "commit": git_commit(),
        "arguments": arguments | {"kv_policy": llm.options.kv_policy},
        "latency_profile": profile_to_dict(llm.latency_profile),
        "rows": [row.to_dict() for row in rows],
    }
    if output is not None:
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if json_output:
        print_json(report)
    else:
        _out.print(display.bench_table(rows))


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"[cli] --concurrency takes ints >= 1, got {text!r}")
    return int(text)
