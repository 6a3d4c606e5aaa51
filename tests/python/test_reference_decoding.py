"""The references agree with transformers and with each other, before any engine is compared."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from oracle_models import fresh_seed, random_oracle
from reference_decoding import (
    STRATEGIES,
    Candidate,
    DecodeParams,
    KvStoreModel,
    ar_decode,
    block_decode,
    block_kv_limits,
    block_visibility,
    causal_visibility,
    chunk_decode,
    gumbel_noise,
    select_commits,
    transformers_forward,
)

VOCAB_SIZE = 64


def random_prompt(rng: np.random.Generator, length: int) -> list[int]:
    return rng.integers(0, VOCAB_SIZE, length).tolist()


def test_the_mask_masks() -> None:
    """No mask is silently causal, so the oracle must show that ours is used."""
    # One layer: then the last row of a block, which sees the same either way, is equal.
    model = random_oracle(fresh_seed(), vocab_size=VOCAB_SIZE, num_hidden_layers=1)
    forward = transformers_forward(model)
    tokens, positions = np.arange(8) + 5, np.arange(8)
    changed = tokens.copy()
    changed[3] = 60
    causal = causal_visibility(8)
    blocks = block_visibility(8, 4)
    difference = forward(tokens, positions, causal) - forward(changed, positions, causal)
    assert not difference[:3].any() and np.abs(difference[3:]).max(axis=1).min() > 1e-3
    difference = forward(tokens, positions, blocks) - forward(changed, positions, blocks)
    assert np.abs(difference).max(axis=1).min() > 1e-3
    difference = forward(tokens, positions, blocks)[:4] - forward(tokens, positions, causal)[:4]
    assert np.abs(difference[:3]).max(axis=1).min() > 1e-3
    assert np.abs(difference[3]).max() < 1e-4
    with torch.no_grad():
        unmasked = model(input_ids=torch.from_numpy(tokens)[None]).logits[0].numpy()
    np.testing.assert_allclose(unmasked, forward(tokens, positions, causal), atol=1e-4)


@pytest.mark.parametrize("block_length", [1, 4, 8])
def test_kv_store_model_matches_transformers(block_length: int) -> None:
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    oracle = random_oracle(seed, vocab_size=VOCAB_SIZE, num_key_value_heads=2)
    model = KvStoreModel(oracle)
    num_tokens = 3 * block_length + 8 // block_length * block_length
    tokens = random_prompt(rng, num_tokens)
    expected = transformers_forward(oracle)(
        np.asarray(tokens), np.arange(num_tokens), block_visibility(num_tokens, block_length)
    )
    store = model.new_store()
    start = 0
    while start < num_tokens:  # in slices of whole blocks
        stop = min(num_tokens, start + block_length * int(rng.integers(1, 3)))
        rows = range(start, stop)
        logits = model.forward(tokens[start:stop], rows, block_kv_limits(rows, block_length), store)
        np.testing.assert_allclose(logits, expected[start:stop], atol=5e-5)
        start = stop


def test_block_decode_equals_stored_kv_with_everything_recomputed() -> None:
    """The published loop from scratch, and the same over stored K and V with a riding commit."""
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    skipped = 0
    for case in range(24):
        oracle = random_oracle(seed + case, vocab_size=VOCAB_SIZE)
        block_length = int(rng.choice([4, 8, 16]))
        params = DecodeParams(
            block_length=block_length,
            mask_token_id=VOCAB_SIZE - 1,
            max_tokens=int(rng.integers(1, 2 * block_length + 2)),
            eos_token_ids=frozenset([7]) if case % 2 else frozenset(),
            unmasking_strategy=STRATEGIES[case % 4],
            confidence_threshold=float(rng.uniform(0.2, 0.9)),
            entropy_bound=float(rng.uniform(0.1, 3.0)),
            denoising_steps=int(rng.integers(0, block_length + 1)),
        )
        prompt = random_prompt(rng, int(rng.integers(1, 3 * block_length)))
        expected = block_decode(transformers_forward(oracle), prompt, params)
        if expected.margin < 1e-5:
            skipped += 1
            continue
        actual = chunk_decode(
            KvStoreModel(oracle), prompt, params, block_length, "refresh", recompute_block=True
        )
        assert actual.token_ids == expected.token_ids, f"case {case}: {params}"
        assert actual.steps == expected.steps
        np.testing.assert_allclose(actual.logprobs, expected.logprobs, atol=1e-4)
    assert skipped <= 4


def test_ar_decode_equals_transformers_generate() -> None:
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    oracle = random_oracle(seed, vocab_size=VOCAB_SIZE)
    for _ in range(4):
        prompt = random_prompt(rng, int(rng.integers(1, 20)))
        params = DecodeParams(block_length=1, mask_token_id=-1, max_tokens=20)
        expected = oracle.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=20,
        )[0, len(prompt) :].tolist()
        result = ar_decode(transformers_forward(oracle), prompt, params)
        if result.margin > 1e-4:
            assert result.token_ids == expected


def candidates(confidences: list[float], entropies: list[float] | None = None) -> list[Candidate]:
    entropies = entropies or [1.0] * len(confidences)
    return [Candidate(0, c, 0.0, e, 1.0) for c, e in zip(confidences, entropies, strict=True)]


def test_selection_by_hand() -> None:
    def chosen(strategy: str, rows: list[Candidate], step: int = 0, **changes: float) -> list[int]:
        params = DecodeParams(8, 63, 8, unmasking_strategy=strategy, **changes)  # type: ignore[arg-type]
        return select_commits(rows, step, params)[0]

    rows = candidates([0.5, 0.95, 0.2, 0.91], [1.0, 0.1, 2.0, 0.15])
    assert chosen("low_confidence_dynamic", rows) == [1, 3]
    assert chosen("low_confidence_dynamic", rows, confidence_threshold=0.96) == [1]
    # Two are above the threshold, the quota is 4 (8 in 2 steps): the quota wins.
    assert chosen("low_confidence_dynamic", rows, denoising_steps=2) == [0, 1, 2, 3]
    # 8 in 3 steps: 3, 3, 2.
    assert chosen("low_confidence_static", rows, denoising_steps=3) == [0, 1, 3]
    assert chosen("low_confidence_static", rows, step=2, denoising_steps=3) == [1, 3]
    assert chosen("sequential", rows, denoising_steps=3) == [0, 1, 2]
    assert chosen("entropy_bounded", rows, entropy_bound=0.3) == [1, 3]
    assert chosen("entropy_bounded", rows, entropy_bound=0.01) == [1]
    assert chosen("entropy_bounded", rows, entropy_bound=1.5) == [0, 1, 3]


def test_gumbel_noise_is_gumbel() -> None:
    noise = gumbel_noise(fresh_seed(), 3, 1, 200_000)
    assert abs(noise.mean() - 0.5772) < 0.02 and abs(noise.std() - np.pi / np.sqrt(6)) < 0.02
    assert not np.array_equal(gumbel_noise(1, 2, 3, 50), gumbel_noise(1, 3, 2, 50))


def test_chunks_differ_from_blocks() -> None:
    """The comparisons above would be empty if every mode decoded the same tokens."""
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    outcomes: Counter[str] = Counter()
    for case in range(10):
        oracle = random_oracle(seed + case, vocab_size=VOCAB_SIZE)
        model = KvStoreModel(oracle)
        params = DecodeParams(8, VOCAB_SIZE - 1, 24, confidence_threshold=0.5)
        prompt = random_prompt(rng, 11)
        block = chunk_decode(model, prompt, params, 8, "refresh", recompute_block=True)
        freeze, refresh = (chunk_decode(model, prompt, params, 3, p) for p in ("freeze", "refresh"))
        outcomes["block != chunk"] += block.token_ids != refresh.token_ids
        outcomes["freeze != refresh"] += freeze.token_ids != refresh.token_ids
        outcomes["several commits in a step"] += block.nfe < 24
    assert all(outcomes[name] >= 3 for name in outcomes) and len(outcomes) == 3, outcomes
