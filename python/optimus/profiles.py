"""Latency profiles on disk: measured once for a device, a model and a shape of engine.

A profile is a file of the cache directory, named by the hash of everything its times depend on. A
file that cannot be read is measured again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from .cache import cache_dir, file_hash, model_hash, write_atomically
from .config import Checkpoint
from .machine import machine
from .native import _C

Profile = _C.LatencyProfile | Sequence[tuple[int, float]]

_log = logging.getLogger("optimus")
# Fields of EngineConfig that a profile's times, or the loads it was measured at, depend on.
_ENGINE_FIELDS = (
    "block_length", "max_num_seqs", "max_num_batched_rows", "max_model_len", "page_size",
    "num_pages", "num_threads", "cuda_graphs",
)  # fmt: skip
_CURVES = ("decode", "prefill", "kv")


def profile_key(
    checkpoint: Checkpoint, config: _C.EngineConfig, *, device: str, dtype: str
) -> dict[str, Any]:
    """What a profile's times depend on, as plain values."""
    here = machine()
    extension = getattr(_C, "__file__", None)
    gpu = f"{_C.cuda_device_name()}, " if device == "cuda" else ""
    return {
        "device": f"{device}: {gpu}{here['cpu']}, {here['cores']} cores",
        "model": model_hash(checkpoint.path),
        "grown_from": checkpoint.grown_from,
        "dtype": dtype,
        "versions": {name: here[name] for name in ("optimus", "torch")},
        "extension": file_hash(Path(extension)) if extension else None,
        "engine": {name: getattr(config, name) for name in _ENGINE_FIELDS},
    }


def profile_file(key: dict[str, Any]) -> Path:
    """Where the profile of a key lies, if it was ever measured."""
    text = json.dumps(key, sort_keys=True)
    return cache_dir() / "profiles" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def load_profile(key: dict[str, Any]) -> _C.LatencyProfile | None:
    """The profile kept for a key; None if there is none, or (with a warning) a broken file."""
    file = profile_file(key)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        _log.warning("the latency profile %s cannot be read and is measured anew: %s", file, error)
        return None
    try:
        stored = json.loads(text)
        if stored["key"] != key:
            raise ValueError("it was measured for something else")
        return profile_from_dict(stored["profile"])
    except (ValueError, KeyError, TypeError) as error:
        _log.warning("the latency profile %s is broken and is measured anew: %r", file, error)
        return None


def save_profile(key: dict[str, Any], profile: _C.LatencyProfile) -> None:
    """Keeps a profile; a cache that cannot be written is a warning."""
    file = profile_file(key)
    text = json.dumps({"key": key, "profile": profile_to_dict(profile)}, indent=1) + "\n"
    try:
        write_atomically(file, text)
    except OSError as error:
        _log.warning("the latency profile cannot be kept in %s: %s", file, error)


def measured_profile(
    engine: _C.Engine,
    checkpoint: Checkpoint,
    *,
    device: str,
    dtype: str,
    anew: bool = False,
    repeats: int = 3,
) -> _C.LatencyProfile:
    """The engine's profile, kept or measured (and kept) now; installed. anew: always measured.
    repeats: every time is the median of so many."""
    key = profile_key(checkpoint, engine.config, device=device, dtype=dtype)
    profile = None if anew else load_profile(key)
    if profile is not None:
        engine.set_profile(profile)
        return profile
    profile = engine.profile(repeats)
    save_profile(key, profile)
    return profile


def profile_to_dict(profile: _C.LatencyProfile) -> dict[str, Any]:
    """decode, prefill: [rows, ms]; kv: [keys read, ms on top]; is_padded."""
    curves = {name: [list(point) for point in getattr(profile, name)] for name in _CURVES}
    return {**curves, "is_padded": profile.is_padded}


def profile_from_dict(values: dict[str, Any]) -> _C.LatencyProfile:
    """Raises ValueError, KeyError or TypeError for anything that is no profile."""
    profile = _C.LatencyProfile()
    for name in _CURVES:
        setattr(profile, name, [(int(x), float(ms)) for x, ms in values[name]])
    profile.is_padded = bool(values["is_padded"])
    profile.validate()
    if not profile.decode:
        raise ValueError("[profiles] a profile needs decode points")
    return profile


def to_profile(profile: Profile | Literal["none"] | None) -> _C.LatencyProfile | None:
    """A LatencyProfile of a table of decode steps. Raises ValueError for one that does not fit."""
    if profile is None or isinstance(profile, _C.LatencyProfile):
        return profile
    if profile == "none":
        return None
    native = _C.LatencyProfile()
    try:
        native.decode = [(rows, float(ms)) for rows, ms in profile]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"[profiles] a latency profile is [(rows, ms), ...], got {profile!r}: {error}"
        ) from None
    native.validate()
    return native
