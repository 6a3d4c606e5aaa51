"""The engine on a GPU against the engine on the CPU. Skipped where there is no GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from optimus import LLM, SamplingParams
from optimus.evaluate import generate_answers, load_tasks
from optimus.native import _C

pytestmark = pytest.mark.skipif(bool(_C.cuda_problem()), reason=_C.cuda_problem() or "")

MODES: dict[str, dict[str, Any]] = {
    "ar": {"decode_mode": "ar"},
    "block": {"decode_mode": "block"},
    "chunk, freeze": {"decode_mode": "chunk", "chunk_length": 4, "kv_policy": "freeze"},
    "chunk, refresh": {"decode_mode": "chunk", "chunk_length": 8, "kv_policy": "refresh"},
    "whole block": {"decode_mode": "chunk", "chunk_length": 32, "recompute_block": True},
    "schedule": {
        "decode_mode": "schedule", "chunk_schedule": {"1-16": 16, "17-": 4}, "kv_policy": "refresh",
    },
}  # fmt: skip
ELASTIC = ("elastic", "elastic_per_request")
GREEDY = SamplingParams(temperature=0.0, max_tokens=128)
SAMPLED = SamplingParams(temperature=0.8, top_p=0.95, seed=7, max_tokens=64)
SIZES: dict[str, Any] = {"kv_cache_memory": "256MiB", "max_num_seqs": 32, "calibration": None,
                         "quality_floor": None}  # fmt: skip


@pytest.fixture(scope="module")
def cuda() -> LLM:
    return LLM(device="cuda", decode_mode="ar", **SIZES)


@pytest.fixture(scope="module")
def cpu() -> LLM:
    return LLM(device="cpu", decode_mode="ar", **SIZES)


def texts(llm: LLM, count: int, params: SamplingParams = GREEDY) -> list[str]:
    return [o.outputs[0].text or "" for o in generate_answers(llm, load_tasks(None, count), params)]


def token_ids(llm: LLM, count: int, params: SamplingParams) -> list[list[int]]:
    outputs = generate_answers(llm, load_tasks(None, count), params)
    return [list(o.outputs[0].token_ids) for o in outputs]


def agreement(ours: list[str], theirs: list[str]) -> float:
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)


def test_auto_takes_the_gpu(cuda: LLM) -> None:
    llm = LLM(decode_mode="ar", **SIZES)
    assert (llm.device, llm.dtype, llm._model.device) == ("cuda", "bfloat16", "cuda")
    with pytest.raises(ValueError, match="dtype must be auto or bfloat16"):
        LLM(device="cuda", dtype="float32")
    assert set(cuda.memory) == {"weights", "kv_cache", "activations", "state", "graphs"}
    assert [rows for rows, _, _ in cuda.engine.graphs] == cuda.engine.padded_rows


def logits_of(llm: LLM, rows: int, block: int) -> np.ndarray:
    rng = np.random.default_rng(3)
    ids = rng.integers(6, llm.checkpoint.vocab_size, rows).tolist()
    ids[-block:] = [llm.checkpoint.mask_token_id] * block  # type: ignore[list-item]
    limits = [(i // block + 1) * block for i in range(rows)]
    pages = list(range(20))[::-1]
    return llm.engine.forward(ids, list(range(rows)), limits, pages)


@pytest.mark.parametrize("rows", [32, 128, 288])
def test_logits_are_those_of_the_cpu(
    cuda: LLM, cpu: LLM, rows: int, record_property: pytest.RecordProperty
) -> None:
    ours, theirs = logits_of(cuda, rows, 32), logits_of(cpu, rows, 32)
    assert ours.shape == theirs.shape and np.isfinite(ours).all()
    error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    same = float((ours.argmax(1) == theirs.argmax(1)).mean())
    print(f"{rows} rows: largest error {error:.4f} of the logit scale, argmax agrees {same:.4f}")
    assert error < 5e-2
    assert same > 0.95


@pytest.mark.parametrize("mode", MODES)
def test_answers_are_those_of_the_cpu(cuda: LLM, cpu: LLM, mode: str) -> None:
    ours = texts(cuda.with_options(**MODES[mode]), 64)
    theirs = texts(cpu.with_options(**MODES[mode]), 64)
    print(f"{mode}: {agreement(ours, theirs):.4f} of 64 answers are the CPU's")
    assert agreement(ours, theirs) >= 0.95


@pytest.mark.parametrize("mode", ELASTIC)
def test_elastic_answers_are_about_those_of_the_cpu(cuda: LLM, cpu: LLM, mode: str) -> None:
    # The chunk lengths follow measured time, so not even two runs on one machine are the same.
    ours = texts(cuda.with_options(decode_mode=mode), 64)
    theirs = texts(cpu.with_options(decode_mode=mode), 64)
    print(f"{mode}: {agreement(ours, theirs):.4f} of 64 answers are the CPU's")
    assert agreement(ours, theirs) >= 0.75


@pytest.mark.parametrize("mode", MODES)
def test_same_tokens_twice_and_without_graphs(cuda: LLM, mode: str) -> None:
    llm = cuda.with_options(**MODES[mode], enable_prefix_cache=False)
    first = token_ids(llm, 24, SAMPLED)
    assert token_ids(llm, 24, SAMPLED) == first
    assert llm.engine.graphs
    eager = cuda.with_options(**MODES[mode], enable_prefix_cache=False, cuda_graphs=False)
    assert not eager.engine.graphs
    assert token_ids(eager, 24, SAMPLED) == first


def test_graphs_change_no_bit(cuda: LLM) -> None:
    found = []
    for graphs in (True, False):
        llm = cuda.with_options(**MODES["block"], cuda_graphs=graphs, enable_prefix_cache=False)
        outputs = generate_answers(llm, load_tasks(None, 8), GREEDY)
        states = [o.outputs[0] for o in outputs]
        found.append([(list(s.token_ids), s.logprobs, s.confidences) for s in states])
    assert found[0] == found[1]


def test_prefix_cache_keeps_the_answers(cuda: LLM) -> None:
    llm = cuda.with_options(**MODES["chunk, refresh"])
    prompt = load_tasks(None, 1)[0].prompt + " " + "So it goes. " * 20
    first = llm.generate([prompt], GREEDY)[0]
    again = llm.generate([prompt], GREEDY)[0]
    assert again.metrics.cached_prompt_tokens > 0
    assert again.outputs[0].text == first.outputs[0].text


def test_preemption_keeps_the_answers(cuda: LLM) -> None:
    options = {**MODES["chunk, refresh"], "enable_prefix_cache": False}
    plenty = cuda.with_options(**options)
    page_bytes = plenty.memory["kv_cache"] // plenty.engine.config.num_pages
    tiny = cuda.with_options(**options, max_model_len=512, kv_cache_memory=18 * page_bytes)
    outputs = generate_answers(tiny, load_tasks(None, 24), GREEDY)
    assert sum(o.metrics.num_preemptions for o in outputs) > 0
    assert agreement([o.outputs[0].text or "" for o in outputs], texts(plenty, 24)) >= 0.9
    assert tiny.engine.num_free_pages == tiny.engine.config.num_pages


def test_abort_in_mid_run(cuda: LLM) -> None:
    llm = cuda.with_options(**MODES["block"], enable_prefix_cache=False)
    native = GREEDY.to_native(llm.checkpoint.generation, 1)
    ids = [llm.engine.add_request([7 + i] * 40, native) for i in range(6)]
    for step in range(3):
        llm.engine.step()
        llm.engine.abort(ids[step])
    while llm.engine.has_unfinished():
        llm.engine.step()
    reasons = [llm.engine.request(i).finish_reason for i in ids]
    assert reasons[:3] == ["abort"] * 3 and "abort" not in reasons[3:]
    assert llm.engine.num_free_pages == llm.engine.config.num_pages


def test_steps_beyond_the_largest_graph(cuda: LLM) -> None:
    llm = cuda.with_options(**MODES["block"], max_num_batched_rows=2048, max_num_seqs=64,
                            enable_prefix_cache=False)  # fmt: skip
    small = cuda.with_options(**MODES["block"], max_num_seqs=16, enable_prefix_cache=False)
    ours = texts(llm, 64)
    assert max(r.rows for r in llm.step_records()) > llm.engine.padded_rows[-1]
    assert agreement(ours, texts(small, 64)) >= 0.95


def test_kv_cache_takes_what_is_free(cuda: LLM) -> None:
    free, total = _C.cuda_memory()
    llm = cuda.with_options(decode_mode="ar", kv_cache_memory=None, gpu_memory_utilization=0.8)
    left, _ = _C.cuda_memory()
    assert llm.memory["kv_cache"] > 0.8 * (free - 0.2 * total) - (1 << 30)
    assert left > 0.15 * total
    del llm
    with pytest.raises(ValueError, match="gpu_memory_utilization"):
        cuda.with_options(kv_cache_memory=None, gpu_memory_utilization=0.001)


def test_grown_in_memory_answers_as_its_parent(cuda: LLM) -> None:
    grown = LLM(device="cuda", grow_to="sdar-1.7b", **MODES["chunk, freeze"], **SIZES)
    parent = cuda.with_options(**MODES["chunk, freeze"])
    assert grown.num_parameters > 1.5e9
    assert agreement(texts(grown, 16), texts(parent, 16)) >= 0.8
