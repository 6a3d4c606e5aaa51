"""Logits of the engine against transformers, through the paged cache with scattered pages.

transformers runs in float64: in fp32 its own rounding reaches 7e-5 in a logit of these models.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from engine_testing import engine_model, make_engine
from exact_logits import TOLERANCE, ExactLogits
from optimus.native import _C
from oracle_models import fresh_seed, random_oracle
from reference_decoding import (
    KvStoreModel,
    block_kv_limits,
    block_visibility,
    causal_visibility,
    transformers_forward,
)

# vocab, hidden, intermediate, layers, q heads, kv heads, head_dim, tied
SHAPES = {
    "small": (64, 32, 48, 2, 4, 2, 16, False),
    "no-gqa-tied": (101, 40, 56, 3, 4, 4, 16, True),
    "head64": (97, 64, 96, 2, 6, 2, 64, False),
    "mqa-head80-tied": (131, 72, 100, 2, 5, 1, 80, True),
    "head128": (257, 128, 200, 1, 4, 2, 128, False),
    "odd": (61, 33, 47, 2, 3, 3, 24, False),
    "wide-mlp-head32": (50, 48, 333, 2, 2, 1, 32, True),
}


def oracle_of(shape: tuple[int, int, int, int, int, int, int, bool], seed: int) -> Any:
    vocab, hidden, intermediate, layers, q_heads, kv_heads, head_dim, tied = shape
    return random_oracle(
        seed,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=q_heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=tied,
    )


def random_shape(rng: np.random.Generator) -> tuple[int, int, int, int, int, int, int, bool]:
    kv_heads = int(rng.integers(1, 4))
    return (
        int(rng.integers(10, 300)),
        int(rng.integers(8, 130)),
        int(rng.integers(8, 260)),
        int(rng.integers(1, 4)),
        kv_heads * int(rng.integers(1, 5)),
        kv_heads,
        int(rng.choice([8, 16, 32, 40, 48, 64, 72, 80, 96, 128])),
        bool(rng.integers(2)),
    )


def scattered_pages(rng: np.random.Generator, num_positions: int, page_size: int) -> list[int]:
    """Distinct pages of a pool of 64, in shuffled order."""
    return rng.permutation(64)[: -(-num_positions // page_size)].tolist()


def check_causal(oracle: Any, rng: np.random.Generator, num_tokens: int, page_size: int) -> None:
    """A causal sequence in random slices."""
    block_length = max(page_size, 8)
    engine = make_engine(
        engine_model(oracle), num_pages=64, page_size=page_size, block_length=block_length
    )
    tokens = rng.integers(0, oracle.config.vocab_size, num_tokens)
    exact = ExactLogits(oracle, tokens, causal_visibility(num_tokens))
    pages = scattered_pages(rng, num_tokens, page_size)
    start = 0
    while start < num_tokens:
        stop = min(num_tokens, start + int(rng.integers(1, 14)))
        positions = list(range(start, stop))
        logits = engine.forward(
            tokens[start:stop].tolist(), positions, [p + 1 for p in positions], pages
        )
        exact.check(logits, positions)
        start = stop


def check_blocks(
    oracle: Any, rng: np.random.Generator, prompt_len: int, block_length: int, page_size: int
) -> None:
    """Prefill of whole blocks in slices, then denoising steps over the tail and MASKs."""
    engine = make_engine(
        engine_model(oracle), num_pages=64, page_size=page_size, block_length=block_length
    )
    vocab_size = oracle.config.vocab_size
    block_start = prompt_len // block_length * block_length
    length = block_start + 2 * block_length
    tokens = rng.integers(0, vocab_size, length)
    pages = scattered_pages(rng, length, page_size)
    exact = ExactLogits(oracle, tokens, block_visibility(length, block_length))
    start = 0
    while start < block_start:
        stop = min(block_start, start + block_length * int(rng.integers(1, 3)))
        positions = list(range(start, stop))
        logits = engine.forward(
            tokens[start:stop].tolist(), positions, block_kv_limits(positions, block_length), pages
        )
        exact.check(logits, positions)
        start = stop
    for end in (block_start + block_length, length):
        positions = list(range(end - block_length, end))
        masked = [p for p in positions if p >= prompt_len]
        final = tokens[:end].copy()
        while True:  # the same pages again and again, with fewer masks
            current = final.copy()
            current[masked] = vocab_size - 1
            exact = ExactLogits(oracle, current, block_visibility(end, block_length))
            logits = engine.forward(
                current[positions].tolist(), positions, [end] * block_length, pages
            )
            exact.check(logits, positions)
            if not masked:
                break
            keep = int(rng.integers(0, len(masked)))
            masked = sorted(rng.choice(masked, keep, replace=False).tolist())


@pytest.mark.parametrize("name", SHAPES)
def test_causal_logits(name: str) -> None:
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    oracle = oracle_of(SHAPES[name], seed)
    check_causal(oracle, rng, int(rng.integers(40, 90)), int(rng.choice([4, 8, 16, 32])))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("prompt", ["shorter than a block", "whole blocks", "with a tail"])
def test_block_logits(name: str, prompt: str) -> None:
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    oracle = oracle_of(SHAPES[name], seed)
    block_length = int(rng.choice([4, 8, 16, 32]))
    page_size = int(rng.choice([4, 8, 16, 32]))
    tail = int(rng.integers(1, block_length))
    blocks = int(rng.integers(1, 4)) * block_length
    prompt_len = {
        "shorter than a block": tail,
        "whole blocks": blocks,
        "with a tail": blocks + tail,
    }[prompt]
    check_blocks(oracle, rng, prompt_len, block_length, page_size)


@pytest.mark.parametrize("head_dim", [40, 80, 112])
def test_logits_at_far_positions(head_dim: int) -> None:
    """Angles are frequencies times positions: far away, the last bits of a frequency show."""
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    oracle = oracle_of((64, 32, 48, 2, 2, 1, head_dim, False), seed)
    length, step = 1000, 40
    engine = make_engine(engine_model(oracle), num_pages=64, page_size=16, max_model_len=1024)
    tokens = rng.integers(0, oracle.config.vocab_size, length)
    exact = ExactLogits(oracle, tokens, causal_visibility(length))
    pages = scattered_pages(rng, length, 16)
    for start in range(0, length, step):
        positions = list(range(start, start + step))
        limits = [p + 1 for p in positions]
        logits = engine.forward(tokens[positions].tolist(), positions, limits, pages)
    exact.check(logits, positions)


def test_logits_of_random_configurations() -> None:
    rng = np.random.default_rng(fresh_seed())
    for _ in range(6):
        shape = random_shape(rng)
        print(f"shape {shape}")
        oracle = oracle_of(shape, int(rng.integers(2**31)))
        check_causal(oracle, rng, int(rng.integers(20, 60)), int(rng.choice([4, 8, 16, 32])))
        check_blocks(oracle, rng, int(rng.integers(1, 40)), 8, int(rng.choice([2, 4, 8, 16, 32])))


def test_scattered_rows_over_stale_kv() -> None:
    """Any rows at any time: whatever K and V a position last wrote is what others see."""
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    oracle = oracle_of(SHAPES["head64"], seed)
    model = KvStoreModel(oracle)
    store = model.new_store()
    engine = make_engine(engine_model(oracle), num_pages=64, page_size=8)
    length = 48
    pages = scattered_pages(rng, length, 8)
    known = 0
    for _ in range(30):
        known = min(length, known + int(rng.integers(0, 6))) or 1
        new = [p for p in range(known) if p not in store[0]]
        old = rng.choice(known, int(rng.integers(0, known + 1)), replace=False).tolist()
        rows = sorted({*new, *old}) or [0]
        limits = np.sort(rng.integers(1, known + 1, len(rows)))
        limits = np.maximum(limits, np.asarray(rows) + 1).tolist()
        tokens = rng.integers(0, oracle.config.vocab_size, len(rows)).tolist()
        expected = model.forward(tokens, rows, limits, store)
        logits = engine.forward(tokens, rows, limits, pages)
        np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)


def test_rows_do_not_depend_on_their_company() -> None:
    """A row's logits are bit-for-bit the same alone and with others, whatever the threads."""
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    oracle = oracle_of(SHAPES["wide-mlp-head32"], seed)
    model = engine_model(oracle)
    tokens = rng.integers(0, oracle.config.vocab_size, 70).tolist()
    positions = list(range(70))
    limits = [p + 1 for p in positions]
    bits = []
    for num_threads, size in ((1, 70), (2, 70), (1, 1), (2, 7), (3, 33)):
        engine = make_engine(model, num_pages=64, page_size=8, num_threads=num_threads)
        pages = scattered_pages(rng, 70, 8)
        parts = [
            engine.forward(
                tokens[i : i + size], positions[i : i + size], limits[i : i + size], pages
            )
            for i in range(0, 70, size)
        ]
        bits.append(np.concatenate(parts).tobytes())
    assert len(set(bits)) == 1


@pytest.mark.parametrize("rows", [1, 7, 40, 97])
def test_bf16_gemm_of_the_library(rows: int) -> None:
    """Also where models run our own: within a rounding to bf16 of the product in float64."""
    generator = torch.Generator().manual_seed(fresh_seed())
    x, weight = (torch.randn(n, 136, generator=generator).bfloat16() for n in (rows, 75))
    as_bits = [matrix.view(torch.uint16).numpy() for matrix in (x, weight)]
    out = torch.from_numpy(_C.bf16_gemm(*as_bits, num_threads=3)).view(torch.bfloat16)
    expected = x.double() @ weight.double().T
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-5 * 136)
    with pytest.raises(ValueError, match=r"\[bf16_gemm\] need x .* got 2 and 2 dimensions, last 8"):
        _C.bf16_gemm(as_bits[0][:, :8], as_bits[1])


@pytest.mark.parametrize("name", ["small", "head64", "mqa-head80-tied", "head128"])
def test_bf16_logits(name: str) -> None:
    """Against the fp32 oracle with bf16 weights: no worse than transformers in bf16."""
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    oracle = oracle_of(SHAPES[name], seed)
    for parameter in oracle.parameters():
        parameter.data = parameter.data.bfloat16().float()
    in_bf16 = copy.deepcopy(oracle).bfloat16()
    in_bf16.model.rotary_emb = copy.deepcopy(oracle.model.rotary_emb)  # angles stay fp32
    engine = make_engine(engine_model(oracle, dtype="bfloat16"), num_pages=64, page_size=8)
    num_tokens, block_length = 64, 8
    tokens = rng.integers(0, oracle.config.vocab_size, num_tokens)
    positions = np.arange(num_tokens)
    visible = block_visibility(num_tokens, block_length)
    expected = transformers_forward(oracle)(tokens, positions, visible)
    peer = transformers_forward(in_bf16)(tokens, positions, visible)
    pages = scattered_pages(rng, num_tokens, 8)
    logits = np.concatenate(
        [
            engine.forward(
                tokens[i : i + 16].tolist(),
                list(range(i, i + 16)),
                block_kv_limits(range(i, i + 16), block_length),
                pages,
            )
            for i in range(0, num_tokens, 16)
        ]
    )
    error = float(np.sqrt(np.mean((logits - expected) ** 2)))
    peer_error = float(np.sqrt(np.mean((peer - expected) ** 2)))
    print(f"rms error {error:.4f}, transformers {peer_error:.4f}, logits {expected.std():.2f}")
    assert error <= 1.2 * peer_error
    assert error <= 0.05 * expected.std()
    assert torch.finfo(torch.bfloat16).eps / 100 < error / expected.std()  # it is not fp32
