"""Files kept between runs: where they lie, how they are written, and which model they are of."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

_READ_SIZE = 1 << 22


def cache_dir() -> Path:
    """OPTIMUS_CACHE_DIR, else optimus/ in XDG_CACHE_HOME, else ~/.cache/optimus. May not exist."""
    own = os.environ.get("OPTIMUS_CACHE_DIR")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "optimus"


def write_atomically(file: Path, data: str | bytes) -> None:
    """Readers find the old file or the whole new one, never a part of it. Makes the directory."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "wb") as part:
            part.write(data.encode() if isinstance(data, str) else data)
        umask = os.umask(0)  # mkstemp makes files for their owner alone
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def model_hash(directory: Path) -> str:
    """SHA-256 (hex) over config.json and the weights: the same model wherever it lies."""
    total = hashlib.sha256()
    for file in [directory / "config.json", *sorted(directory.glob("*.safetensors"))]:
        total.update(f"{file.name}\0{file_hash(file)}\n".encode())
    return total.hexdigest()


def file_hash(file: Path) -> str:
    """SHA-256 (hex). Of big files remembered in the cache, by path, size and time of change."""
    stat = file.stat()
    if stat.st_size <= _READ_SIZE:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    key = f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"
    remembered = cache_dir() / "hashes" / hashlib.sha256(key.encode()).hexdigest()
    with contextlib.suppress(OSError, UnicodeDecodeError):
        text = remembered.read_text()
        if len(text) == 64:
            return text
    digest = hashlib.sha256()
    with file.open("rb") as data:
        while part := data.read(_READ_SIZE):
            digest.update(part)
    with contextlib.suppress(OSError):  # a cache that cannot be written is no reason to stop
        write_atomically(remembered, digest.hexdigest())
    return digest.hexdigest()
