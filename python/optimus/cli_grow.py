"""`optimus grow`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

_out = Console(highlight=False, soft_wrap=True)
_err = Console(stderr=True, highlight=False, soft_wrap=True)


def grow_command(
    directory: Annotated[Path, typer.Argument(help="New directory of the grown checkpoint.")],
    to: Annotated[
        str,
        typer.Option(help="sdar-1.7b, sdar-4b, sdar-8b, or a config.json with the shapes."),
    ],
    model: Annotated[
        Path | None, typer.Option(help="Checkpoint to grow. Default: the demo model.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
    dtype: Annotated[str, typer.Option(help="Of the weights: bfloat16 or float32.")] = "bfloat16",
) -> None:
    """Grow a model to larger shapes: the same outputs at the cost of a big model."""
    from . import display
    from .config import DEMO_MODEL
    from .grow import grow
    from .inspect_checkpoint import inspect_checkpoint

    parent = DEMO_MODEL if model is None else model
    with _err.status("reading") as status:
        grow(
            parent, to, directory, seed=seed, dtype=dtype,
            on_tensor=lambda name, done, total: status.update(f"{done} of {total} tensors: {name}"),
        )  # fmt: skip
    facts = inspect_checkpoint(directory).facts
    _out.print(display.facts_table([(k, str(v)) for k, v in facts.items()], "checkpoint"))
