"""Calibrations: the accuracy of every way of decoding, against block decoding on paired prompts.

A calibration is a JSON file: which model (its hash), which tasks, where and how it was measured,
and one entry per arm. Elastic decoding reads it to leave out arms below its quality floor.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cache import cache_dir, model_hash, write_atomically
from .config import DEMO_MODEL, Checkpoint

if TYPE_CHECKING:
    from . import _C

_log = logging.getLogger("optimus")
FILE_NAME = "calibration.json"
_Z = 1.959964  # standard deviations of a 95% interval


@dataclass(frozen=True)
class Arm:
    """One way of decoding, measured. chunk_length None: block decoding.

    results: one character per prompt, "1" where the answer was right.
    difference: accuracy minus block decoding's at the same threshold, over the same prompts;
        difference_low, difference_high bound it at 95%. All 0 for block decoding itself.
    """

    threshold: float
    chunk_length: int | None
    refresh: bool
    correct: int
    total: int
    accuracy: float
    difference: float
    difference_low: float
    difference_high: float
    tokens_per_forward: float
    rows_per_token: float
    results: str

    @classmethod
    def of(
        cls,
        threshold: float,
        chunk_length: int | None,
        refresh: bool,
        results: str,
        block_results: str,
        *,
        tokens_per_forward: float,
        rows_per_token: float,
    ) -> Arm:
        difference, low, high = paired_difference(block_results, results)
        correct, total = results.count("1"), len(results)
        return cls(
            threshold, chunk_length, refresh, correct, total, correct / total,
            difference, low, high, tokens_per_forward, rows_per_token, results,
        )  # fmt: skip

    @property
    def key(self) -> tuple[float, int | None, bool]:
        return self.threshold, self.chunk_length, self.refresh

    def meets(self, floor: float | str | None) -> bool:
        """Whether elastic decoding with this `quality_floor` may use the arm."""
        if floor is None:
            return True
        return self.difference_high >= 0 if isinstance(floor, str) else self.accuracy >= floor


@dataclass
class Calibration:
    """Arms of one model. arguments: what else the results depend on. file: where it came from.

    weights_sha256: of the weights alone, by which models that were grown from them know them.
    """

    model_hash: str
    weights_sha256: str
    block_length: int
    arguments: dict[str, Any]
    machine: dict[str, Any]
    commit: str | None
    arms: list[Arm] = field(default_factory=list)
    file: Path | None = None

    def block_results(self, threshold: float) -> str | None:
        return next((a.results for a in self.arms if a.key == (threshold, None, True)), None)

    def measured_arms(self) -> list[_C.MeasuredArm]:
        """What the engine reads of it: the chunk arms."""
        from .native import _C

        return [
            _C.MeasuredArm(
                threshold=arm.threshold,
                chunk_length=arm.chunk_length,
                refresh=arm.refresh,
                accuracy=arm.accuracy,
                difference_upper=arm.difference_high,
            )
            for arm in self.arms
            if arm.chunk_length is not None
        ]

    def reaches(self, floor: float | str | None) -> bool:
        """Whether elastic decoding may use any of the chunk arms."""
        return any(arm.meets(floor) for arm in self.arms if arm.chunk_length is not None)

    def in_order(self) -> list[Arm]:
        """By threshold, block decoding first, then chunk length, freeze before refresh."""
        return sorted(self.arms, key=lambda a: (a.threshold, a.chunk_length or 0, a.refresh))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "model_hash": self.model_hash,
            "weights_sha256": self.weights_sha256,
            "block_length": self.block_length,
            "arguments": self.arguments,
            "machine": self.machine,
            "commit": self.commit,
            "arms": [asdict(arm) for arm in self.in_order()],
        }

    def save(self, file: Path) -> None:
        write_atomically(file, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, file: str | Path) -> Calibration:
        """Raises ValueError for a file that is no calibration."""
        file = Path(file)
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            found = cls(**{**values, "arms": [Arm(**arm) for arm in values["arms"]], "file": file})
            found._check()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"[calibration] {file} is no calibration: {error!r}") from None
        return found

    def _check(self) -> None:
        for arm in self.arms:
            bounds = (arm.accuracy, arm.difference_high, arm.difference_low, arm.threshold)
            if not all(isinstance(x, int | float) and math.isfinite(x) for x in bounds):
                raise ValueError(f"numbers must be finite, got {bounds}")
            if not 0 <= arm.accuracy <= 1 or len(arm.results) != arm.total:
                raise ValueError(f"arm {arm.key} contradicts itself")
            if arm.chunk_length is not None and not 1 <= arm.chunk_length <= self.block_length:
                raise ValueError(f"chunk_length must be in [1, {self.block_length}], got {arm.key}")


def paired_difference(block: str, other: str) -> tuple[float, float, float]:
    """Mean of other - block over paired prompts ("1" right, "0" wrong) and its 95% interval.

    Normal interval of a paired difference, as in McNemar's test: only prompts that one of the two
    got right and the other wrong count.
    """
    if len(block) != len(other) or not block:
        raise ValueError(
            f"[calibration] paired results must be of the same prompts, got {len(block)} and "
            f"{len(other)}"
        )
    n = len(block)
    gained = sum(b < o for b, o in zip(block, other, strict=True))
    lost = sum(b > o for b, o in zip(block, other, strict=True))
    mean = (gained - lost) / n
    half = _Z * math.sqrt(max(0.0, gained + lost - (gained - lost) ** 2 / n)) / n
    return mean, mean - half, mean + half


def cached_file(hash_of_model: str) -> Path:
    """Where `optimus calibrate` keeps a model's calibration unless told otherwise."""
    return cache_dir() / "calibrations" / f"{hash_of_model}.json"


def load_calibration(checkpoint: Checkpoint) -> Calibration | None:
    """The model directory's calibration.json, else the one in the cache; None without one.

    Files that are broken or of another model are skipped with a warning. A model that was grown
    from the demo model (`optimus grow`) decodes as that one does, and takes its calibration.
    """
    ours = model_hash(checkpoint.path)
    for file in (checkpoint.path / FILE_NAME, cached_file(ours)):
        found = _load_or_warn(file)
        if found is None:
            continue
        if found.model_hash == ours and found.block_length == checkpoint.block_length:
            return found
        _log.warning("ignored: the calibration %s is of another model", file)
    if checkpoint.grown_from is None:
        return None
    found = _load_or_warn(DEMO_MODEL / FILE_NAME)
    return found if found is not None and _is_parent(found, checkpoint) else None


def _load_or_warn(file: Path) -> Calibration | None:
    if not file.exists():
        return None
    try:
        return Calibration.load(file)
    except ValueError as error:
        _log.warning("ignored: %s", error)
        return None


def _is_parent(calibration: Calibration, checkpoint: Checkpoint) -> bool:
    origin = checkpoint.grown_from or {}
    return (
        origin.get("weights_sha256") == calibration.weights_sha256
        and calibration.block_length == checkpoint.block_length
    )


class CalibrationSource:
    """A model's calibration, looked for when it is first needed.

    given: "auto" (`load_calibration`), a file, or None. Raises ValueError for a bad file.
    """

    def __init__(self, checkpoint: Checkpoint, given: str | Path | None) -> None:
        self._checkpoint, self._given = checkpoint, given
        self._looked = given is None
        self._warned = False
        self._found: Calibration | None = None
        if given is not None and given != "auto":
            self._found, self._looked = Calibration.load(given), True
            ours = model_hash(checkpoint.path)
            if self._found.model_hash != ours and not _is_parent(self._found, checkpoint):
                raise ValueError(f"[calibration] {given} is of another model")

    def find(self) -> Calibration | None:
        if not self._looked:
            self._found, self._looked = load_calibration(self._checkpoint), True
        return self._found

    def measured_arms(self, floor: float | str | None) -> list[_C.MeasuredArm]:
        """For an elastic engine with this quality floor; empty when nothing is known, which is said
        once."""
        if floor is None:
            return []
        found = self.find()
        if found is not None:
            if not self._warned and not found.reaches(floor):
                self._warned = True
                _log.warning(
                    "no chunk length of %s reaches quality_floor=%r: the most accurate is used",
                    self._checkpoint.path, floor,
                )  # fmt: skip
            return found.measured_arms()
        if not self._warned:
            self._warned = True
            _log.warning(
                "no calibration of %s: quality_floor=%r cannot be kept, every chunk length may be "
                "used (run `optimus calibrate`, or pass quality_floor=None)",
                self._checkpoint.path, floor,
            )  # fmt: skip
        return []
