"""Profiler traces of steps on a GPU, summed up by kernel.

Used by gpu_engine.py. The trace is PyTorch's (CUPTI), which times every kernel of a replayed graph
and costs the step some time of its own, and the host 300 us and more for every launch of a graph:
step times, and what lies between steps, are not for it to measure (see `idle_us` of gpu_engine.py).
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
