"""Generated, verifiable tasks: the only data the demo model is trained and measured on.

Every answer is a function of its prompt, so exact match of the whole text is a fair check.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from types import ModuleType

from . import dates, json_extract, lists, sequences, units, word_problems
from .common import HELDOUT_MODULUS, Task, is_heldout

__all__ = [
    "CHAINED",
    "FAMILIES",
    "HELDOUT_MODULUS",
    "Task",
    "check",
    "check_final",
    "generate",
    "heldout_tasks",
    "is_heldout",
    "train_tasks",
]

FAMILIES: dict[str, ModuleType] = {
    module.FAMILY: module
    for module in (word_problems, lists, json_extract, dates, units, sequences)
}

# The kinds whose next value cannot be had without the one before it: the part of the held-out set
# on which block decoding has to go step by step. Chosen by construction, not by accuracy.
CHAINED: frozenset[str] = frozenset(
    {"follow", "hunt", "parcel", "calls", "board", "dial", *sequences.KINDS}
)


def generate(rng: random.Random, family: str | None = None) -> Task:
    """One random task, of `family` or of a random one, on either side of the split."""
    return FAMILIES[family or rng.choice(list(FAMILIES))].generate(rng)


def train_tasks(seed: int) -> Iterator[Task]:
    """An endless stream of training tasks, fixed by the seed; held-out prompts never occur."""
    rng = random.Random(f"train-{seed}")
    while True:
        task = generate(rng)
        if not is_heldout(task.prompt):
            yield task


def heldout_tasks(seed: int, count: int) -> list[Task]:
    """`count` distinct held-out tasks, the families in turn."""
    rng = random.Random(f"heldout-{seed}")
    names, seen, out = list(FAMILIES), set(), []
    while len(out) < count:
        task = generate(rng, names[len(out) % len(names)])
        if is_heldout(task.prompt) and task.prompt not in seen:
            seen.add(task.prompt)
            out.append(task)
    return out


def check(task: Task, output: str) -> bool:
    """The strict check: the whole output, stripped, is the gold text."""
    return output.strip() == task.answer.strip()


def check_final(task: Task, output: str) -> bool:
    """The looser check: the result is right, whatever the work looks like.

    JSON is compared as data, with the order of keys; all other families by their last line.
    """
    if task.family == json_extract.FAMILY:
        try:
            found = json.loads(output, object_pairs_hook=list)
        except json.JSONDecodeError:
            return False
        return found == json.loads(task.answer, object_pairs_hook=list)
    lines = output.strip().splitlines()
    return bool(lines) and lines[-1].strip() == task.answer.strip().splitlines()[-1]
