"""Accuracy of the elastic modes beside block decoding, on paired held-out prompts.

    python bench/elastic_accuracy.py --output bench/results/elastic_accuracy_cpu.json

The elastic modes follow measured time, so their tokens may differ from run to run; what may not
differ is how often they are right.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import optimus
from optimus.calibration import paired_difference
from optimus.evaluate import generate_answers, is_correct, load_tasks, summarise
from optimus.machine import git_commit, machine

MODES = ("block", "elastic", "elastic_per_request")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--num-prompts", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=16)
    arguments = parser.parse_args()
    tasks = load_tasks(None, arguments.num_prompts)
    base = optimus.LLM(max_num_seqs=arguments.concurrency, enable_prefix_cache=False)
    params = optimus.SamplingParams(temperature=0.0, max_tokens=512)
    results: dict[str, str] = {}
    rows = []
    for mode in MODES:
        llm = base.with_options(decode_mode=mode)
        start = time.perf_counter()
        outputs = generate_answers(llm, tasks, params)
        summary = summarise(tasks, outputs, time.perf_counter() - start)
        right = [is_correct(o, t) for o, t in zip(outputs, tasks, strict=True)]
        results[mode] = "".join("01"[r] for r in right)
        row = {"mode": mode, **summary.to_dict()}
        if mode != MODES[0]:
            row["vs_block"], row["vs_block_low"], row["vs_block_high"] = paired_difference(
                results[MODES[0]], results[mode]
            )
        rows.append(row)
        score = summary.overall
        percent = [100 * share for share in (score.accuracy, score.low, score.high)]
        against = [100 * row.get(f"vs_block{end}", 0.0) for end in ("", "_low", "_high")]
        print(
            f"{mode}: {percent[0]:.1f}% ({percent[1]:.1f} to {percent[2]:.1f}), {against[0]:+.1f} "
            f"points against block ({against[1]:+.1f} to {against[2]:+.1f}), "
            f"{summary.tokens_per_forward:.2f} tokens per forward",
            flush=True,
        )
    if arguments.output:
        report = {
            "benchmark": "elastic_accuracy", "commit": git_commit(), "machine": machine(),
            "arguments": {
                "num_prompts": arguments.num_prompts, "concurrency": arguments.concurrency,
            },
            "rows": rows,
        }  # fmt: skip
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
