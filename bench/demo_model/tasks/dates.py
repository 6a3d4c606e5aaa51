"""Calendar arithmetic, worked month by month."""

from __future__ import annotations

import calendar
import datetime
import itertools
import random

from .common import Kinds, Task, draw, plural, trace
from .pools import MONTHS, TITLES, WEEKDAYS

FAMILY = "dates"


def _long(day: datetime.date) -> str:
    return f"{day.day} {MONTHS[day.month - 1]} {day.year}"


def _wording(rng: random.Random, day: datetime.date) -> str:
    """One of three ways a prompt may write a date."""
    return rng.choice(
        (_long(day), day.isoformat(), f"{MONTHS[day.month - 1]} {day.day}, {day.year}")
    )


def _random_day(rng: random.Random) -> datetime.date:
    year, month = rng.randint(2001, 2039), rng.randint(1, 12)
    return datetime.date(year, month, rng.randint(1, calendar.monthrange(year, month)[1]))


def _month_line(year: int, month: int) -> str:
    """States a month's length; for February, why."""
    days, name = calendar.monthrange(year, month)[1], MONTHS[month - 1]
    if month == 2:
        leap = "a leap year" if days == 29 else "not a leap year"
        return f"{year} is {leap}, {name} has {days} days."
    return f"{name} has {days} days."


def _forward(start: datetime.date, days: int) -> list[str]:
    """The worked lines of start + days."""
    year, month, day, left = start.year, start.month, start.day, days
    lines = []
    while True:
        length = calendar.monthrange(year, month)[1]
        lines.append(_month_line(year, month))
        room = length - day
        if left <= room:
            lines.append(f"{day} + {left} = {day + left}.")
            return lines
        lines.append(f"{length} - {day} = {room} and {left} - {room} = {left - room}.")
        left -= room
        day, month = 0, month + 1
        if month > 12:
            year, month = year + 1, 1
        lines.append(f"Go on from 0 {MONTHS[month - 1]} {year} with {plural(left, 'day')}.")


def add_days(rng: random.Random) -> tuple[str, str]:
    """A date plus a number of days."""
    start, days = _random_day(rng), rng.randint(5, 100)
    text, what = _wording(rng, start), rng.choice(TITLES)
    ask = rng.choice(
        (
            f"What date is {days} days after {text}?",
            f"Which day comes {days} days after {text}?",
            f"The {what} is {days} days after {text}. On which date is that?",
        )
    )
    end = start + datetime.timedelta(days=days)
    lines = [f"Start at {_long(start)} with {days} days.", *_forward(start, days)]
    return ask, "\n".join(lines) + f"\nAnswer: {_long(end)}"


def add_weeks(rng: random.Random) -> tuple[str, str]:
    """A date plus weeks and days, turned into days first."""
    start, weeks, days = _random_day(rng), rng.randint(2, 12), rng.randint(1, 6)
    text, what = _wording(rng, start), rng.choice(TITLES)
    span = f"{weeks} weeks and {plural(days, 'day')}"
    ask = rng.choice(
        (
            f"What date is {span} after {text}?",
            f"A {what} was planned for {text} but moved back by {span}. What is the new date?",
            f"Add {span} to {text}.",
        )
    )
    total = 7 * weeks + days
    end = start + datetime.timedelta(days=total)
    lines = [
        f"{weeks} * 7 = {7 * weeks} and {7 * weeks} + {days} = {total}.",
        f"Start at {_long(start)} with {total} days.",
        *_forward(start, total),
    ]
    return ask, "\n".join(lines) + f"\nAnswer: {_long(end)}"


def _weekday_lines(weekday: int, days: int) -> tuple[list[str], str]:
    """Worked steps from a weekday over a number of days."""
    weeks, rest = divmod(days, 7)
    lines = [
        f"{weeks} * 7 = {weeks * 7} and {days} - {weeks * 7} = {rest}.",
        f"{plural(weeks, 'full week')} and {plural(rest, 'day')} after {WEEKDAYS[weekday]}.",
    ]
    lines += [f"{i} later: {WEEKDAYS[(weekday + i) % 7]}." for i in range(1, rest + 1)]
    return lines, WEEKDAYS[(weekday + rest) % 7]


def weekday(rng: random.Random) -> tuple[str, str]:
    """A weekday plus a number of days, and the date as well."""
    start, days = _random_day(rng), rng.randint(8, 90)
    text, name = _wording(rng, start), WEEKDAYS[start.weekday()]
    ask = rng.choice(
        (
            f"{text} is a {name}. Which weekday and date is {days} days later?",
            f"If {text} falls on a {name}, what are the weekday and the date {days} days after it?",
        )
    )
    end = start + datetime.timedelta(days=days)
    lines, found = _weekday_lines(start.weekday(), days)
    lines += [f"Start at {_long(start)} with {days} days.", *_forward(start, days)]
    return ask, "\n".join(lines) + f"\nAnswer: {found}, {_long(end)}"


def between(rng: random.Random) -> tuple[str, str]:
    """The number of days between two dates, month by month."""
    start = _random_day(rng)
    end = start + datetime.timedelta(days=rng.randint(25, 130))
    a, b = _wording(rng, start), _wording(rng, end)
    ask = rng.choice(
        (
            f"How many days is it from {a} to {b}?",
            f"Count the days between {a} and {b}.",
            f"A {rng.choice(TITLES)} opens on {a} and closes on {b}. How many days later is that?",
        )
    )
    year, month = start.year, start.month
    if (year, month) == (end.year, end.month):
        work = [f"Same month: {end.day} - {start.day} = {end.day - start.day}."]
        return ask, "\n".join(work) + f"\nAnswer: {plural(end.day - start.day, 'day')}"
    length = calendar.monthrange(year, month)[1]
    total = length - start.day
    work = [_month_line(year, month), f"{length} - {start.day} = {total} days."]
    while True:
        year, month = (year, month + 1) if month < 12 else (year + 1, 1)
        last = (year, month) == (end.year, end.month)
        part = end.day if last else calendar.monthrange(year, month)[1]
        if last:
            work.append(f"{MONTHS[month - 1]} adds {part} more.")
        else:
            work.append(_month_line(year, month))
        work.append(f"{total} + {part} = {total + part} days.")
        total += part
        if last:
            return ask, "\n".join(work) + f"\nAnswer: {plural(total, 'day')}"


def recurring(rng: random.Random) -> tuple[str, str]:
    """Something comes back every few days, but a weekend moves it, and all that follows."""
    every, count = rng.randint(3, 20), rng.randint(8, 14)
    # All within one year: nobody has to know whether the next one is a leap year.
    latest = 365 - (every + 2) * count - 3
    start = datetime.date(rng.randint(2001, 2039), 1, 1)
    start += datetime.timedelta(days=rng.randint(0, latest))
    while start.weekday() > 4:
        start += datetime.timedelta(days=1)
    what, text = rng.choice(TITLES), _wording(rng, start)
    ask = rng.choice(
        (
            f"A {what} takes place on {text}, a {WEEKDAYS[start.weekday()]}, and then always "
            f"{every} days later, or on the Monday after if that is a weekend. "
            f"List the next {count} dates.",
            f"{text} is a {WEEKDAYS[start.weekday()]}. Count on by {every} days, {count} times; "
            "from a Saturday or Sunday move on to Monday each time.",
        )
    )
    day, states = start, []
    for _ in range(count + 1):
        while day.weekday() > 4:
            day += datetime.timedelta(days=1)
        states.append(f"{WEEKDAYS[day.weekday()]} {day.day} {MONTHS[day.month - 1]}")
        day += datetime.timedelta(days=every)
    return ask, trace("Dates", states)


def calls(rng: random.Random) -> tuple[str, str]:
    """Every meeting names the day of the next one; told in mixed order."""
    year = rng.choice((2023, 2025, 2026, 2027))
    first = datetime.date(year, 1, 1)
    days = [first + datetime.timedelta(days=d) for d in rng.sample(range(365), rng.randint(18, 30))]
    names = [f"{d.day} {MONTHS[d.month - 1]}" for d in days]
    links = [f"{a} names {b}" for a, b in itertools.pairwise(names)]
    rng.shuffle(links)
    text, what = ", ".join(links), rng.choice(TITLES)
    ask = rng.choice(
        (
            f"At every {what} the day of another one is set: {text}. "
            f"In which order do they follow if one starts with {names[0]}?",
            f"Each {what} names a date: {text}. Begin on {names[0]} and follow the dates.",
        )
    )
    return ask, f"Dates: {' '.join(names)}\nAnswer: {names[-1]}"


KINDS: Kinds = {
    "calls": (15, calls),
    "recurring": (2, recurring),
    "add_days": (1, add_days),
    "add_weeks": (1, add_weeks),
    "weekday": (1, weekday),
    "between": (1, between),
}


def generate(rng: random.Random) -> Task:
    """One random calendar task."""
    return draw(rng, FAMILY, KINDS)
