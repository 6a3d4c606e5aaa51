"""The engine on a GPU: answers, step times against what they must cost, throughput, and traces.

    python bench/gpu_engine.py FOLDER [--parts accuracy steps throughput kernels]
                               [--grow-to sdar-8b]

accuracy: the demo model's answers to held-out prompts in each mode, on this device and on the CPU.
steps: time of a step of the grown model, its rows in sequences of 8 that read 1,024 positions each,
    against its matrix products alone in one CUDA graph plus the KV bytes at the measured copy
    bandwidth. Either is timed after as much of the same, for the clock falls while the GPU works,
    and they take turns: medians of the rounds. `unequal`: steps of sequences that read from 20%
    fewer to 20% more.
throughput: offline, of the grown model, by mode and concurrency, with the accuracy beside it.
kernels: where a step's time goes, from profiler traces (gpu_trace.py); on a GPU alone, and after
    all others: once a profiler was attached, launches stay slower.
One JSON file per part, written as far as it got; a part that fails does not stop the others.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_trace
import optimus
from optimus.arms import parse_arm
from optimus.bench import StepTotals
from optimus.evaluate import Task, generate_answers, is_correct, load_tasks, summarise
from optimus.machine import git_commit, machine
from optimus.native import _C
from optimus.options import kv_bytes_per_token, resolve_device
from optimus.summary import percentile

ACCURACY_MODES: dict[str, dict[str, Any]] = {
    "ar": {"decode_mode": "ar"},
    "block": {"decode_mode": "block"},
    "chunk:4": {"decode_mode": "chunk", "chunk_length": 4, "kv_policy": "freeze"},
    "chunk:8": {"decode_mode": "chunk", "chunk_length": 8, "kv_policy": "refresh"},
    "elastic": {"decode_mode": "elastic"},
    "elastic_per_request": {"decode_mode": "elastic_per_request"},
}
THROUGHPUT_MODES = (
    "ar", "block", "chunk:4/freeze", "chunk:8/freeze", "elastic", "elastic_per_request",
)  # fmt: skip
STEP_ROWS = (1, 32, 64, 128, 256, 512)
ROWS_PER_SEQ, CONTEXT = 8, 1024
UNEQUAL_SEQS, SPREAD = (4, 14, 32, 64), 0.2
STEP_ROUNDS, STEP_SECONDS = 3, 0.2
GREEDY = optimus.SamplingParams(temperature=0.0, max_tokens=256)

Write = Callable[[dict[str, Any]], None]


def engine_of_steps(grown: optimus.LLM) -> optimus.LLM:
    """For steps of up to STEP_ROWS rows with CONTEXT positions to read."""
    most_seqs = max(STEP_ROWS) // ROWS_PER_SEQ
    token_bytes = kv_bytes_per_token(grown.checkpoint, grown.dtype)
    return grown.with_options(
        decode_mode="chunk", kv_policy="freeze", max_num_seqs=most_seqs,
        max_num_batched_rows=max(STEP_ROWS),
        kv_cache_memory=(most_seqs + 1) * (CONTEXT + 64) * token_bytes,
    )  # fmt: skip


def engine_at_load(grown: optimus.LLM, mode: str, concurrency: int) -> optimus.LLM:
    """For that many short answers at once, with room for a whole block of everybody's."""
    block = grown.checkpoint.block_length or 1
    token_bytes = kv_bytes_per_token(grown.checkpoint, grown.dtype)
    return grown.with_options(
        max_num_seqs=concurrency, max_model_len=512, enable_prefix_cache=False,
        kv_cache_memory=(concurrency + 1) * 512 * token_bytes,
        max_num_batched_rows=max(512, concurrency * block * 5 // 4),
        **parse_arm(mode).options(),
    )  # fmt: skip


def accuracy(args: argparse.Namespace, write: Write) -> None:
    tasks = load_tasks(args.tasks, args.prompts)
    sizes: dict[str, Any] = {"max_num_seqs": 64, "kv_cache_memory": "1GiB", "decode_mode": "ar"}
    devices = {"device": args.device} if args.no_cpu else {"device": args.device, "cpu": "cpu"}
    llms = {key: optimus.LLM(device=device, **sizes) for key, device in devices.items()}
    rows: list[dict[str, Any]] = []
    for mode, options in ACCURACY_MODES.items():
        row: dict[str, Any] = {"mode": mode, "num_prompts": len(tasks)}
        texts: dict[str, list[str | None]] = {}
        for key, llm in llms.items():
            engine = llm.with_options(**options)
            start = time.perf_counter()
            outputs = generate_answers(engine, tasks, GREEDY)
            row[f"{key}_seconds"] = time.perf_counter() - start
            correct = [is_correct(o, t) for o, t in zip(outputs, tasks, strict=True)]
            row[f"{key}_accuracy"] = sum(correct) / len(correct)
            texts[key] = [o.outputs[0].text for o in outputs]
            del engine
        if len(texts) == 2:
            same = [a == b for a, b in zip(texts["device"], texts["cpu"], strict=True)]
            row["same_answers"] = sum(same) / len(same)
        rows.append(row)
        print(row, flush=True)
        write({"rows": rows})


def copy_gb_s() -> float | None:
    """Bytes read and written per second by a large copy on the GPU, in GB/s."""
    import torch

    if not torch.cuda.is_available():
        return None
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_(0, 256)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(8):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        best = max(best, 2 * source.numel() / begin.elapsed_time(end) / 1e6)
    del source, target
    torch.cuda.empty_cache()
    return best


def equal_contexts(rows: int) -> list[int]:
    return [CONTEXT] * max(1, rows // ROWS_PER_SEQ)


def steps(args: argparse.Namespace, write: Write, grown: optimus.LLM) -> None:
    bandwidth = copy_gb_s()
    token_bytes = kv_bytes_per_token(grown.checkpoint, grown.dtype)
    llm = engine_of_steps(grown)
    result: dict[str, Any] = {
        "copy_gb_s": bandwidth, "context": CONTEXT, "rows_per_seq": ROWS_PER_SEQ,
        "memory": llm.memory, "graphs": llm.engine.graphs, "rows": [], "unequal": [],
    }  # fmt: skip
    cases = [("rows", rows, equal_contexts(rows)) for rows in STEP_ROWS]
    for n in UNEQUAL_SEQS:
        contexts = [round(CONTEXT * (1 + SPREAD * (2 * i / (n - 1) - 1))) for i in range(n)]
        cases.append(("unequal", ROWS_PER_SEQ * n, contexts))
    for table, rows, contexts in cases:
        row = one_step(llm, rows, contexts, token_bytes, bandwidth, args.repeats)
        result[table].append(row)
        print(table, row, flush=True)
        write(result)


def one_step(
    llm: optimus.LLM, rows: int, contexts: list[int], token_bytes: int, bandwidth: float | None,
    least_repeats: int,
) -> dict[str, Any]:  # fmt: skip
    """`bandwidth` in GB/s."""
    num_seqs = len(contexts)
    short_ms = llm.engine.time_forward(rows, [32] * num_seqs, least_repeats)
    repeats = max(least_repeats, round(STEP_SECONDS * 1e3 / short_ms))
    kv_bytes = sum(contexts) * token_bytes
    kv_ms = kv_bytes / bandwidth / 1e6 if bandwidth else None
    rounds: list[tuple[float, float]] = []
    for _ in range(STEP_ROUNDS):
        llm.engine.time_forward(rows, contexts, repeats)
        step_ms = llm.engine.time_forward(rows, contexts, repeats)
        # On what the step left: products of random numbers take more time than of zeros.
        llm.engine.time_gemms(rows, repeats)
        rounds.append((step_ms, llm.engine.time_gemms(rows, repeats)))
    over_floor = [step_ms / (gemm_ms + kv_ms) for step_ms, gemm_ms in rounds] if kv_ms else []
    return {
        "rows": rows, "num_seqs": num_seqs, "step_ms_short": short_ms,
        "step_ms": statistics.median(step_ms for step_ms, _ in rounds),
        "gemm_ms": statistics.median(gemm_ms for _, gemm_ms in rounds),
        "kv_bytes": kv_bytes, "kv_ms": kv_ms,
        "over_floor": statistics.median(over_floor) if over_floor else None,
        "over_floor_range": [min(over_floor), max(over_floor)] if over_floor else None,
    }  # fmt: skip


def throughput(args: argparse.Namespace, write: Write, grown: optimus.LLM) -> None:
    rows: list[dict[str, Any]] = []
    deadline = time.monotonic() + args.throughput_seconds
    for concurrency in args.concurrency:
        tasks = load_tasks(args.tasks, min(1500, max(8, 3 * concurrency)))
        for mode in args.modes:
            if time.monotonic() > deadline:
                print("out of time", flush=True)
                return
            start = time.perf_counter()
            try:
                llm = engine_at_load(grown, mode, concurrency)
                setup_seconds = time.perf_counter() - start
                row = {"mode": mode, "concurrency": concurrency, **one_run(llm, tasks)}
            except Exception:
                traceback.print_exc()
                continue
            rows.append({**row, "setup_seconds": setup_seconds, "memory": llm.memory})
            row.pop("chunk_lengths")
            print(row, f"set up in {setup_seconds:.1f} s", flush=True)
            write({"rows": rows})
            del llm
            gc.collect()


def one_run(llm: optimus.LLM, tasks: list[Task]) -> dict[str, Any]:
    """All tasks at once, after one short request. forward_ms: of a step on the device; gap_ms: the
    rest of the run, by steps, tokenising and drawing up outputs included; idle_us: percentiles of
    what lies on the device between two forwards, copies and making rows included; rows_us: of that,
    until the rows are made; host_p50_ms: medians of the host's parts of a step; full_*: steps with
    every slot taken."""
    generate_answers(llm, tasks[:1], GREEDY)
    totals = StepTotals(llm.options.max_num_seqs)
    llm.on_step = totals.add
    start = time.perf_counter()
    outputs = generate_answers(llm, tasks, GREEDY)
    seconds = time.perf_counter() - start
    score = summarise(tasks, outputs, seconds)
    return {
        "num_prompts": len(tasks),
        "num_tokens": score.num_tokens,
        "seconds": seconds,
        "tokens_per_second": score.tokens_per_second,
        "full_tokens_per_second": (
            totals.full_commits / totals.full_ms * 1e3 if totals.full_ms > 0 else None
        ),
        "accuracy": score.overall.accuracy,
        "num_steps": totals.num_steps,
        "ms_per_step": seconds * 1e3 / totals.num_steps,
        "forward_ms": totals.forward_ms / totals.num_steps,
        "gap_ms": (seconds * 1e3 - totals.forward_ms) / totals.num_steps,
        **{
            f"{part}_us": {
                q: percentile([getattr(record, f"{part}_ms") * 1e3 for record in totals.records], q)
                for q in (10, 50, 90, 99)
            }
            for part in ("idle", "rows")
        },
        "host_p50_ms": {
            part: percentile([getattr(record, f"{part}_ms") for record in totals.records], 50)
            for part in ("plan", "launch", "wait", "apply")
        },
        "rows_per_step": totals.num_rows / totals.num_steps,
        "tokens_per_forward": score.tokens_per_forward,
        "rows_per_token": score.rows_per_token,
        "chunk_lengths": dict(sorted(totals.chunks.items())),
    }


def kernels(args: argparse.Namespace, write: Write, grown: optimus.LLM) -> None:
    llm = engine_of_steps(grown)
    tables: list[dict[str, Any]] = []
    for rows in STEP_ROWS:
        shape = (rows, equal_contexts(rows))
        llm.engine.time_forward(*shape, 2)
        events = gpu_trace.record(llm.engine.time_forward, *shape, gpu_trace.REPEATS)
        table = {"rows": rows, **gpu_trace.kernel_table(events)}
        tables.append(table)
        print(gpu_trace.table_text(table), flush=True)
        write({"tables": tables})


PARTS = {
    "accuracy": accuracy, "steps": steps, "throughput": throughput,
    "kernels": kernels,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS)[:3])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--grow-to", default="sdar-8b")
    parser.add_argument("--tasks", type=Path, default=None)
    parser.add_argument("--prompts", type=int, default=256, help="of the part accuracy")
    parser.add_argument("--no-cpu", action="store_true", help="accuracy on the device alone")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16, 64, 128])
    parser.add_argument("--modes", nargs="+", default=list(THROUGHPUT_MODES))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--throughput-seconds", type=float, default=200.0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    device = resolve_device(args.device)
    head: dict[str, Any] = {
        "machine": machine(), "commit": git_commit(), "device": device,
        "gpu": _C.cuda_device_name() if device == "cuda" else None,
    }  # fmt: skip

    def run(part: str, *more: Any) -> None:
        start = time.perf_counter()

        def write(result: dict[str, Any]) -> None:
            text = json.dumps({**head, "part": part, **result}, indent=1)
            (args.folder / f"engine_{part}.json").write_text(text + "\n")

        try:
            PARTS[part](args, write, *more)
        except Exception:
            traceback.print_exc()
        print(f"{part}: {time.perf_counter() - start:.1f} s", flush=True)

    if "accuracy" in args.parts:
        run("accuracy")
    if set(args.parts) - {"accuracy"}:
        start = time.perf_counter()
        grown = optimus.LLM(
            device=args.device, grow_to=args.grow_to, decode_mode="ar", kv_cache_memory="1GiB",
            max_num_seqs=1,
        )  # fmt: skip
        head["grown_from"] = grown.checkpoint.grown_from
        head["load_seconds"] = time.perf_counter() - start
        print(f"{args.grow_to}: {head['load_seconds']:.1f} s", flush=True)
        for part in PARTS:
            if part in args.parts and part != "accuracy":
                run(part, grown)


if __name__ == "__main__":
    main()
