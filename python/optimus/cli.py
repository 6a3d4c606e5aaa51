"""The `optimus` command. Only this module (and `display`) prints; the work is in the library."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from .cli_grow import grow_command

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
bench_app = typer.Typer(help="Measure speed.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
app.command(name="grow")(grow_command)

_out = Console(highlight=False, soft_wrap=True)
_err = Console(stderr=True, highlight=False, soft_wrap=True)

# Options that several commands share.
Model = Annotated[Path | None, typer.Option(help="Checkpoint directory. Default: the demo model.")]
Mode = Annotated[
    str, typer.Option(help="ar, block, chunk (or chunk:4), or elastic.", show_default=True)
]
ChunkLength = Annotated[int | None, typer.Option(help="Masks per forward, for --mode chunk.")]
KvPolicy = Annotated[str | None, typer.Option(help="freeze, refresh or auto.")]
Threshold = Annotated[
    float | None, typer.Option(help="Confidence above which masks commit. Default: the model's.")
]
MaxTokens = Annotated[int | None, typer.Option(help="Most output tokens. Default: the context.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy. Default: the model's.")]
Seed = Annotated[int, typer.Option(help="Of sampling at a temperature above 0.")]
Dtype = Annotated[str, typer.Option(help="float32 or bfloat16; auto is float32 on the CPU.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads. Default: all cores.")]
BlockLength = Annotated[int | None, typer.Option(help="If the checkpoint does not say.")]
MaskTokenId = Annotated[int | None, typer.Option(help="If the checkpoint does not say.")]
Raw = Annotated[bool, typer.Option("--raw", help="No chat template.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on standard output.")]
Tasks = Annotated[
    Path | None, typer.Option(help="JSONL of id, task, prompt, answer. Default: demo tasks.")
]


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
    llm = _load(
        model, mode, chunk_length, kv_policy, seed=seed, dtype=dtype, num_threads=threads,
        block_length=block_length, mask_token_id=mask_token_id,
    )  # fmt: skip
    params = _params(threshold, max_tokens, temperature)
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
    llm = _load(
        model, mode, chunk_length, kv_policy, seed=seed, dtype=dtype, num_threads=threads,
        block_length=block_length, mask_token_id=mask_token_id,
    )  # fmt: skip
    params = _params(threshold, max_tokens, temperature)
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
        _print_json({"facts": found.facts, "problems": found.problems})
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
    llm = _load(
        model, mode, chunk_length, kv_policy, seed=seed, dtype=dtype, num_threads=threads,
        block_length=block_length, mask_token_id=mask_token_id, max_num_seqs=concurrency,
    )  # fmt: skip
    result = evaluate(llm, task_list, _params(threshold, max_tokens, temperature), raw=raw)
    if json_output:
        arguments = {
            "mode": mode, "chunk_length": chunk_length, "kv_policy": llm.options.kv_policy,
            "threshold": threshold, "concurrency": concurrency, "num_prompts": len(task_list),
        }  # fmt: skip
        grown_from = llm.checkpoint.grown_from
        _print_json({"grown_from": grown_from, "arguments": arguments, **result.to_dict()})
        return
    _out.print(display.eval_table(result, f"exact match, mode {mode}"))
    _out.print(display.eval_line(result))


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
    from .bench import bench_offline, git_commit, machine
    from .evaluate import load_tasks

    concurrencies = [_positive_int(c) for c in _split(concurrency)]
    arguments = {
        "model": None if model is None else str(model), "modes": _split(modes),
        "concurrency": concurrencies,
        "num_prompts": num_prompts, "threshold": threshold, "max_tokens": max_tokens,
        "temperature": temperature, "seed": seed, "dtype": dtype, "threads": threads, "raw": raw,
        "tasks": None if tasks is None else str(tasks),
    }  # fmt: skip
    task_list = load_tasks(tasks, num_prompts)
    llm = _load(
        model, "elastic", None, kv_policy, seed=seed, dtype=dtype, num_threads=threads,
        block_length=block_length, mask_token_id=mask_token_id,
    )  # fmt: skip
    rows = bench_offline(
        llm, task_list, _split(modes), concurrencies,
        _params(threshold, max_tokens, temperature), raw=raw,
        on_row=lambda row: _err.print(
            f"[dim]{row.mode} at {row.concurrency}: {row.tokens_per_second:.0f} tok/s[/dim]"
        ),
    )  # fmt: skip
    report = {
        "machine": machine(),
        "commit": git_commit(),
        "grown_from": llm.checkpoint.grown_from,
        "arguments": arguments | {"kv_policy": llm.options.kv_policy},
        "latency_profile": llm.latency_profile,
        "rows": [row.to_dict() for row in rows],
    }
    if output is not None:
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if json_output:
        _print_json(report)
    else:
        _out.print(display.bench_table(rows))


def _load(
    model: Path | None,
    mode: str,
    chunk_length: int | None,
    kv_policy: str | None,
    *,
    num_threads: int | None,
    **options: Any,
) -> LLM:
    from .llm import LLM
    from .options import parse_mode

    decode_mode, mode_length = parse_mode(mode)
    if kv_policy is not None:
        options["kv_policy"] = kv_policy
    return LLM(
        model,
        decode_mode=decode_mode,
        chunk_length=mode_length if chunk_length is None else chunk_length,
        num_threads=num_threads,
        **options,
    )


def _params(
    threshold: float | None, max_tokens: int | None, temperature: float | None
) -> SamplingParams:
    from .sampling_params import SamplingParams

    return SamplingParams(
        confidence_threshold=threshold, max_tokens=max_tokens, temperature=temperature
    )


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
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
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
            _print_json(output.to_dict(), indent=None)
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


def _print_json(value: Any, indent: int | None = 1) -> None:
    sys.stdout.write(json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"[cli] --concurrency takes ints >= 1, got {text!r}")
    return int(text)


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
