"""Figures of benchmark reports (`optimus bench ... --output`). Needs the extra "bench".

optimus bench figures REPORT.json --output DIR
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .arms import parse_arm
from .figure_parts import (
    BLUE,
    GREY,
    INK,
    LINE,
    ORANGE,
    PX_PER_INCH,
    STYLE,
    WIDTH,
    Report,
    Row,
    arm_label,
    arm_style,
    label_ends,
    longest_chunk,
    modes_of,
    set_load_axis,
    subtitle,
    write_heading,
    write_note,
)


def draw_report(report: Report, directory: Path, prefix: str = "") -> list[Path]:
    """Every figure that the report has data for, as PNG and SVG; returns the files.

    Raises ValueError for a report of an unknown kind.
    """
    kinds = {
        "offline": _offline_figures, "serving": _serving_figures, "simulate": _simulate_figures,
    }  # fmt: skip
    kind = report.get("kind") or report.get("benchmark", "offline")
    if kind not in kinds:
        raise ValueError(f"[figures] kind must be one of {', '.join(kinds)}, got {kind!r}")
    directory.mkdir(parents=True, exist_ok=True)
    files = []
    with plt.rc_context(STYLE):
        for name, figure in kinds[kind](report):
            for suffix in ("png", "svg"):
                files.append(directory / f"{prefix}{name}.{suffix}")
                metadata = {"Date": None} if suffix == "svg" else None
                figure.savefig(files[-1], dpi=2 * PX_PER_INCH, metadata=metadata)
            plt.close(figure)
    return files


def load_report(path: Path) -> dict[str, Any]:
    """Raises ValueError for a file that is no report."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        report["rows"][0]["mode"]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"[figures] {path} is no benchmark report: {error!r}") from None
    return dict(report)


def _offline_figures(report: Report) -> Iterator[tuple[str, Figure]]:
    yield "throughput", throughput_over_load(report)
    yield "accuracy_front", accuracy_front(report)
    yield "accuracy", accuracy_bars(report)
    if any(row.get("reliability") for row in report["rows"]):
        yield "reliability", reliability(report)


def _simulate_figures(report: Report) -> Iterator[tuple[str, Figure]]:
    yield "throughput", throughput_over_load(report)


def _serving_figures(report: Report) -> Iterator[tuple[str, Figure]]:
    is_ramp = report.get("arguments", {}).get("pattern") == "ramp"
    for row in report["rows"]:
        if parse_arm(row["mode"]).is_elastic and row.get("timeline"):
            name = re.sub(r"[^\w.]+", "_", f"timeline_{row['mode']}_{row['rate']:g}")
            yield name, timeline(row, is_ramp)
    if report.get("capacities"):
        yield "capacity", capacity_bars(report)


# -------------------------------------------------------------------------------------- offline


def throughput_over_load(report: Report) -> Figure:
    """Tokens per second over concurrency, an arm a line; accuracy beside each name if known."""
    rows = report["rows"]
    modes, loads = modes_of(rows), sorted({row["concurrency"] for row in rows})
    figure, ax = plt.subplots(figsize=(WIDTH, 4.8))
    ends: list[tuple[str, float, str]] = []
    for mode in modes:
        line = sorted((r for r in rows if r["mode"] == mode), key=lambda r: r["concurrency"])
        style = arm_style(mode, longest_chunk(modes))
        x, y = [r["concurrency"] for r in line], [r["tokens_per_second"] for r in line]
        ax.plot(x, y, **style)
        low, high = [r.get("lowest") for r in line], [r.get("highest") for r in line]
        if None not in low and low != high:
            ax.vlines(x, low, high, color=style["color"], linewidth=1.2, alpha=0.5, zorder=1)
        score = line[-1].get("accuracy")
        label = arm_label(mode) + (f"  {100 * score['accuracy']:.1f}" if score else "")
        ends.append((label, y[-1], style["color"]))
    has_accuracy = any(row.get("accuracy") for row in rows)
    set_load_axis(ax, loads)
    rates = [row["tokens_per_second"] for row in rows]
    if max(rates) > 8 * min(rates):
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_minor_formatter(NullFormatter())
    else:
        ax.set_ylim(0, 1.06 * max(row.get("highest") or row["tokens_per_second"] for row in rows))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
    ax.set_ylabel("tokens per second")
    ax.set_title("Throughput over load" + ", with accuracy" * has_accuracy, pad=22)
    note = "right: exact match, %, at the highest load; " if has_accuracy else ""
    write_note(ax, note + subtitle(report))
    figure.subplots_adjust(left=0.085, right=0.72 if has_accuracy else 0.78, top=0.86, bottom=0.12)
    label_ends(ax, loads[-1], ends)
    return figure


def accuracy_front(report: Report) -> Figure:
    """Accuracy against throughput, a panel per load; the front joins what nothing beats in both."""
    rows = report["rows"]
    modes, loads = modes_of(rows), sorted({row["concurrency"] for row in rows})
    columns = min(len(loads), 3)
    lines = -(-len(loads) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(WIDTH, 0.9 + 2.6 * lines), sharey=True, squeeze=False
    )
    for ax in axes.flat[len(loads) :]:
        ax.set_visible(False)
    for ax, load in zip(axes.flat, loads):
        here = [row for row in rows if row["concurrency"] == load]
        front = pareto_front([(r["tokens_per_second"], r["accuracy"]["accuracy"]) for r in here])
        ax.plot([x for x, _ in front], [100 * y for _, y in front], color=LINE, linewidth=5,
                marker="o", markersize=14, zorder=1)  # fmt: skip
        for row in here:
            style = arm_style(row["mode"], longest_chunk(modes))
            score = row["accuracy"]
            x, y = row["tokens_per_second"], 100 * score["accuracy"]
            marker = style["marker"] or "x"
            ax.plot(x, y, linestyle="", color=style["color"], zorder=style["zorder"],
                    marker="o" if marker == "." else marker, markersize=7)  # fmt: skip
        ax.set_title(f"{load} at once", fontsize=10.5)
        ax.set_xlim(0, 1.12 * max(r["tokens_per_second"] for r in here))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
        ax.xaxis.set_major_locator(plt.MaxNLocator(4))
    for ax in axes[:, 0]:
        ax.set_ylabel("exact match, %")
    for ax in axes[-1]:
        ax.set_xlabel("tokens per second")
    write_heading(figure, "Accuracy against throughput", subtitle(report))
    handles = [
        plt.Line2D([], [], linestyle="", markersize=7, color=s["color"], label=arm_label(mode),
                   marker={"": "x", ".": "o"}.get(s["marker"], s["marker"]))
        for mode, s in ((m, arm_style(m, longest_chunk(modes))) for m in modes)
    ]  # fmt: skip
    figure.legend(handles=handles, loc="lower center", ncols=min(5, len(handles)), fontsize=9.5)
    height = figure.get_figheight()
    legend = (0.2 + 0.22 * -(-len(handles) // 5)) / height
    figure.tight_layout(rect=(0, legend, 1, 1 - 0.5 / height), h_pad=1.5)
    return figure


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that no other point beats or equals in both coordinates, by ascending first one."""
    front: list[tuple[float, float]] = []
    for point in sorted(set(points), reverse=True):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front[::-1]


def accuracy_bars(report: Report) -> Figure:
    """Exact match of every arm with its 95% interval, at the highest load."""
    load = max(row["concurrency"] for row in report["rows"])
    rows = [row for row in report["rows"] if row["concurrency"] == load][::-1]
    modes = modes_of(rows)
    figure, ax = plt.subplots(figsize=(WIDTH, 1.5 + 0.33 * len(rows)))
    for i, row in enumerate(rows):
        score = {k: 100 * row["accuracy"][k] for k in ("accuracy", "low", "high")}
        style = arm_style(row["mode"], longest_chunk(modes))
        ax.plot([score["low"], score["high"]], [i, i], color=style["color"], linewidth=2.4,
                solid_capstyle="round", zorder=2)  # fmt: skip
        ax.plot(score["accuracy"], i, marker="o", markersize=7, color=style["color"], zorder=3)
        ax.text(1.01, i, f"{score['accuracy']:.1f}", va="center", fontsize=10,
                transform=ax.get_yaxis_transform())  # fmt: skip
    block = next((row for row in rows if row["mode"] == "block"), None)
    if block is not None:
        ax.axvline(100 * block["accuracy"]["accuracy"], color=ORANGE, linewidth=1, zorder=1,
                   linestyle=(0, (4, 3)))  # fmt: skip
    ax.set_yticks(range(len(rows)), [arm_label(row["mode"]) for row in rows])
    ax.tick_params(axis="y", labelcolor=INK)
    ax.grid(axis="y", visible=False)
    ax.set_ylim(-0.6, len(rows) - 0.4)
    ax.set_xlabel("exact match, % (95% interval); dashed: block decoding")
    ax.set_title("Accuracy", pad=22)
    prompts = rows[0]["num_prompts"]
    write_note(ax, f"{prompts} paired prompts, {load} requests at once; {subtitle(report)}")
    figure.tight_layout()
    return figure


def reliability(report: Report) -> Figure:
    """Expected against realised commits: by predicted probability, and by rank of the mask."""
    rows = [row for row in report["rows"] if row.get("reliability")]
    modes = modes_of(rows)
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 4.2), width_ratios=(1, 1.25))
    left.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for mode in modes:
        style = arm_style(mode)
        runs = [row["reliability"] for row in rows if row["mode"] == mode]
        bins = _pooled([run["by_probability"] for run in runs])
        most = max((count for count, _, _ in bins), default=1)
        x, y, sizes = [], [], []
        for count, predicted, committed in bins:
            if count >= 20:
                x.append(predicted / count)
                y.append(committed / count)
                sizes.append(18 + 150 * count / most)
        left.plot(x, y, color=style["color"], linewidth=1.2, zorder=2)
        left.scatter(x, y, s=sizes, color=style["color"], marker=style["marker"], alpha=0.85,
                     zorder=3, label=arm_label(mode), linewidth=0, clip_on=False)  # fmt: skip
        ranks = _pooled([run["by_rank"] for run in runs])
        known = [(i + 1, p / n, c / n) for i, (n, p, c) in enumerate(ranks) if n >= 20]
        right.plot([r for r, _, _ in known], [p for _, p, _ in known], color=style["color"],
                   linewidth=1.4, linestyle=(0, (3, 2)))  # fmt: skip
        right.plot([r for r, _, _ in known], [c for _, _, c in known], color=style["color"],
                   marker=style["marker"], markersize=4.5, linewidth=1.4)  # fmt: skip
    left.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="predicted probability of a commit",
             ylabel="share that committed")  # fmt: skip
    left.set_title("By prediction (area: masks)", fontsize=10.5)
    left.legend(loc="upper left", fontsize=9.5)
    right.set(ylim=(0, 1.03), xlabel="rank of the mask in its chunk", ylabel="commits per mask")
    right.set_title("By rank: realised (solid), expected (dashed)", fontsize=10.5)
    write_heading(figure, "Expected against realised commits", subtitle(report))
    figure.tight_layout(rect=(0, 0, 1, 0.88), w_pad=2.5)
    return figure


def _pooled(runs: Sequence[Sequence[Sequence[float]]]) -> list[tuple[float, float, float]]:
    """(count, predicted, committed) per bin, summed over runs."""
    width = max((len(run) for run in runs), default=0)
    bins = [[run[i] for run in runs if i < len(run)] for i in range(width)]
    return [(sum(b[0] for b in bin), sum(b[1] for b in bin), sum(b[2] for b in bin))
            for bin in bins]  # fmt: skip


# -------------------------------------------------------------------------------------- serving


def timeline(row: Row, is_ramp: bool = False) -> Figure:
    """Load above, chunk length below, over the time of one run."""
    data = row["timeline"]
    bin_s = data["bin_s"]
    edges = [i * bin_s for i in range(len(data["time_s"]) + 1)]
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(WIDTH, 5.0), sharex=True, height_ratios=(1, 1.05)
    )
    top.stairs(data["decoding"], edges, color=BLUE, alpha=0.25, fill=True, linewidth=0)
    top.stairs(data["decoding"], edges, color=BLUE, linewidth=1.8)
    top.set_ylabel("requests")
    lines = [("decoding", BLUE)]
    if max(data["waiting"]) > 0:
        top.stairs(data["waiting"], edges, color=ORANGE, linewidth=1.5)
        lines.append(("waiting", ORANGE))
    top.set_ylim(0, 1.1 * max(1.0, *data["decoding"], *data["waiting"]))
    _line_legend(top, lines)
    columns = {  # nothing is drawn where nothing was decoded
        name: [math.nan if value is None else value for value in data[name]]
        for name in ("chosen", "chunk_mean", "chunk_p10", "chunk_p90")
    }
    chosen, evaluated = "chosen", "evaluated, mean"
    if row["mode"] == "elastic_per_request":
        chosen, evaluated = "longest chosen", "evaluated, mean and 10th to 90th percentile"
        bottom.stairs(columns["chunk_p90"], edges, baseline=columns["chunk_p10"], fill=True,
                      color=GREY, alpha=0.16, linewidth=0)  # fmt: skip
    bottom.stairs(columns["chunk_mean"], edges, baseline=None, color=GREY, linewidth=1.5)
    bottom.stairs(columns["chosen"], edges, baseline=None, color=INK, linewidth=2)
    _line_legend(bottom, [(chosen, INK), (evaluated, GREY)])
    bottom.set_yscale("log", base=2)
    longest = max([c for c in data["chunk_p90"] + data["chosen"] if c is not None], default=2)
    ticks = [1 << i for i in range(max(2, math.ceil(math.log2(longest)) + 1))]
    bottom.set_yticks(ticks, [str(t) for t in ticks])
    bottom.yaxis.set_minor_formatter(NullFormatter())
    bottom.set_ylim(0.9, 1.15 * longest)
    bottom.set(xlabel="seconds", ylabel="chunk length")
    bottom.set_xlim(0, edges[-1])
    top.set_title(f"{arm_label(row['mode']).capitalize()}: load and chunk length over time", pad=22)
    write_note(top, f"{row['rate']:g} requests per second{' at the peak' if is_ramp else ''}")
    figure.tight_layout(h_pad=1.2)
    return figure


def _line_legend(ax: Axes, lines: Sequence[tuple[str, str]]) -> None:
    """Above the right end of the axes, where no data is."""
    handles = [plt.Line2D([], [], color=color, linewidth=2, label=name) for name, color in lines]
    ax.legend(handles=handles, loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=len(lines),
              fontsize=9.5, borderaxespad=0.1)  # fmt: skip


def capacity_bars(report: Report) -> Figure:
    """Requests per second at which enough requests meet the SLO."""
    capacities = report["capacities"]
    modes = list(capacities)[::-1]
    figure, ax = plt.subplots(figsize=(WIDTH, 1.5 + 0.38 * len(modes)))
    most = max([capacities[m]["rate"] for m in modes] + [1e-9])
    for i, mode in enumerate(modes):
        rate = capacities[mode]["rate"]
        style = arm_style(mode, longest_chunk(modes))
        ax.barh(i, rate, height=0.62, color=style["color"], zorder=2)
        ax.text(rate + 0.01 * most, i, f"{rate:.3g}", va="center", fontsize=10.5)
    ax.set_yticks(range(len(modes)), [arm_label(mode) for mode in modes])
    ax.tick_params(axis="y", labelcolor=INK)
    ax.grid(axis="y", visible=False)
    ax.set_xlim(0, 1.1 * most)
    ax.set_xlabel("requests per second")
    share = next(iter(capacities.values()))["share"]
    ax.set_title("Serving capacity", pad=22)
    slo = report.get("slo", {})
    names = {"ttft_ms": "TTFT", "tpot_ms": "time per token"}
    limits = [f"{names[k]} {v:g} ms" for k, v in slo.items() if v is not None]
    write_note(ax, f"{100 * share:.0f}% of requests within {', '.join(limits)}; {subtitle(report)}")
    figure.tight_layout()
    return figure
