"""What all task generators share: the task record, the split, and small wording helpers."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

HELDOUT_MODULUS = 64


@dataclass(frozen=True)
class Task:
    """One prompt with its only correct answer.

    `family` is the group accuracy is reported on, `kind` the generator inside it.
    """

    family: str
    kind: str
    prompt: str
    answer: str


def is_heldout(prompt: str) -> bool:
    """Says on which side of the split a prompt lies: one prompt in 64 is held out.

    The side depends on the prompt's text alone, so training and held-out sets are disjoint
    however many examples either draws.
    """
    digest = hashlib.sha256(prompt.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") % HELDOUT_MODULUS == 0


def join_and(parts: list[str]) -> str:
    """`[a, b, c]` -> `a, b and c`."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def count_noun(count: int, noun: tuple[str, str]) -> str:
    """A number and the noun in the form that fits it."""
    return f"{count} {noun[0] if count == 1 else noun[1]}"


def plural(count: int, noun: str) -> str:
    """As `count_noun` for nouns whose plural only adds an s."""
    return count_noun(count, (noun, noun + "s"))


def comma_list(values: list[int] | list[str]) -> str:
    """Values separated by a comma and a space."""
    return ", ".join(str(v) for v in values)


# kind -> (weight among its family's kinds, generator of (prompt, answer))
Kinds = dict[str, tuple[int, Callable[[random.Random], tuple[str, str]]]]


def draw(rng: random.Random, family: str, kinds: Kinds) -> Task:
    """One random task of a family, its kind drawn by weight."""
    kind = rng.choices(list(kinds), [weight for weight, _ in kinds.values()])[0]
    prompt, answer = kinds[kind][1](rng)
    return Task(family, kind, prompt, answer)


def rolling_digits(rng: random.Random, low: int, high: int) -> tuple[list[int], int, list[int]]:
    """Inputs, factor and states of s -> (factor * s + input) mod 10 from s = 0.

    The factors are invertible modulo 10, so every input matters for all that follows.
    """
    inputs = [rng.randint(0, 9) for _ in range(rng.randint(low, high))]
    factor, state, states = rng.choice((3, 7, 9)), 0, []
    for value in inputs:
        state = (state * factor + value) % 10
        states.append(state)
    return inputs, factor, states


def digits(values: list[int]) -> str:
    """Single digits side by side."""
    return "".join(map(str, values))


def trace(label: str, values: list[int] | list[str]) -> str:
    """A chain of states, each computed from the one before, and the last one as the answer."""
    return f"{label}: {comma_list(values)}\nAnswer: {values[-1]}"
