"""What the bench commands share: parsing, records of runs, reports."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_options import print_json

if TYPE_CHECKING:
    from . import _C

QualityFloor = Annotated[
    str, typer.Option(help="block, none or an accuracy in [0, 1]: what elastic arms must keep.")
]
MaxRows = Annotated[int, typer.Option(help="Most rows per step.")]
KvMemory = Annotated[str | None, typer.Option(help="Bytes, or like 512MiB.")]
Modes = Annotated[
    str,
    typer.Option(
        help="Comma-separated: ar, block, chunk:N, chunk:all, schedule, elastic, "
        "elastic_per_request; with /freeze or /refresh, that KV policy."
    ),
]
Schedule = Annotated[str | None, typer.Option(help="Of mode schedule: 1-16:16,17-:4.")]
TargetTpot = Annotated[float | None, typer.Option(help="For elastic arms.")]
StepLog = Annotated[Path | None, typer.Option(help="Append every step as JSON lines.")]
Trace = Annotated[
    Path | None, typer.Option(help="Chrome trace of the last runs: chrome://tracing, Perfetto.")
]
Explain = Annotated[
    int | None,
    typer.Option(min=1, help="Explain this step (from 1) of every elastic arm's last run."),
]
Output = Annotated[Path | None, typer.Option(help="Write JSON to this file.")]


class RunLog:
    """The records of runs, for --step-log, --trace and --explain.

    explanations: of the step `explain` (from 1) of every elastic arm.
    """

    def __init__(self, step_log: Path | None, trace: Path | None, explain: int | None) -> None:
        self.step_log, self.trace, self.explain = step_log, trace, explain
        self.explanations: list[str] = []
        self._lanes: dict[str, list[_C.StepRecord]] = {}

    @property
    def is_wanted(self) -> bool:
        """Whether anything becomes of the records."""
        return any(item is not None for item in (self.step_log, self.trace, self.explain))

    def add(
        self,
        name: str,
        labels: dict[str, Any],
        records: Sequence[_C.StepRecord],
        *,
        is_elastic: bool,
        is_last: bool = True,
    ) -> None:
        """name: of the lane and in explanations; labels: of every line of the step log. is_last:
        the last run of that name, which is the one that is drawn and explained."""
        from .step_log import explain, write_json_lines

        if self.step_log is not None:
            write_json_lines(self.step_log, records, labels)
        if not is_last:
            return
        if self.trace is not None:
            self._lanes[name] = list(records)
        if self.explain is None or not is_elastic:
            return
        if self.explain <= len(records):
            record = records[self.explain - 1]  # numbered by its engine, earlier runs included
            self.explanations.append(f"{name}, step {self.explain} of the run:\n{explain(record)}")
        else:
            self.explanations.append(f"{name}: the last run had {len(records)} steps")

    def finish(self) -> None:
        from .step_log import write_chrome_trace

        if self.trace is not None:
            write_chrome_trace(self.trace, self._lanes)


def parse_floor(text: str) -> float | str | None:
    """ "block", "none" or an accuracy. Raises ValueError."""
    if text in ("block", "none"):
        return text if text == "block" else None
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"[cli] --quality-floor takes block, none or an accuracy, got {text!r}"
        ) from None


def check_output(*files: Path | None) -> None:
    """Raises ValueError now, not after the run, where a report could not be written."""
    for file in files:
        if file is not None and not file.parent.is_dir():
            raise ValueError(f"[cli] {file} cannot be written: no folder {file.parent}")


def write_report(report: dict[str, Any], output: Path | None, json_output: bool) -> None:
    if output is not None:
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if json_output:
        print_json(report)


def split_list(text: str, name: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise ValueError(f"[cli] {name} takes a comma-separated list, got {text!r}")
    return parts


def parse_positive_ints(text: str, name: str) -> list[int]:
    for part in split_list(text, name):
        if not part.isdecimal() or int(part) < 1:
            raise ValueError(f"[cli] {name} takes ints >= 1, got {part!r}")
    return [int(part) for part in split_list(text, name)]


def parse_positive_float(text: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise ValueError(f"[cli] {name} takes numbers > 0, got {text!r}")
    return value
