"""The drawing of `elastic_decoding.py`: a white card, laid out in pixels of its 900 px width."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, Literal

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path

Kind = Literal["committed", "no token", "again"]

WIDTH = 900
MARGIN = 36
PX_PER_INCH = 100
PT = 72 / PX_PER_INCH  # font sizes below are in pixels, too
INK, GREY, LINE, EMPTY = "#1f2328", "#59636e", "#d1d9e0", "#f0f2f5"
RULE = "#a8b2bd"  # between blocks
# Blue and orange stay apart under every colour blindness; the three differ in lightness as well.
COLORS: dict[Kind, str] = {"committed": "#0b5cad", "no token": "#f5a742", "again": "#9fcbee"}
LEGEND: list[tuple[str, str]] = [
    (COLORS["committed"], "token committed"),
    (COLORS["again"], "known token, fed again"),
    (COLORS["no token"], "evaluated, no token"),
    (EMPTY, "not computed"),
]
GRID_TOP, GRID_HEIGHT = 198, 400  # of the three panels
AXIS_WIDTH, PANEL_GAP, MIN_PANEL_WIDTH = 34, 30, 142
LOAD_TOP, LOAD_CELL = 714, (74, 27)
MIN_LABELLED_SHARE = 0.05
STYLE: dict[Any, Any] = {
    "font.family": ["sans-serif"],
    "font.sans-serif": ["Inter", "Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans"],
    "svg.fonttype": "path",
    "svg.hashsalt": "optimus",
}


@dataclass(frozen=True)
class Cell:
    """A row of a step, by position in the answer (below 0: the prompt)."""

    step: int
    position: int
    kind: Kind


@dataclass(frozen=True)
class ArmPicture:
    """One decode mode: a cell per row computed, in `num_forwards` steps."""

    title: str
    caption: str
    cells: Sequence[Cell]
    prompt_len: int
    num_tokens: int
    num_forwards: int


@dataclass(frozen=True)
class LoadPicture:
    """Requests running -> chunk length -> steps that chose it; where that was measured."""

    chunk_arms: Sequence[int]
    chosen: Mapping[int, Counter[int]]
    setting: str


def text(ax: Axes, x: float, y: float, value: str, size: float = 13, **style: Any) -> float:
    """Returns the width."""
    done = ax.text(x, y, value, fontsize=size * PT, **({"color": INK, "va": "baseline"} | style))
    return done.get_window_extent().width * PX_PER_INCH / ax.figure.dpi


def boxes(
    ax: Axes,
    places: Sequence[tuple[float, float]],
    size: tuple[float, float],
    color: str,
    **style: Any,
) -> None:
    """Equal boxes by their top left corners, as one path."""
    width, height = size
    corners = [(0, 0), (width, 0), (width, height), (0, height), (0, 0)]
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * len(places)
    points = [(x + dx, y + dy) for x, y in places for dx, dy in corners]
    if points:
        ax.add_patch(PathPatch(Path(points, codes), facecolor=color, linewidth=0, **style))


def line(ax: Axes, x: Sequence[float], y: Sequence[float], color: str, **style: Any) -> None:
    options: dict[str, Any] = {"linewidth": 0.8, "solid_capstyle": "butt"} | style
    ax.plot(x, y, color=color, **options)


def canvas(height: float) -> tuple[plt.Figure, Axes]:
    """A transparent figure with a rounded white card; axes in pixels, y downwards."""
    figure = plt.figure(figsize=(WIDTH / PX_PER_INCH, height / PX_PER_INCH))
    figure.patch.set_alpha(0)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, WIDTH), ylim=(height, 0))
    ax.axis("off")
    shape = "round,pad=0,rounding_size=14"
    ax.add_patch(FancyBboxPatch((1, 1), WIDTH - 2, height - 2, boxstyle=shape, facecolor="white",
                                edgecolor=LINE, linewidth=1))  # fmt: skip
    return figure, ax


def draw_heading(ax: Axes, num_tokens: int) -> None:
    text(ax, MARGIN, 54, "One answer, three ways to compute it", 22, weight="bold")
    note = f"{num_tokens} tokens. A column is a forward step, a line is a position of the answer."
    text(ax, MARGIN, 80, note, 13, color=GREY)
    x = float(MARGIN)
    for color, label in LEGEND:
        boxes(ax, [(x, 101)], (12, 12), color)
        x += 18 + text(ax, x + 18, 112, label, 12) + 26


def draw_panels(ax: Axes, panels: Sequence[ArmPicture], block_length: int) -> None:
    """All panels share one scale, so that width is the number of forwards."""
    positions = [cell.position for panel in panels for cell in panel.cells]
    first, last = min(positions), max(positions)
    room = WIDTH - 2 * MARGIN - AXIS_WIDTH - PANEL_GAP * (len(panels) - 1)
    width = cell_width([panel.num_forwards for panel in panels], room)
    height = GRID_HEIGHT / (last - first + 1)
    size = (width - min(1.0, width / 5), height - min(1.0, height / 5))

    def top(position: float) -> float:
        return GRID_TOP + (position - first) * height

    draw_positions(ax, panels[0], (first, last), block_length, top)
    x = float(MARGIN + AXIS_WIDTH)
    for panel in panels:
        text(ax, x, GRID_TOP - 32, panel.title, 15, weight="bold")
        text(ax, x, GRID_TOP - 13, panel.caption, 12, color=GREY)
        panel_width = panel.num_forwards * width
        boxes(ax, [(x, GRID_TOP)], (panel_width, GRID_HEIGHT), EMPTY)
        for kind, color in COLORS.items():
            places = [(x + c.step * width, top(c.position)) for c in panel.cells if c.kind == kind]
            boxes(ax, places, size, color)
        for p in boundaries(panel, first, last, block_length):
            line(ax, (x, x + panel_width), (top(p) - 0.5,) * 2, RULE)
        if panel.num_tokens <= last:
            y = top(panel.num_tokens) - 0.5
            line(ax, (x, x + panel_width), (y, y), INK, linestyle=(0, (3, 2)))
        draw_totals(ax, x, panel)
        x += max(panel_width, MIN_PANEL_WIDTH) + PANEL_GAP


def cell_width(columns: Sequence[int], room: float) -> float:
    """The widest cell at which all panels fit, narrow ones padded to MIN_PANEL_WIDTH."""
    width = 24.0
    while width > 1 and sum(max(n * width, MIN_PANEL_WIDTH) for n in columns) > room:
        width -= 0.05
    return width


def boundaries(panel: ArmPicture, first: int, last: int, block_length: int) -> list[int]:
    return [p for p in range(first + 1, last + 1) if (panel.prompt_len + p) % block_length == 0]


def draw_positions(
    ax: Axes, panel: ArmPicture, span: tuple[int, int], block_length: int, top: Any
) -> None:
    """The axis on the left: where blocks begin and where the answer ends."""
    x = MARGIN + AXIS_WIDTH - 8
    ticks = {0: "1"} | {p: str(p + 1) for p in boundaries(panel, *span, block_length) if p > 0}
    ticks = {p: label for p, label in ticks.items() if abs(p - panel.num_tokens) > 3}
    for position, label in ticks.items():
        text(ax, x, top(position + 0.5), label, 11, color=GREY, ha="right", va="center")
    text(ax, x, top(panel.num_tokens), "end", 11, color=GREY, ha="right", va="center")


def draw_totals(ax: Axes, x: float, panel: ArmPicture) -> None:
    y = GRID_TOP + GRID_HEIGHT
    text(ax, x, y + 28, f"{panel.num_forwards} forwards", 17, weight="bold")
    rows = len(panel.cells)
    text(ax, x, y + 49, f"{rows} rows, {rows / panel.num_tokens:.1f} a token", 12, color=GREY)


def draw_load(ax: Axes, load: LoadPicture) -> None:
    """The choices of "elastic": words on the left, the grid on the right."""
    line(ax, (MARGIN, WIDTH - MARGIN), (LOAD_TOP - 34,) * 2, LINE)
    text(ax, MARGIN, LOAD_TOP + 16, "Chunk length under load", 17, weight="bold")
    notes = [
        "Share of steps. Chosen before",
        "every step, from measured step",
        "times and recent commits.",
    ]
    for i, note in enumerate(notes):
        text(ax, MARGIN, LOAD_TOP + 42 + 19 * i, note, 13, color=GREY)
    width, height = LOAD_CELL
    bottom = LOAD_TOP + height * len(load.chunk_arms)
    text(ax, MARGIN, bottom - 6, load.setting, 11, color=GREY)
    x0, x1 = WIDTH - MARGIN - width * len(load.chosen), WIDTH - MARGIN
    text(ax, (x0 + x1) / 2, bottom + 37, "requests running", 12, ha="center")
    text(ax, x0 - 46, (LOAD_TOP + bottom) / 2, "chunk length", 12, rotation=90, ha="center",
         va="center")  # fmt: skip
    for i, arm in enumerate(sorted(load.chunk_arms)):
        y = bottom - (i + 0.5) * height - 1
        text(ax, x0 - 12, y, str(arm), 12, color=GREY, ha="right", va="center_baseline")
    for i, (requests, counts) in enumerate(load.chosen.items()):
        middle = x0 + (i + 0.5) * width - 1
        text(ax, middle, bottom + 16, str(requests), 12, color=GREY, ha="center")
        draw_choices(ax, x0 + i * width, bottom, sorted(load.chunk_arms), counts)


def draw_choices(
    ax: Axes, x: float, bottom: float, arms: Sequence[int], counts: Counter[int]
) -> None:
    """One column: a box per chunk length, the darker the more steps chose it."""
    width, height = LOAD_CELL
    for i, arm in enumerate(arms):
        share = counts[arm] / max(1, counts.total())
        y = bottom - (i + 1) * height
        boxes(ax, [(x, y)], (width - 3, height - 3), EMPTY)
        boxes(ax, [(x, y)], (width - 3, height - 3), COLORS["committed"], alpha=share)
        if share >= MIN_LABELLED_SHARE:
            color = "white" if share > 0.45 else INK
            text(ax, x + width / 2 - 1.5, y + height / 2 - 1, f"{100 * share:.0f}%", 11,
                 color=color, ha="center", va="center_baseline")  # fmt: skip


def draw(
    panels: Sequence[ArmPicture], load: LoadPicture, block_length: int, stem: FilePath
) -> None:
    """Writes stem.svg and stem.png."""
    height = LOAD_TOP + LOAD_CELL[1] * len(load.chunk_arms) + 68
    with plt.rc_context(STYLE):
        figure, ax = canvas(height)
        draw_heading(ax, panels[-1].num_tokens)
        draw_panels(ax, panels, block_length)
        draw_load(ax, load)
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
        figure.savefig(stem.with_suffix(".png"), dpi=2 * PX_PER_INCH)
        plt.close(figure)
