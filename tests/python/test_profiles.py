"""Latency profiles on disk, and the cache they lie in."""

from __future__ import annotations

import json
import logging
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from checkpoints import make_checkpoint
from optimus import _C, LLM
from optimus.cache import cache_dir, file_hash, model_hash, write_atomically
from optimus.cli import main
from optimus.profiles import (
    load_profile,
    profile_file,
    profile_from_dict,
    profile_key,
    profile_to_dict,
    save_profile,
)

OPTIONS: dict[str, Any] = {"max_num_seqs": 2, "max_num_batched_rows": 32, "num_threads": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    return make_checkpoint(path, tokenizer=True, max_position_embeddings=64)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPTIMUS_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def key_of(llm: LLM) -> dict[str, Any]:
    return profile_key(llm.checkpoint, llm.engine.config, device=llm.device, dtype=llm.dtype)


def curves(llm: LLM) -> dict[str, Any]:
    assert llm.latency_profile is not None
    return profile_to_dict(llm.latency_profile)


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPTIMUS_CACHE_DIR", "~/here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == Path.home() / "here"
    monkeypatch.delenv("OPTIMUS_CACHE_DIR")
    assert cache_dir() == tmp_path / "optimus"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_dir() == Path.home() / ".cache" / "optimus"


def test_write_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a" / "b.json"
    write_atomically(file, "one")
    write_atomically(file, b"two")
    assert file.read_text() == "two" and os.listdir(file.parent) == ["b.json"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask

    def fail(*_: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no room"):
        write_atomically(file, "three")
    assert file.read_text() == "two" and os.listdir(file.parent) == ["b.json"]


def test_model_hash(tmp_path: Path, cache: Path) -> None:
    """Follows contents, not places; remembers big files until they change."""
    one, same, other = (
        make_checkpoint(tmp_path / name, seed=seed)
        for name, seed in (("one", 0), ("same", 0), ("other", 1))
    )
    assert model_hash(one) == model_hash(same) != model_hash(other)
    (same / "config.json").write_text((one / "config.json").read_text() + " ")
    assert model_hash(one) != model_hash(same)

    big = tmp_path / "big"
    big.write_bytes(b"x" * (5 << 20))
    first = file_hash(big)
    [remembered] = (cache / "hashes").iterdir()
    assert remembered.read_text() == first == file_hash(big)
    remembered.write_text("0" * 64)
    assert file_hash(big) == "0" * 64  # it is read
    big.write_bytes(b"y" * (5 << 20))
    os.utime(big, ns=(1, 1))
    assert file_hash(big) not in (first, "0" * 64)


def test_profiles_survive_the_process(checkpoint: Path, cache: Path) -> None:
    first = LLM(checkpoint, **OPTIONS)
    [file] = (cache / "profiles").iterdir()
    assert file == profile_file(key_of(first))
    again = LLM(checkpoint, **OPTIONS)
    assert curves(again) == curves(first)  # times to the last digit: not measured twice
    assert again.engine.predict_ms(32) == pytest.approx(curves(first)["decode"][-1][1])


@pytest.mark.parametrize(
    "changes",
    [{"max_num_batched_rows": 64}, {"max_num_seqs": 3}, {"num_threads": 2}, {"dtype": "bfloat16"}],
    ids=str,
)
def test_what_a_profile_depends_on(checkpoint: Path, cache: Path, changes: dict[str, Any]) -> None:
    block = LLM(checkpoint, decode_mode="block", **OPTIONS)
    other = LLM(checkpoint, decode_mode="block", **(OPTIONS | changes))
    assert profile_file(key_of(block)) != profile_file(key_of(other))
    elastic = LLM(checkpoint, **OPTIONS)
    assert key_of(elastic) == key_of(block)
    assert len(os.listdir(cache / "profiles")) == 1


def test_block_mode_and_given_profiles_touch_no_cache(checkpoint: Path, cache: Path) -> None:
    LLM(checkpoint, decode_mode="block", **OPTIONS)
    LLM(checkpoint, latency_profile=[(1, 1.0)], **OPTIONS)
    assert not (cache / "profiles").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"decode"', '"encode"'),
        lambda text: text.replace('"key"', '"other"'),
        lambda text: json.dumps({"key": json.loads(text)["key"], "profile": None}),
        lambda text: text.replace('"cpu', '"gpu'),
    ],
    ids=["empty", "truncated", "a list", "no curve", "no key", "no profile", "another device"],
)
def test_broken_files_are_measured_again(
    checkpoint: Path, cache: Path, caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    file = profile_file(key_of(LLM(checkpoint, **OPTIONS)))
    good = file.read_text()
    file.write_text(damage(good))
    with caplog.at_level(logging.WARNING, "optimus"):
        llm = LLM(checkpoint, **OPTIONS)
    assert sum("is measured anew" in m for m in caplog.messages) == 1
    stored = json.loads(file.read_text())
    assert stored["key"] == key_of(llm) and stored["profile"] == curves(llm)


def test_a_cache_that_cannot_be_written(
    checkpoint: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_text("not a directory")
    llm = LLM(checkpoint, **OPTIONS)
    assert any("cannot be" in message for message in caplog.messages)
    assert llm.generate("hello", use_tqdm=False)


@pytest.mark.parametrize(
    "curve, points", [("decode", []), ("decode", [[2, 1.0], [1, 2.0]]), ("kv", [[5, -1.0]])]
)
def test_profiles_that_make_no_sense(curve: str, points: list[list[float]]) -> None:
    values: dict[str, Any] = {"decode": [[1, 1.0]], "prefill": [], "kv": [], "is_padded": False}
    with pytest.raises(ValueError, match=r"latency_model|needs decode points"):
        profile_from_dict(values | {curve: points})


def test_dict_and_back(cache: Path) -> None:
    profile = _C.LatencyProfile()
    profile.decode, profile.prefill = [(1, 0.1), (7, 1 / 3)], [(1, 0.05)]
    profile.kv, profile.is_padded = [(1000, 0.0), (1 << 40, 2.5)], True
    assert profile_to_dict(profile_from_dict(profile_to_dict(profile))) == profile_to_dict(profile)
    save_profile({"a": 1}, profile)
    loaded = load_profile({"a": 1})
    assert loaded is not None and profile_to_dict(loaded) == profile_to_dict(profile)
    assert load_profile({"a": 2}) is None


def test_the_command(checkpoint: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["profile", "--model", str(checkpoint), "--max-num-seqs", "2",
                 "--max-num-batched-rows", "32", "--threads", "1"]  # fmt: skip
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--json"])
    assert done.value.code == 0
    report = json.loads(capsys.readouterr().out)
    llm = LLM(checkpoint, **OPTIONS)
    assert report["key"] == key_of(llm) and report["profile"] == curves(llm)
    with pytest.raises(SystemExit):
        main(arguments)
    shown = capsys.readouterr().out
    assert "us/row" in shown and str(profile_file(key_of(llm))) in shown
    assert curves(LLM(checkpoint, **OPTIONS)) != report["profile"]  # measured anew


def test_a_step_is_timed_over_any_contexts(checkpoint: Path) -> None:
    engine = LLM(checkpoint, device="cpu", **OPTIONS).engine
    assert engine.time_forward(8, [64, 1]) > 0
    for rows, contexts, text in (
        (33, [8], "rows must be in 1..32, .* got 33 rows, 1 contexts"),
        (8, [], "got 8 rows, 0 contexts"),
        (8, [1, 1, 1], "contexts 1 to min\\(rows, 2\\), .* got 8 rows, 3 contexts"),
        (8, [8, 65], "contexts must be in 1..64, got 65"),
        (8, [0], "contexts must be in 1..64, got 0"),
    ):
        with pytest.raises(ValueError, match=text):
            engine.time_forward(rows, contexts)
