"""Number chains: every value needs the one before it, by a rule that does not shortcut.

Sums alone would not do: a small model learns to add many terms at once. A branch, a
multiplication modulo something, or a remainder keeps the chain a chain.
"""

from __future__ import annotations

import random

from .common import Kinds, Task, digits, draw, rolling_digits, trace

FAMILY = "sequences"


def collatz(rng: random.Random) -> tuple[str, str]:
    """Halve or triple-and-add, a rule with a branch."""
    value, add, steps = rng.randint(10, 200), rng.randrange(1, 10, 2), rng.randint(10, 20)
    ask = rng.choice(
        (
            f"Start with {value}. Halve an even number; times 3 plus {add} for an odd one. "
            f"Do {steps} steps.",
            f"From {value} on: even numbers are halved, odd ones become 3 times the number "
            f"plus {add}. Show {steps} steps.",
        )
    )
    states = [value]
    for _ in range(steps):
        value = value // 2 if value % 2 == 0 else 3 * value + add
        states.append(value)
    return ask, trace("Steps", states)


def multiply_add(rng: random.Random) -> tuple[str, str]:
    """Times a, plus c, last two digits."""
    value, factor, plus = rng.randint(1, 99), rng.choice((2, 3)), rng.randint(1, 30)
    steps = rng.randint(12, 26)
    ask = rng.choice(
        (
            f"Start with {value}. Multiply by {factor}, add {plus} and keep the last two digits. "
            f"Repeat {steps} times.",
            f"Rule: times {factor}, plus {plus}, keep the last two digits. Apply it {steps} "
            f"times to {value}.",
        )
    )
    states = [value]
    for _ in range(steps):
        states.append((states[-1] * factor + plus) % 100)
    return ask, trace("Numbers", states)


def two_terms(rng: random.Random) -> tuple[str, str]:
    """Each number is the sum of the two before it, cut to two digits."""
    states, steps = [rng.randint(1, 99), rng.randint(1, 99)], rng.randint(12, 24)
    ask = rng.choice(
        (
            f"Start with {states[0]} and {states[1]}. Each next number is the sum of the two "
            f"before it; keep the last two digits. Write {steps} more numbers.",
            f"Continue {states[0]}, {states[1]} for {steps} numbers: add the last two and keep "
            "the last two digits.",
        )
    )
    for _ in range(steps):
        states.append((states[-1] + states[-2]) % 100)
    return ask, trace("Numbers", states)


def rolling_code(rng: random.Random) -> tuple[str, str]:
    """A check code: times m plus the next digit, last digit kept; one digit a step."""
    inputs, factor, codes = rolling_digits(rng, 60, 116)
    text = digits(inputs)
    ask = rng.choice(
        (
            f"Check code of {text}: begin with 0; for each digit multiply the code by {factor}, "
            "add the digit and keep the last digit. Write all codes.",
            f"The digits are {text}. From 0 on, the code becomes {factor} times the code plus "
            "the next digit, cut to its last digit. List the codes.",
        )
    )
    return ask, f"Codes: {digits(codes)}\nAnswer: {codes[-1]}"


def long_division(rng: random.Random) -> tuple[str, str]:
    """Division by one digit: all remainders first, then the quotient's digits."""
    number = [rng.randint(1, 9)] + [rng.randint(0, 9) for _ in range(rng.randint(15, 34))]
    divisor, rest = rng.choice((3, 4, 6, 7, 8, 9)), 0
    text = digits(number)
    ask = rng.choice(
        (
            f"Divide {text} by {divisor} digit by digit. Write the remainders, then the quotient.",
            f"Long division: {text} / {divisor}. Show every remainder and the quotient's digits.",
        )
    )
    remainders, quotient = [], []
    for digit in number:
        whole = 10 * rest + digit
        quotient.append(whole // divisor)
        rest = whole % divisor
        remainders.append(rest)
    lines = [
        f"Remainders: {digits(remainders)}",
        f"Quotient: {digits(quotient)}",
        f"Answer: remainder {rest}",
    ]
    return ask, "\n".join(lines)


KINDS: Kinds = {
    "rolling_code": (11, rolling_code),
    "multiply_add": (3, multiply_add),
    "two_terms": (2, two_terms),
    "long_division": (2, long_division),
    "collatz": (1, collatz),
}


def generate(rng: random.Random) -> Task:
    """One random number chain."""
    return draw(rng, FAMILY, KINDS)
