"""How block decoding commits: answer tokens per forward, and P(commit | offset).

    python bench/commit_profile.py --output bench/results/commit_profile_cpu.json

Offset: distance of a mask from the first mask of its block, over all denoising forwards of the
prompts' answers. Positions behind the end of an answer are not counted. Rebuilt from the step at
which each token was committed.

Four profiles: over all forwards; over blocks that were not committed whole in their first forward;
and, of those blocks, over first and over later forwards alone. Large offsets are reached only while
most of the block is masked, which is nearly always in first forwards, and a first forward commits
far more at every offset: the profile over all forwards mixes the two in a share that moves with the
offset, and may rise where both of its parts fall.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import optimus
from optimus.evaluate import generate_answers, load_tasks
from optimus.machine import git_commit, machine
from optimus.outputs import RequestOutput

Block = list[tuple[int, int]]  # (position, step of its commit)
MIN_MASKS = 100  # offsets seen less often say nothing about the trend


@dataclass
class Profile:
    """Masks seen and committed at each offset from the first mask."""

    seen: list[int] = field(default_factory=list)
    committed: list[int] = field(default_factory=list)
    num_forwards: int = 0

    def add(self, block: Block, forward: int) -> None:
        """Counts the denoising step `forward` of a block."""
        masks = [(position, step) for position, step in block if step >= forward]
        self.num_forwards += 1
        for position, step in masks:
            offset = position - masks[0][0]
            while len(self.seen) <= offset:
                self.seen.append(0)
                self.committed.append(0)
            self.seen[offset] += 1
            self.committed[offset] += step == forward

    def probability(self) -> list[float]:
        return [c / max(1, s) for c, s in zip(self.committed, self.seen, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        return {
            "forwards": self.num_forwards,
            "tokens_per_forward": sum(self.committed) / max(1, self.num_forwards),
            "probability_by_offset": [round(p, 3) for p in self.probability()],
            "masks_by_offset": self.seen,
            "trend": trend([p for p, n in zip(self.probability(), self.seen) if n >= MIN_MASKS]),
        }


def trend(probability: list[float]) -> dict[str, Any] | None:
    """Whether a profile falls with the offset; None for fewer than two offsets.

    spearman: rank correlation of offset and probability, -1 for one that only falls; null for a
    constant. largest_rise: from any offset to any later one, and where.
    """
    if len(probability) < 2:
        return None
    p = np.asarray(probability)
    # Average ranks of ties.
    ranks = np.array([(p < x).sum() + ((p == x).sum() - 1) / 2 for x in p])
    offsets = np.arange(len(p))
    spearman = None if ranks.std() == 0 else float(np.corrcoef(offsets, ranks)[0, 1])
    rises = p[None, :] - p[:, None]
    rises[np.tril_indices(len(p))] = 0
    low, high = np.unravel_index(int(rises.argmax()), rises.shape)
    return {
        "spearman": None if spearman is None else round(spearman, 3),
        "largest_rise": round(float(rises.max()), 3),
        "largest_rise_offsets": [int(low), int(high)] if rises.max() > 0 else None,
    }


def blocks_of(output: RequestOutput, block_length: int) -> list[Block]:
    """The answer's positions by block."""
    blocks: dict[int, Block] = {}
    for position, step in enumerate(output.outputs[0].steps, len(output.prompt_token_ids)):
        blocks.setdefault(position // block_length, []).append((position, step))
    return list(blocks.values())


def measure(blocks: list[Block]) -> tuple[dict[str, Profile], float]:
    """The profiles, and the share of blocks committed whole in their first forward."""
    names = ("all", "not_whole_at_once", "first_forwards", "later_forwards")
    profiles = {name: Profile() for name in names}
    num_whole = 0
    for block in blocks:
        first, last = min(s for _, s in block), max(s for _, s in block)
        num_whole += first == last
        for forward in range(first, last + 1):
            profiles["all"].add(block, forward)
            if first < last:
                profiles["not_whole_at_once"].add(block, forward)
                part = "first_forwards" if forward == first else "later_forwards"
                profiles[part].add(block, forward)
    return profiles, num_whole / len(blocks)


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
    blocks = [block for output in outputs for block in blocks_of(output, block_length)]
    profiles, share = measure(blocks)
    every = profiles["all"].to_dict()
    print(f"{every['tokens_per_forward']:.2f} answer tokens per denoising forward")
    print(f"{share:.1%} of {len(blocks)} blocks were committed whole in their first forward")
    for name, profile in profiles.items():
        found = profile.to_dict()
        print(f"P(commit | offset), {name}:", *found["probability_by_offset"])
        print(f"  {found['forwards']} forwards; trend:", found["trend"])
    if arguments.output:
        result = {
            "benchmark": "commit_profile",
            "commit": git_commit(),
            "machine": machine(),
            "arguments": {"num_prompts": arguments.num_prompts, "threshold": arguments.threshold},
            "trends_from_masks": MIN_MASKS,
            "tokens_per_forward": every["tokens_per_forward"],
            "num_blocks": len(blocks),
            "share_of_blocks_whole_at_once": share,
            "probability_by_offset": every["probability_by_offset"],
            "profiles": {name: profile.to_dict() for name, profile in profiles.items()},
        }
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
