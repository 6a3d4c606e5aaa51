"""The `optimus` command. Only the `cli` modules and `display` print; the work is in the library."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from .cli_bench import bench_app
from .cli_calibrate import register as register_calibrate
from .cli_grow import grow_command
from .cli_options import (
    AsJson,
    BlockLength,
    ChunkLength,
    Dtype,
    KvPolicy,
    MaskTokenId,
    MaxTokens,
    Mode,
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
from .cli_simulate import simulate

if TYPE_CHECKING:
    from .llm import LLM
    from .outputs import RequestOutput
    from .sampling_params import SamplingParams

app = typer.Typer(
    name="optimus",
    help="Inference engine for block-diffusion language models. "
    "Without --model, the demo model of the package runs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench_app, name="bench")
app.command()(simulate)
register_calibrate(app)
app.command(name="grow")(grow_command)

_out = Console(highlight=False, soft_wrap=True)
_err = Console(stderr=True, highlight=False, soft_wrap=True)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    if version:
        from . import __version__

        _out.print(f"optimus {__version__}")
        raise typer.Exit


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="Default: standard input.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="Prompts: .txt, one per line, or .jsonl with 'prompt'.")
    ] = None,
    model: Model = None,
    mode: Mode = "elastic",
    chunk_length: ChunkLength = None,
    kv_policy: KvPolicy = None,
    threshold: Threshold = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    threads: Threads = None,
    block_length: BlockLength = None,
    mask_token_id: MaskTokenId = None,
    raw: Raw = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show the text being unmasked.")] = False,
    json_output: AsJson = False,
) -> None:
    """Continue a prompt, a file of prompts, or standard input."""
    prompts = _read_prompts(prompt, file)
    if watch and (json_output or len(prompts) != 1):
        raise ValueError("[cli] --watch shows one prompt, and not as --json")
    llm = load_llm(
        model, mode, chunk_length, kv_policy, seed=seed, dtype=dtype, num_threads=threads,
        block_length=block_length, mask_token_id=mask_token_id,
    )  # fmt: skip
    params = sampling_params(threshold, max_tokens, temperature)
    has_template = llm.tokenizer is not None and llm.tokenizer.chat_template is not None
    chats = [[{"role": "user", "content": p}] for p in prompts]
    if watch and llm.tokenizer is not None:
        from . import display

        source: Any = chats[0] if has_template and not raw else prompts[0]
        events = llm.stream(source, params, mode="denoise")
        output = display.watch(_out, llm.tokenizer, events, mode)
        _err.print(f"[dim]{escape(display.metrics_line(output, speed=False))}[/dim]")
        return
    outputs = llm.chat(chats, params) if has_template and not raw else llm.generate(prompts, params)
    _print_outputs(prompts, outputs, json_output)


@app.command()
def chat(
    model: Model = None,
    mode: Mode = "elastic",
    chunk_length: ChunkLength = None,
    kv_policy: KvPolicy = None,
    threshold: Threshold = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    threads: Threads = None,
    block_length: BlockLength = None,
    mask_token_id: MaskTokenId = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
) -> None:
    """Talk to the model. /reset forgets the conversation, /exit or Ctrl-D ends it."""
    llm = load_llm(
        model, mode, chunk_length, kv_policy, seed=seed, dtype=dtype, num_threads=threads,
        block_length=block_length, mask_token_id=mask_token_id,
    )  # fmt: skip
    params = sampling_params(threshold, max_tokens, temperature)
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    _err.print("[dim]/reset forgets the conversation, /exit ends it[/dim]")
    while True:
        try:
            line = _out.input("[bold]> [/bold]").strip() if sys.stdin.isatty() else input()
        except EOFError:
            return
        if line == "/exit":
            return
        if line == "/reset":
            messages = list(opening)
        elif line:
            messages.append({"role": "user", "content": line})
            answer = _answer(llm, messages, params)
            if answer is None:
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": answer})


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(help="Checkpoint directory.")],
    block_length: BlockLength = None,
    mask_token_id: MaskTokenId = None,
    json_output: AsJson = False,
) -> None:
    """Say what was understood of a checkpoint, and what is wrong with it (then exit with 1)."""
    from . import display
    from .inspect_checkpoint import inspect_checkpoint

    found = inspect_checkpoint(directory, block_length=block_length, mask_token_id=mask_token_id)
    if json_output:
        print_json({"facts": found.facts, "problems": found.problems})
    else:
        facts = [(name, str(value)) for name, value in found.facts.items()]
        _out.print(display.facts_table(facts, "checkpoint"))
        for problem in found.problems:
            _out.print(f"[yellow]problem:[/yellow] {escape(problem)}")
    if found.problems:
        raise typer.Exit(1)


@app.command(name="eval")
def evaluate_command(
    model: Model = None,
    tasks: Tasks = None,
    mode: Mode = "elastic",
    chunk_length: ChunkLength = None,
    kv_policy: KvPolicy = None,
    threshold: Threshold = None,
    num_prompts: Annotated[int | None, typer.Option(help="The first N. Default: all.")] = None,
    concurrency: Annotated[int, typer.Option(help="Requests decoding at once.")] = 32,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    threads: Threads = None,
    block_length: BlockLength = None,
    mask_token_id: MaskTokenId = None,
    raw: Raw = False,
    json_output: AsJson = False,
) -> None:
    """Measure accuracy (exact match) on tasks with one right answer, and its cost."""
    from . import display
    from .evaluate import evaluate, load_tasks

    task_list = load_tasks(tasks, num_prompts)
    llm = load_llm(
        model, mode, chunk_length, kv_policy, seed=seed, dtype=dtype, num_threads=threads,
        block_length=block_length, mask_token_id=mask_token_id, max_num_seqs=concurrency,
    )  # fmt: skip
    result = evaluate(llm, task_list, sampling_params(threshold, max_tokens, temperature), raw=raw)
    if json_output:
        arguments = {
            "mode": mode, "chunk_length": chunk_length, "kv_policy": llm.options.kv_policy,
            "threshold": threshold, "concurrency": concurrency, "num_prompts": len(task_list),
        }  # fmt: skip
        grown_from = llm.checkpoint.grown_from
        print_json({"grown_from": grown_from, "arguments": arguments, **result.to_dict()})
        return
    _out.print(display.eval_table(result, f"exact match, mode {mode}"))
    _out.print(display.eval_line(result))


def _read_prompts(prompt: str | None, file: Path | None) -> list[str]:
    if (prompt is not None) and (file is not None):
        raise ValueError("[cli] give either a PROMPT or --file")
    if prompt is not None:
        return [prompt]
    if file is None:
        if sys.stdin.isatty():
            raise ValueError("[cli] give a PROMPT or --file, or pipe text in")
        return [sys.stdin.read().rstrip("\n")]
    if not file.exists():
        raise ValueError(f"[cli] {file} does not exist")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"[cli] {file} is not UTF-8: {error}") from None
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"[cli] {file} holds no prompts")
    if file.suffix != ".jsonl":
        return lines
    try:
        return [str(json.loads(line)["prompt"]) for line in lines]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"[cli] {file}: every line must hold a prompt: {error!r}") from None


def _print_outputs(prompts: list[str], outputs: list[RequestOutput], as_json: bool) -> None:
    from .display import metrics_line

    for prompt, output in zip(prompts, outputs, strict=True):
        if as_json:
            print_json(output.to_dict(), indent=None)
            continue
        if len(outputs) > 1:
            _out.print(f"[bold]> {escape(prompt)}[/bold]")
        _out.print(output.outputs[0].text, markup=False)
        _err.print(f"[dim]{escape(metrics_line(output))}[/dim]")


def _answer(llm: LLM, messages: list[dict[str, str]], params: SamplingParams) -> str | None:
    """Streams one answer; None if it was refused or interrupted."""
    from .display import metrics_line
    from .events import BlockEvent

    output = None
    try:
        for event in llm.stream(messages, params):
            assert isinstance(event, BlockEvent)
            _out.print(event.text, end="", markup=False)
            output = event.output
    except ValueError as error:
        _err.print(f"[red]error:[/red] {escape(str(error))} (/reset forgets the conversation)")
        return None
    except KeyboardInterrupt:
        _out.print("\n[dim]interrupted[/dim]")
        return None
    _out.print()
    assert output is not None
    _err.print(f"[dim]{escape(metrics_line(output))}[/dim]")
    return output.outputs[0].text


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; library errors become one line and exit code 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        app(args=given, prog_name="optimus")
    except (ValueError, RuntimeError, OSError) as error:
        if "--debug" in given:
            raise
        _err.print(f"[red]error:[/red] {escape(str(error))}")
        raise SystemExit(2) from None
