"""Commit traces: recorded from a model, kept in files, and replayed by the simulator."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import make_checkpoint
from engine_testing import latency_profile
from optimus import _C, LLM, SamplingParams
from optimus.cache import model_hash
from optimus.config import DEMO_MODEL
from optimus.evaluate import Task, generate_answers, load_tasks
from optimus.traces import (
    DEMO_TRACES,
    Trace,
    decode,
    describe_traces,
    encode,
    load_traces,
    record_traces,
    save_traces,
    trace_info,
)

GREEDY = SamplingParams(temperature=0.0, max_tokens=21, confidence_threshold=0.5)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    path = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(path, tokenizer=True, max_position_embeddings=128)
    return LLM(path, decode_mode="block", max_num_seqs=2, max_num_batched_rows=32, num_threads=1)


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    """Prompts of several blocks; their lengths leave different remainders."""
    return [Task(str(n), "odd" if n % 2 else "even", "x" * n, "") for n in (1, 6, 11, 40)]


@pytest.fixture(scope="module")
def traces(llm: LLM, tasks: list[Task]) -> list[Trace]:
    return record_traces(llm, tasks, GREEDY)


def simulate(
    traces: Sequence[Trace], chunk_length: int | None, threshold: float, **overrides: Any
) -> tuple[list[int], float]:
    """Forwards that each trace takes, and tokens per forward of all; None: block mode."""
    config = _C.SimulatorConfig()
    engine = config.engine
    engine.decode_mode = "block" if chunk_length is None else "chunk"
    engine.chunk_length = chunk_length or 1
    engine.block_length = traces[0].block_length
    engine.kv_policy, engine.enable_prefix_cache = "refresh", False
    engine.max_num_seqs, engine.max_num_batched_rows, engine.num_pages = 16, 1024, 4096
    for name, value in overrides.items():
        setattr(engine, name, value)
    config.engine = engine
    config.latency = latency_profile([(1, 1.0), (1024, 2.0)])
    simulator = _C.Simulator(config, [trace.to_native() for trace in traces])
    numbers = {}
    for i, trace in enumerate(traces):
        params = _C.SamplingParams()
        params.max_tokens, params.confidence_threshold = trace.num_tokens, threshold
        numbers[simulator.add_request(0.0, trace.prompt_len, i, params)] = i
    simulator.run(float("inf"), 10**9)
    assert simulator.num_unfinished == 0
    forwards = [0] * len(traces)
    for request in simulator.take_finished():
        i = numbers[request.id]
        assert (request.num_tokens, request.prompt_len) == (
            traces[i].num_tokens,
            traces[i].prompt_len,
        )
        forwards[i] = request.metrics.nfe
    return forwards, sum(trace.num_tokens for trace in traces) / sum(forwards)


def made_up(prompt_len: int, num_tokens: int, block: int, confidences: Any) -> Trace:
    trace = Trace("made up", prompt_len, num_tokens, block, np.empty(0))
    values = np.broadcast_to(confidences, int(trace.row_begin()[-1])).astype(np.float32)
    return Trace("made up", prompt_len, num_tokens, block, values)


def test_codes_keep_order_and_thresholds() -> None:
    rest = np.concatenate([10.0 ** np.linspace(0, -7.2, 5000), [0.0]])
    confidences = np.unique((1 - rest).astype(np.float32))
    codes = encode(confidences)
    assert codes.dtype == np.uint8 and (np.diff(codes.astype(int)) >= 0).all()
    read = decode(codes)
    assert (np.diff(read) >= 0).all()
    coarse = confidences < 1 - 1e-5  # beyond it float32 itself has few steps
    assert (encode(read[coarse]) == codes[coarse]).all()
    off = np.log10((1 - read[coarse]) / (1 - confidences[coarse]))
    assert np.abs(off).max() < 1 / 32
    for threshold in (0.9, 0.99, 0.999):
        for value in (threshold - 1e-6, threshold + 1e-6):
            read = decode(encode(np.array([value], np.float32)))
            assert (read[0] > threshold) == (value > threshold)


def test_row_begin() -> None:
    trace = made_up(prompt_len=6, num_tokens=4, block=4, confidences=0.5)
    assert trace.row_begin().tolist() == [0, 2, 3, 7, 10]
    native = trace.to_native()
    assert native.num_tokens == 4 and native.row_begin == trace.row_begin().tolist()


def test_the_first_row_of_a_block_is_its_first_forward(
    llm: LLM, tasks: list[Task], traces: list[Trace]
) -> None:
    engine = llm.with_options(decode_mode="block").engine
    for task, trace in zip(tasks, traces, strict=True):
        assert llm.tokenizer is not None
        chat = llm.render_chat([{"role": "user", "content": task.prompt}])
        prompt = llm.tokenizer.encode(chat, add_special_tokens=False)
        assert (trace.prompt_len, trace.block_length) == (len(prompt), 8)
        assert trace.family == task.family
        request = engine.add_request(prompt, GREEDY.to_native(llm.checkpoint.generation, 0))
        begins, compared, last_block = trace.row_begin(), 0, -1
        while engine.has_unfinished():
            before = engine.request(request)
            updates = engine.step().updates
            if not updates or before.block_start == last_block:
                continue
            last_block = before.block_start
            j = max(last_block - len(prompt), 0)
            row = trace.confidences[begins[j] : begins[j + 1]]
            [update] = updates
            after = engine.request(request)
            if j + len(row) > GREEDY.max_tokens or after.status == "finished":  # type: ignore
                break  # what commits behind the end is not reported
            committed = {c.output_idx - j: c.confidence for c in update.commits}
            rest = iter(after.open_confidences)
            shown = [committed[k] if k in committed else next(rest) for k in range(len(row))]
            np.testing.assert_allclose(row, shown, atol=1e-4)
            compared += 1
        assert compared >= 2
        if engine.has_unfinished():
            engine.abort(request)


def test_sampled_answers_are_refused(llm: LLM, tasks: list[Task]) -> None:
    with pytest.raises(ValueError, match=r"temperature must be 0, got 0\.5"):
        record_traces(llm, tasks, SamplingParams(temperature=0.5))


def test_files(llm: LLM, traces: list[Trace], tmp_path: Path) -> None:
    file = tmp_path / "traces.npz"
    save_traces(file, traces, describe_traces(llm, GREEDY))
    for loaded, trace in zip(load_traces(file), traces, strict=True):
        assert (loaded.family, loaded.prompt_len, loaded.num_tokens, loaded.block_length) == (
            trace.family, trace.prompt_len, trace.num_tokens, trace.block_length,
        )  # fmt: skip
        assert (encode(loaded.confidences) == encode(trace.confidences)).all()
    about = trace_info(file)
    assert about["model_hash"] == model_hash(llm.checkpoint.path)
    assert (about["confidence_threshold"], about["dtype"]) == (0.5, "float32")
    with pytest.raises(ValueError, match="traces of one block length"):
        save_traces(file, [], {})
    data = file.read_bytes()
    for broken in (b"", data[: len(data) // 2], b"PK" + data[2:50], b"{}"):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match=r"traces\.npz is no file of commit traces"):
            load_traces(file)
    with np.load(DEMO_TRACES) as arrays:
        parts = dict(arrays)
    for change in ({"codes": parts["codes"][:-1]}, {"family": parts["family"] + 100}):
        np.savez(file, **(parts | change))
        with pytest.raises(ValueError, match="is no file of commit traces"):
            load_traces(file)
    with pytest.raises(ValueError, match="is no file of commit traces"):
        load_traces(tmp_path / "missing.npz")


@pytest.mark.parametrize("prompt_len, num_tokens", [(8, 16), (5, 11), (3, 1), (8, 9)])
def test_forwards_of_made_up_traces(prompt_len: int, num_tokens: int) -> None:
    """Sure masks all commit at once; unsure ones one by one, whatever the chunk."""
    unsure = made_up(prompt_len, num_tokens, 8, 0.3)
    sure = made_up(prompt_len, num_tokens, 8, 0.95)
    blocks = np.unique((prompt_len + np.arange(num_tokens)) // 8, return_counts=True)[1]
    for chunk_length in (None, 1, 2, 3, 8):
        forwards, _ = simulate([unsure], chunk_length, 0.9)
        assert forwards == [num_tokens]
        forwards, _ = simulate([sure], chunk_length, 0.9)
        assert forwards == [sum(-(-n // (chunk_length or 8)) for n in blocks)]
        forwards, _ = simulate([sure], chunk_length, 0.99)
        assert forwards == [num_tokens]


def test_the_demo_models() -> None:
    traces = load_traces()
    assert len(traces) >= 280 and {t.block_length for t in traces} == {32}
    assert len({t.family for t in traces}) == 6
    about = trace_info()
    assert about["model_hash"] == model_hash(DEMO_MODEL)
    assert about["confidence_threshold"] == 0.99
    assert DEMO_TRACES.stat().st_size < 600_000
    assert sum(f.stat().st_size for f in DEMO_MODEL.iterdir()) <= 24_000_000


def test_simulated_tokens_per_forward_are_the_engines() -> None:
    """What the simulator is worth: chunk lengths take as many forwards as with the model, on the
    same prompts."""
    num_prompts = 24
    llm = LLM(decode_mode="block", max_num_seqs=num_prompts)
    tasks = load_tasks(None, num_prompts)
    traces = load_traces()[:num_prompts]
    assert [t.family for t in traces] == [t.family for t in tasks]
    for chunk_length in (4, 16, None):
        if chunk_length is None:
            engine = llm
        else:
            engine = llm.with_options(
                decode_mode="chunk", chunk_length=chunk_length, kv_policy="refresh"
            )
        outputs = generate_answers(engine, tasks, SamplingParams(temperature=0.0, max_tokens=512))
        tokens = sum(o.metrics.num_output_tokens for o in outputs)
        real = tokens / sum(o.metrics.nfe for o in outputs)
        _, simulated = simulate(traces, chunk_length, 0.99)
        assert simulated == pytest.approx(real, rel=0.1), (chunk_length, simulated, real)
