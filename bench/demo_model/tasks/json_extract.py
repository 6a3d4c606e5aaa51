"""Extraction of facts from a short text into JSON.

The prompt names the keys and their order, so the fields cannot be written without reading it;
some facts in the text are not asked for. Dates and times are normalised, totals are computed.
"""

from __future__ import annotations

import itertools
import json
import random

from .common import Kinds, Task, draw, join_and
from .pools import CITIES, GOODS, JOBS, MONTHS, NAMES, PLACES, SURNAMES, TITLES

FAMILY = "json_extract"

Fact = tuple[str, object]  # sentence, value


def _render(rng: random.Random, text: str, keys: list[str], values: dict[str, object]) -> tuple:
    """Puts the text and the request together; the answer holds `keys` in the asked order."""
    listed = ", ".join(keys)
    ask = rng.choice(
        (
            f"Extract JSON with the keys {listed} from this text: {text}",
            f"Read the text and return {listed} as JSON. {text}",
            f"{text} Write this as JSON with {listed}.",
        )
    )
    return ask, json.dumps({k: values[k] for k in keys}, indent=2)


def _date(rng: random.Random) -> tuple[str, str]:
    """A date as prose and as ISO."""
    year, month, day = rng.randint(2015, 2035), rng.randint(1, 12), rng.randint(1, 28)
    name = MONTHS[month - 1]
    text = rng.choice((f"{day} {name} {year}", f"{name} {day}, {year}"))
    return text, f"{year:04d}-{month:02d}-{day:02d}"


def _time(rng: random.Random) -> tuple[str, str]:
    """A clock time as prose and in 24-hour form."""
    hour, minute = rng.randint(1, 11), rng.choice((0, 5, 10, 15, 20, 30, 40, 45, 50))
    half = rng.choice(("am", "pm"))
    text = f"{hour}:{minute:02d} {half}" if minute else f"{hour} {half}"
    return text, f"{hour + (12 if half == 'pm' else 0):02d}:{minute:02d}"


def person(rng: random.Random) -> tuple[str, str]:
    """A profile; four to six of its facts are asked for."""
    first, last = rng.choice(NAMES), rng.choice(SURNAMES)
    city, job, age = rng.choice(CITIES), rng.choice(JOBS), rng.randint(18, 79)
    phone = " ".join(str(rng.randint(100, 999)) for _ in range(2))
    born_text, born = _date(rng)
    married = rng.random() < 0.5
    kids = rng.randint(0, 5)
    facts: dict[str, Fact] = {
        "age": (rng.choice((f"{first} is {age} years old.", f"The age is {age}.")), age),
        "city": (rng.choice((f"{first} lives in {city}.", f"Home is {city}.")), city),
        "job": (rng.choice((f"{first} works as a {job}.", f"The job is {job}.")), job),
        "phone": (f"The phone number is {phone}.", phone.replace(" ", "-")),
        "member_since": (f"{first} joined on {born_text}.", born),
        "married": (f"{first} is {'married' if married else 'not married'}.", married),
        "children": (
            f"{first} has {'no' if kids == 0 else kids} {'child' if kids == 1 else 'children'}.",
            kids,
        ),
    }
    shown = rng.sample(list(facts), rng.randint(5, 7))
    keys = rng.sample(shown, rng.randint(4, min(6, len(shown))))
    values: dict[str, object] = {k: facts[k][1] for k in keys}
    values |= {"first_name": first, "last_name": last}
    text = " ".join([f"This is {first} {last}.", *(facts[k][0] for k in shown)])
    names = ["first_name", "last_name"]
    return _render(rng, text, names + keys if rng.random() < 0.7 else keys + names, values)


def order(rng: random.Random) -> tuple[str, str]:
    """An order with a list of items, their cost, the running sum and the total."""
    name, city = rng.choice(NAMES), rng.choice(CITIES)
    goods = rng.sample(GOODS, rng.randint(2, 4))
    lines = [(g, rng.randint(2, 9), rng.randint(2, 19)) for g in goods]
    listed = join_and([f"{n} {g[1]} at {p} dollars each" for g, n, p in lines])
    totals = list(itertools.accumulate(n * p for _, n, p in lines))
    number = rng.randint(100, 9999)
    day_text, day = _date(rng)
    paid = rng.random() < 0.5
    values: dict[str, object] = {
        "order": number,
        "customer": name,
        "city": city,
        "date": day,
        "paid": paid,
        "items": [
            {"name": g[0], "count": n, "cost": n * p, "sum": total}
            for (g, n, p), total in zip(lines, totals, strict=True)
        ],
        "total": totals[-1],
    }
    facts = [
        f"It ships to {city}.",
        f"The date is {day_text}.",
        f"It is {'already paid' if paid else 'not paid yet'}.",
    ]
    rng.shuffle(facts)
    text = " ".join([f"Order {number}: {name} wants {listed}.", *facts])
    keys = rng.sample(["order", "customer", "city", "date", "paid"], rng.randint(1, 3))
    at = rng.randint(0, len(keys))
    keys[at:at] = ["items", "total"]
    return _render(rng, text, keys, values)


def event(rng: random.Random) -> tuple[str, str]:
    """An appointment with date, time, place, length and guests."""
    title, place, city = rng.choice(TITLES), rng.choice(PLACES), rng.choice(CITIES)
    guests = rng.sample(NAMES, rng.randint(2, 4))
    (day_text, day), (start_text, start) = _date(rng), _time(rng)
    minutes, price = rng.randint(2, 9) * 15, rng.randint(0, 40)
    values: dict[str, object] = {
        "title": title,
        "date": day,
        "start": start,
        "place": place,
        "city": city,
        "minutes": minutes,
        "guests": guests,
        "price": price,
    }
    hours = f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
    facts = {
        "date": f"It is on {day_text}.",
        "start": f"It starts at {start_text}.",
        "place": f"Meet at the {place} in {city}.",
        "minutes": f"It takes {hours}.",
        "guests": f"Guests are {join_and(guests)}.",
        "price": "It is free." if price == 0 else f"A ticket costs {price} dollars.",
    }
    shown = list(facts)
    rng.shuffle(shown)
    text = " ".join([f"Invitation to a {title}.", *(facts[k] for k in shown)])
    keys = ["title", *rng.sample([k for k in values if k != "title"], rng.randint(4, 6))]
    return _render(rng, text, keys, values)


def readings(rng: random.Random) -> tuple[str, str]:
    """Measurements per city as a list of records, sorted or not, with the highest."""
    cities = rng.sample(CITIES, rng.randint(3, 5))
    temps = rng.sample(range(1, 40), len(cities))
    rain = [rng.randint(0, 30) for _ in cities]
    parts = [
        rng.choice(
            (
                f"{c} has {t} degrees and {r} mm of rain.",
                f"In {c} it is {t} degrees with {r} mm of rain.",
            )
        )
        for c, t, r in zip(cities, temps, rain, strict=True)
    ]
    rows = [
        {"city": c, "degrees": t, "rain": r} for c, t, r in zip(cities, temps, rain, strict=True)
    ]
    text = " ".join(parts)
    best = cities[temps.index(max(temps))]
    values: dict[str, object] = {"warmest": best, "stations": rows, "count": len(rows)}
    keys = rng.choice((["stations", "warmest"], ["count", "stations"],
                       ["stations", "count", "warmest"]))  # fmt: skip
    return _render(rng, text, list(keys), values)


def ledger(rng: random.Random) -> tuple[str, str]:
    """A statement of deposits and withdrawals with the balance after each."""
    name, city, start = rng.choice(NAMES), rng.choice(CITIES), rng.randint(100, 900)
    balances, parts, balance = [], [], start
    for _ in range(rng.randint(7, 14)):
        amount = rng.randint(11, 250)
        if balance - amount > 10 and rng.random() < 0.5:
            parts.append(f"out {amount}")
            balance -= amount
        else:
            parts.append(f"in {amount}")
            balance += amount
        balances.append(balance)
    values: dict[str, object] = {"owner": name, "city": city, "start": start,
                                 "balances": balances, "final": balance}  # fmt: skip
    text = rng.choice(
        (
            f"The account of {name} in {city} starts at {start}. Then: {', '.join(parts)}.",
            f"{name} from {city} has {start} dollars. Bookings: {', '.join(parts)}.",
        )
    )
    keys = ["balances", *rng.sample(["owner", "city", "start", "final"], rng.randint(1, 2))]
    rng.shuffle(keys)
    if "final" in keys:  # the sum is worked out in the list first
        keys.remove("final")
        keys.append("final")
    return _render(rng, text, keys, values)


def parcel(rng: random.Random) -> tuple[str, str]:
    """The way of a parcel from hand to hand, told in mixed order."""
    people = rng.sample(NAMES, rng.randint(28, 50))
    weight, city = rng.randint(2, 40), rng.choice(CITIES)
    hops = [f"{a} passes it to {b}." for a, b in itertools.pairwise(people)]
    rng.shuffle(hops)
    intro = rng.choice(
        (
            f"A parcel of {weight} kg for {city} starts with {people[0]}.",
            f"{people[0]} is the first to hold a parcel for {city} that weighs {weight} kg.",
        )
    )
    values: dict[str, object] = {
        "route": " ".join(people), "last": people[-1], "handovers": len(people) - 1,
        "weight": weight, "city": city, "first": people[0],
    }  # fmt: skip
    keys = rng.sample(["weight", "city", "first"], rng.randint(1, 3))
    keys += ["route", *rng.sample(["last", "handovers"], rng.randint(0, 2))]
    return _render(rng, " ".join([intro, *hops]), keys, values)


KINDS: Kinds = {
    "parcel": (16, parcel),
    "ledger": (1, ledger),
    "person": (1, person),
    "order": (1, order),
    "event": (1, event),
    "readings": (1, readings),
}


def generate(rng: random.Random) -> Task:
    """One random extraction task."""
    return draw(rng, FAMILY, KINDS)
