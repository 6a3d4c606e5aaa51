"""Profiler traces of the engine on a GPU, summed up: idle time between steps, time by kernel.

Used by gpu_engine.py. The trace is PyTorch's (CUPTI), which times every kernel of a replayed graph
and costs both the host and the step some time of their own: step times are not for it to measure.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from optimus.summary import percentile

FIRST_KERNELS = ("open_windows", "build_rows")  # between two steps' forwards
REPEATS = 5  # of a step, for kernel_table

Event = dict[str, Any]  # name, cat, ts and dur in microseconds


def record(work: Callable[..., object], *arguments: Any) -> list[Event]:
    """What the GPU did while `work(*arguments)` ran, in order of time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work(*arguments)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        found = json.loads(path.read_text())["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    return sorted((e for e in found if e.get("cat") in kinds), key=lambda e: e["ts"])


def kernel_name(event: Event) -> str:
    """Without namespaces, template arguments and parameters."""
    name = re.sub(r"\(anonymous namespace\)::", "", event["name"])
    return re.split(r"[<(]", name.removeprefix("void "))[0].rsplit("::", 1)[-1]


def step_idle_us(events: Sequence[Event]) -> list[float]:
    """From the last kernel of each step's forward to the first of the next one's, but for the
    kernels in between, which make its rows."""
    idle: list[float] = []
    end, busy, is_between = None, 0.0, False
    for event in events:
        if event["cat"] != "kernel":
            continue
        if any(name in event["name"] for name in FIRST_KERNELS):
            busy += event["dur"]
            is_between = True
            continue
        if is_between and end is not None:
            idle.append(max(0.0, event["ts"] - end - busy))
        end, busy, is_between = max(end or 0.0, event["ts"] + event["dur"]), 0.0, False
    return idle


def idle_summary(events: Sequence[Event]) -> dict[str, Any]:
    """idle_us: percentiles of what the GPU waits for the host between two steps, the copies of
    results and plan included; copies: those."""
    idle_us = step_idle_us(events)
    num_steps = len(idle_us) + 1
    copies: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        if event["cat"] != "kernel":
            copies[event["name"]].append(event)
    return {
        "num_steps": num_steps,
        "idle_us": {q: percentile(idle_us, q) for q in (10, 50, 90, 99)},
        "copies": {
            name: {
                "per_step": len(found) / num_steps,
                "median_us": statistics.median(e["dur"] for e in found),
                "median_bytes": statistics.median(e["args"].get("bytes", 0) for e in found),
                "step_us": sum(e["dur"] for e in found) / num_steps,
            }
            for name, found in copies.items()
        },
    }


def kernel_table(events: Sequence[Event]) -> dict[str, Any]:
    """Of REPEATS equal steps: how long one took from its first kernel to its last, what of that no
    kernel filled, and for each kernel how often it ran, its time, and how far it moved the end of
    the step: kernels start early and wait, so their own times overlap; `added_us` add up to the
    step."""
    found = [event for event in events if event["cat"] == "kernel"]
    of_step = len(found) // REPEATS
    by_name: dict[str, list[float]] = defaultdict(list)
    added: dict[str, float] = defaultdict(float)
    spans, empty = [], []
    for first in range(0, of_step * REPEATS, of_step):
        step = found[first : first + of_step]
        end = step[0]["ts"]
        hole = 0.0
        for event in step:
            name = kernel_name(event)
            by_name[name].append(event["dur"])
            hole += max(0.0, event["ts"] - end)
            added[name] += max(0.0, event["ts"] + event["dur"] - end)
            end = max(end, event["ts"] + event["dur"])
        spans.append(end - step[0]["ts"])
        empty.append(hole)
    return {
        "kernels_per_step": of_step,
        "step_us": statistics.median(spans),
        "empty_us": statistics.median(empty),
        "kernels": {
            name: {
                "per_step": len(us) / REPEATS,
                "median_us": statistics.median(us),
                "step_us": sum(us) / REPEATS,
                "added_us": added[name] / REPEATS,
            }
            for name, us in sorted(by_name.items(), key=lambda item: -added[item[0]])
        },
    }


def table_text(table: dict[str, Any]) -> str:
    lines = [
        f"{table['rows']} rows: step {table['step_us']:.0f} us, empty {table['empty_us']:.0f} us"
    ]
    lines += [
        f"  {name:44} {row['per_step']:6.1f} x {row['median_us']:8.2f} us"
        f" = {row['step_us']:8.1f} us, adds {row['added_us']:8.1f} us"
        for name, row in table["kernels"].items()
    ]
    return "\n".join(lines)
