"""Slow, obvious references of every decode mode: the oracle of the engine.

Three loops, each written for reading and not for speed:

* `block_decode`: the published SDAR loop. The whole sequence is forwarded from scratch in every
  step, so there is no KV cache that could be wrong.
* `chunk_decode`: the first c masks of a block are rows, committed positions are fed once more and
  then keep the K and V of that step. `KvStoreModel` is a from-scratch Qwen3 forward with one K and
  one V per layer and position, overwritten whenever the position is a row.
* `ar_decode`: one token a step, causal.

Every decision (a threshold, a quota boundary, an argmax) records how close it was. Two correct
implementations may round differently, so a test may draw another case when `Result.margin` is below
its tolerance, and must bound how often it does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Qwen3ForCausalLM

FloatArray = NDArray[np.floating]
# forward(tokens [n], positions [n], visible [n, n]) -> logits [n, vocab_size]
Forward = Callable[[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]], FloatArray]

STRATEGIES = (
    "low_confidence_dynamic",
    "low_confidence_static",
    "sequential",
    "entropy_bounded",
)


@dataclass(frozen=True)
class DecodeParams:
    """What the decoding of one request depends on."""

    block_length: int
    mask_token_id: int
    max_tokens: int
    eos_token_ids: frozenset[int] = frozenset()
    unmasking_strategy: str = "low_confidence_dynamic"
    confidence_threshold: float = 0.9
    entropy_bound: float = 0.3
    denoising_steps: int = 0  # 0 = block_length
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


@dataclass
class Result:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)  # forward evaluation that committed it, from 1
    finish_reason: str = ""
    nfe: int = 0
    num_rows: int = 0
    margin: float = math.inf  # the closest decision


# ------------------------------------------------------------------------------------ visibility


def causal_visibility(num_tokens: int) -> NDArray[np.bool_]:
    position = np.arange(num_tokens)
    return position[None, :] <= position[:, None]


def block_visibility(num_tokens: int, block_length: int) -> NDArray[np.bool_]:
    """Block-causal staircase: everything in earlier blocks and the whole own block."""
    block = np.arange(num_tokens) // block_length
    return block[None, :] <= block[:, None]


def block_kv_limits(positions: Iterable[int], block_length: int) -> list[int]:
    return [(position // block_length + 1) * block_length for position in positions]


def transformers_forward(model: Qwen3ForCausalLM) -> Forward:
    """The oracle model. It must use sdpa: eager attention would *add* a boolean mask."""
    if model.config._attn_implementation != "sdpa":
        raise ValueError(f"sdpa attention needed, got {model.config._attn_implementation}")

    def forward(
        tokens: NDArray[np.int64], positions: NDArray[np.int64], visible: NDArray[np.bool_]
    ) -> FloatArray:
        with torch.no_grad():
            output = model(
                input_ids=torch.from_numpy(tokens)[None],
                position_ids=torch.from_numpy(positions)[None],
                attention_mask=torch.from_numpy(visible)[None, None],
                use_cache=False,
            )
        return output.logits[0].float().numpy()

    return forward


# ------------------------------------------------------------------------- from-scratch KV model


class KvStoreModel:
    """Qwen3 with an explicit K and V per layer and position, in float64.

    A row writes K and V at its position before anybody attends; row i attends to the stored
    positions [0, kv_limits[i]). Reading a position that was never written is an error.
    """

    def __init__(self, model: Qwen3ForCausalLM) -> None:
        config = model.config
        self.num_layers: int = config.num_hidden_layers
        self.num_q_heads: int = config.num_attention_heads
        self.num_kv_heads: int = config.num_key_value_heads
        self.head_dim: int = config.head_dim
        self.eps: float = config.rms_norm_eps
        rope_theta = config.rope_parameters["rope_theta"]
        # Angles in float32, like every implementation; the rest in float64.
        exponent = np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim)
        self.inv_freq = (1.0 / np.power(np.float32(rope_theta), exponent)).astype(np.float32)
        self.weights = {
            name: tensor.detach().double().numpy() for name, tensor in model.state_dict().items()
        }
        self.weights.setdefault("lm_head.weight", self.weights["model.embed_tokens.weight"])

    def _norm(self, x: FloatArray, weight: str) -> FloatArray:
        scale = 1.0 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return x * scale * self.weights[weight]

    def _rotate(self, x: FloatArray, positions: NDArray[np.int64]) -> FloatArray:
        angle = positions.astype(np.float32)[:, None] * self.inv_freq[None, :]
        cos, sin = np.cos(angle).astype(np.float64), np.sin(angle).astype(np.float64)
        cos, sin = cos[:, None, :], sin[:, None, :]
        low, high = np.split(x, 2, axis=-1)
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)

    def new_store(self) -> list[dict[int, tuple[FloatArray, FloatArray]]]:
        return [{} for _ in range(self.num_layers)]

    def forward(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        kv_limits: Sequence[int],
        store: list[dict[int, tuple[FloatArray, FloatArray]]],
    ) -> FloatArray:
        rows = len(token_ids)
        position_array = np.asarray(positions, dtype=np.int64)
        group = self.num_q_heads // self.num_kv_heads
        x = self.weights["model.embed_tokens.weight"][np.asarray(token_ids)]
        for layer, kv in enumerate(store):
            prefix = f"model.layers.{layer}."
            h = self._norm(x, prefix + "input_layernorm.weight")
            q, k, v = (
                (h @ self.weights[f"{prefix}self_attn.{name}_proj.weight"].T).reshape(
                    rows, -1, self.head_dim
                )
                for name in "qkv"
            )
            q = self._rotate(self._norm(q, prefix + "self_attn.q_norm.weight"), position_array)
            k = self._rotate(self._norm(k, prefix + "self_attn.k_norm.weight"), position_array)
            for row, position in enumerate(positions):
                kv[position] = (k[row], v[row])
            span = max(kv_limits)
            keys = np.stack([kv[position][0] for position in range(span)])
            values = np.stack([kv[position][1] for position in range(span)])
            keys = np.repeat(keys, group, axis=1)  # [span, num_q_heads, head_dim]
            values = np.repeat(values, group, axis=1)
            scores = np.einsum("rhd,shd->rhs", q, keys) / math.sqrt(self.head_dim)
            visible = np.arange(span)[None, :] < np.asarray(kv_limits)[:, None]
            scores = np.where(visible[:, None, :], scores, -np.inf)
            scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
            scores /= scores.sum(axis=-1, keepdims=True)
            attended = np.einsum("rhs,shd->rhd", scores, values).reshape(rows, -1)
            x = x + attended @ self.weights[prefix + "self_attn.o_proj.weight"].T
            h = self._norm(x, prefix + "post_attention_layernorm.weight")
            gate = h @ self.weights[prefix + "mlp.gate_proj.weight"].T
            up = h @ self.weights[prefix + "mlp.up_proj.weight"].T
            hidden = gate / (1.0 + np.exp(-gate)) * up
            x = x + hidden @ self.weights[prefix + "mlp.down_proj.weight"].T
        return self._norm(x, "model.norm.weight") @ self.weights["lm_head.weight"].T


# --------------------------------------------------------------------- candidates and unmasking


def log_softmax(x: FloatArray) -> FloatArray:
    shifted = x - x.max()
    return shifted - np.log(np.exp(shifted).sum())


@dataclass
class Candidate:
    token_id: int
    confidence: float
    logprob: float
    entropy: float
    margin: float  # how far the choice of the token is from another one


def pick_candidate(
    logits: FloatArray, position: int, denoise_step: int, params: DecodeParams
) -> Candidate:
    """One row's token with its confidence under the unfiltered, temperature-scaled softmax."""
    logits = logits.astype(np.float64)
    logprobs = log_softmax(logits)
    if params.temperature == 0.0:
        scaled_logprobs = logprobs
        scores = logits
        margin = math.inf
        error_scale = 1.0
    else:
        scaled = logits / np.float32(params.temperature)
        scaled_logprobs = log_softmax(scaled)
        kept, margin = filter_top_k_top_p(scaled, params.top_k, params.top_p)
        noise = gumbel_noise(params.seed, position, denoise_step, len(logits))
        scores = np.where(kept, scaled + noise, -np.inf)
        error_scale = 1.0 / params.temperature
    token_id = int(np.argmax(scores))
    others = np.delete(scores, token_id)
    gap = float(scores[token_id] - others.max()) if len(others) else math.inf
    probabilities = np.exp(scaled_logprobs)
    return Candidate(
        token_id=token_id,
        confidence=float(probabilities[token_id]),
        logprob=float(logprobs[token_id]),
        entropy=float(-(probabilities * scaled_logprobs).sum()),
        # A logit error of e moves a probability by at most e / 4 and a gap by at most 2 e.
        margin=min(margin, gap / error_scale) / 8,
    )


def filter_top_k_top_p(
    scaled: FloatArray, top_k: int, top_p: float
) -> tuple[NDArray[np.bool_], float]:
    """The top_k tokens, and of those (renormalised) the shortest head with mass above top_p."""
    order = np.argsort(-scaled, kind="stable")
    kept = np.ones(len(scaled), dtype=bool)
    margin = math.inf
    count = len(scaled)
    if 0 < top_k < count:
        margin = float(scaled[order[top_k - 1]] - scaled[order[top_k]])
        count = top_k
    if top_p < 1.0:
        head = np.exp(log_softmax(scaled[order[:count]]))
        before = np.cumsum(head) - head  # mass of the better tokens
        margin = min(margin, float(np.abs(before[1:] - top_p).min(initial=math.inf)))
        count = max(1, int((before <= np.float32(top_p)).sum()))
    kept[order[count:]] = False
    return kept, margin


def quota(step: int, params: DecodeParams) -> int:
    """n_t: how many masks step `step` of a block commits at least."""
    steps = params.denoising_steps or params.block_length
    base, remainder = divmod(params.block_length, steps)
    return max(1, base + (1 if step < remainder else 0))


def select_commits(
    candidates: Sequence[Candidate], step: int, params: DecodeParams
) -> tuple[list[int], float]:
    """Indices of the candidates to commit, and how close the closest decision was."""
    count = min(quota(step, params), len(candidates))
    confidence = np.array([candidate.confidence for candidate in candidates])
    by_confidence = np.argsort(-confidence, kind="stable")

    def best(n: int) -> tuple[list[int], float]:
        gap = math.inf
        if n < len(candidates):
            gap = float(confidence[by_confidence[n - 1]] - confidence[by_confidence[n]])
        return sorted(by_confidence[:n].tolist()), gap

    if params.unmasking_strategy == "sequential":
        chosen, margin = list(range(count)), math.inf
    elif params.unmasking_strategy == "low_confidence_static":
        chosen, margin = best(count)
    elif params.unmasking_strategy == "low_confidence_dynamic":
        threshold = float(np.float32(params.confidence_threshold))
        margin = float(np.abs(confidence - threshold).min())
        chosen = np.flatnonzero(confidence > threshold).tolist()
        if len(chosen) < count:
            chosen, gap = best(count)
            margin = min(margin, gap)
    elif params.unmasking_strategy == "entropy_bounded":
        bound = float(np.float32(params.entropy_bound))
        entropy = np.array([candidate.entropy for candidate in candidates])
        order = np.argsort(entropy, kind="stable")
        running = np.cumsum(entropy[order])
        taken = max(1, int((running <= bound).sum()))
        chosen = sorted(order[:taken].tolist())
        # The first is committed in any case, so the bound decides only from the second on.
        margin = float(np.abs(running[1:] - bound).min(initial=math.inf))
        if taken < len(candidates):
            margin = min(margin, float(entropy[order[taken]] - entropy[order[taken - 1]]))
        margin /= 8
    else:
        raise ValueError(f"unknown unmasking strategy {params.unmasking_strategy}")

    if params.temperature == 0.0:
        relevant: Iterable[int] = chosen  # an argmax tie changes no confidence
    else:
        relevant = range(len(candidates))
    return chosen, min([margin, *(candidates[i].margin for i in relevant)])


# --------------------------------------------------------------------------------------- the loops


class _Sequence:
    """Tokens with a mask state of their own: a mask is never recognised by its token id."""

    def __init__(self, prompt: Sequence[int], params: DecodeParams) -> None:
        self.prompt_len = len(prompt)
        self.params = params
        self.length = math.ceil((len(prompt) + params.max_tokens) / params.block_length)
        self.length *= params.block_length
        self.tokens = [*prompt] + [params.mask_token_id] * (self.length - len(prompt))
        self.masked = [False] * len(prompt) + [True] * (self.length - len(prompt))
        self.candidates: dict[int, tuple[Candidate, int]] = {}

    def commit(self, position: int, candidate: Candidate, nfe: int) -> None:
        assert self.masked[position]
        self.tokens[position] = candidate.token_id
        self.masked[position] = False
        self.candidates[position] = (candidate, nfe)

    def finished(self) -> tuple[int, str] | None:
        """(output length, reason) once it is decided: no mask before the end."""
        for index in range(self.params.max_tokens):
            position = self.prompt_len + index
            if self.masked[position]:
                return None
            if self.tokens[position] in self.params.eos_token_ids:
                return index + 1, "stop"
        return self.params.max_tokens, "length"

    def result(self, length: int, reason: str, nfe: int, num_rows: int, margin: float) -> Result:
        chosen = [self.candidates[self.prompt_len + index] for index in range(length)]
        return Result(
            token_ids=[candidate.token_id for candidate, _ in chosen],
            logprobs=[candidate.logprob for candidate, _ in chosen],
            confidences=[candidate.confidence for candidate, _ in chosen],
            steps=[step for _, step in chosen],
            finish_reason=reason,
            nfe=nfe,
            num_rows=num_rows,
            margin=margin,
        )


def block_decode(forward: Forward, prompt: Sequence[int], params: DecodeParams) -> Result:
    """The published SDAR loop: all positions of the block in every step, nothing cached."""
    block_length = params.block_length
    sequence = _Sequence(prompt, params)
    block_start = len(prompt) // block_length * block_length
    nfe = num_rows = 0
    margin = math.inf
    while True:
        block_end = block_start + block_length
        denoise_step = 0
        while any(sequence.masked[block_start:block_end]):
            logits = forward(
                np.asarray(sequence.tokens[:block_end]),
                np.arange(block_end),
                block_visibility(block_end, block_length),
            )
            nfe += 1
            num_rows += block_length
            rows = [p for p in range(block_start, block_end) if sequence.masked[p]]
            candidates = [pick_candidate(logits[p], p, denoise_step, params) for p in rows]
            chosen, closest = select_commits(candidates, denoise_step, params)
            margin = min(margin, closest)
            for index in chosen:
                sequence.commit(rows[index], candidates[index], nfe)
            denoise_step += 1
            if (end := sequence.finished()) is not None:
                return sequence.result(*end, nfe, num_rows, margin)
        num_rows += block_length  # the clean block is forwarded once more, for its K and V
        block_start = block_end


def _at_step(choices: Sequence[int], step: int) -> int:
    return choices[min(step, len(choices) - 1)]


def chunk_decode(
    model: KvStoreModel,
    prompt: Sequence[int],
    params: DecodeParams,
    chunk_length: int | Sequence[int],
    kv_policy: str | Sequence[bool],
    recompute_block: bool = False,
) -> Result:
    """Chunk decoding with an explicit state per position, over stored K and V.

    A step's rows, ascending: the previous block if it holds fresh positions (those under `freeze`,
    all of it under `refresh`), fresh positions of the current block, its first `chunk_length`
    masks. With `recompute_block` all positions of the current block are rows in every step.

    What a controller chooses is given by step: a sequence of chunk lengths, and of whether a step
    refreshes. Past its end the last choice holds: a tie that the recorded run decided otherwise can
    take more steps, and has to come back with its `margin`, not as an error. Masks that were rows
    and are not now stay present, with the K and V of that step.
    """
    if isinstance(kv_policy, str) and kv_policy not in ("freeze", "refresh"):
        raise ValueError(f"kv_policy {kv_policy}")
    block_length = params.block_length
    sequence = _Sequence(prompt, params)
    block_start = len(prompt) // block_length * block_length
    store = model.new_store()
    if block_start:
        prefill = range(block_start)
        model.forward(prompt[:block_start], prefill, block_kv_limits(prefill, block_length), store)
    fresh = set(range(block_start, len(prompt)))
    present = set(range(len(prompt)))  # ever a row, or known
    denoise_step = nfe = num_rows = 0
    margin = math.inf
    while True:
        previous = range(max(0, block_start - block_length), block_start)
        current = range(block_start, block_start + block_length)
        if isinstance(kv_policy, str):
            refresh = kv_policy == "refresh"
        else:
            refresh = bool(_at_step(kv_policy, nfe))
        length = chunk_length if isinstance(chunk_length, int) else _at_step(chunk_length, nfe)
        masks = [p for p in current if sequence.masked[p]][:length]
        rows: list[int] = []
        if any(p in fresh for p in previous):
            rows += [p for p in previous if refresh or p in fresh]
        if recompute_block:
            rows += current
        else:
            rows += sorted([p for p in current if p in fresh] + masks)
        present.update(rows)
        current_limit = max(p for p in current if p in present) + 1
        kv_limits = [block_start if p < block_start else current_limit for p in rows]
        logits = model.forward([sequence.tokens[p] for p in rows], rows, kv_limits, store)
        fresh.difference_update(rows)
        nfe += 1
        num_rows += len(rows)
        candidates = [pick_candidate(logits[rows.index(p)], p, denoise_step, params) for p in masks]
        chosen, closest = select_commits(candidates, denoise_step, params)
        margin = min(margin, closest)
        for index in chosen:
            sequence.commit(masks[index], candidates[index], nfe)
            fresh.add(masks[index])
        denoise_step += 1
        if (end := sequence.finished()) is not None:
            return sequence.result(*end, nfe, num_rows, margin)
        if not any(sequence.masked[p] for p in current):
            block_start += block_length
            denoise_step = 0


def ar_decode(forward: Forward, prompt: Sequence[int], params: DecodeParams) -> Result:
    """One token a step from the last position's logits, causal, recomputed from scratch."""
    if params.block_length != 1:
        raise ValueError("ar decoding is block_length 1")
    sequence = _Sequence(prompt, params)
    margin = math.inf
    for nfe in range(1, params.max_tokens + 1):
        length = len(prompt) + nfe - 1
        logits = forward(
            np.asarray(sequence.tokens[:length]), np.arange(length), causal_visibility(length)
        )
        candidate = pick_candidate(logits[-1], length, 0, params)
        margin = min(margin, candidate.margin)
        sequence.commit(length, candidate, nfe)
        if (end := sequence.finished()) is not None:
            return sequence.result(*end, nfe, nfe, margin)
    raise AssertionError("unreachable: max_tokens ends the loop")


# ------------------------------------------------------------------------------------------- noise

_U64 = (1 << 64) - 1


def _mix64(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = z + np.uint64(0x9E3779B97F4A7C15)  # wraps
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def gumbel_noise(seed: int, position: int, denoise_step: int, vocab_size: int) -> FloatArray:
    """Gumbel(0, 1) noise of every token: the counter-based function of csrc/kernels/noise.h."""
    key = _mix64(np.array([seed & _U64], dtype=np.uint64))
    key = _mix64(key ^ np.uint64(position))
    key = _mix64(key ^ np.uint64(denoise_step))
    bits = _mix64(key ^ np.arange(vocab_size, dtype=np.uint64)) >> np.uint64(41)
    uniform = (bits.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)
    return -np.log(-np.log(uniform))
