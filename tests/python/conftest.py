"""Set-up of all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's cache, nor does a process that a test starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPTIMUS_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield
