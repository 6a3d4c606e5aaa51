"""Options and helpers that several commands of the command line share."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .llm import LLM
    from .sampling_params import SamplingParams

Model = Annotated[Path | None, typer.Option(help="Checkpoint directory. Default: the demo model.")]
Mode = Annotated[
    str,
    typer.Option(
        help="ar, block, chunk (or chunk:4), elastic or elastic_per_request.", show_default=True
    ),
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


def load_llm(
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


def sampling_params(
    threshold: float | None, max_tokens: int | None, temperature: float | None
) -> SamplingParams:
    from .sampling_params import SamplingParams

    return SamplingParams(
        confidence_threshold=threshold, max_tokens=max_tokens, temperature=temperature
    )


def print_json(value: Any, indent: int | None = 1) -> None:
    sys.stdout.write(json.dumps(value, indent=indent, ensure_ascii=False) + "\n")
