"""What users feel: latency percentiles, how many requests meet a service-level objective, and the
highest rate at which enough of them do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .load import check_positive
from .serving import FinishedRequest
from .summary import percentile

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Slo:
    """Limits in milliseconds; None = no limit. Raises ValueError for one that is not positive."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None:
                check_positive(f"slo_{name}", value)

    @property
    def is_set(self) -> bool:
        return self.ttft_ms is not None or self.tpot_ms is not None

    def meets_ttft(self, request: FinishedRequest) -> bool:
        return self.ttft_ms is None or request.ttft_s * 1e3 <= self.ttft_ms

    def meets_tpot(self, request: FinishedRequest) -> bool:
        """An answer of one token has no time per further token: it meets any limit."""
        tpot_s = request.tpot_s
        return self.tpot_ms is None or tpot_s is None or tpot_s * 1e3 <= self.tpot_ms

    def meets(self, request: FinishedRequest) -> bool:
        """Finished, and within every limit."""
        return request.is_finished and self.meets_ttft(request) and self.meets_tpot(request)


@dataclass(frozen=True)
class Percentiles:
    """Milliseconds, nearest rank; None where that rank never came."""

    p50: float | None
    p90: float | None
    p99: float | None
    mean: float | None

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Percentiles:
        finite = [1e3 * s for s in seconds if s < math.inf]
        ranks = (percentile([1e3 * s for s in seconds], p) for p in PERCENTILES)
        known = [None if r is None or r == math.inf else r for r in ranks]
        mean = sum(finite) / len(finite) if finite and len(finite) == len(seconds) else None
        return cls(known[0], known[1], known[2], mean)


@dataclass(frozen=True)
class ServingSummary:
    """A run in figures. Unfinished requests count as infinitely late, and against the SLO.

    offered_rate: requests per second of the arrivals. seconds: start of the run to the last token.
    tokens_per_second: output tokens of finished requests; goodput: requests per second that met the
    SLO. attainment: share of requests that met it, all of it and each half.
    tokens_per_forward, rows_per_token: over finished requests.
    """

    num_requests: int
    num_finished: int
    offered_rate: float
    seconds: float
    requests_per_second: float
    tokens_per_second: float
    goodput: float
    ttft_ms: Percentiles
    tpot_ms: Percentiles
    latency_ms: Percentiles
    attainment: float
    ttft_attainment: float
    tpot_attainment: float
    tokens_per_forward: float
    rows_per_token: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def summarise_serving(
    requests: Sequence[FinishedRequest], slo: Slo, duration_s: float
) -> ServingSummary:
    """duration_s: over which requests arrived. Raises ValueError without requests."""
    if not requests:
        raise ValueError("[serving] no request arrived: the rate or the duration is too small")
    finished = [r for r in requests if r.is_finished]
    count = len(requests)
    num_tokens = sum(r.num_tokens for r in finished)
    seconds = max([r.finish_s for r in finished if r.finish_s is not None], default=duration_s)
    tpots = [r.tpot_s for r in requests]
    num_good = sum(slo.meets(r) for r in requests)
    return ServingSummary(
        num_requests=count,
        num_finished=len(finished),
        offered_rate=count / duration_s,
        seconds=seconds,
        requests_per_second=len(finished) / seconds,
        tokens_per_second=num_tokens / seconds,
        goodput=num_good / seconds,
        ttft_ms=Percentiles.of([r.ttft_s for r in requests]),
        tpot_ms=Percentiles.of([t for t in tpots if t is not None]),
        latency_ms=Percentiles.of([r.latency_s for r in requests]),
        attainment=num_good / count,
        ttft_attainment=sum(slo.meets_ttft(r) for r in requests) / count,
        tpot_attainment=sum(slo.meets_tpot(r) for r in requests) / count,
        tokens_per_forward=num_tokens / max(1, sum(r.nfe for r in finished)),
        rows_per_token=sum(r.decode_rows for r in finished) / max(1, num_tokens),
    )


class MissCounter:
    """A `Stop`: ends a run once too many requests have missed the SLO for the share to be met."""

    def __init__(self, slo: Slo, num_requests: int, share: float) -> None:
        self.slo = slo
        self.misses_left = num_requests - math.ceil(share * num_requests - 1e-9)

    def __call__(self, request: FinishedRequest) -> bool:
        self.misses_left -= not self.slo.meets(request)
        return self.misses_left < 0


@dataclass(frozen=True)
class Probe:
    """One run of a capacity search: requests per second, share that met the SLO."""

    rate: float
    attainment: float


@dataclass(frozen=True)
class Capacity:
    """The highest rate found at which `share` of the requests met the SLO; 0 if none was found.

    limit: the lowest rate found at which they did not; None if all rates tried were fine.
    is_converged: rate and limit are as close as was asked for.
    """

    rate: float
    limit: float | None
    share: float
    is_converged: bool
    probes: list[Probe]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_capacity(
    attainment: Callable[[float], float],
    start_rate: float,
    *,
    share: float = 0.9,
    tolerance: float = 0.05,
    max_runs: int = 12,
) -> Capacity:
    """Bisection for the highest rate whose `attainment` is at least `share`.

    From start_rate, doubling or halving until the capacity is bracketed, then at the geometric
    mean, until the bracket is within `tolerance` or max_runs runs were made. Raises ValueError.
    """
    check_positive("rate", start_rate)
    check_positive("tolerance", tolerance)
    if not 0 < share <= 1:
        raise ValueError(f"[load] share must be in (0, 1], got {share}")
    if max_runs < 1:
        raise ValueError(f"[load] max_runs must be at least 1, got {max_runs}")
    probes: list[Probe] = []
    good, bad = 0.0, math.inf
    rate = start_rate
    while len(probes) < max_runs and not (good > 0 and bad <= good * (1 + tolerance)):
        probes.append(Probe(rate, attainment(rate)))
        if probes[-1].attainment >= share:
            good = max(good, rate)
        else:
            bad = min(bad, rate)
        if bad == math.inf:
            rate = good * 2
        elif good == 0:
            rate = bad / 2
        else:
            rate = math.sqrt(good * bad)
    return Capacity(
        rate=good,
        limit=None if bad == math.inf else bad,
        share=share,
        is_converged=good > 0 and bad <= good * (1 + tolerance),
        probes=probes,
    )
