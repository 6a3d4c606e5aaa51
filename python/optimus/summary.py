"""Arithmetic of benchmark reports: percentiles, paired differences, regret."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .arms import parse_arm
from .evaluate import Score, wilson_interval

if TYPE_CHECKING:
    from .bench import BenchRow


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The smallest value that at least `percent` of the values do not exceed (nearest rank).

    One of the values, never between two, so infinite ones are no special case. None without values.
    """
    if not values:
        return None
    rank = math.ceil(percent / 100 * len(values) - 1e-9)
    return sorted(values)[max(0, rank - 1)]


def pooled_score(correct: Sequence[Sequence[bool]]) -> Score:
    """Score over repetitions [round][prompt]; the interval counts each prompt once, since its
    repetitions are no independent evidence."""
    num_prompts = len(correct[0])
    num_correct, total = sum(map(sum, correct)), len(correct) * num_prompts
    accuracy = num_correct / total if total else 0.0
    low, high = wilson_interval(accuracy * num_prompts, num_prompts)
    return Score(num_correct, total, accuracy, low, high)


def paired_difference(
    reference: Sequence[Sequence[bool]], other: Sequence[Sequence[bool]]
) -> tuple[float, float, float]:
    """Mean accuracy of `other` minus `reference`, and its 95% interval (normal approximation).

    Both [round][prompt], over the same prompts; a prompt's rounds are averaged first.
    """
    before, after = _prompt_shares(reference), _prompt_shares(other)
    differences = [b - a for a, b in zip(before, after, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return mean, -1.0, 1.0
    half = 1.959964 * math.sqrt(statistics.variance(differences) / len(differences))
    return mean, mean - half, mean + half


def _prompt_shares(correct: Sequence[Sequence[bool]]) -> list[float]:
    return [sum(prompt) / len(prompt) for prompt in zip(*correct, strict=True)]


@dataclass(frozen=True)
class Regret:
    """How much slower than `best` an arm was: 1 - its throughput over best's, median of the rounds
    (each round compares runs that followed each other); negative where it was faster."""

    best: str
    best_tokens_per_second: float
    regret: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """An elastic arm against the fixed arms (block and chunks) at the same concurrency.

    against_all: the fastest of all. against_good: the fastest of those whose accuracy, measured in
    this run, passes the quality floor. None where there is none.
    over_block, over_ar: ratios of throughput, medians of the rounds; None without the arm.
    The best of several noisy arms looks better than it is, so regret errs against the elastic arm.
    """

    concurrency: int
    mode: str
    against_all: Regret | None
    against_good: Regret | None
    over_block: float | None
    over_ar: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def passes_floor(row: BenchRow, floor: float | str | None) -> bool:
    """Whether a row's accuracy is good enough. floor: "block" (not measurably below block decoding;
    nothing is excluded if "block" was not run), an accuracy, or None."""
    if floor is None:
        return True
    if floor == "block":
        return row.accuracy_vs_block is None or row.accuracy_vs_block[2] >= 0
    return row.accuracy.accuracy >= float(floor)


def compare(rows: Sequence[BenchRow], floor: float | str | None) -> list[Comparison]:
    """One comparison per elastic arm and concurrency."""
    comparisons = []
    for row in rows:
        if not parse_arm(row.mode).is_elastic:
            continue
        peers = [r for r in rows if r.concurrency == row.concurrency]
        fixed = [r for r in peers if parse_arm(r.mode).is_fixed]
        good = [r for r in fixed if passes_floor(r, floor)]
        by_mode = {r.mode: r for r in peers}
        comparisons.append(
            Comparison(
                concurrency=row.concurrency,
                mode=row.mode,
                against_all=_regret(row, fixed),
                against_good=_regret(row, good),
                over_block=_ratio(row, by_mode.get("block")),
                over_ar=_ratio(row, by_mode.get("ar")),
            )
        )
    return comparisons


def _round_ratios(row: BenchRow, other: BenchRow) -> list[float]:
    return [a / b for a, b in zip(row.rounds, other.rounds, strict=True)]


def _ratio(row: BenchRow, other: BenchRow | None) -> float | None:
    return None if other is None else statistics.median(_round_ratios(row, other))


def _regret(row: BenchRow, others: Sequence[BenchRow]) -> Regret | None:
    if not others:
        return None
    best = max(others, key=lambda other: statistics.median(other.rounds))
    regrets = [1 - ratio for ratio in _round_ratios(row, best)]
    return Regret(
        best.mode,
        statistics.median(best.rounds),
        statistics.median(regrets),
        min(regrets),
        max(regrets),
    )
