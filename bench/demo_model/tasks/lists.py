"""List and text manipulation with the intermediate steps written out."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import accumulate, pairwise

from .common import Kinds, Task, comma_list, draw, trace
from .pools import WORDS

FAMILY = "lists"


def _numbers(rng: random.Random, low: int, high: int) -> list[int]:
    """Between `low` and `high` distinct numbers."""
    return rng.sample(range(1, rng.choice((99, 99, 999)) + 1), rng.randint(low, high))


def _selection(values: list, take: Callable) -> str:
    """Selection sort: each line takes one value out of what is left."""
    left, out, lines = list(values), [], []
    while len(left) > 1:
        best = take(left)
        left.remove(best)
        out.append(best)
        lines.append(f"Take {best}, left: {comma_list(left)}")
    out.append(left[0])
    return "\n".join([*lines, f"Answer: {comma_list(out)}"])


def sort_numbers(rng: random.Random) -> tuple[str, str]:
    """Sorts distinct numbers by selection."""
    values = _numbers(rng, 4, 7)
    up = rng.random() < 0.6
    text = comma_list(values)
    if up:
        ask = rng.choice(
            (
                f"Sort these numbers from smallest to largest: {text}.",
                f"Put {text} in ascending order.",
                f"Numbers: {text}. List them in rising order, one step at a time.",
            )
        )
    else:
        ask = rng.choice(
            (
                f"Sort these numbers from largest to smallest: {text}.",
                f"Put {text} in descending order.",
                f"Numbers: {text}. List them in falling order, one step at a time.",
            )
        )
    return ask, _selection(values, min if up else max)


def sort_words(rng: random.Random) -> tuple[str, str]:
    """Sorts distinct words alphabetically by selection."""
    values = rng.sample(WORDS, rng.randint(5, 8))
    text = comma_list(values)
    ask = rng.choice(
        (
            f"Sort these words alphabetically: {text}.",
            f"Put the words {text} in the order of a dictionary.",
            f"Words: {text}. Arrange them from A to Z.",
        )
    )
    return ask, _selection(values, min)


def _rule(rng: random.Random, values: list[int]) -> tuple[str, str, Callable[[int], bool]]:
    """A filter: (wording, the mark a line of the work shows, predicate)."""
    name = rng.choice(("greater", "less", "even", "odd"))
    if name in ("even", "odd"):
        want = 0 if name == "even" else 1
        return f"{name}", f"{name}", lambda v: v % 2 == want
    pivot = rng.choice(values) + rng.randint(-3, 3)
    pivot = max(2, pivot)
    if name == "greater":
        return f"greater than {pivot}", f"> {pivot}", lambda v: v > pivot
    return f"less than {pivot}", f"< {pivot}", lambda v: v < pivot


def filter_numbers(rng: random.Random) -> tuple[str, str]:
    """Keeps the numbers that satisfy a rule, one decision a line."""
    values = _numbers(rng, 6, 9)
    words, mark, keep = _rule(rng, values)
    text = comma_list(values)
    ask = rng.choice(
        (
            f"Keep only the numbers that are {words}: {text}.",
            f"From the list {text} select every number that is {words}.",
            f"Which of these numbers are {words}? {text}",
        )
    )
    lines = [f"{v} {mark}? {'yes, keep' if keep(v) else 'no, drop'}" for v in values]
    kept = [v for v in values if keep(v)]
    return ask, "\n".join([*lines, f"Answer: {comma_list(kept) if kept else 'none'}"])


def filter_sum(rng: random.Random) -> tuple[str, str]:
    """Filters, then adds what is left with a running sum."""
    values = _numbers(rng, 6, 9)
    words, _, keep = _rule(rng, values)
    text = comma_list(values)
    ask = rng.choice(
        (
            f"Add up the numbers that are {words}: {text}.",
            f"In the list {text}, what is the sum of all numbers that are {words}?",
        )
    )
    kept = [v for v in values if keep(v)]
    if not kept:
        return ask, f"Keep: none\nDrop: {text}\nAnswer: 0"
    lines = [f"Keep: {comma_list(kept)}"]
    dropped = [v for v in values if not keep(v)]
    if dropped:
        lines.append(f"Drop: {comma_list(dropped)}")
    return ask, "\n".join([*lines, trace("Totals", list(accumulate(kept)))])


def _repeated(rng: random.Random) -> list[str]:
    """Seven to eleven words with repeats."""
    base = rng.sample(WORDS, rng.randint(3, 5))
    extra = [rng.choice(base) for _ in range(rng.randint(4, 6))]
    values = base + extra
    rng.shuffle(values)
    return values


def count_words(rng: random.Random) -> tuple[str, str]:
    """Counts every word with a running tally."""
    values = _repeated(rng)
    text = comma_list(values)
    ask = rng.choice(
        (
            f"Count how often each word appears: {text}.",
            f"How many times does each word occur in this list? {text}",
            f"Tally these words: {text}.",
        )
    )
    seen: dict[str, int] = {}
    lines = []
    for i, v in enumerate(values, 1):
        seen[v] = seen.get(v, 0) + 1
        lines.append(f"{i}. {v} {seen[v]}")
    return ask, "\n".join([*lines, "Answer: " + ", ".join(f"{k} {n}" for k, n in seen.items())])


def dedupe(rng: random.Random) -> tuple[str, str]:
    """Removes repeats, keeping the first of each."""
    values = _repeated(rng)
    text = comma_list(values)
    ask = rng.choice(
        (
            f"Remove the duplicates and keep the first of each: {text}.",
            f"List each word once, in the order of first appearance: {text}.",
            f"Drop the repeated words from {text}.",
        )
    )
    seen: list[str] = []
    lines = []
    for i, v in enumerate(values, 1):
        lines.append(f"{i}. {v} {'seen' if v in seen else 'new'}")
        if v not in seen:
            seen.append(v)
    return ask, "\n".join([*lines, f"Answer: {comma_list(seen)}"])


def reverse(rng: random.Random) -> tuple[str, str]:
    """Reverses a list after numbering its places."""
    values = rng.sample(WORDS, rng.randint(6, 10))
    text = comma_list(values)
    ask = rng.choice(
        (
            f"Reverse the order of these words: {text}.",
            f"Write the list backwards: {text}.",
            f"Read {text} from the last word to the first.",
        )
    )
    lines = [f"{i}. {v}" for i, v in enumerate(values, 1)]
    return ask, "\n".join([*lines, f"Answer: {comma_list(values[::-1])}"])


def follow(rng: random.Random) -> tuple[str, str]:
    """Follows links from word to word, given in mixed order, until they end."""
    words = rng.sample(WORDS, rng.randint(44, 70))
    steps = rng.randint(38, len(words) - 1)
    path, rest = words[: steps + 1], words[steps + 1 :]
    links = list(pairwise(path))
    links += list(pairwise(rest))  # a second chain that never meets the first
    rng.shuffle(links)
    text = ", ".join(f"{a} to {b}" for a, b in links)
    ask = rng.choice(
        (
            f"The links are {text}. Start at {path[0]} and follow them to the end.",
            f"Doors lead from {text}. Which words does a walk from {path[0]} pass, and where "
            "does it end?",
        )
    )
    return ask, f"Path: {' '.join(path)}\nAnswer: {path[-1]}"


KINDS: Kinds = {
    "follow": (20, follow),
    "sort_numbers": (1, sort_numbers),
    "sort_words": (1, sort_words),
    "filter_numbers": (1, filter_numbers),
    "filter_sum": (2, filter_sum),
    "count_words": (1, count_words),
    "dedupe": (1, dedupe),
    "reverse": (1, reverse),
}


def generate(rng: random.Random) -> Task:
    """One random list task."""
    return draw(rng, FAMILY, KINDS)
