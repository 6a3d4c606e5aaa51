"""How block decoding commits: answer tokens per forward, and P(commit | offset).

    python bench/commit_profile.py --output bench/results/commit_profile_cpu.json

Offset: distance of a mask from the first mask of its block, over all denoising forwards of the
prompts' answers. Positions behind the end of an answer are not counted. Rebuilt from the step at
which each token was committed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import optimus
from optimus.evaluate import generate_answers, load_tasks
from optimus.machine import git_commit, machine
from optimus.outputs import RequestOutput


def count(
    output: RequestOutput, block_length: int, seen: list[int], committed: list[int]
) -> tuple[int, int]:
    """Adds one output to the counts per offset; returns its forwards and committed tokens."""
    start, steps = len(output.prompt_token_ids), output.outputs[0].steps
    blocks: dict[int, list[tuple[int, int]]] = {}
    for position, step in enumerate(steps, start):
        blocks.setdefault(position // block_length, []).append((position, step))
    num_forwards = 0
    for block in blocks.values():
        for forward in range(min(s for _, s in block), max(s for _, s in block) + 1):
            masks = [(position, step) for position, step in block if step >= forward]
            num_forwards += 1
            for position, step in masks:
                seen[position - masks[0][0]] += 1
                committed[position - masks[0][0]] += step == forward
    return num_forwards, len(steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--num-prompts", type=int, default=300)
    parser.add_argument("--threshold", type=float, default=None, help="default: the model's")
    arguments = parser.parse_args()
    llm = optimus.LLM(decode_mode="block", max_num_seqs=8)
    params = optimus.SamplingParams(temperature=0.0, confidence_threshold=arguments.threshold)
    outputs = generate_answers(llm, load_tasks(None, arguments.num_prompts), params)
    block_length = llm.engine.config.block_length
    seen, committed = [0] * block_length, [0] * block_length
    counts = [count(output, block_length, seen, committed) for output in outputs]
    per_forward = sum(tokens for _, tokens in counts) / sum(forwards for forwards, _ in counts)
    probability = [round(c / max(1, s), 3) for c, s in zip(committed, seen, strict=True)]
    print(f"{per_forward:.2f} answer tokens committed per denoising forward")
    print("P(commit | offset):", *probability)
    if arguments.output:
        result = {
            "benchmark": "commit_profile",
            "commit": git_commit(),
            "machine": machine(),
            "arguments": {"num_prompts": arguments.num_prompts, "threshold": arguments.threshold},
            "tokens_per_forward": per_forward,
            "probability_by_offset": probability,
        }
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
