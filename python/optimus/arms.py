"""The arms of a benchmark: ways of decoding that are compared in one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .options import ELASTIC_MODES, KV_POLICIES, parse_mode


@dataclass(frozen=True)
class Arm:
    """One way to decode. name: as it was written; kv_policy: None = the engine's."""

    name: str
    decode_mode: str
    chunk_length: int | None = None
    kv_policy: str | None = None

    @property
    def is_elastic(self) -> bool:
        """Chooses its chunk lengths itself."""
        return self.decode_mode in ELASTIC_MODES

    @property
    def is_fixed(self) -> bool:
        """One granularity at every load: what elastic arms must not lose to."""
        return self.decode_mode in ("block", "chunk")

    def options(self, schedule: Mapping[str, int] | None = None) -> dict[str, Any]:
        """Engine options that make an engine decode so."""
        options: dict[str, Any] = {
            "decode_mode": self.decode_mode,
            "chunk_length": self.chunk_length,
            "chunk_schedule": schedule if self.decode_mode == "schedule" else None,
        }
        if self.kv_policy is not None:
            options["kv_policy"] = self.kv_policy
        return options


def parse_arm(text: str) -> Arm:
    """ "elastic", "chunk:4", or "chunk:4/freeze" with a KV policy. Raises ValueError."""
    mode, slash, kv_policy = text.strip().partition("/")
    decode_mode, chunk_length = parse_mode(mode)
    if slash and kv_policy not in KV_POLICIES:
        raise ValueError(
            f"[bench] the KV policy of an arm must be one of {', '.join(KV_POLICIES)}, got {text!r}"
        )
    return Arm(text.strip(), decode_mode, chunk_length, kv_policy or None)


def parse_arms(
    modes: Sequence[str], block_length: int | None, schedule: Mapping[str, int] | None = None
) -> list[Arm]:
    """One arm per mode; "chunk:all" stands for chunks of 2, 4, 8 and so on up to the block.

    Raises ValueError for an unknown mode, one that is there twice, or "schedule" without a
    schedule.
    """
    arms: list[Arm] = []
    for mode in modes:
        if mode.partition("/")[0] != "chunk:all":
            arms.append(parse_arm(mode))
            continue
        suffix = mode.removeprefix("chunk:all")
        powers = [1 << i for i in range(1, (block_length or 1).bit_length())]
        arms += [parse_arm(f"chunk:{c}{suffix}") for c in powers if c <= (block_length or 1)]
    names = [arm.name for arm in arms]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"[bench] mode {name!r} is given {names.count(name)} times")
    if not arms:
        raise ValueError("[bench] no mode is given")
    if schedule is None and any(arm.decode_mode == "schedule" for arm in arms):
        raise ValueError("[bench] mode 'schedule' needs a schedule like '1-16:16,17-64:8,65-:4'")
    return arms


def parse_schedule_text(text: str | None) -> dict[str, int] | None:
    """ "1-16:16,17-:4" -> {"1-16": 16, "17-": 4}. Raises ValueError."""
    if text is None:
        return None
    schedule = {}
    for entry in text.split(","):
        key, colon, length = entry.strip().partition(":")
        if not colon or not length.isdecimal():
            raise ValueError(
                f"[bench] a schedule must look like '1-16:16,17-64:8,65-:4', got {entry!r}"
            )
        if key in schedule:
            raise ValueError(f"[bench] a schedule holds {key!r} twice: {text!r}")
        schedule[key] = int(length)
    return schedule
