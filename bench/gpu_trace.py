"""Where the GPU's time goes, from profiler traces of the grown model.

    python bench/gpu_trace.py FOLDER [--parts idle kernels] [--grow-to sdar-8b]

idle: between one step's last kernel and the next one's first, by mode and concurrency: what the GPU
    waits for the host, the copies of results and plan included. Quantiles over a run's steps.
kernels: of one step with 1k contexts, by number of rows: time by kernel, and what no kernel fills.

The trace is PyTorch's (CUPTI), which times every kernel of a replayed graph and costs the step some
time of its own: step times are gpu_engine.py's to measure.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optimus
from optimus.arms import parse_arm
from optimus.evaluate import generate_answers, load_tasks
from optimus.machine import git_commit, machine
from optimus.native import _C
from optimus.options import kv_bytes_per_token
from optimus.summary import percentile

MODES = ("ar", "block", "chunk:4/freeze", "elastic", "elastic_per_request")
FIRST_KERNELS = ("open_windows", "build_rows")  # of a step
GREEDY = optimus.SamplingParams(temperature=0.0, max_tokens=64)

Event = dict[str, Any]  # name, cat, ts and dur in microseconds


@contextmanager
def trace() -> Iterator[list[Event]]:
    """Collects what the GPU did, in order of time; complete when the block is left."""
    from torch.profiler import ProfilerActivity, profile

    events: list[Event] = []
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        yield events
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        found = json.loads(path.read_text())["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    events += sorted((e for e in found if e.get("cat") in kinds), key=lambda e: e["ts"])


def kernel_name(event: Event) -> str:
    """Without namespaces, template arguments and parameters."""
    name = re.sub(r"\(anonymous namespace\)::", "", event["name"])
    return re.split(r"[<(]", name.removeprefix("void "))[0].rsplit("::", 1)[-1]


def step_idle_us(events: list[Event]) -> list[float]:
    """From the last kernel of each step to the first of the next."""
    idle: list[float] = []
    last_end = None
    last_was_first = False
    for event in events:
        if event["cat"] != "kernel":
            continue
        is_first = any(name in event["name"] for name in FIRST_KERNELS)
        if is_first and not last_was_first and last_end is not None:
            idle.append(event["ts"] - last_end)
        last_end = max(last_end or 0.0, event["ts"] + event["dur"])
        last_was_first = is_first
    return idle


def idle(args: argparse.Namespace, write: Callable[[Any], None], grown: optimus.LLM) -> None:
    rows: list[dict[str, Any]] = []
    token_bytes = kv_bytes_per_token(grown.checkpoint, grown.dtype)
    block = grown.checkpoint.block_length or 1
    for concurrency in args.concurrency:
        tasks = load_tasks(args.tasks, max(2, concurrency))
        for mode in args.modes:
            llm = grown.with_options(
                max_num_seqs=concurrency, max_model_len=512, enable_prefix_cache=False,
                kv_cache_memory=(concurrency + 1) * 512 * token_bytes,
                max_num_batched_rows=max(512, concurrency * block * 5 // 4),
                **parse_arm(mode).options(),
            )  # fmt: skip
            generate_answers(llm, tasks[:1], GREEDY)
            with trace() as events:
                generate_answers(llm, tasks, GREEDY)
            idle_us = step_idle_us(events)
            row = {
                "mode": mode, "concurrency": concurrency, "num_steps": len(idle_us) + 1,
                "idle_us": {q: percentile(idle_us, q) for q in (10, 50, 90, 99)},
                "copies_us": sum(e["dur"] for e in events if e["cat"] != "kernel")
                / (len(idle_us) + 1),
            }  # fmt: skip
            rows.append(row)
            print(row, flush=True)
            write({"rows": rows})
            del llm
            gc.collect()


def kernels(args: argparse.Namespace, write: Callable[[Any], None], grown: optimus.LLM) -> None:
    context, rows_per_seq, repeats = 1024, 8, 5
    most_seqs = max(args.rows) // rows_per_seq
    token_bytes = kv_bytes_per_token(grown.checkpoint, grown.dtype)
    llm = grown.with_options(
        decode_mode="chunk", kv_policy="freeze", max_num_seqs=most_seqs,
        max_num_batched_rows=max(args.rows),
        kv_cache_memory=(most_seqs + 1) * (context + 64) * token_bytes,
    )  # fmt: skip
    tables: list[dict[str, Any]] = []
    for rows in args.rows:
        num_seqs = max(1, rows // rows_per_seq)
        llm.engine.time_forward(rows, num_seqs, context, 2)
        with trace() as events:
            for _ in range(repeats):
                llm.engine.time_forward(rows, num_seqs, context, 1)
        found = [event for event in events if event["cat"] == "kernel"]
        of_step = len(found) // repeats
        by_name: dict[str, list[float]] = defaultdict(list)
        spans, empty = [], []
        for first in range(0, of_step * repeats, of_step):
            step = found[first : first + of_step]
            end = step[0]["ts"]
            hole = 0.0
            for event in step:
                by_name[kernel_name(event)].append(event["dur"])
                hole += max(0.0, event["ts"] - end)
                end = max(end, event["ts"] + event["dur"])
            spans.append(end - step[0]["ts"])
            empty.append(hole)
        table = {
            "rows": rows, "kernels_per_step": of_step, "step_us": statistics.median(spans),
            "empty_us": statistics.median(empty),
            "kernels": {
                name: {"per_step": len(us) / repeats, "median_us": statistics.median(us),
                       "step_us": sum(us) / repeats}
                for name, us in sorted(by_name.items(), key=lambda item: -sum(item[1]))
            },
        }  # fmt: skip
        tables.append(table)
        print(f"{rows} rows: step {table['step_us']:.0f} us, empty {table['empty_us']:.0f} us")
        for name, row in table["kernels"].items():
            print(f"  {name:44} {row['per_step']:6.1f} x {row['median_us']:8.2f} us"
                  f" = {row['step_us']:8.1f} us", flush=True)  # fmt: skip
        write({"tables": tables})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts", nargs="+", default=["idle", "kernels"])
    parser.add_argument("--grow-to", default="sdar-8b")
    parser.add_argument("--tasks", type=Path, default=None)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--modes", nargs="+", default=list(MODES))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 64, 128, 256, 512])
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    grown = optimus.LLM(
        device="cuda", grow_to=args.grow_to, decode_mode="ar", kv_cache_memory="1GiB",
        max_num_seqs=1,
    )  # fmt: skip
    head = {
        "machine": machine(), "commit": git_commit(), "gpu": _C.cuda_device_name(),
        "grown_from": grown.checkpoint.grown_from,
    }  # fmt: skip
    parts = {"idle": idle, "kernels": kernels}
    for part in args.parts:

        def write(result: dict[str, Any], part: str = part) -> None:
            text = json.dumps({**head, "part": part, **result}, indent=1)
            (args.folder / f"trace_{part}.json").write_text(text + "\n")

        parts[part](args, write, grown)


if __name__ == "__main__":
    main()
