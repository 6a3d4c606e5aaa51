"""Writes the measured tables of README.md and the model card from the files in bench/results/.

    python bench/readme_tables.py            # rewrites what stands between the markers
    python bench/readme_tables.py --check    # fails if a table is not what the results say

A table stands between `<!-- table: NAME -->` and `<!-- end: NAME -->`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accuracy_table import CHUNK_LENGTHS, paired_difference
from accuracy_table import markdown as accuracy_markdown
from controller_tables import capacity_table, loads_table, sweeps_table
from gpu_tables import (
    attention_table,
    kernels_table,
    peers_table,
    prompts_table,
    steps_table,
    throughput_table,
    unequal_table,
)

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
DEMO = ROOT / "python" / "optimus" / "assets" / "demo"
DOCUMENTS = (ROOT / "README.md", DEMO / "MODEL_CARD.md")


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def source(result: dict[str, Any], name: str) -> str:
    machine = result["machine"]
    return (
        f"From `bench/results/{name}`: {machine['cpu']}, {machine['cores']} cores, torch "
        f"{machine['torch']}, commit {result['commit'][:10]}."
    )


def accuracy_all() -> str:
    name = "accuracy_cpu.json"
    result = read(name)
    prompts = result["arms"][0]["num_prompts"]
    return f"{accuracy_markdown(result)}\n\n{prompts} paired prompts. {source(result, name)}"


def accuracy_recommended() -> str:
    name = "accuracy_cpu.json"
    result = read(name)
    threshold = json.loads((DEMO / "generation_config.json").read_text())["confidence_threshold"]
    arms = [arm for arm in result["arms"] if arm.get("threshold", threshold) == threshold]
    prompts = result["arms"][0]["num_prompts"]
    return (
        f"{accuracy_markdown({**result, 'arms': arms})}\n\n{prompts} paired prompts, fp32. "
        f"{source(result, name)} All thresholds: "
        "[model card](python/optimus/assets/demo/MODEL_CARD.md)."
    )


def kv_policy() -> str:
    """Why `auto` is the default, in the figures of the table."""
    arms = {arm["name"]: arm for arm in read("accuracy_cpu.json")["arms"]}
    threshold = json.loads((DEMO / "generation_config.json").read_text())["confidence_threshold"]
    gains, costs = [], []
    pairs = []
    for c in CHUNK_LENGTHS[1:]:
        freeze = arms[f"chunk c={c} freeze t={threshold}"]
        refresh = arms[f"chunk c={c} refresh t={threshold}"]
        gains.append(100 * (refresh["exact_match"] - freeze["exact_match"]))
        costs.append(100 * (refresh["rows_per_token"] / freeze["rows_per_token"] - 1))
        pairs.append((freeze["correct"], refresh["correct"]))
    mean, half = paired_difference([p[0] for p in pairs], [p[1] for p in pairs])
    return (
        f"Why `auto` is the default: at c >= 2 `refresh` gains {min(gains):+.1f} to "
        f"{max(gains):+.1f} points over `freeze` ({mean:+.1f} ± {half:.1f} averaged over them) for "
        f"{min(costs):.0f} to {max(costs):.0f}% more rows. That is worth it where rows are free, "
        "and not where they cost."
    )


def families() -> str:
    result = read("accuracy_cpu.json")
    threshold = json.loads((DEMO / "generation_config.json").read_text())["confidence_threshold"]
    arms = [a for a in result["arms"] if a.get("threshold", threshold) == threshold]
    names = sorted(arms[0]["families"])
    lines = [f"| mode | KV | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    for arm in arms:
        mode = arm["mode"] + (f" {arm['chunk_length']}" if arm["mode"] == "chunk" else "")
        shares = " | ".join(f"{100 * arm['families'][name]:.1f}" for name in names)
        lines.append(f"| {mode} | {arm.get('kv_policy', '')} | {shares} |")
    return "\n".join(lines)


def plain_torch() -> str:
    name = "compare_plain_torch_cpu.json"
    result = read(name)
    lines = [
        "| concurrency | plain PyTorch loop, tok/s | engine, tok/s | speed-up | same outputs |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['concurrency']} | {row['plain_tokens_per_second'][row['baseline']]:.0f} "
            f"({row['baseline'].split(', ')[1]}) | {row['engine_tokens_per_second']:.0f} "
            f"| {row['speedup']:.2f}x | {row['same_outputs']} of {row['num_prompts']} |"
        )
    arguments = result["arguments"]
    return (
        "\n".join(lines)
        + f"\n\n`block` mode, {arguments['dtype']}, {arguments['threads']} threads on both sides. "
        + source(result, name)
    )


def offline() -> str:
    name = "offline_cpu.json"
    result = read(name)
    lines = [
        "| concurrency | mode | tok/s | ms a step | tokens per forward | rows per token "
        "| exact match, % |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['concurrency']} | {row['mode']} | {row['tokens_per_second']:.0f} "
            f"| {row['ms_per_step']:.2f} | {row['tokens_per_forward']:.2f} "
            f"| {row['rows_per_token']:.2f} | {100 * row['accuracy']['accuracy']:.1f} |"
        )
    lines += [
        "",
        f"Clocks drift between the {result['arguments']['rounds']} rounds, so arms are compared "
        "round by round too. Median of the ratios to the best fixed chunk:",
        "",
        "| concurrency | best fixed | elastic | elastic per request |",
        "|---|---|---|---|",
    ]
    ratios = {
        (c["concurrency"], c["mode"]): (1 - c["against_all"]["regret"], c["against_all"]["best"])
        for c in result["comparisons"]
    }
    for load in sorted({load for load, _ in ratios}):
        elastic, best = ratios[load, "elastic"]
        per_request, _ = ratios[load, "elastic_per_request"]
        lines.append(f"| {load} | {best} | {elastic:.3f} | {per_request:.3f} |")
    return "\n".join(lines) + "\n\n" + source(result, name)


def simulated(name: str, table: str) -> str:
    report = read(name)
    return f"{table}\n\n{source(report, name)}"


def controller_loads() -> str:
    name = "simulate_policies.json"
    return simulated(name, loads_table(read(name), "h200 dense 8B"))


def controller_sweeps() -> str:
    name = "simulate_policies.json"
    return simulated(name, sweeps_table(read(name)))


def serving_capacity() -> str:
    name = "serving_simulated.json"
    return simulated(name, capacity_table(read(name)))


def on_gpu(name: str, table: Callable[[dict[str, Any]], str]) -> str:
    report = read(name)
    card = str(report.get("gpu") or report.get("device")).removeprefix("NVIDIA ")
    return f"{table(report)}\n\nFrom `bench/results/{name}`: one NVIDIA {card}."


TABLES: dict[str, Callable[[], str]] = {
    "accuracy-all": accuracy_all,
    "accuracy-recommended": accuracy_recommended,
    "accuracy-families": families,
    "kv-policy": kv_policy,
    "plain-torch": plain_torch,
    "offline": offline,
    "controller-loads": controller_loads,
    "controller-sweeps": controller_sweeps,
    "serving-capacity": serving_capacity,
    "gpu-attention": lambda: on_gpu("block_attention_h200.json", attention_table),
    "gpu-peers": lambda: on_gpu(
        "attention_peers_h200.json",
        lambda peers: peers_table(read("block_attention_h200.json"), peers),
    ),
    "gpu-unequal": lambda: on_gpu("block_attention_h200.json", unequal_table),
    "gpu-prompts": lambda: on_gpu("block_attention_h200.json", prompts_table),
    "gpu-kernels": lambda: on_gpu("kernels_cuda_h200.json", kernels_table),
    "gpu-steps": lambda: on_gpu("engine_steps_h200.json", steps_table),
    "gpu-throughput": lambda: on_gpu("engine_throughput_h200.json", throughput_table),
}


def render(text: str) -> str:
    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise SystemExit(f"unknown table {name!r}; known: {', '.join(TABLES)}")
        return f"<!-- table: {name} -->\n\n{TABLES[name]()}\n\n<!-- end: {name} -->"

    pattern = r"<!-- table: (?P<name>[\w-]+) -->.*?<!-- end: (?P=name) -->"
    return re.sub(pattern, replace, text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for document in DOCUMENTS:
        text = document.read_text()
        rendered = render(text)
        if rendered == text:
            continue
        stale.append(document.name)
        if not check:
            document.write_text(rendered)
    print(f"{'stale' if check else 'rewritten'}: {', '.join(stale) or 'nothing'}")
    if check and stale:
        sys.exit(1)


if __name__ == "__main__":
    main()
