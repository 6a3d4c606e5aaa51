"""What the command line shows: tables, answers, and the live view of unmasking."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .bench import BenchRow
from .bench_serving import ServingRow
from .evaluate import EvalResult, Score
from .events import DenoiseEvent, Event, snapshot_pieces
from .outputs import RequestOutput
from .slo import Capacity
from .summary import Comparison
from .tokenizer import Tokenizer

FRAME_SECONDS = 0.04  # the demo model is faster than the eye
_STYLES = {"known": "", "fresh": "bold black on bright_green", "mask": "dim"}


def watch(
    console: Console, tokenizer: Tokenizer, events: Iterator[Event], title: str
) -> RequestOutput:
    """Animates denoising events: masks dim, new tokens highlighted. Returns the output."""
    output = None
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        for event in events:
            assert isinstance(event, DenoiseEvent)
            body = Text()
            for text, kind in snapshot_pieces(tokenizer, event.token_ids, set(event.committed)):
                body.append(text, _STYLES[kind])
            if event.output is not None:
                output = event.output
                body = Text(output.outputs[0].text or "")
            caption = f"forward {event.step}, {len(event.committed)} new"
            live.update(Panel(body, title=title, subtitle=caption), refresh=True)
            if event.output is None:
                time.sleep(FRAME_SECONDS)
    assert output is not None
    return output


def metrics_line(output: RequestOutput, *, speed: bool = True) -> str:
    """One line on the cost of a request; `speed` means little where frames are held back."""
    metrics, completion = output.metrics, output.outputs[0]
    rate = metrics.num_output_tokens / max(metrics.latency, 1e-9)
    return (
        f"{metrics.num_output_tokens} tokens in {metrics.nfe} forwards "
        f"({metrics.tokens_per_forward:.2f} a forward, {metrics.rows_per_token:.2f} rows a token), "
        + (f"{rate:.0f} tok/s, " if speed else "")
        + completion.finish_reason
    )


def eval_table(result: EvalResult, title: str) -> Table:
    table = _table(title, ["family"], ["prompts", "exact match", "95% interval"])
    for family, score in [*result.families.items(), ("all", result.overall)]:
        style = "bold" if family == "all" else ""
        table.add_row(family, str(score.total), _percent(score.accuracy), _interval(score),
                      style=style)  # fmt: skip
    return table


def eval_line(result: EvalResult) -> str:
    return (
        f"{result.tokens_per_forward:.2f} tokens per forward, {result.rows_per_token:.2f} rows per "
        f"token, {result.tokens_per_second:.0f} tok/s, {result.num_tokens} tokens in "
        f"{result.seconds:.1f} s"
    )


def bench_table(rows: Sequence[BenchRow]) -> Table:
    """Fits 80 columns. "spread", of several rounds, is their range in percent of the median one;
    "match" is exact match in percent, then its 95% interval."""
    num_rounds = len(rows[0].rounds)
    spread = ["spread"] if num_rounds > 1 else []
    columns = ["load", "tok/s", *spread, "ms/step", "tok/fwd", "rows/tok", "match", "95%"]
    title = f"offline, {rows[0].num_prompts} prompts"
    title += f", median of {num_rounds} rounds" if num_rounds > 1 else ""
    table = _table(title, ["mode"], columns)
    for i, row in enumerate(rows):
        share = 100 * (row.highest - row.lowest) / row.tokens_per_second
        table.add_row(
            row.mode, str(row.concurrency), f"{row.tokens_per_second:.0f}",
            *[f"{share:.1f}%" for _ in spread], f"{row.ms_per_step:.2f}",
            f"{row.tokens_per_forward:.2f}", f"{row.rows_per_token:.2f}",
            _percent(row.accuracy.accuracy), _interval(row.accuracy),
            end_section=i + 1 < len(rows) and rows[i + 1].concurrency != row.concurrency,
        )  # fmt: skip
    return table


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """Regret of elastic arms in percent of the best fixed arm, and of the best good enough one."""
    columns = ["load", "best fixed", "regret", "best good", "regret", "/block", "/ar"]
    table = _table("elastic against fixed arms", ["mode"], columns)
    for item in comparisons:
        cells = []
        for regret in (item.against_all, item.against_good):
            cells += ["-", "-"] if regret is None else [regret.best, f"{100 * regret.regret:.1f}%"]
        for ratio in (item.over_block, item.over_ar):
            cells.append("-" if ratio is None else f"{ratio:.2f}x")
        table.add_row(item.mode, str(item.concurrency), *cells)
    return table


def serving_table(rows: Sequence[ServingRow], has_slo: bool) -> Table:
    """Fits 80 columns. Milliseconds to the first token and per further one, 50th and 99th
    percentile; percent of requests that finished and that met the SLO; exact match, percent."""
    columns = ["rate", "tok/s", "TTFT", "p99", "TPOT", "p99", "done", "SLO", "match"]
    table = _table("serving, requests per second; ms at p50 and p99", ["mode"], columns)
    for i, row in enumerate(rows):
        found, times = row.summary, []
        for pair in (found.ttft_ms, found.tpot_ms):
            times += ["-" if t is None else _short(t) for t in (pair.p50, pair.p99)]
        table.add_row(
            row.mode, f"{row.rate:.4g}", f"{found.tokens_per_second:.0f}", *times,
            f"{100 * found.num_finished / found.num_requests:.0f}",
            _percent(found.attainment) if has_slo else "-",
            "-" if row.accuracy is None else _percent(row.accuracy.accuracy),
            end_section=i + 1 < len(rows) and rows[i + 1].rate != row.rate,
        )  # fmt: skip
    return table


def capacity_table(capacities: Mapping[str, Capacity]) -> Table:
    """Requests per second at which enough requests meet the SLO, and where they do not any more."""
    table = _table("capacity, requests per second", ["mode"], ["meets SLO", "does not", "runs"])
    for name, found in capacities.items():
        limit = "-" if found.limit is None else f"{found.limit:.3g}"
        table.add_row(name, f"{found.rate:.3g}", limit, str(len(found.probes)))
    return table


def facts_table(facts: Sequence[tuple[str, str]], title: str) -> Table:
    """Two columns, no header."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    table.show_header = False
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, Text(value))
    return table


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.show_edge = False
    table.padding = (0, 1, 0, 0)
    for name in left:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def format_bytes(count: int) -> str:
    value, units = float(count), ["B", "KiB", "MiB", "GiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def _short(value: float) -> str:
    """Three digits, more only before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _interval(score: Score) -> str:
    return f"{100 * score.low:.1f}-{100 * score.high:.1f}"
