"""`optimus calibrate`, `optimus profile`: what elastic decoding knows of a model and a machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .cli_options import (
    AsJson,
    BlockLength,
    Dtype,
    MaskTokenId,
    Model,
    Raw,
    Tasks,
    Threads,
    load_llm,
    print_json,
)
from .cli_report import parse_positive_ints

if TYPE_CHECKING:
    from . import _C
    from .calibration import Arm, Calibration

_out = Console(highlight=False, soft_wrap=True)
_err = Console(stderr=True, highlight=False, soft_wrap=True)


def calibrate_command(
    model: Model = None,
    tasks: Tasks = None,
    num_prompts: Annotated[int | None, typer.Option(help="The first N. Default: all.")] = None,
    chunk_lengths: Annotated[
        str | None,
        typer.Option(help="Comma-separated. Default: powers of two from 2 to the block."),
    ] = None,
    thresholds: Annotated[str, typer.Option(help="Comma-separated.")] = "0.8,0.9,0.95,0.99",
    max_tokens: Annotated[int, typer.Option(help="Most output tokens.")] = 512,
    concurrency: Annotated[int, typer.Option(help="Requests decoding at once.")] = 32,
    output: Annotated[
        Path | None, typer.Option(help="File to write or go on with. Default: in the cache.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what the file holds.")] = False,
    dtype: Dtype = "auto",
    threads: Threads = None,
    block_length: BlockLength = None,
    mask_token_id: MaskTokenId = None,
    raw: Raw = False,
    json_output: AsJson = False,
) -> None:
    """Measure the accuracy of every way of decoding, against block decoding on the same prompts.

    Elastic modes then leave out what is below their quality floor.
    """
    from .cache import model_hash
    from .calibrate import calibrate
    from .calibration import FILE_NAME, cached_file
    from .evaluate import load_tasks

    task_list = load_tasks(tasks, num_prompts)
    lengths = None
    if chunk_lengths is not None:
        lengths = parse_positive_ints(chunk_lengths, "--chunk-lengths")
    llm = load_llm(
        model, "block", None, None, dtype=dtype, num_threads=threads, block_length=block_length,
        mask_token_id=mask_token_id, max_num_seqs=concurrency, calibration=None,
    )  # fmt: skip
    directory = llm.checkpoint.path
    file = cached_file(model_hash(directory)) if output is None else output
    found = calibrate(
        llm, task_list, file,
        chunk_lengths=lengths,
        thresholds=_numbers(thresholds), max_tokens=max_tokens, fresh=fresh, raw=raw,
        on_arm=lambda arm: _err.print(f"[dim]{_line(arm)}[/dim]"),
    )  # fmt: skip
    if json_output:
        print_json(found.to_dict())
        return
    _out.print(arms_table(found))
    _out.print(f"written to {file}", markup=False)
    if output is None and (directory / FILE_NAME).exists():
        _out.print(
            f"{directory / FILE_NAME} comes first: pass LLM(calibration={str(file)!r}) to use this "
            "one",
            markup=False,
        )


def profile_command(
    model: Model = None,
    max_num_seqs: Annotated[int, typer.Option(help="Most requests decoding at once.")] = 32,
    max_num_batched_rows: Annotated[int, typer.Option(help="Most rows per step.")] = 512,
    repeats: Annotated[int, typer.Option(help="Every time is the median of so many.")] = 7,
    dtype: Dtype = "auto",
    threads: Threads = None,
    block_length: BlockLength = None,
    mask_token_id: MaskTokenId = None,
    json_output: AsJson = False,
) -> None:
    """Measure how long steps take, and keep it for the elastic modes."""
    from .profiles import measured_profile, profile_file, profile_key, profile_to_dict

    llm = load_llm(
        model, "block", None, None, dtype=dtype, num_threads=threads, block_length=block_length,
        mask_token_id=mask_token_id, max_num_seqs=max_num_seqs,
        max_num_batched_rows=max_num_batched_rows, calibration=None,
    )  # fmt: skip
    where: dict[str, Any] = {"device": llm.device, "dtype": llm.dtype}
    profile = measured_profile(llm.engine, llm.checkpoint, anew=True, repeats=repeats, **where)
    key = profile_key(llm.checkpoint, llm.engine.config, **where)
    if json_output:
        print_json({"key": key, "profile": profile_to_dict(profile)})
        return
    _out.print(curve_table(profile))
    _out.print(f"kept in {profile_file(key)}", markup=False)


def register(app: typer.Typer) -> None:
    """Adds both commands."""
    app.command("calibrate")(calibrate_command)
    app.command("profile")(profile_command)


def arms_table(found: Calibration, floor: float | str | None = "block") -> Table:
    """Every arm, and whether elastic decoding may use it with this quality floor."""
    total = found.arguments.get("num_prompts", 0)
    table = Table(title=f"accuracy on {total} prompts, difference from block at 95%")
    for name in ("threshold", "chunk", "KV", "right %", "vs block", "tok/fwd", "rows/tok", "floor"):
        table.add_column(name, justify="left" if name in ("KV", "floor") else "right", no_wrap=True)
    for arm in found.in_order():
        is_block = arm.chunk_length is None
        half = 50 * (arm.difference_high - arm.difference_low)
        table.add_row(
            f"{arm.threshold:g}",
            "block" if is_block else str(arm.chunk_length),
            "" if is_block else "refresh" if arm.refresh else "freeze",
            f"{100 * arm.accuracy:.1f}",
            "" if is_block else f"{100 * arm.difference:+.1f} ± {half:.1f}",
            f"{arm.tokens_per_forward:.2f}",
            f"{arm.rows_per_token:.2f}",
            "" if is_block else "yes" if arm.meets(floor) else "no",
        )
    return table


def curve_table(profile: _C.LatencyProfile) -> Table:
    """The curves of a profile, side by side."""
    table = Table(title="milliseconds of a step")
    for name in ("rows", "decode", "prefill", "us/row"):
        table.add_column(name, justify="right")
    prefill = dict(profile.prefill)
    for rows, ms in profile.decode:
        other = f"{prefill[rows]:.2f}" if rows in prefill else ""
        table.add_row(str(rows), f"{ms:.2f}", other, f"{1e3 * ms / rows:.0f}")
    for i, (keys, ms) in enumerate(profile.kv):
        if i == 0:
            table.add_section()
        table.add_row(f"{keys} keys", f"+{ms:.2f}", "", "")
    return table


def _line(arm: Arm) -> str:
    chunk = "block" if arm.chunk_length is None else f"chunk {arm.chunk_length}"
    policy = "" if arm.chunk_length is None else " refresh" if arm.refresh else " freeze"
    return f"{chunk}{policy} at {arm.threshold:g}: {arm.correct} of {arm.total} right"


def _numbers(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers:
        raise ValueError(f"[cli] numbers separated by commas were expected, got {text!r}")
    return numbers
