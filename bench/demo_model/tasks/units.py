"""Unit conversion with every factor and every carry written out."""

from __future__ import annotations

import random

from .common import (
    Kinds,
    Task,
    digits,
    draw,
    join_and,
    plural,
    rolling_digits,
    trace,
)
from .pools import GOODS, ITEMS, NAMES

FAMILY = "units"

# large unit, small unit, small units in one large unit, largest count of the large unit
PAIRS: tuple[tuple[str, str, int, int], ...] = (
    ("kg", "g", 1000, 9),
    ("km", "m", 1000, 9),
    ("liters", "ml", 1000, 9),
    ("m", "cm", 100, 9),
    ("feet", "inches", 12, 9),
    ("pounds", "ounces", 16, 9),
    ("hours", "minutes", 60, 9),
    ("minutes", "seconds", 60, 9),
    ("days", "hours", 24, 9),
    ("weeks", "days", 7, 12),
)


def _amount(rng: random.Random, pair: tuple[str, str, int, int]) -> tuple[int, int]:
    """A mixed amount (large, small), the small part not zero."""
    _, _, factor, top = pair
    small = rng.randint(1, 19) * 50 if factor == 1000 else rng.randint(1, factor - 1)
    return rng.randint(2, top), small


def _mixed(large: int, small: int, pair: tuple[str, str, int, int]) -> str:
    return f"{large} {pair[0]} {small} {pair[1]}"


def _to_small(large: int, small: int, pair: tuple[str, str, int, int]) -> tuple[list[str], int]:
    """Worked lines of (large, small) in the small unit."""
    _, unit, factor, _ = pair
    product = large * factor
    total = product + small
    return [f"{large} * {factor} = {product} and {product} + {small} = {total} {unit}."], total


def _to_mixed(total: int, pair: tuple[str, str, int, int]) -> tuple[list[str], int, int]:
    """Worked lines of a total in the small unit, split again."""
    _big, unit, factor, _ = pair
    large, small = divmod(total, factor)
    return (
        [f"{large} * {factor} = {large * factor} and {total} - {large * factor} = {small} {unit}."],
        large,
        small,
    )


def add_amounts(rng: random.Random) -> tuple[str, str]:
    """Sums mixed amounts: all to the small unit, a running sum, and back."""
    pair = rng.choice(PAIRS)
    amounts = [_amount(rng, pair) for _ in range(rng.randint(2, 3))]
    listed = join_and([_mixed(a, b, pair) for a, b in amounts])
    ask = rng.choice(
        (
            f"Add {listed}.",
            f"What is the sum of {listed}?",
            f"{rng.choice(NAMES)} needs {listed}. How much is that together?",
        )
    )
    lines, totals = [], []
    for a, b in amounts:
        work, total = _to_small(a, b, pair)
        lines += work
        totals.append(total)
    total = totals[0]
    for t in totals[1:]:
        lines.append(f"{total} + {t} = {total + t} {pair[1]}.")
        total += t
    work, large, small = _to_mixed(total, pair)
    return ask, "\n".join([*lines, *work, f"Answer: {_mixed(large, small, pair)}"])


def difference(rng: random.Random) -> tuple[str, str]:
    """Compares two mixed amounts and says by how much they differ."""
    pair = rng.choice(PAIRS)
    first, second = _amount(rng, pair), _amount(rng, pair)
    while first == second:
        second = _amount(rng, pair)
    a, b = rng.sample(NAMES, 2)
    ask = rng.choice(
        (
            f"{a} has {_mixed(*first, pair)}, {b} has {_mixed(*second, pair)}. "
            "Who has more, and how much more?",
            f"Compare: {a} with {_mixed(*first, pair)} and {b} with {_mixed(*second, pair)}. "
            "Who is ahead and by how much?",
        )
    )
    work_a, total_a = _to_small(*first, pair)
    work_b, total_b = _to_small(*second, pair)
    high, low = max(total_a, total_b), min(total_a, total_b)
    winner = a if total_a > total_b else b
    work, large, small = _to_mixed(high - low, pair)
    lines = [
        f"{a}: {work_a[0]}",
        f"{b}: {work_b[0]}",
        f"{winner} has more: {high} - {low} = {high - low} {pair[1]}.",
        *work,
        f"Answer: {winner} by {_mixed(large, small, pair)}",
    ]
    return ask, "\n".join(lines)


def seconds(rng: random.Random) -> tuple[str, str]:
    """Hours, minutes and seconds to seconds, or back."""
    h, m, s = rng.randint(1, 9), rng.randint(1, 59), rng.randint(1, 59)
    minutes = h * 60 + m
    total = minutes * 60 + s
    text = f"{plural(h, 'hour')}, {plural(m, 'minute')} and {plural(s, 'second')}"
    if rng.random() < 0.5:
        ask = rng.choice((f"How many seconds are {text}?", f"Turn {text} into seconds."))
        lines = [
            f"{h} * 60 = {h * 60} minutes.",
            f"{h * 60} + {m} = {minutes} minutes.",
            f"{minutes} * 60 = {minutes * 60} seconds.",
            f"{minutes * 60} + {s} = {total} seconds.",
        ]
        return ask, "\n".join([*lines, f"Answer: {total} seconds"])
    ask = rng.choice(
        (
            f"Write {total} seconds as hours, minutes and seconds.",
            f"How many hours, minutes and seconds are {total} seconds?",
        )
    )
    lines = [
        f"{h} * 3600 = {h * 3600} and {total} - {h * 3600} = {total - h * 3600} seconds.",
        f"{m} * 60 = {m * 60} and {total - h * 3600} - {m * 60} = {s} seconds.",
    ]
    return ask, "\n".join([*lines, f"Answer: {text}"])


def recipe(rng: random.Random) -> tuple[str, str]:
    """Scales a recipe to more people, ingredient by ingredient, with a unit change."""
    people, factor = rng.randint(2, 6), rng.randint(2, 9)
    parts = rng.sample(("flour", "sugar", "butter", "rice", "milk", "oats", "honey"), 3)
    grams = [rng.randint(2, 18) * 25 for _ in parts]
    listed = join_and([f"{g} g of {p}" for p, g in zip(parts, grams, strict=True)])
    ask = f"A recipe for {people} people needs {listed}. " + rng.choice(
        (
            f"How much of each for {people * factor} people?",
            f"What is needed for {people * factor} people?",
        )
    )
    lines = [f"{people * factor} / {people} = {factor}."]
    result = []
    for part, gram in zip(parts, grams, strict=True):
        total = gram * factor
        text = f"{total} g"
        if total >= 1000:
            text = f"{total // 1000} kg {total % 1000} g"
        lines.append(f"{part}: {gram} * {factor} = {total} g, that is {text}.")
        result.append(f"{text} of {part}")
    return ask, "\n".join([*lines, f"Answer: {join_and(result)}"])


def load(rng: random.Random) -> tuple[str, str]:
    """The weight of several kinds of things in kg and g."""
    things = rng.sample(ITEMS + GOODS, rng.randint(2, 3))
    counts = [(rng.randint(2, 9), rng.randint(2, 19) * rng.choice((5, 10, 25))) for _ in things]
    listed = join_and(
        [f"{n} {t[1]} of {w} g each" for t, (n, w) in zip(things, counts, strict=True)]
    )
    box = rng.randint(2, 9) * 50
    ask = rng.choice(
        (
            f"A box of {box} g holds {listed}. What does it weigh in all, in kg and g?",
            f"Pack {listed} into a box of {box} g. Give the total weight in kg and g.",
        )
    )
    lines, total = [], box
    for thing, (n, w) in zip(things, counts, strict=True):
        lines.append(f"{thing[1]}: {n} * {w} = {n * w} g.")
        lines.append(f"{total} + {n * w} = {total + n * w} g.")
        total += n * w
    pair = ("kg", "g", 1000, 9)
    work, large, small = _to_mixed(total, pair)
    return ask, "\n".join([*lines, *work, f"Answer: {_mixed(large, small, pair)}"])


def schedule(rng: random.Random) -> tuple[str, str]:
    """The end of each job when every job waits for the next full ten minutes."""
    now, jobs, states = rng.randint(5, 9) * 60, [], []
    first = f"{now // 60}:{now % 60:02d}"
    for _ in range(rng.randint(11, 19)):
        minutes = rng.randint(5, 95)
        long = minutes >= 60
        jobs.append(f"{minutes // 60} h {minutes % 60} min" if long else f"{minutes} min")
        now = -(-now // 10) * 10 + minutes
        states.append(f"{now // 60 % 24}:{now % 60:02d}")
    ask = rng.choice(
        (
            f"{rng.choice(NAMES)} starts at {first}. The jobs take {', '.join(jobs)}. Each new job "
            "waits for the next full ten minutes. When does each one end?",
            f"It is {first}. One after the other: {', '.join(jobs)}. A job only starts when the "
            "minutes end in 0. Give the time at the end of each.",
        )
    )
    return ask, trace("Clock", states)


def tank(rng: random.Random) -> tuple[str, str]:
    """A tank in liters and deciliters that runs over or dry; its level in deciliters."""
    size = rng.randint(4, 9) * 10
    level, flows = rng.randint(1, size), []
    states = [level]
    for _ in range(rng.randint(11, 19)):
        amount = rng.randint(1, 3) * 10 + rng.randint(1, 9)
        way = rng.choice(("in", "out"))
        level = min(size, level + amount) if way == "in" else max(0, level - amount)
        flows.append(f"{amount // 10} l {amount % 10} dl {way}")
        states.append(level)
    ask = rng.choice(
        (
            f"A tank of {size // 10} liters holds {states[0]} dl and can run over or dry. "
            f"Flows: {', '.join(flows)}. Give its level in dl each time.",
            f"A barrel with {states[0]} dl takes at most {size // 10} l and never less than 0. "
            f"What is in it in dl after {', '.join(flows)}?",
        )
    )
    return ask, trace("Level", states)


# small unit of which ten make the large one
TENS: tuple[tuple[str, str], ...] = (
    ("mm", "cm"),
    ("dl", "liter"),
    ("dm", "meter"),
    ("cents", "dime"),
)


def dial(rng: random.Random) -> tuple[str, str]:
    """A dial that multiplies what it shows, adds, and drops every full large unit."""
    small, large = rng.choice(TENS)
    inputs, factor, shown = rolling_digits(rng, 60, 116)
    text = digits(inputs)
    ask = rng.choice(
        (
            f"A dial shows 0 {small}. Each turn makes it {factor} times as much and adds the next "
            f"digit of {text} in {small}; every full {large} of 10 {small} drops out. "
            "What does it show after each turn?",
            f"Begin with 0 {small}. For each digit of {text}: times {factor}, plus the digit, "
            f"and take away each {large}, that is 10 {small}. Write the {small} each time.",
        )
    )
    return ask, f"Dial: {digits(shown)}\nAnswer: {shown[-1]} {small}"


KINDS: Kinds = {
    "dial": (20, dial),
    "schedule": (1, schedule),
    "tank": (1, tank),
    "add_amounts": (1, add_amounts),
    "difference": (1, difference),
    "seconds": (1, seconds),
    "recipe": (1, recipe),
    "load": (1, load),
}


def generate(rng: random.Random) -> Task:
    """One random conversion task."""
    return draw(rng, FAMILY, KINDS)
