"""Token for token: the engine's decode modes against the slow references."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3ForCausalLM

from checkpoints import make_checkpoint
from engine_testing import (
    Finished,
    assert_same_decoding,
    engine_model,
    generate,
    latency_profile,
    make_engine,
    sampling_params,
)
from optimus import LLM, SamplingParams
from oracle_models import fresh_seed, random_oracle
from reference_decoding import (
    STRATEGIES,
    DecodeParams,
    KvStoreModel,
    Result,
    ar_decode,
    block_decode,
    chunk_decode,
    gumbel_noise,
    transformers_forward,
)

# A decision closer than this may fall differently in two correct implementations.
TIE = 1e-5


class Cases:
    """Random cases of one test; one that hangs on a tie is drawn again, and counted."""

    def __init__(self, seed: int, max_redrawn: float = 0.15) -> None:
        self.rng = np.random.default_rng(seed)
        self.max_redrawn = max_redrawn
        self.redrawn = 0
        self.drawn = 0
        self.reasons: Counter[str] = Counter()
        self.jointly = 0  # cases with several commits in one step

    def draw(
        self,
        draw_case: Callable[[], tuple[list[int], DecodeParams]],
        reference: Callable[..., Result],
    ) -> tuple[list[int], DecodeParams, Result]:
        for _ in range(20):
            prompt, params = draw_case()
            expected = reference(prompt, params)
            if not params.eos_token_ids and self.rng.random() < 0.4:
                # An EOS that is sure to come, somewhere inside.
                eos = expected.token_ids[self.rng.integers(len(expected.token_ids))]
                params = replace(params, eos_token_ids=frozenset([eos]))
                expected = reference(prompt, params)
            self.drawn += 1
            if expected.margin >= TIE:
                self.reasons[expected.finish_reason] += 1
                self.jointly += len(set(expected.steps)) < len(expected.steps)
                return prompt, params, expected
            self.redrawn += 1
        raise AssertionError("20 cases in a row hang on ties")

    def check(self) -> None:
        print(f"{self.drawn} cases drawn, {self.redrawn} again because of a tie")
        assert self.redrawn <= 3 + self.max_redrawn * self.drawn
        print(f"ends: {dict(self.reasons)}")
        if self.drawn >= 24:
            assert set(self.reasons) == {"stop", "length"}, "a kind of ending was never tested"


def random_model_shape(rng: np.random.Generator) -> dict[str, Any]:
    kv_heads = int(rng.integers(1, 3))
    return {
        "vocab_size": int(rng.integers(50, 101)),
        "num_attention_heads": kv_heads * int(rng.integers(1, 4)),
        "num_key_value_heads": kv_heads,
        "head_dim": int(rng.choice([8, 16, 24])),
        "tie_word_embeddings": bool(rng.integers(2)),
        "logit_scale": float(rng.uniform(2.0, 5.0)),
    }


def random_page_size(rng: np.random.Generator, block_length: int) -> int:
    """Smaller than the block, equal, or larger; one is a multiple of the other."""
    return int(rng.choice([max(1, block_length // 4), block_length, 2 * block_length]))


def random_case(
    rng: np.random.Generator,
    vocab_size: int,
    block_length: int,
    strategy: str | None = None,
    sampled: bool = False,
) -> tuple[list[int], DecodeParams]:
    longest = min(48, 2 * block_length + block_length // 2)
    # The prompt may hold any id, the mask token's too: masks are never recognised by id.
    prompt = rng.integers(0, vocab_size, int(rng.integers(1, 2 * block_length + 2))).tolist()
    if rng.random() < 0.3:
        prompt[-1] = vocab_size - 1
    with_eos = rng.random() < 0.4
    eos = rng.choice(vocab_size, int(rng.integers(1, 10)), replace=False).tolist()
    sampling: dict[str, Any] = {}
    if sampled:
        sampling = {
            "temperature": float(rng.uniform(0.3, 1.5)),
            "top_k": int(rng.choice([0, 1, 5, 20])),
            "top_p": float(rng.choice([1.0, 0.95, 0.7, 0.3])),
            "seed": int(rng.integers(0, 2**63)),
        }
    return prompt, DecodeParams(
        block_length=block_length,
        mask_token_id=vocab_size - 1,
        max_tokens=int(rng.integers(1, longest + 1)),
        eos_token_ids=frozenset(eos) if with_eos else frozenset(),
        unmasking_strategy=strategy or str(rng.choice(STRATEGIES)),
        confidence_threshold=float(rng.uniform(0.1, 1.0)),
        entropy_bound=float(rng.uniform(0.01, 4.0)),
        denoising_steps=int(rng.choice([0, int(rng.integers(1, block_length + 1))])),
        **sampling,
    )


# --------------------------------------------------------------------------------------- block mode


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_block_mode_is_the_published_loop(strategy: str, sampled: bool) -> None:
    """52 greedy and 32 sampled cases a strategy, four requests of unlike parameters at a time."""
    seed = fresh_seed()
    cases = Cases(seed, max_redrawn=0.4 if sampled else 0.15)
    for number in range(8 if sampled else 13):
        rng = cases.rng
        shape = random_model_shape(rng)
        oracle = random_oracle(seed + number, **shape)
        forward = transformers_forward(oracle)
        block_length = (4, 8, 16, 32)[number % 4]
        batch = [
            cases.draw(
                lambda: random_case(rng, shape["vocab_size"], block_length, strategy, sampled),  # noqa: B023
                lambda prompt, params: block_decode(forward, prompt, params),  # noqa: B023
            )
            for _ in range(4)
        ]
        engine = make_engine(
            engine_model(oracle),
            decode_mode="block",
            kv_policy=str(rng.choice(["refresh", "freeze", "auto"])),  # of no concern to blocks
            block_length=block_length,
            page_size=random_page_size(rng, block_length),
            max_num_batched_rows=int(rng.choice([4, 5, 16])) * block_length,
        )
        results = generate(
            engine,
            [prompt for prompt, _, _ in batch],
            [sampling_params(params) for _, params, _ in batch],
        )
        for result, (prompt, params, expected) in zip(results, batch, strict=True):
            what = f"shape {shape}, prompt {prompt}, {params}"
            assert_same_decoding(result, expected, what)
            assert result.state.metrics.decode_rows == expected.num_rows, what
    cases.check()
    if strategy != "sequential":
        assert cases.jointly >= 5


# --------------------------------------------------------------------------------------- chunk mode


@pytest.mark.parametrize("block_length", [4, 8, 16, 32])
def test_chunk_of_the_whole_block_recomputed_is_block_mode(block_length: int) -> None:
    """Bit for bit, probabilities too."""
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    for number in range(4):
        shape = random_model_shape(rng)
        model = engine_model(random_oracle(seed + number, **shape))
        batch = [
            random_case(rng, shape["vocab_size"], block_length, sampled=bool(rng.integers(2)))
            for _ in range(6)
        ]
        prompts = [prompt for prompt, _ in batch]
        sampling = [sampling_params(params) for _, params in batch]
        page_size = random_page_size(rng, block_length)
        settings = {"block_length": block_length, "page_size": page_size}
        blocks = generate(make_engine(model, decode_mode="block", **settings), prompts, sampling)
        chunks = generate(
            make_engine(
                model,
                decode_mode="chunk",
                chunk_length=block_length,
                recompute_block=True,
                **settings,
            ),
            prompts,
            sampling,
        )
        for block, chunk in zip(blocks, chunks, strict=True):
            assert block.token_ids == chunk.token_ids
            assert block.logprob_bits == chunk.logprob_bits
            assert list(block.state.output_steps) == list(chunk.state.output_steps)
            assert block.state.metrics.decode_rows == chunk.state.metrics.decode_rows


CHUNKS = {
    4: [1, 2, 3, 4],
    8: [1, 2, 3, 4, 5, 6, 7, 8],
    16: [1, 2, 3, 5, 8, 11, 15, 16],
    32: [1, 2, 4, 7, 13, 16, 24, 31, 32],
}


@pytest.mark.parametrize("kv_policy", ["freeze", "refresh"])
@pytest.mark.parametrize("block_length", CHUNKS)
def test_chunk_mode_is_the_reference(block_length: int, kv_policy: str) -> None:
    seed = fresh_seed()
    cases = Cases(seed, max_redrawn=0.3)
    for number, chunk_length in enumerate(CHUNKS[block_length]):
        rng = cases.rng
        shape = random_model_shape(rng)
        oracle = random_oracle(seed + number, **shape)
        kv_model = KvStoreModel(oracle)
        batch = [
            cases.draw(
                lambda: random_case(
                    rng,  # noqa: B023
                    shape["vocab_size"],  # noqa: B023
                    block_length,
                    sampled=bool(rng.integers(2)),  # noqa: B023
                ),
                lambda prompt, params: chunk_decode(
                    kv_model,  # noqa: B023
                    prompt,
                    params,
                    chunk_length,  # noqa: B023
                    kv_policy,
                ),
            )
            for _ in range(4)
        ]
        engine = make_engine(
            engine_model(oracle),
            decode_mode="chunk",
            kv_policy=kv_policy,
            chunk_length=chunk_length,
            block_length=block_length,
            page_size=random_page_size(rng, block_length),
            max_num_batched_rows=int(rng.choice([4, 5, 16])) * block_length,
        )
        results = generate(
            engine,
            [prompt for prompt, _, _ in batch],
            [sampling_params(params) for _, params, _ in batch],
        )
        for result, (prompt, params, expected) in zip(results, batch, strict=True):
            what = f"c={chunk_length}, shape {shape}, prompt {prompt}, {params}"
            assert_same_decoding(result, expected, what)
            assert result.state.metrics.decode_rows == expected.num_rows, what
    cases.check()


@pytest.mark.parametrize("arms", [[], [3]], ids=["without a profile", "one arm"])
def test_elastic_mode_with_a_known_choice(arms: list[int]) -> None:
    """One arm is that chunk; without a profile it is the trained block."""
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    shape = random_model_shape(rng)
    model = engine_model(random_oracle(seed, **shape))
    batch = [random_case(rng, shape["vocab_size"], 8) for _ in range(6)]
    prompts = [prompt for prompt, _ in batch]
    sampling = [sampling_params(params) for _, params in batch]
    engine = make_engine(model, decode_mode="elastic", chunk_arms=arms)
    if arms:
        engine.set_profile(latency_profile([(1, 1.0), (256, 9.0)]))
    elastic = generate(engine, prompts, sampling)
    chunk_length = arms[0] if arms else 8
    chunks = generate(
        make_engine(model, decode_mode="chunk", chunk_length=chunk_length), prompts, sampling
    )
    for one, other in zip(elastic, chunks, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprob_bits == other.logprob_bits


@pytest.mark.parametrize("kv_policy", ["freeze", "refresh", "auto"])
def test_elastic_mode_replayed(kv_policy: str) -> None:
    """Latency profiles that change under way make the controller grow and shrink the chunk (and
    `auto` change its mind); the reference follows the choices that the step records report."""
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    # Rows cost nothing: the whole block. Rows cost everything: the smallest chunk.
    profiles = tuple(latency_profile([(1, 1.0), (512, ms)]) for ms in (1.0, 512.0))
    compared, chunk_lengths, refreshed = 0, set(), set()
    for number in range(12):
        shape = random_model_shape(rng)
        oracle = random_oracle(seed + number, **shape)
        block_length = int(rng.choice([8, 16, 32]))
        page_size = random_page_size(rng, block_length)
        engine = make_engine(
            engine_model(oracle),
            decode_mode="elastic",
            kv_policy=kv_policy,
            block_length=block_length,
            page_size=page_size,
        )
        prompt, params = random_case(rng, shape["vocab_size"], block_length)
        params = replace(params, max_tokens=2 * block_length + 5, eos_token_ids=frozenset())
        request = engine.add_request(prompt, sampling_params(params))
        records = []
        while engine.has_unfinished():
            engine.set_profile(profiles[rng.integers(2)])
            records.append(engine.step().record)
        steps = [record for record in records if record.logit_rows]
        choices = [record.chunk_length for record in steps]
        refreshes = [record.refresh_rows > 0 for record in steps]
        expected = chunk_decode(KvStoreModel(oracle), prompt, params, choices, refreshes)
        if expected.margin < TIE:
            continue
        result = Finished(engine.request(request))
        assert_same_decoding(result, expected, f"{shape}, {prompt}, {params}, {choices}")
        assert result.state.metrics.decode_rows == expected.num_rows
        compared += 1
        chunk_lengths |= {(block_length, c) for c in choices}
        refreshed |= set(refreshes)
    assert compared >= 8
    assert len({c for _, c in chunk_lengths}) >= 2 and any(c < b for b, c in chunk_lengths)
    assert refreshed == ({False} if kv_policy == "freeze" else {False, True})


# ------------------------------------------------------------------------------------------ ar mode


def ar_engine(model: Any, rng: np.random.Generator) -> Any:
    return make_engine(
        model,
        decode_mode="ar",
        block_length=1,
        page_size=int(rng.choice([1, 4, 16])),
        max_num_batched_rows=int(rng.choice([4, 7, 64])),
    )


def long_ar_case(rng: np.random.Generator, vocab_size: int) -> tuple[list[int], DecodeParams]:
    """Longer than two tokens, which is what `random_case` makes of block length 1."""
    prompt = rng.integers(0, vocab_size, int(rng.integers(2, 40))).tolist()
    eos = frozenset(rng.choice(vocab_size, 3, replace=False).tolist())
    return prompt, DecodeParams(1, -1, max_tokens=30, eos_token_ids=eos)


def test_ar_mode_is_greedy_generate() -> None:
    """Against transformers' own generate, with and without an EOS."""
    seed = fresh_seed()
    cases = Cases(seed)
    for number in range(8):
        rng = cases.rng
        shape = random_model_shape(rng)
        oracle = random_oracle(seed + number, **shape)
        forward = transformers_forward(oracle)
        draws = (
            lambda: random_case(rng, shape["vocab_size"], 1),  # noqa: B023
            lambda: long_ar_case(rng, shape["vocab_size"]),  # noqa: B023
        )
        batch = [
            cases.draw(
                draw,
                lambda prompt, params: ar_decode(forward, prompt, params),  # noqa: B023
            )
            for draw in (*draws, *draws)
        ]
        results = generate(
            ar_engine(engine_model(oracle), rng),
            [prompt for prompt, _, _ in batch],
            [sampling_params(params) for _, params, _ in batch],
        )
        for result, (prompt, params, expected) in zip(results, batch, strict=True):
            what = f"shape {shape}, prompt {prompt}, {params}"
            assert_same_decoding(result, expected, what)
            tokens = oracle.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                do_sample=False,
                max_new_tokens=params.max_tokens,
                eos_token_id=sorted(params.eos_token_ids) or None,
                pad_token_id=0,
            )
            assert result.token_ids == tokens[0, len(prompt) :].tolist(), what


def test_ar_mode_samples_like_the_reference() -> None:
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    compared = 0
    for number in range(6):
        shape = random_model_shape(rng)
        oracle = random_oracle(seed + number, **shape)
        prompts, params = [], []
        for _ in range(4):
            prompts.append(rng.integers(0, shape["vocab_size"], int(rng.integers(1, 20))).tolist())
            _, drawn = random_case(rng, shape["vocab_size"], 8, sampled=True)
            params.append(
                DecodeParams(
                    1,
                    -1,
                    max_tokens=20,
                    temperature=drawn.temperature,
                    top_k=drawn.top_k,
                    top_p=drawn.top_p,
                    seed=drawn.seed,
                )
            )
        engine = ar_engine(engine_model(oracle), rng)
        results = generate(engine, prompts, [sampling_params(p) for p in params])
        for result, prompt, param in zip(results, prompts, params, strict=True):
            expected = ar_decode(transformers_forward(oracle), prompt, param)
            if expected.margin >= TIE:
                assert_same_decoding(result, expected, f"prompt {prompt}, {param}")
                compared += 1
    assert compared >= 16


# ------------------------------------------------------------------------------- a checkpoint's LLM


def test_llm_decodes_a_checkpoint_like_transformers_loads_it(tmp_path: Path) -> None:
    """The whole way through files: config, sharded weights, options, SamplingParams."""
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    make_checkpoint(
        tmp_path, block_size=8, seed=seed, shards=2, tie_word_embeddings=bool(rng.integers(2))
    )
    oracle = Qwen3ForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    forward, kv_model = transformers_forward(oracle), KvStoreModel(oracle)
    vocab_size, mask_token_id = oracle.config.vocab_size, oracle.config.vocab_size - 1
    prompts = [rng.integers(0, vocab_size, n).tolist() for n in (3, 16, 21)]
    llm = LLM(tmp_path, decode_mode="block", num_threads=1, max_model_len=128)
    shared = {"max_tokens": 30, "confidence_threshold": 0.6}
    block_params = DecodeParams(8, mask_token_id, **shared)
    ar_params = DecodeParams(1, mask_token_id, max_tokens=30)
    compared = 0
    for mode, reference in {
        "block": lambda prompt: block_decode(forward, prompt, block_params),
        "chunk": lambda prompt: chunk_decode(kv_model, prompt, block_params, 3, "freeze"),
        "ar": lambda prompt: ar_decode(forward, prompt, ar_params),
    }.items():
        options = {"chunk_length": 3, "kv_policy": "freeze"} if mode == "chunk" else {}
        outputs = llm.with_options(decode_mode=mode, **options).generate(
            prompts, SamplingParams(temperature=0, **shared), use_tqdm=False
        )
        for prompt, output in zip(prompts, outputs):
            expected = reference(prompt)
            if expected.margin >= TIE:
                assert output.outputs[0].token_ids == expected.token_ids, f"{mode}, {prompt}"
                assert output.outputs[0].finish_reason == "length"
                assert output.metrics.nfe == expected.nfe
                compared += 1
    assert compared >= 6


# ----------------------------------------------------------------------------------------- sampling


def test_sampling_is_reproducible_per_seed() -> None:
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    model = engine_model(random_oracle(seed, logit_scale=2.0))
    prompt = rng.integers(0, 64, 13).tolist()

    def tokens(request_seed: int) -> tuple[int, ...]:
        params = DecodeParams(8, 63, max_tokens=24, temperature=1.0, seed=request_seed)
        (result,) = generate(make_engine(model), [prompt], [sampling_params(params)])
        return tuple(result.token_ids)

    seeds = [0, 1, 2, 2**63 + 5, 2**64 - 1]
    outputs = {request_seed: tokens(request_seed) for request_seed in seeds}
    assert len(set(outputs.values())) == len(seeds)
    for request_seed in seeds:
        assert tokens(request_seed) == outputs[request_seed]


def test_sampled_tokens_follow_the_distribution() -> None:
    """Frequencies of a first AR token over many seeds against its probabilities (chi-square)."""
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    oracle = random_oracle(seed, vocab_size=12, logit_scale=1.0)
    prompt = rng.integers(0, 12, 5).tolist()
    forward = transformers_forward(oracle)
    logits = forward(np.asarray(prompt), np.arange(5), np.tril(np.ones((5, 5), dtype=bool)))[-1]
    probabilities = np.exp(logits - logits.max()).astype(np.float64)
    probabilities /= probabilities.sum()
    engine = make_engine(
        engine_model(oracle), decode_mode="ar", block_length=1, max_num_seqs=64, page_size=8
    )
    num_samples = 2000
    params = [
        sampling_params(
            DecodeParams(1, -1, max_tokens=1, temperature=1.0, seed=int(rng.integers(0, 2**63)))
        )
        for _ in range(num_samples)
    ]
    results = generate(engine, [prompt] * num_samples, params)
    counts = np.bincount([result.token_ids[0] for result in results], minlength=12)
    expected = probabilities * num_samples
    tail = expected < 5  # too rare for a term of their own
    counts = np.append(counts[~tail], counts[tail].sum())
    expected = np.append(expected[~tail], expected[tail].sum())
    used = expected > 0
    chi_square = float(((counts - expected)[used] ** 2 / expected[used]).sum())
    freedom = int(used.sum()) - 1
    # Beyond five standard deviations of the chi-square law: not once in 10,000 runs.
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom) + 10


def _unmix64(z: int) -> int:
    """The inverse of the noise function's mix."""
    mask = 2**64 - 1

    def unshift(value: int, shift: int) -> int:
        result = value
        for _ in range(64 // shift + 1):
            result = value ^ (result >> shift)
        return result

    z = unshift(z, 31) * pow(0x94D049BB133111EB, -1, 2**64) & mask
    z = unshift(z, 27) * pow(0xBF58476D1CE4E5B9, -1, 2**64) & mask
    return (unshift(z, 30) - 0x9E3779B97F4A7C15) & mask


def test_the_largest_noise_is_finite() -> None:
    """A seed made so that the least likely token draws the largest of all uniform numbers."""
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    oracle = random_oracle(seed, logit_scale=3.0)
    prompt = rng.integers(0, 64, 6).tolist()
    forward = transformers_forward(oracle)
    logits = forward(np.asarray(prompt), np.arange(6), np.tril(np.ones((6, 6), dtype=bool)))[-1]
    token = int(logits.argmin())
    key = _unmix64(2**64 - 1) ^ token
    made = _unmix64(_unmix64(_unmix64(key)) ^ 6)
    noise = gumbel_noise(made, position=6, denoise_step=0, vocab_size=64)
    assert noise.argmax() == token and 15 < noise[token] < 18
    temperature = float(logits.max() - logits.min()) / 40  # 40 against at most 17 of noise
    params = DecodeParams(1, -1, max_tokens=1, temperature=temperature, seed=made)
    engine = make_engine(engine_model(oracle), decode_mode="ar", block_length=1, page_size=8)
    (result,) = generate(engine, [prompt], [sampling_params(params)])
    assert result.token_ids != [token]


# -------------------------------------------------------------------------------------------- stops


@pytest.mark.parametrize("decode_mode", ["ar", "block", "chunk"])
def test_ends_of_a_request(decode_mode: str) -> None:
    """EOS of the model, stop ids of the request, ignore_eos, max_tokens: same tokens, cut."""
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    model = engine_model(random_oracle(seed))
    block_length = 1 if decode_mode == "ar" else 8
    prompt = rng.integers(0, 64, 11).tolist()

    def run(eos: list[int], **overrides: Any) -> Any:
        engine = make_engine(
            model, decode_mode=decode_mode, block_length=block_length, eos_token_ids=eos
        )
        params = DecodeParams(block_length, 63, max_tokens=40, confidence_threshold=0.5)
        (result,) = generate(engine, [prompt], [sampling_params(params, **overrides)])
        return result

    free = run([])
    assert len(free.token_ids) == 40 and free.state.finish_reason == "length"
    last = free.token_ids[25]
    first = free.token_ids.index(last)
    for stopped in (run([last]), run([], stop_token_ids=[last]), run([last], max_tokens=first + 1)):
        assert stopped.token_ids == free.token_ids[: first + 1]
        assert stopped.state.finish_reason == "stop"
        assert len(stopped.logprob_bits) == 8 * (first + 1)
    ignored = run([last], ignore_eos=True)
    assert ignored.token_ids == free.token_ids
    assert ignored.state.finish_reason == "length"
    for max_tokens in (1, 2, 7, 8, 9, 17):
        cut = run([], max_tokens=max_tokens)
        assert cut.token_ids == free.token_ids[:max_tokens]
        assert cut.state.finish_reason == "length"


def test_the_mask_tokens_text_in_a_prompt_is_text() -> None:
    """A prompt made of the mask token's id decodes like the reference, which keeps mask state."""
    seed = fresh_seed()
    oracle = random_oracle(seed)
    engine = make_engine(engine_model(oracle), decode_mode="block", block_length=8)
    for prompt in ([63] * 3, [63] * 8, [63] * 13, [5, 63, 63, 7, 63]):
        params = DecodeParams(8, 63, max_tokens=16, confidence_threshold=0.6)
        expected = block_decode(transformers_forward(oracle), prompt, params)
        if expected.margin >= TIE:
            (result,) = generate(engine, [prompt], [sampling_params(params)])
            assert_same_decoding(result, expected, f"prompt {prompt}")
