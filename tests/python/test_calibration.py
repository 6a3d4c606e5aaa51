"""Calibrations: measured, kept, found, and heeded by the engine."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from checkpoints import make_checkpoint
from optimus import LLM, SamplingParams
from optimus.cache import model_hash
from optimus.calibrate import calibrate, tasks_hash
from optimus.calibration import (
    Arm,
    Calibration,
    cached_file,
    load_calibration,
    paired_difference,
)
from optimus.cli import main
from optimus.config import DEMO_MODEL, load_checkpoint
from optimus.evaluate import Task, load_tasks
from optimus.grow import weights_sha256

PROFILE = [(1, 1.0), (256, 2.0)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    return make_checkpoint(path, tokenizer=True, max_position_embeddings=128)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPTIMUS_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> LLM:
    return LLM(checkpoint, decode_mode="block", max_num_seqs=2, num_threads=1)


@pytest.fixture(scope="module")
def tasks(llm: LLM) -> list[Task]:
    """Block decoding at threshold 0.5 gets all but the last right."""
    params = SamplingParams(temperature=0.0, max_tokens=9, confidence_threshold=0.5)
    tasks = []
    for prompt in ("one", "two", "three", "four", "five"):
        output = llm.chat([{"role": "user", "content": prompt}], params)[0]
        tasks.append(Task(prompt, "all", prompt, output.outputs[0].text or ""))
    return [*tasks[:4], Task("five", "all", "five", "something else")]


def arm(threshold: float, chunk_length: int | None, refresh: bool, results: str, block: str) -> Arm:
    return Arm.of(
        threshold, chunk_length, refresh, results, block, tokens_per_forward=2.0, rows_per_token=3.0
    )


def calibration_of(checkpoint: Path, *arms: Arm) -> Calibration:
    return Calibration(
        model_hash(checkpoint),
        weights_sha256(checkpoint),
        8,
        {"num_prompts": 4},
        {},
        None,
        list(arms),
    )


def test_paired_difference() -> None:
    assert paired_difference("1100", "1100") == (0, 0, 0)
    # Of 100 prompts 10 are gained and 4 lost: McNemar's normal interval by hand.
    block, other = "1" * 44 + "0" * 56, "1" * 40 + "0" * 50 + "1" * 10
    mean, low, high = paired_difference(block, other)
    half = 1.959964 * math.sqrt(14 - 36 / 100) / 100
    assert mean == pytest.approx(0.06)
    assert (low, high) == pytest.approx((0.06 - half, 0.06 + half))
    assert paired_difference(other, block)[2] == pytest.approx(-low)
    for bad in (("", ""), ("1", "10")):
        with pytest.raises(ValueError, match="of the same prompts"):
            paired_difference(*bad)


def test_every_arm_is_measured(llm: LLM, tasks: list[Task], tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    seen: list[Arm] = []
    found = calibrate(
        llm, tasks, file, chunk_lengths=[1, 4, 8], thresholds=[0.5, 0.9], max_tokens=9,
        on_arm=seen.append,
    )  # fmt: skip
    keys = {(t, c, r) for t in (0.5, 0.9) for c in (1, 4, 8) for r in (False, True)}
    assert {a.key for a in found.arms} == keys | {(0.5, None, True), (0.9, None, True)}
    assert len(seen) == len(found.arms) == 14
    by_key = {a.key: a for a in found.arms}
    block = by_key[0.5, None, True]
    assert (block.results, block.correct, block.total, block.accuracy) == ("11110", 4, 5, 0.8)
    for a in found.arms:
        against = by_key[a.threshold, None, True].results
        assert (a.difference, a.difference_low, a.difference_high) == paired_difference(
            against, a.results
        )
        params = SamplingParams(temperature=0.0, max_tokens=9, confidence_threshold=a.threshold)
        engine = llm.with_options(
            decode_mode="block" if a.chunk_length is None else "chunk",
            chunk_length=a.chunk_length, kv_policy="refresh" if a.refresh else "freeze",
        )  # fmt: skip
        outputs = engine.chat([[{"role": "user", "content": t.prompt}] for t in tasks], params)
        texts = [o.outputs[0].text for o in outputs]
        expected = [str(int(x == t.answer)) for x, t in zip(texts, tasks, strict=True)]
        assert a.results == "".join(expected), a.key
        assert a.tokens_per_forward == pytest.approx(
            sum(o.metrics.num_output_tokens for o in outputs) / sum(o.metrics.nfe for o in outputs)
        )
    assert by_key[0.5, 1, True].results == by_key[0.9, 1, True].results
    loaded = Calibration.load(file)
    assert loaded.to_dict() == found.to_dict()
    assert loaded.arguments["tasks_hash"] == tasks_hash(tasks)
    assert [a.chunk_length for a in loaded.arms[:3]] == [None, 1, 1]
    native = {(round(a.threshold, 6), a.chunk_length, a.refresh): a for a in found.measured_arms()}
    assert native.keys() == keys
    for key, measured in native.items():
        assert measured.accuracy == by_key[key].accuracy
        assert measured.difference_upper == by_key[key].difference_high


def test_calibration_is_resumed(llm: LLM, tasks: list[Task], tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    seen: list[Any] = []
    options: dict[str, Any] = {"max_tokens": 4, "on_arm": lambda arm: seen.append(arm.key)}
    calibrate(llm, tasks, file, chunk_lengths=[4], thresholds=[0.5], **options)
    assert seen == [(0.5, None, True), (0.5, 4, False), (0.5, 4, True)]
    seen.clear()
    calibrate(llm, tasks, file, chunk_lengths=[4, 2], thresholds=[0.5, 0.9], **options)
    assert sorted(seen, key=str) == sorted(
        [(0.9, None, True), (0.9, 4, False), (0.9, 4, True), (0.5, 2, False), (0.5, 2, True),
         (0.9, 2, False), (0.9, 2, True)], key=str,
    )  # fmt: skip
    assert len(Calibration.load(file).arms) == 10
    seen.clear()
    for changed, message in (({"max_tokens": 5}, "max_tokens 4, not 5"), ({"raw": True}, "raw")):
        with pytest.raises(ValueError, match=message):
            calibrate(llm, tasks, file, chunk_lengths=[4], thresholds=[0.5], **options | changed)
    with pytest.raises(ValueError, match=r"num_prompts 5, not 2|tasks_hash"):
        calibrate(llm, tasks[:2], file, chunk_lengths=[4], thresholds=[0.5], **options)
    assert not seen
    calibrate(llm, tasks[:2], file, chunk_lengths=[4], thresholds=[0.5], fresh=True, **options)
    assert len(seen) == 3 == len(Calibration.load(file).arms)


def test_bad_arguments_run_nothing(llm: LLM, tasks: list[Task], tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    with pytest.raises(ValueError, match=r"chunk_lengths must be in \[1, 8\], got 9"):
        calibrate(llm, tasks, file, chunk_lengths=[4, 9])
    with pytest.raises(ValueError, match=r"confidence_threshold must be .* got 1\.5"):
        calibrate(llm, tasks, file, thresholds=[0.9, 1.5])
    assert not file.exists()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"arms": 3}', '{"arms": [{}]}', '{"arms": [3]}', "\x00"],
)
def test_files_that_are_no_calibration(checkpoint: Path, tmp_path: Path, text: str) -> None:
    file = tmp_path / "calibration.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"calibration\.json is no calibration"):
        LLM(checkpoint, calibration=file, latency_profile=PROFILE)


@pytest.mark.parametrize(
    "change", [{"accuracy": 1.5}, {"accuracy": math.nan}, {"results": "1"}, {"chunk_length": 9}]
)
def test_arms_that_contradict_themselves(
    checkpoint: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    values = calibration_of(checkpoint, arm(0.9, 4, True, "1100", "1111")).to_dict()
    values["arms"][0] |= change
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"calibration\.json is no calibration"):
        Calibration.load(file)


def test_where_it_is_found(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    loaded = load_checkpoint(model)
    assert load_calibration(loaded) is None
    in_cache = cached_file(model_hash(model))
    calibration_of(model, arm(0.9, 4, True, "1100", "1111")).save(in_cache)
    found = load_calibration(loaded)
    assert found is not None and found.file == in_cache
    in_model = model / "calibration.json"
    calibration_of(model, arm(0.9, 2, True, "1100", "1111")).save(in_model)
    found = load_calibration(loaded)
    assert found is not None and found.file == in_model
    assert not caplog.messages

    in_model.write_text("broken")
    found = load_calibration(loaded)
    assert found is not None and found.file == in_cache
    Calibration("f" * 64, "f" * 64, 8, {}, {}, None).save(in_model)
    found = load_calibration(loaded)
    assert found is not None and found.file == in_cache
    assert ["is no calibration" in m or "of another model" in m for m in caplog.messages] == [
        True,
        True,
    ]
    with pytest.raises(ValueError, match="is of another model"):
        LLM(model, calibration=in_model, latency_profile=PROFILE)


def test_a_grown_model_takes_its_parents(checkpoint: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    config = json.loads((model / "config.json").read_text())

    def grown_from(weights: str) -> None:
        origin = {"name": "parent", "weights_sha256": weights, "to": "itself", "seed": 0}
        changed = config | {"block_size": 32, "grown_from": origin}
        (model / "config.json").write_text(json.dumps(changed))

    grown_from(weights_sha256(DEMO_MODEL))
    found = load_calibration(load_checkpoint(model))
    assert found is not None and found.file == DEMO_MODEL / "calibration.json"
    options: dict[str, Any] = {"latency_profile": PROFILE, "calibration": found.file}
    assert LLM(model, **options).calibration is not None
    grown_from("f" * 64)
    assert load_calibration(load_checkpoint(model)) is None
    with pytest.raises(ValueError, match="is of another model"):
        LLM(model, **options)


def chosen_lengths(llm: LLM) -> set[int]:
    llm.generate("hello", SamplingParams(max_tokens=24, confidence_threshold=0.9))
    return {r.chunk_length for r in llm.engine.step_records() if r.num_decoding}


def test_the_engine_keeps_the_floor(checkpoint: Path, tmp_path: Path) -> None:
    """Rows are nearly free, so that nothing but the floor keeps it from the whole block."""
    file = tmp_path / "calibration.json"
    good, bad = "1" * 100, "1" * 60 + "0" * 40
    calibration_of(
        checkpoint,
        *(arm(0.9, c, r, good, good) for c in (2, 4) for r in (False, True)),
        *(arm(0.9, 8, r, bad, good) for r in (False, True)),
    ).save(file)
    options: dict[str, Any] = {"latency_profile": PROFILE, "num_threads": 1}
    free = LLM(checkpoint, calibration=None, **options)
    assert free.calibration is None and 8 in chosen_lengths(free)
    kept = LLM(checkpoint, calibration=file, **options)
    assert kept.calibration is not None and len(kept.engine.config.measured_arms) == 6
    assert chosen_lengths(kept) <= {2, 4}
    for floor, longest in ((0.5, 8), (0.6, 8), (0.61, 4), (None, 8)):
        lengths = chosen_lengths(kept.with_options(quality_floor=floor))
        assert max(lengths) == longest, (floor, lengths)
    assert max(chosen_lengths(kept.with_options(decode_mode="elastic_per_request"))) <= 4
    assert not kept.with_options(decode_mode="block").engine.config.measured_arms


def test_an_unknown_floor_is_said_once(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    def warnings() -> int:
        return sum("no calibration of" in message for message in caplog.messages)

    with caplog.at_level(logging.WARNING, "optimus"):
        llm = LLM(checkpoint, decode_mode="block", latency_profile=PROFILE)
        assert warnings() == 0
        llm.with_options(decode_mode="elastic", quality_floor=None)
        assert warnings() == 0
        elastic = llm.with_options(decode_mode="elastic")
        llm.with_options(decode_mode="elastic_per_request", quality_floor=0.9)
        elastic.with_options(max_num_seqs=3)
        assert warnings() == 1


def test_the_command(
    llm: LLM,
    checkpoint: Path,
    tasks: list[Task],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "tasks.jsonl"
    lines = [json.dumps({"prompt": t.prompt, "answer": t.answer}) for t in tasks]
    file.write_text("\n".join(lines))

    def run(*arguments: object) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as done:
            main(["calibrate", "--model", str(checkpoint), "--tasks", str(file), "--thresholds",
                  "0.5", "--chunk-lengths", "2,8", "--max-tokens", "9", "--threads", "1",
                  *map(str, arguments)])  # fmt: skip
        return (done.value.code, *capsys.readouterr())

    code, out, err = run()
    in_cache = cached_file(model_hash(checkpoint))
    assert code == 0 and err.count("at 0.5:") == 5 and "block at 0.5: 4 of 5 right" in err
    assert f"written to {in_cache}" in out and "freeze" in out and "vs block" in out
    assert all(len(line) <= 80 for line in out.splitlines() if "│" in line)
    found = load_calibration(llm.checkpoint)
    assert found is not None and len(found.arms) == 5
    code, out, err = run("--json")
    assert (code, err) == (0, "") and json.loads(out) == found.to_dict()
    code, out, err = run("--output", tmp_path / "other.json", "--num-prompts", 2)
    assert code == 0 and Calibration.load(tmp_path / "other.json").arms[0].total == 2
    code, out, err = run("--num-prompts", 2)
    assert code == 2 and "--fresh" in err and err.count("\n") == 1
    assert run("--thresholds", "high")[0] == run("--chunk-lengths", "x")[0] == 2


def test_the_demo_models() -> None:
    """It is of the model and the tasks that ship with it."""
    found = load_calibration(load_checkpoint(DEMO_MODEL))
    assert found is not None and found.file == DEMO_MODEL / "calibration.json"
    total = found.arguments["num_prompts"]
    assert total >= 1000 and found.arguments["tasks_hash"] == tasks_hash(load_tasks(None, total))
    by_key = {a.key: a for a in found.arms}
    for threshold in (0.8, 0.9, 0.95, 0.99):
        block = by_key[threshold, None, True]
        for chunk_length in (2, 4, 8, 16, 32):
            for refresh in (False, True):
                a = by_key[threshold, chunk_length, refresh]
                assert a.total == total
                assert a.difference == pytest.approx(a.accuracy - block.accuracy)
    llm = LLM(latency_profile=PROFILE)
    assert len(llm.engine.config.measured_arms) == sum(
        a.chunk_length is not None for a in found.arms
    )
