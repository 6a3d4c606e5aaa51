"""Accuracy of the demo model in every decode mode, on paired held-out prompts.

    python bench/accuracy_table.py --output bench/results/accuracy_cpu.json --workers 2

Arms: `ar`; `block`; `chunk` c in {1, 2, 4, 8, 16, 32} with `freeze` and `refresh`; the block and
chunk arms at each threshold, except c = 1, which commits its one candidate at any threshold. Every
arm decodes the same prompts with the C++ engine. One engine decodes an arm at all its thresholds,
a few prompts at a time, so that the later ones find the prompt's KV in the prefix cache (which
changes no token: tests/python/test_batch_invariance.py). Each worker process runs on one thread.
Arms already in the output file are kept, so a run can be continued. `--markdown` prints the table
of a finished file instead.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optimus
from optimus.evaluate import Task, generate_answers, is_correct, load_tasks, wilson_interval
from optimus.machine import git_commit, machine
from optimus.outputs import RequestOutput

THRESHOLDS = (0.8, 0.9, 0.95, 0.99)
CHUNK_LENGTHS = (1, 2, 4, 8, 16, 32)
KV_POLICIES = ("freeze", "refresh")


def list_groups() -> list[dict[str, Any]]:
    """Engines to run, the most expensive first, each with its thresholds (None: any)."""
    groups: list[dict[str, Any]] = [{"mode": "block", "thresholds": THRESHOLDS}]
    groups += [
        {
            "mode": "chunk",
            "chunk_length": c,
            "kv_policy": policy,
            "thresholds": THRESHOLDS if c > 1 else (None,),
        }
        for c in reversed(CHUNK_LENGTHS)
        for policy in KV_POLICIES
    ]
    return [*groups, {"mode": "ar", "thresholds": (None,)}]


def arm_name(group: dict[str, Any], threshold: float | None) -> str:
    parts = [group["mode"]]
    if group["mode"] == "chunk":
        parts += [f"c={group['chunk_length']}", group["kv_policy"]]
    if threshold is not None:
        parts.append(f"t={threshold}")
    return " ".join(parts)


def run_group(job: tuple[dict[str, Any], dict[str, Any]]) -> list[dict[str, Any]]:
    """Decodes all prompts at each threshold of a group; returns its arms."""
    group, settings = job
    tasks = load_tasks(settings["tasks"], settings["num_prompts"])
    options: dict[str, Any] = {k: group[k] for k in ("chunk_length", "kv_policy") if k in group}
    llm = optimus.LLM(
        settings["model"], dtype=settings["dtype"], num_threads=1, decode_mode=group["mode"],
        max_num_seqs=settings["concurrency"], **options,
    )  # fmt: skip
    outputs: dict[float | None, list[RequestOutput]] = {t: [] for t in group["thresholds"]}
    for begin in range(0, len(tasks), settings["concurrency"]):
        part = tasks[begin : begin + settings["concurrency"]]
        for threshold, done in outputs.items():
            params = optimus.SamplingParams(
                temperature=0.0, confidence_threshold=threshold, max_tokens=settings["max_tokens"]
            )
            done += generate_answers(llm, part, params)
    return [summarise(group, threshold, tasks, done) for threshold, done in outputs.items()]


def summarise(
    group: dict[str, Any],
    threshold: float | None,
    tasks: Sequence[Task],
    outputs: Sequence[RequestOutput],
) -> dict[str, Any]:
    """One arm's figures and one 0/1 per prompt."""
    correct = [is_correct(output, task) for output, task in zip(outputs, tasks, strict=True)]
    families: dict[str, list[bool]] = {}
    for task, result in zip(tasks, correct, strict=True):
        families.setdefault(task.family, []).append(result)
    num_tokens = sum(o.metrics.num_output_tokens for o in outputs)
    arm = {k: group[k] for k in ("mode", "chunk_length", "kv_policy") if k in group}
    if threshold is not None:
        arm["threshold"] = threshold
    return {
        **arm,
        "name": arm_name(group, threshold),
        "num_prompts": len(tasks),
        "exact_match": sum(correct) / len(correct),
        "interval_95": wilson_interval(sum(correct), len(correct)),
        "families": {name: sum(r) / len(r) for name, r in sorted(families.items())},
        "num_tokens": num_tokens,
        "tokens_per_forward": num_tokens / sum(o.metrics.nfe for o in outputs),
        "rows_per_token": sum(o.metrics.decode_rows for o in outputs) / num_tokens,
        "correct": "".join("1" if c else "0" for c in correct),
    }


def paired_difference(a: Sequence[str], b: Sequence[str]) -> tuple[float, float]:
    """Mean of b - a over paired prompts and the half width of its 95% interval, in points.

    a, b: 0/1 per prompt of one arm, or of several, which are averaged per prompt first.
    """
    differences = [
        sum(int(y) - int(x) for x, y in zip(xs, ys, strict=True)) / len(a)
        for xs, ys in zip(zip(*a, strict=True), zip(*b, strict=True), strict=True)
    ]
    n = len(differences)
    mean = sum(differences) / n
    variance = sum((d - mean) ** 2 for d in differences) / max(1, n - 1)
    return 100 * mean, 100 * 1.96 * math.sqrt(variance / n)


def markdown(result: dict[str, Any], reference: float = 0.99) -> str:
    """The table of a result file, with each arm's paired difference from block decoding at the
    same threshold (arms without one: at `reference`)."""
    arms = {arm["name"]: arm for arm in result["arms"]}
    lines = [
        "| mode | KV | threshold | exact match, % (95%) | vs block, points | tokens per forward "
        "| rows per token |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in sorted(result["arms"], key=_table_order):
        low, high = arm["interval_95"]
        block = arms.get(f"block t={arm.get('threshold', reference)}")
        difference = "" if block is None or block is arm else "{:+.1f} ± {:.1f}".format(
            *paired_difference([block["correct"]], [arm["correct"]])
        )  # fmt: skip
        mode = arm["mode"] + (f" {arm['chunk_length']}" if arm["mode"] == "chunk" else "")
        threshold = arm.get("threshold", "any" if arm["mode"] == "chunk" else "")
        lines.append(
            f"| {mode} | {arm.get('kv_policy', '')} | {threshold} "
            f"| {100 * arm['exact_match']:.1f} ({100 * low:.1f} to {100 * high:.1f}) "
            f"| {difference} | {arm['tokens_per_forward']:.2f} | {arm['rows_per_token']:.2f} |"
        )
    return "\n".join(lines)


def _table_order(arm: dict[str, Any]) -> tuple[Any, ...]:
    modes = ("ar", "block", "chunk")
    return (
        modes.index(arm["mode"]), arm.get("chunk_length", 0), arm.get("kv_policy", ""),
        arm.get("threshold", 0),
    )  # fmt: skip


def write(path: Path, settings: dict[str, Any], arms: list[dict[str, Any]]) -> None:
    result = {
        "benchmark": "accuracy_table",
        "commit": git_commit(),
        "machine": machine(),
        "arguments": settings,
        "arms": sorted(arms, key=_table_order),
    }
    path.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file, continued if there")
    parser.add_argument("--model", default=None, help="checkpoint; default: the demo model")
    parser.add_argument("--tasks", default=None, help="JSONL of tasks; default: the held-out set")
    parser.add_argument("--num-prompts", type=int, default=None)
    parser.add_argument("--max-tokens", type=int, default=768)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--markdown", action="store_true", help="print the table of --output")
    arguments = parser.parse_args()
    if arguments.markdown:
        print(markdown(json.loads(arguments.output.read_text())))
        return
    settings = {
        name: getattr(arguments, name)
        for name in ("model", "tasks", "num_prompts", "max_tokens", "concurrency", "dtype")
    }
    done: list[dict[str, Any]] = []
    if arguments.output.exists():
        done = json.loads(arguments.output.read_text())["arms"]
    names = {arm["name"] for arm in done}
    jobs = [
        (group, settings)
        for group in list_groups()
        if not names.issuperset(arm_name(group, t) for t in group["thresholds"])
    ]
    start = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool:
        for arms in pool.imap_unordered(run_group, jobs):
            done += arms
            write(arguments.output, settings, done)
            for arm in arms:
                print(
                    f"{time.perf_counter() - start:7.1f} s  {arm['name']:28s} "
                    f"{100 * arm['exact_match']:5.1f}%  {arm['tokens_per_forward']:.2f} "
                    f"tokens/forward {arm['rows_per_token']:.2f} rows/token",
                    flush=True,
                )


if __name__ == "__main__":
    main()
