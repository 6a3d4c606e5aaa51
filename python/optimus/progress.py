"""The progress bar of `LLM.generate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(total: int, *, enabled: bool) -> Iterator[Callable[[int], None]]:
    """A bar on stderr over `total` requests; yields what to call with each one's output tokens.

    Nothing is drawn when disabled, empty, or when stderr is no terminal.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if not enabled or not total or not console.is_terminal:
        yield lambda num_tokens: None
        return
    from rich import progress

    columns = (
        progress.TextColumn("requests"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.fields[speed]:.0f} tok/s"),
    )
    with progress.Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=total, speed=0.0)
        num_tokens = 0

        def advance(new_tokens: int) -> None:
            nonlocal num_tokens
            num_tokens += new_tokens
            elapsed = bar.tasks[0].elapsed or 1e-9
            bar.update(task, advance=1, speed=num_tokens / elapsed)

        yield advance
