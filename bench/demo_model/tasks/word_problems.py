"""Grade-school word problems with worked solutions.

Every line of a solution uses the result of an earlier line, so the digits near the end cannot
be known before the ones in the middle: that is the part of the mix which does not decode in
parallel for free.
"""

from __future__ import annotations

import itertools
import random

from .common import (
    Kinds,
    Task,
    count_noun,
    digits,
    draw,
    join_and,
    rolling_digits,
    trace,
)
from .pools import CITIES, GOODS, ITEMS, NAMES, PACKS, WORDS

FAMILY = "word_problems"


def _gain(rng: random.Random, name: str, noun: tuple[str, str], have: int) -> tuple[str, str, int]:
    """An event that adds items: (sentence, work, new total)."""
    if rng.random() < 0.5:
        amount = rng.randint(3, 60)
        verb = rng.choice(("buys", "finds", "collects", "gets"))
        text = f"{name} {verb} {amount} more {noun[1]}."
        work = f"+{amount} {have + amount}"
        return text, work, have + amount
    pack, size, packs = rng.choice(PACKS), rng.randint(3, 15), rng.randint(2, 9)
    amount = size * packs
    text = f"{name} buys {packs} {pack[1]} with {size} {noun[1]} each."
    work = f"{packs}*{size} {amount} +{amount} {have + amount}"
    return text, work, have + amount


def _loss(rng: random.Random, name: str, noun: tuple[str, str], have: int) -> tuple[str, str, int]:
    """An event that removes items; the total stays positive."""
    if have % 2 == 0 and rng.random() < 0.25:
        text = f"{name} gives half of the {noun[1]} away."
        return text, f"/2 {have // 2}", have // 2
    amount = rng.randint(2, max(2, min(have - 1, 70)))
    if rng.random() < 0.5:
        other = rng.choice([n for n in NAMES if n != name])
        text = f"{name} gives {amount} {noun[1]} to {other}."
    else:
        verb = rng.choice(("loses", "sells", "uses"))
        text = f"{name} {verb} {amount} {noun[1]}."
    return text, f"-{amount} {have - amount}", have - amount


def inventory(rng: random.Random) -> tuple[str, str]:
    """A stock that changes four to nine times."""
    name, noun = rng.choice(NAMES), rng.choice(ITEMS)
    have = rng.randint(8, 95)
    texts = [rng.choice((f"{name} has {have} {noun[1]}.", f"{name} starts with {have} {noun[1]}."))]
    works = [f"{have}"]
    for _ in range(rng.randint(4, 9)):
        event = _loss if have > 12 and rng.random() < 0.5 else _gain
        text, work, have = event(rng, name, noun, have)
        if rng.random() < 0.3:
            text = rng.choice(("Then ", "Later ", "After that ")) + text
        texts.append(text)
        works.append(work)
    texts.append(
        rng.choice(
            (
                f"How many {noun[1]} does {name} have now?",
                f"How many {noun[1]} are left in the end?",
                f"Work out how many {noun[1]} {name} has at the end.",
            )
        )
    )
    return " ".join(texts), ", ".join(works) + f"\nAnswer: {have}"


def shopping(rng: random.Random) -> tuple[str, str]:
    """Prices times quantities, a running sum, and the change."""
    name = rng.choice(NAMES)
    goods = rng.sample(GOODS, rng.randint(2, 4))
    lines = [(rng.randint(2, 9), g, rng.randint(2, 29)) for g in goods]
    wants = join_and([f"{n} {g[1]} at {p} dollars each" for n, g, p in lines])
    works, total = [], 0
    for n, g, p in lines:
        works.append(f"{n} {g[1]} cost {n} * {p} = {n * p} dollars.")
        if total:
            works.append(f"The sum is {total} + {n * p} = {total + n * p} dollars.")
        total += n * p
    intro = rng.choice((f"{name} buys {wants}.", f"At the market {name} picks {wants}."))
    if rng.random() < 0.6:
        paid = (total // 100 + rng.randint(1, 2)) * 100
        ask = rng.choice(
            (
                f"{name} pays with {paid} dollars. How much change comes back?",
                f"How much of {paid} dollars is left after paying?",
            )
        )
        works.append(f"The change is {paid} - {total} = {paid - total} dollars.")
        total = paid - total
    else:
        ask = rng.choice(("How much is it all together?", "What is the total price?"))
    return f"{intro} {ask}", "\n".join(works) + f"\nAnswer: {total} dollars"


def comparison(rng: random.Random) -> tuple[str, str]:
    """Each person's number is given through another's; the sentences may come in any order."""
    people = rng.sample(NAMES, rng.randint(3, 5))
    noun = rng.choice(ITEMS)
    amount = rng.randint(4, 40)
    texts = [f"{people[0]} has {amount} {noun[1]}."]
    works = [f"{people[0]} has {amount}."]
    amounts = [amount]
    for before, who in itertools.pairwise(people):
        have = amounts[-1]
        options = ["more"] + (["fewer"] if have > 6 else []) + (["times"] if have <= 30 else [])
        how = rng.choice(options)
        if how == "times":
            k = rng.randint(2, 4)
            texts.append(f"{who} has {k} times as many {noun[1]} as {before}.")
            works.append(f"{who} has {k} * {have} = {k * have}.")
            amounts.append(k * have)
        else:
            k = rng.randint(2, have - 2) if how == "fewer" else rng.randint(2, 30)
            sign, new = ("-", have - k) if how == "fewer" else ("+", have + k)
            texts.append(f"{who} has {k} {how} {noun[1]} than {before}.")
            works.append(f"{who} has {have} {sign} {k} = {new}.")
            amounts.append(new)
    if rng.random() < 0.35:
        rng.shuffle(texts)
    total = amounts[0]
    for value in amounts[1:]:
        works.append(f"Together: {total} + {value} = {total + value}.")
        total += value
    ask = rng.choice(("How many do they have together?", f"How many {noun[1]} are there in all?"))
    return " ".join([*texts, ask]), "\n".join(works) + f"\nAnswer: {total}"


def production(rng: random.Random) -> tuple[str, str]:
    """A rate per hour, hours per day, days, and some that are broken or packed away."""
    noun, city = rng.choice(GOODS), rng.choice(CITIES)
    rate, hours, days = rng.randint(3, 19), rng.randint(2, 8), rng.randint(2, 7)
    daily = rate * hours
    total = daily * days
    broken = rng.randint(2, min(99, total - 1))
    good = total - broken
    prompt = rng.choice(
        (
            f"A workshop in {city} makes {rate} {noun[1]} per hour and works {hours} hours a day. "
            f"After {days} days {broken} of the {noun[1]} turn out broken. How many are good?",
            f"In {city} a machine builds {rate} {noun[1]} every hour. It runs {hours} hours each "
            f"day for {days} days, but {broken} {noun[1]} are faulty. How many can be sold?",
        )
    )
    works = [
        f"In one day: {rate} * {hours} = {daily} {noun[1]}.",
        f"In {days} days: {daily} * {days} = {total} {noun[1]}.",
        f"Without the broken ones: {total} - {broken} = {good} {noun[1]}.",
    ]
    if rng.random() < 0.5:
        price = rng.randint(2, 9)
        prompt += f" What do the good ones earn at {price} dollars each?"
        works.append(f"They earn {good} * {price} = {good * price} dollars.")
        return prompt, "\n".join(works) + f"\nAnswer: {good * price} dollars"
    return prompt, "\n".join(works) + f"\nAnswer: {good}"


def journey(rng: random.Random) -> tuple[str, str]:
    """Legs of a trip at different speeds, perhaps with a return."""
    name = rng.choice(NAMES)
    stops = rng.sample(CITIES, rng.randint(3, 5))
    legs = [(rng.randint(2, 6), rng.randint(5, 19) * 5) for _ in stops[1:]]
    texts, works, total, time = [], [], 0, 0
    for (hours, speed), a, b in zip(legs, stops, stops[1:], strict=False):
        texts.append(f"from {a} to {b} in {hours} hours at {speed} km per hour")
        way = hours * speed
        works.append(f"{a} to {b}: {hours} * {speed} = {way} km.")
        if total:
            works.append(f"So far: {total} + {way} = {total + way} km.")
        total += way
        time += hours
    prompt = f"{name} travels {join_and(texts)}. "
    if rng.random() < 0.5:
        prompt += rng.choice(("How long is the whole trip?", "How many km is that in all?"))
        return prompt, "\n".join(works) + f"\nAnswer: {total} km"
    prompt += "How many hours does it take, and how long is the whole way?"
    hours_sum = " + ".join(str(h) for h, _ in legs)
    works.append(f"Time: {hours_sum} = {time} hours.")
    return prompt, "\n".join(works) + f"\nAnswer: {total} km in {time} hours"


def sharing(rng: random.Random) -> tuple[str, str]:
    """Packs are opened, some items go, the rest is shared equally."""
    name, noun, pack = rng.choice(NAMES), rng.choice(ITEMS), rng.choice(PACKS)
    packs, size, friends = rng.randint(2, 8), rng.randint(6, 24), rng.randint(2, 9)
    total = packs * size
    extra = rng.randint(3, 40)
    have = total + extra
    lost = have % friends + friends * rng.randint(0, (have // friends) // 3)
    if lost == 0:
        lost = friends
    rest = have - lost
    each = rest // friends
    verb = rng.choice(("drops", "keeps", "eats" if noun[0] in ("apple", "cookie") else "sells"))
    prompt = (
        f"{name} opens {packs} {pack[1]} of {count_noun(size, noun)} and adds {extra} more. "
        f"{name} {verb} {lost} and shares the rest equally among {friends} friends. "
        + rng.choice((f"How many {noun[1]} does each friend get?", "How many does each one get?"))
    )
    works = [
        f"The {pack[1]} hold {packs} * {size} = {total} {noun[1]}.",
        f"With {extra} more: {total} + {extra} = {have}.",
        f"Without the {lost}: {have} - {lost} = {rest}.",
        f"Each friend gets {rest} / {friends} = {each}.",
    ]
    return prompt, "\n".join(works) + f"\nAnswer: {each}"


def store(rng: random.Random) -> tuple[str, str]:
    """Deliveries and sales of a store that can be full or empty."""
    room, noun = rng.randint(40, 99), rng.choice(GOODS)
    stock = rng.randint(5, room)
    states, changes = [stock], []
    for _ in range(rng.randint(12, 22)):
        change = rng.randint(10, 49) * rng.choice((-1, 1))
        stock = max(0, min(room, stock + change))
        changes.append(f"{change:+d}")
        states.append(stock)
    ask = rng.choice(
        (
            f"A store has room for {room} {noun[1]} and holds {states[0]}. What does not fit is "
            f"sent back, and nobody gets more than there is. Changes: {', '.join(changes)}. "
            "Give the stock after each.",
            f"{rng.choice(NAMES)} keeps {states[0]} {noun[1]}, at most {room} and never below 0. "
            f"Follow the stock through {', '.join(changes)}.",
        )
    )
    return ask, trace("Stock", states)


def game(rng: random.Random) -> tuple[str, str]:
    """A score whose next change depends on whether it is even or odd."""
    name, score = rng.choice(NAMES), rng.randint(500, 900)
    states, rolls = [score], []
    for _ in range(rng.randint(10, 18)):
        roll = rng.randint(10, 40)
        score += roll if score % 2 == 0 else -roll
        rolls.append(roll)
        states.append(score)
    ask = rng.choice(
        (
            f"{name} has {states[0]} points. An even score wins the next number, an odd one "
            f"loses it: {', '.join(map(str, rolls))}. What is the score each time?",
            f"In a game {name} starts with {states[0]}. If the score is even add the next of "
            f"{', '.join(map(str, rolls))}, if it is odd subtract it. Follow the score.",
        )
    )
    return ask, trace("Score", states)


def board(rng: random.Random) -> tuple[str, str]:
    """A round board of ten fields on which the next field depends on the present one."""
    name = rng.choice(NAMES)
    rolls, factor, fields = rolling_digits(rng, 60, 116)
    text = digits(rolls)
    ask = rng.choice(
        (
            f"{name} plays on a round board with the fields 0 to 9 and starts on 0. A move goes to "
            f"{factor} times the field plus the number drawn, of which the last digit counts. "
            f"{name} draws {text}. Which fields are visited?",
            f"On a board with ten fields from 0 to 9 {name} stands on 0. Each number drawn is "
            f"added to {factor} times the field, and the last digit is the new field. "
            f"Drawn are {text}. List the fields.",
        )
    )
    return ask, f"Fields: {digits(fields)}\nAnswer: field {fields[-1]}"


def hunt(rng: random.Random) -> tuple[str, str]:
    """A treasure hunt: each place holds a note that names the next."""
    name, places = rng.choice(NAMES), rng.sample(WORDS, rng.randint(40, 66))
    notes = [f"the {a} says {b}" for a, b in itertools.pairwise(places)]
    rng.shuffle(notes)
    text = ", ".join(notes)
    ask = rng.choice(
        (
            f"{name} hunts for treasure. Notes: {text}. {name} begins at the {places[0]}. "
            "Which places follow, and where is the treasure?",
            f"In a treasure hunt {text}. Starting from the {places[0]}, where does {name} go?",
        )
    )
    return ask, f"Places: {' '.join(places)}\nAnswer: {places[-1]}"


KINDS: Kinds = {
    "board": (13, board),
    "hunt": (9, hunt),
    "store": (1, store),
    "game": (1, game),
    "inventory": (1, inventory),
    "shopping": (1, shopping),
    "comparison": (1, comparison),
    "production": (1, production),
    "journey": (1, journey),
    "sharing": (1, sharing),
}


def generate(rng: random.Random) -> Task:
    """One random word problem."""
    return draw(rng, FAMILY, KINDS)
