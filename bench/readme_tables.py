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

from accuracy_table import markdown as accuracy_markdown

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
    return "\n".join(lines) + "\n\n" + source(result, name)


TABLES: dict[str, Callable[[], str]] = {
    "accuracy-all": accuracy_all,
    "accuracy-recommended": accuracy_recommended,
    "accuracy-families": families,
    "plain-torch": plain_torch,
    "offline": offline,
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
