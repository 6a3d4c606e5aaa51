"""Measures a calibration: every way of decoding over the same tasks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from .cache import model_hash
from .calibration import Arm, Calibration
from .evaluate import Task, generate_answers, is_correct
from .grow import weights_sha256
from .llm import LLM
from .machine import git_commit, machine
from .outputs import RequestOutput
from .sampling_params import SamplingParams

DEFAULT_THRESHOLDS = (0.8, 0.9, 0.95, 0.99)


def tasks_hash(tasks: Sequence[Task]) -> str:
    """SHA-256 (hex) of prompts and answers in order: results of the same hash are paired."""
    pairs = [(task.prompt, task.answer) for task in tasks]
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def calibrate(
    llm: LLM,
    tasks: Sequence[Task],
    file: Path,
    *,
    chunk_lengths: Sequence[int] | None = None,
    thresholds: Sequence[float] = DEFAULT_THRESHOLDS,
    max_tokens: int = 512,
    fresh: bool = False,
    raw: bool = False,
    on_arm: Callable[[Arm], None] | None = None,
) -> Calibration:
    """Decodes all tasks (greedy) in every arm that `file` lacks, and keeps it up to date.

    chunk_lengths: default powers of two from 2 to the block length; each with `freeze` and
    `refresh`. llm: its weights, dtype and max_num_seqs are used. fresh: forget what the file holds.
    Raises ValueError if the file is of another model or other arguments.
    """
    llm.checkpoint.check_diffusion("block")
    block = llm.checkpoint.block_length
    assert block is not None
    if chunk_lengths is None:
        chunk_lengths = [*(c for c in (2, 4, 8, 16, 32, 64) if c < block), block]
    for c in chunk_lengths:
        if not 1 <= c <= block:
            raise ValueError(f"[calibration] chunk_lengths must be in [1, {block}], got {c}")
    params = [  # checks the thresholds
        SamplingParams(temperature=0.0, confidence_threshold=t, max_tokens=max_tokens)
        for t in thresholds
    ]
    found = _begin(llm, tasks, file, max_tokens, raw, fresh)
    modes: list[tuple[int | None, bool]] = [(None, True)]
    modes += [
        (c, refresh) for c in sorted(chunk_lengths, reverse=True) for refresh in (False, True)
    ]
    for chunk_length, refresh in modes:
        known = {arm.key for arm in found.arms}
        missing = [
            p for p in params if (p.confidence_threshold, chunk_length, refresh) not in known
        ]
        for arm in _measure(llm, tasks, missing, chunk_length, refresh, raw, found):
            found.arms.append(arm)
            if on_arm is not None:
                on_arm(arm)
        if missing:
            found.save(file)
    return found


def _begin(
    llm: LLM, tasks: Sequence[Task], file: Path, max_tokens: int, raw: bool, fresh: bool
) -> Calibration:
    """What the file holds, if it was made like this; otherwise an empty one."""
    arguments = {
        "tasks_hash": tasks_hash(tasks), "num_prompts": len(tasks), "max_tokens": max_tokens,
        "dtype": llm.dtype, "raw": raw, "temperature": 0.0,
    }  # fmt: skip
    checkpoint = llm.checkpoint
    new = Calibration(
        model_hash(checkpoint.path), weights_sha256(checkpoint.path), checkpoint.block_length or 1,
        arguments, machine(), git_commit(), [], file,
    )  # fmt: skip
    if fresh or not file.exists():
        return new
    old = Calibration.load(file)
    for name, theirs, ours in (
        ("model", old.model_hash, new.model_hash),
        ("block_length", old.block_length, new.block_length),
        *((key, old.arguments.get(key), value) for key, value in arguments.items()),
    ):
        if theirs != ours:
            raise ValueError(
                f"[calibration] {file} was measured with {name} {theirs!r}, not {ours!r}: name "
                "another file, or measure anew with --fresh"
            )
    old.machine, old.commit = new.machine, new.commit
    return old


def _measure(
    llm: LLM,
    tasks: Sequence[Task],
    params: Sequence[SamplingParams],
    chunk_length: int | None,
    refresh: bool,
    raw: bool,
    found: Calibration,
) -> list[Arm]:
    """One engine at all thresholds that are missing; a group of prompts after the other, so that
    later thresholds find the prompts' KV in the prefix cache."""
    if not params:
        return []
    if chunk_length is None:
        engine = llm.with_options(decode_mode="block")
    else:
        engine = llm.with_options(
            decode_mode="chunk", chunk_length=chunk_length,
            kv_policy="refresh" if refresh else "freeze",
        )  # fmt: skip
    # One candidate commits at any threshold.
    runs = params[:1] if chunk_length == 1 else params
    outputs: list[list[RequestOutput]] = [[] for _ in runs]
    size = llm.options.max_num_seqs
    for begin in range(0, len(tasks), size):
        for each, done in zip(runs, outputs, strict=True):
            done += generate_answers(engine, tasks[begin : begin + size], each, raw=raw)
    outputs *= len(params) // len(runs)
    arms = []
    for each, done in zip(params, outputs, strict=True):
        results = "".join(
            str(int(is_correct(output, task))) for output, task in zip(done, tasks, strict=True)
        )
        threshold = each.confidence_threshold
        assert threshold is not None
        block_results = results if chunk_length is None else found.block_results(threshold)
        assert block_results is not None, "block decoding is measured first"
        num_tokens = max(1, sum(o.metrics.num_output_tokens for o in done))
        arms.append(
            Arm.of(
                threshold, chunk_length, refresh, results, block_results,
                tokens_per_forward=num_tokens / max(1, sum(o.metrics.nfe for o in done)),
                rows_per_token=sum(o.metrics.decode_rows for o in done) / num_tokens,
            )
        )  # fmt: skip
    return arms
