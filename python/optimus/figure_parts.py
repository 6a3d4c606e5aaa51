"""What the figures of benchmark reports share: colours and names of arms, labels, axes.

Colours stay apart under every colour blindness, and lines differ in marker or weight as well; fixed
chunk lengths are context and stay grey.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

Report = Mapping[str, Any]
Row = Mapping[str, Any]

INK, GREY, LINE = "#1f2328", "#59636e", "#d1d9e0"
ORANGE, BLUE, PURPLE, GREEN = "#d55e00", "#0072b2", "#b0509a", "#00795a"
LIGHT_GREY, DARK_GREY = 0.78, 0.42  # of the shortest and the longest fixed chunk
PX_PER_INCH = 100
LABEL_GAP = 0.062  # of the height of the axes
WIDTH = 9.0  # inches: the width of a README
STYLE: dict[Any, Any] = {
    "font.family": ["sans-serif"],
    "font.sans-serif": ["Inter", "Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 10.5,
    "axes.edgecolor": LINE, "axes.labelcolor": GREY, "axes.titlecolor": INK,
    "axes.titlesize": 12, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": "#eceff2", "grid.linewidth": 0.8,
    "xtick.color": GREY, "ytick.color": GREY, "xtick.major.size": 0, "ytick.major.size": 0,
    "xtick.minor.size": 0, "ytick.minor.size": 0, "text.color": INK, "legend.frameon": False,
    "figure.facecolor": "white", "svg.fonttype": "path", "svg.hashsalt": "optimus",
}  # fmt: skip


def arm_style(mode: str, longest_chunk: int = 32) -> dict[str, Any]:
    """Line style of an arm: the same in every figure."""
    name, _, suffix = mode.partition("/")
    fixed = {"linewidth": 1.4, "markersize": 4, "zorder": 3}
    if name == "ar":
        return {"color": INK, "linestyle": (0, (4, 2)), "marker": "", **fixed}
    if name == "oracle":
        return {"color": GREY, "linestyle": (0, (1, 1.5)), "marker": "", **fixed}
    if name == "block":
        return {"color": ORANGE, "marker": "s", **fixed | {"linewidth": 1.8}}
    if name == "schedule":
        return {"color": GREEN, "marker": "v", **fixed | {"linewidth": 1.8}}
    if name == "elastic":
        return {"color": BLUE, "marker": "o", "linewidth": 2.6, "markersize": 6, "zorder": 5}
    if name == "elastic_per_request":
        return {"color": PURPLE, "marker": "D", "linewidth": 2.2, "markersize": 5, "zorder": 4}
    length = int(name.partition(":")[2] or 4)
    share = min(1.0, length.bit_length() / max(1, longest_chunk.bit_length()))
    grey = LIGHT_GREY + (DARK_GREY - LIGHT_GREY) * share
    line = {"color": str(round(grey, 3)), "marker": ".", "zorder": 2}
    return {**fixed, **line, "linestyle": ":" if suffix else "-"}


def arm_label(mode: str) -> str:
    """What a reader calls it."""
    name, _, suffix = mode.partition("/")
    names = {"ar": "AR", "elastic_per_request": "elastic, per request"}
    label = names.get(name, name.replace("chunk:", "chunk "))
    return f"{label}, {suffix}" if suffix else label


def modes_of(rows: Sequence[Row]) -> list[str]:
    """In their order, each once."""
    return list(dict.fromkeys(row["mode"] for row in rows))


def longest_chunk(modes: Sequence[str]) -> int:
    lengths = [int(m) for mode in modes for m in re.findall(r"^chunk:(\d+)", mode)]
    return max(lengths, default=32)


def subtitle(report: Report) -> str:
    """Where and with what it was measured."""
    arguments, machine = report.get("arguments", {}), report.get("machine", {})
    model = Path(arguments.get("model") or "demo model").name
    curve = arguments.get("simulate") or arguments.get("curve")
    if curve:
        return f"simulated: {Path(curve).stem}, {model}"
    where = machine.get("gpu") or machine.get("cpu") or ""
    cores = f", {machine['cores']} cores" if machine.get("cores") and not machine.get("gpu") else ""
    return f"{model}, {where}{cores}"


def write_note(ax: Axes, text: str) -> None:
    """A grey line under the title."""
    ax.annotate(text, (0, 1), (0, 7), xycoords="axes fraction", textcoords="offset points",
                color=GREY, fontsize=10)  # fmt: skip


def write_heading(figure: Figure, title: str, note: str) -> None:
    top = 1 - 0.12 / figure.get_figheight()
    figure.text(0.012, top, title, fontsize=12, weight="bold", va="top")
    figure.text(0.012, top - 0.23 / figure.get_figheight(), note, color=GREY, fontsize=10, va="top")


def set_load_axis(ax: Axes, loads: Sequence[int]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks(loads, [str(load) for load in loads])
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("requests at once")
    if len(loads) == 1:
        ax.set_xlim(loads[0] / 2, loads[0] * 2)


def label_ends(ax: Axes, x: float, ends: Sequence[tuple[str, float, str]]) -> None:
    """Names of lines (name, y at the right end, colour) beside the axes, moved apart where they
    would overlap."""

    def height(y: float) -> float:
        return float(ax.transAxes.inverted().transform(ax.transData.transform((x, y)))[1])

    placed = spread([height(y) for _, y, _ in ends], LABEL_GAP)
    placed = [at - max(0.0, max(placed) - 1.0) for at in placed]
    for (text, y, color), at in zip(ends, placed, strict=True):
        is_grey = color.replace(".", "").isdecimal()
        ax.annotate(
            text, (x, y), (1.04, at), textcoords="axes fraction", va="center", fontsize=10,
            color=GREY if is_grey else color,
            weight="bold" if color in (BLUE, PURPLE) else "normal",
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.7, "shrinkA": 2,
                        "shrinkB": 5, "relpos": (0, 0.5)},
        )  # fmt: skip


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Moves positions apart to at least `gap`; their order stays, and the mean of those moved."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    groups: list[list[int]] = []
    centres: list[float] = []
    for i in order:
        groups.append([i])
        centres.append(positions[i])
        while len(groups) > 1:
            room = gap * (len(groups[-2]) + len(groups[-1])) / 2
            if centres[-1] - centres[-2] >= room - 1e-12:
                break
            groups[-2:] = [groups[-2] + groups[-1]]
            centres[-2:] = [sum(positions[k] for k in groups[-1]) / len(groups[-1])]
    placed = [0.0] * len(positions)
    for group, centre in zip(groups, centres, strict=True):
        for k, i in enumerate(group):
            placed[i] = centre + gap * (k - (len(group) - 1) / 2)
    return placed
