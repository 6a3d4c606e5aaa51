"""A request's tokens do not depend on its company: bit for bit, probabilities included."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine_testing import Finished, engine_model, generate, make_engine, sampling_params
from optimus import _C
from oracle_models import fresh_seed, random_oracle
from reference_decoding import STRATEGIES, DecodeParams

VOCAB_SIZE = 64
BLOCK_LENGTH = 8

MODES: dict[str, dict[str, Any]] = {
    "ar": {"decode_mode": "ar", "block_length": 1},
    "block": {"decode_mode": "block"},
    "chunk-refresh": {"decode_mode": "chunk", "kv_policy": "refresh", "chunk_length": 3},
    "chunk-freeze": {"decode_mode": "chunk", "kv_policy": "freeze", "chunk_length": 3},
}


def random_request(
    rng: np.random.Generator, prompt_len: int, max_tokens: int
) -> tuple[list[int], _C.SamplingParams]:
    prompt = rng.integers(0, VOCAB_SIZE, prompt_len).tolist()
    params = DecodeParams(
        block_length=BLOCK_LENGTH,
        mask_token_id=VOCAB_SIZE - 1,
        max_tokens=max_tokens,
        unmasking_strategy=str(rng.choice(STRATEGIES)),
        confidence_threshold=float(rng.uniform(0.2, 0.9)),
        entropy_bound=float(rng.uniform(0.1, 3.0)),
        denoising_steps=int(rng.integers(0, BLOCK_LENGTH + 1)),
        temperature=float(rng.choice([0.0, 0.7, 1.2])),
        top_k=int(rng.choice([0, 10])),
        top_p=float(rng.choice([1.0, 0.9])),
        seed=int(rng.integers(0, 2**63)),
    )
    return prompt, sampling_params(params)


def random_requests(
    rng: np.random.Generator, count: int, longest_prompt: int = 50, longest_output: int = 40
) -> list[tuple[list[int], _C.SamplingParams]]:
    return [
        random_request(
            rng, int(rng.integers(1, longest_prompt + 1)), int(rng.integers(1, longest_output + 1))
        )
        for _ in range(count)
    ]


def random_model() -> tuple[np.random.Generator, _C.Model]:
    """A model drawn from a fresh seed, and the generator for what a test draws besides."""
    seed = fresh_seed()
    return np.random.default_rng(seed), engine_model(random_oracle(seed, vocab_size=VOCAB_SIZE))


def alone(
    model: _C.Model, requests: list[tuple[list[int], _C.SamplingParams]], **settings: Any
) -> list[Finished]:
    """Each request in an engine of its own."""
    return [
        generate(make_engine(model, **settings), [prompt], [params])[0]
        for prompt, params in requests
    ]


def assert_identical(actual: list[Finished], expected: list[Finished], steps: bool = True) -> None:
    assert len(actual) == len(expected)
    for i, (one, other) in enumerate(zip(actual, expected)):
        assert one.token_ids == other.token_ids, f"tokens of request {i}"
        assert one.logprob_bits == other.logprob_bits, f"probabilities of request {i}"
        assert one.state.finish_reason == other.state.finish_reason
        if steps:
            assert list(one.state.output_steps) == list(other.state.output_steps), f"request {i}"


@pytest.mark.parametrize("mode", MODES)
def test_alone_or_among_sixteen_others(mode: str) -> None:
    """Arriving over time, under a row budget that cuts prompts and leaves requests out of steps."""
    rng, model = random_model()
    requests = random_requests(rng, 17)
    expected = alone(model, requests, **MODES[mode])
    engine = make_engine(
        model, **MODES[mode], max_num_seqs=17, max_num_batched_rows=int(rng.choice([40, 64, 200]))
    )
    ids, most_seqs = [], 0
    for prompt, params in requests:
        ids.append(engine.add_request(prompt, params))
        for _ in range(int(rng.integers(0, 3))):
            most_seqs = max(most_seqs, engine.step().record.num_seqs)
    while engine.has_unfinished():
        most_seqs = max(most_seqs, engine.step().record.num_seqs)
    assert most_seqs >= 3, "requests never shared a step"
    assert_identical([Finished(engine.request(i)) for i in ids], expected)


@pytest.mark.parametrize("mode", MODES)
def test_planned_ahead(mode: str) -> None:
    """With steps that are planned before the results of the one in progress are known."""
    rng, model = random_model()
    requests = random_requests(rng, 12)
    for _, params in requests[::2]:
        params.stop_token_ids = rng.integers(0, VOCAB_SIZE, 3).tolist()
    expected = alone(model, requests, **MODES[mode])
    engine = make_engine(model, **MODES[mode], async_scheduling=True)
    assert_identical(generate(engine, *zip(*requests)), expected)
    assert any(record.is_ahead for record in engine.step_records())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("page_size", [4, 16])
def test_after_preemption(mode: str, page_size: int) -> None:
    """A pool far too small for the batch. Freeze recomputes the context cleanly, by design, so
    there only the arrival of all tokens is asserted."""
    rng, model = random_model()
    requests = [
        random_request(rng, int(rng.integers(1, 12)), int(rng.integers(50, 60))) for _ in range(8)
    ]
    expected = alone(model, requests, **MODES[mode], page_size=page_size)
    engine = make_engine(
        model,
        **MODES[mode],
        page_size=page_size,
        num_pages=-(-96 // page_size),  # one request fits, two do not
        enable_prefix_cache=bool(rng.integers(2)),
    )
    actual = generate(engine, *zip(*requests))
    assert sum(result.state.metrics.num_preemptions for result in actual) > 0
    if mode == "chunk-freeze":
        for result, (_, params) in zip(actual, requests):
            assert len(result.token_ids) == params.max_tokens
            assert min(result.state.output_steps) >= 1
            assert result.state.finish_reason == "length"
    else:
        assert_identical(actual, expected, steps=False)
    for result in actual:
        if result.state.metrics.num_preemptions:
            assert result.state.metrics.nfe > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("page_size", [4, 8, 16])
def test_with_prefix_cache_hits(mode: str, page_size: int) -> None:
    """Shared system prompts, and second turns whose prompt holds an earlier answer."""
    rng, model = random_model()
    settings = {**MODES[mode], "page_size": page_size}
    cached = make_engine(model, **settings, enable_prefix_cache=True)
    system = rng.integers(0, VOCAB_SIZE, 37).tolist()
    first = random_requests(rng, 6)
    first = [(system[: int(rng.integers(16, 38))] + prompt, params) for prompt, params in first]
    # The first request alone fills the cache; the others find it there, and find each other.
    answers = generate(cached, *zip(first[0])) + generate(cached, *zip(*first[1:]))
    assert_identical(answers, alone(model, first, **settings))
    hits = [answer.state.metrics.cached_prompt_tokens for answer in answers]
    assert hits[0] == 0 and min(hits[1:]) > 0
    assert all(hit % page_size == 0 for hit in hits)

    second = [
        (prompt + answer.token_ids + rng.integers(0, VOCAB_SIZE, 9).tolist(), params)
        for (prompt, params), answer in zip(first, answers)
    ]
    turns = generate(cached, *zip(*second))
    assert_identical(turns, alone(model, second, **settings))
    hits = [turn.state.metrics.cached_prompt_tokens for turn in turns]
    assert min(hits) > 0
    if mode != "chunk-freeze":  # frozen answers are not clean and must not be found
        assert any(hit > len(prompt) for hit, (prompt, _) in zip(hits, first))


@pytest.mark.parametrize("mode", MODES)
def test_with_any_number_of_threads(mode: str) -> None:
    rng, model = random_model()
    requests = random_requests(rng, 6)
    results = [
        generate(make_engine(model, **MODES[mode], num_threads=n), *zip(*requests))
        for n in (1, 2, 3)
    ]
    assert_identical(results[1], results[0])
    assert_identical(results[2], results[0])


@pytest.mark.parametrize("mode", MODES)
def test_with_other_page_sizes_and_budgets(mode: str) -> None:
    rng, model = random_model()
    requests = random_requests(rng, 6)
    expected = alone(model, requests, **MODES[mode])
    for page_size, shuffle, budget in ((2, True, 32), (8, False, 48), (64, True, 500)):
        engine = make_engine(
            model,
            **MODES[mode],
            page_size=page_size,
            num_pages=8192 // page_size,
            shuffle_pages=shuffle,
            max_num_batched_rows=budget,
        )
        assert_identical(generate(engine, *zip(*requests)), expected)
