"""What the engine did and why, step by step: dumps of its step records, and explanations.

The same for the records of an engine and of a simulator (whose clock is virtual).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import _C

_FIELDS = (
    "step", "start_s", "rows", "prefill_rows", "refresh_rows", "logit_rows", "num_seqs",
    "num_decoding", "num_waiting", "kv_tokens", "chunk_length", "refresh", "chunk_lengths",
    "commits", "expected_commits", "predicted_ms", "forward_ms", "step_ms", "plan_ms", "launch_ms",
    "wait_ms", "apply_ms", "idle_ms", "rows_ms", "meets_target", "is_ahead", "reason",
)  # fmt: skip
_ARM_FIELDS = ("chunk_length", "refresh", "commits", "rows", "ms", "tpot_ms", "score", "verdict")
# A counter track of the trace: its name -> the fields that it shows.
_COUNTERS = {
    "chunk length": ("chunk_length",),
    "requests": ("num_decoding", "num_waiting"),
    "commits": ("commits",),
}


def record_to_dict(record: _C.StepRecord) -> dict[str, Any]:
    """All fields, for JSON. `chunk_lengths` has one entry per decoding request; `arms` is what an
    elastic policy compared."""
    entry: dict[str, Any] = {name: getattr(record, name) for name in _FIELDS}
    entry["chunk_lengths"] = list(record.chunk_lengths)
    entry["arms"] = [{name: getattr(arm, name) for name in _ARM_FIELDS} for arm in record.arms]
    return entry


def write_json_lines(
    path: str | Path, records: Iterable[_C.StepRecord], labels: Mapping[str, Any] | None = None
) -> None:
    """One record a line, each with `labels` in front. Appends, so that runs can share a file."""
    with Path(path).open("a", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps({**(labels or {}), **record_to_dict(record)}) + "\n")


def chrome_trace(lanes: Mapping[str, Sequence[_C.StepRecord]]) -> dict[str, Any]:
    """Lanes of steps for chrome://tracing or Perfetto, by name.

    A lane is a process of the trace: one thread of steps, whose arguments are the record, and
    counters of chunk length, requests and commits. Times are microseconds from the lane's first
    step, so that lanes that ran one after the other lie side by side.
    """
    events: list[dict[str, Any]] = []
    for pid, (name, records) in enumerate(lanes.items(), 1):
        events.append(_metadata("process_name", pid, name))
        events.append(_metadata("thread_name", pid, "steps"))
        origin_s = records[0].start_s if records else 0.0
        for record in records:
            events += _step_events(pid, record, origin_s)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write_chrome_trace(path: str | Path, lanes: Mapping[str, Sequence[_C.StepRecord]]) -> None:
    """`chrome_trace` as a file."""
    Path(path).write_text(json.dumps(chrome_trace(lanes)) + "\n", encoding="utf-8")


def _metadata(what: str, pid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": 1, "ts": 0, "args": {"name": name}}


def _step_events(pid: int, record: _C.StepRecord, origin_s: float) -> list[dict[str, Any]]:
    start_us = (record.start_s - origin_s) * 1e6
    entry = record_to_dict(record)
    entry["chunk_lengths"] = _counts_text(record.chunk_lengths)
    entry["arms"] = [_arm_text(arm) for arm in record.arms]
    step = {
        "ph": "X", "name": _step_name(record), "cat": "step", "pid": pid, "tid": 1,
        "ts": start_us, "dur": record.step_ms * 1e3, "args": entry,
    }  # fmt: skip
    counters = [
        {
            "ph": "C", "name": name, "pid": pid, "tid": 1, "ts": start_us,
            "args": {field: getattr(record, field) for field in fields},
        }
        for name, fields in _COUNTERS.items()
    ]  # fmt: skip
    return [step, *counters]


def _step_name(record: _C.StepRecord) -> str:
    parts = [f"decode c={record.chunk_length}"] if record.num_decoding else []
    parts += ["prefill"] if record.prefill_rows else []
    return " + ".join(parts) or "idle"


def chunk_histogram(records: Iterable[_C.StepRecord]) -> dict[int, int]:
    """Masks that a request evaluated in a step -> how often, over all requests and steps."""
    counts: Counter[int] = Counter()
    for record in records:
        counts.update(record.chunk_lengths)
    return dict(sorted(counts.items()))


def explain(record: _C.StepRecord) -> str:
    """The decision of a step with its reasons, in lines of at most 80 columns."""
    kv = "refresh" if record.refresh else "freeze"
    decision = f"chunk length {record.chunk_length}, {kv}" if record.num_decoding else "no decoding"
    lines = [f"step {record.step}: {decision} ({record.reason or 'no decision'})"]
    lines.append(
        f"  load      {record.num_decoding} decoding, {record.num_waiting} waiting, "
        f"{record.kv_tokens} KV tokens read"
    )
    lines.append(
        f"  rows      {record.rows}: {record.logit_rows} masks, {record.prefill_rows} prompt, "
        f"{record.refresh_rows} refresh, {_refed_rows(record)} fed again"
    )
    lines.append("  commits   " + _against(record.commits, record.expected_commits, "expected"))
    measured = f"{_ms(record.step_ms)} ms measured ({_ms(record.forward_ms)} in the model)"
    if record.predicted_ms > 0:
        error = record.step_ms / record.predicted_ms - 1
        off = f"{100 * error:+.1f}%" if error < 10 else f"{error + 1:.0f} times as long"
        lines.append(f"  time      {measured}, {_ms(record.predicted_ms)} predicted: {off}")
    else:
        lines.append(f"  time      {measured}, no prediction")
    if record.launch_ms > 0:
        lines.append(
            f"  host      planned in {_ms(record.plan_ms)} ms, launched in "
            f"{_ms(record.launch_ms)}, applied in {_ms(record.apply_ms)}"
        )
    if not record.meets_target:
        lines.append("  target    no arm meets target_tpot_ms")
    if record.chunk_lengths:
        lines.append(
            "  chunks    masks evaluated x requests: " + _counts_text(record.chunk_lengths)
        )
    return "\n".join(lines + _arm_lines(record))


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 100 else f"{value:.0f}"


def _refed_rows(record: _C.StepRecord) -> int:
    return record.rows - record.prefill_rows - record.refresh_rows - record.logit_rows


def _against(measured: float, estimate: float, word: str) -> str:
    known = f"{estimate:.2f} {word}" if estimate > 0 else f"none {word}: not estimated"
    return f"{measured:g}, {known}"


def _arm_lines(record: _C.StepRecord) -> list[str]:
    """A table of what was compared, and in words what decided: the score, the commits of a step
    less what the time costs that its decode rows add."""
    arms = record.arms
    if not arms:
        return ["  arms      none compared: the chunk length was given"]
    lines = ["  chunk KV      commits   rows       ms commits/s  tpot ms   score  verdict"]
    for arm in sorted(arms, key=lambda arm: arm.score, reverse=True):
        lines.append(
            f"  {arm.chunk_length:5d} {_kv(arm):7} {arm.commits:7.2f} {arm.rows:6.1f} "
            f"{_ms(arm.ms):>8} {_rate(arm):9.1f} {_ms(arm.tpot_ms):>8} "
            f"{arm.score:7{'.2f' if abs(arm.score) < 1000 else '.0f'}}  {arm.verdict}"
        )
    chosen = next((arm for arm in arms if arm.verdict == "chosen"), None)
    return lines if chosen is None else lines + _verdict_lines(record, chosen)


def _verdict_lines(record: _C.StepRecord, chosen: _C.ArmEstimate) -> list[str]:
    """What the chosen arm gains, and why the step may not look like it."""
    lines = []
    estimate = (chosen.commits, chosen.rows, chosen.ms)
    others = [arm for arm in record.arms if (arm.commits, arm.rows, arm.ms) != estimate]
    if others:
        second = max(others, key=lambda arm: arm.score)
        lines.append(
            f"  chunk {chosen.chunk_length} {_kv(chosen)} against the best other estimate, "
            f"{second.chunk_length} {_kv(second)}: {chosen.score - second.score:+.2f} commits"
        )
    if record.chunk_length > chosen.chunk_length:
        lines.append(
            f"  requests evaluate up to {record.chunk_length} masks: rows went where they gain "
            "most, or the"
        )
        lines.append(f"  quality floor does not admit chunk {chosen.chunk_length} for them")
    return lines


def _kv(arm: _C.ArmEstimate) -> str:
    return "refresh" if arm.refresh else "freeze"


def _rate(arm: _C.ArmEstimate) -> float:
    """Expected commits per second of the whole batch."""
    return arm.commits / arm.ms * 1e3 if arm.ms > 0 else 0.0


def _arm_text(arm: _C.ArmEstimate) -> str:
    return (
        f"{arm.chunk_length} {_kv(arm)}: {arm.commits:.2f} commits, {arm.rows:.1f} rows, "
        f"{arm.ms:.3f} ms, {arm.verdict}"
    )


def _counts_text(lengths: Sequence[int]) -> str:
    return ", ".join(f"{c} x{n}" for c, n in sorted(Counter(lengths).items()))
