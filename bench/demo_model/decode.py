"""Batched reference decoding in torch: autoregressive, block, and chunk.

Written for clarity and for measuring a checkpoint, not for speed: every request computes the
rows of its whole current block in every step, and rows that a chunk leaves out are hidden by
masks. What is computed for the rows that count is exactly what a ragged batch would compute.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .model import DemoModel


class Cache:
    """Keys and values of N requests, [layers][N, Hkv, length, D] each."""

    def __init__(self, model: DemoModel, requests: int, length: int) -> None:
        c, weight = model.config, model.model.embed_tokens.weight
        shape = (c.num_hidden_layers, requests, c.num_key_value_heads, length, c.head_dim)
        self.k = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.v = torch.zeros_like(self.k)
        self.length = length


def forward_rows(
    model: DemoModel, cache: Cache, ids: Tensor, positions: Tensor, limits: Tensor, write: Tensor
) -> Tensor:
    """One step over rows [N, R]: writes K and V where `write`, then row (n, r) sees the keys
    [0, limits[n, r]) of request n. Returns hidden states [N, R, hidden]."""
    keys = torch.arange(cache.length, device=ids.device)
    seen = (keys < limits[..., None])[:, None]  # [N, 1, R, length]
    where = positions[:, None, :, None].expand(-1, cache.k.shape[2], -1, cache.k.shape[4])

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for store, new in ((cache.k[layer], k), (cache.v[layer], v)):
            kept = torch.where(write[:, None, :, None], new, store.gather(2, where))
            store.scatter_(2, where, kept)
        return F.scaled_dot_product_attention(
            q, cache.k[layer], cache.v[layer], attn_mask=seen, enable_gqa=True
        )

    return model.hidden(ids, positions, attend)


def _prefill(
    model: DemoModel, prompts: list[list[int]], max_answer: int, block: int, causal: bool
) -> tuple[Cache, Tensor, Tensor]:
    """Runs the prompts; returns (cache, ids [N, length], prompt lengths [N]).

    Block diffusion: the whole blocks of a prompt, each row seeing its block and those before.
    Autoregressive: all tokens but the last, causally.
    """
    device = model.model.embed_tokens.weight.device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    rows = -(-int(lengths.max()) // block) * block
    total = rows + -(-max_answer // block) * block + block
    ids = torch.zeros((len(prompts), total), dtype=torch.long, device=device)
    for index, prompt in enumerate(prompts):
        ids[index, : len(prompt)] = torch.tensor(prompt, device=device)
    cache = Cache(model, len(prompts), total)
    positions = torch.arange(rows, device=device).expand(len(prompts), -1)
    done = (lengths - 1 if causal else lengths // block * block)[:, None]
    limits = positions + 1 if causal else positions // block * block + block
    forward_rows(model, cache, ids[:, :rows], positions, limits, positions < done)
    return cache, ids, lengths


@dataclass
class Result:
    """Answers and what they cost."""

    outputs: list[list[int]]  # answer tokens without eos; all that was written if eos never came
    forwards: Tensor  # [N] denoising forwards (AR: steps); the forward that stores a block is extra
    seen_at: Tensor  # [B] how often a mask at that rank (0 = first mask) was evaluated
    committed_at: Tensor  # [B] how often it was committed
    finished: Tensor = field(default_factory=lambda: torch.empty(0))  # [N] eos was reached

    def tokens_per_forward(self) -> float:
        """Committed tokens up to and with eos, per denoising forward."""
        tokens = sum(len(o) + 1 for o in self.outputs)
        return tokens / float(self.forwards.sum())


def _collect(ids: Tensor, lengths: Tensor, ends: Tensor, eos_id: int) -> list[list[int]]:
    """The answers [prompt length, end) of every request, cut at the first eos."""
    out = []
    for row, start, end in zip(ids.tolist(), lengths.tolist(), ends.tolist(), strict=True):
        answer = row[start:end]
        out.append(answer[: answer.index(eos_id)] if eos_id in answer else answer)
    return out


@torch.inference_mode()
def decode_causal(model: DemoModel, prompts: list[list[int]], max_answer: int) -> Result:
    """Greedy autoregressive decoding."""
    c = model.config
    cache, ids, lengths = _prefill(model, prompts, max_answer, c.block_size, causal=True)
    at = lengths - 1
    active = torch.ones_like(at, dtype=torch.bool)
    forwards = torch.zeros_like(at)
    for _ in range(max_answer):
        rows = at[:, None]
        hidden = forward_rows(
            model, cache, ids.gather(1, rows), rows, rows + 1, torch.ones_like(rows, dtype=bool)
        )
        token = model.logits(hidden[:, 0]).argmax(-1)
        at = torch.where(active, at + 1, at)
        current = ids.gather(1, at[:, None])[:, 0]
        ids.scatter_(1, at[:, None], torch.where(active, token, current)[:, None])
        forwards += active
        active &= token != c.eos_token_id
        if not active.any():
            break
    none = torch.zeros(c.block_size)
    outputs = _collect(ids, lengths, at + 1, c.eos_token_id)
    return Result(outputs, forwards.cpu(), none, none, ~active.cpu())


class BlockDecoder:
    """Block diffusion of a batch of requests, each at its own block.

    chunk: how many of a block's first masks are evaluated in a step; positions behind them are
    not present. The block length gives the reference semantics.
    freeze: a committed position is fed once with its real id and its K and V then stay; without
    it every present position is recomputed in every step, and once more when the block is clean.
    """

    def __init__(
        self, model: DemoModel, prompts: list[list[int]], max_answer: int,
        threshold: float, chunk: int, freeze: bool,
    ) -> None:  # fmt: skip
        c = model.config
        self.model, self.block = model, c.block_size
        self.eos, self.mask_id = c.eos_token_id, c.mask_token_id
        self.threshold, self.chunk, self.freeze = threshold, chunk, freeze
        self.cache, self.ids, self.lengths = _prefill(model, prompts, max_answer, self.block, False)
        device = self.ids.device
        self.base = self.lengths // self.block * self.block
        self.offsets = torch.arange(self.block, device=device)
        self.masked = self.base[:, None] + self.offsets >= self.lengths[:, None]  # [N, B]
        self.cached = torch.zeros_like(self.masked)
        self.active = torch.ones_like(self.base, dtype=torch.bool)
        self.forwards = torch.zeros_like(self.base)
        self.seen_at = torch.zeros(self.block, device=device)
        self.committed_at = torch.zeros(self.block, device=device)

    def _evaluate(self, rank: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Forwards the present rows; returns (commit [N, B], candidate ids [N, B])."""
        places = self.base[:, None] + self.offsets
        real = self.ids.gather(1, places)
        ids = torch.where(self.masked, self.mask_id, real)
        limits = (self.base + present.sum(1))[:, None].expand_as(places)
        write = present & self.active[:, None]
        if self.freeze:
            write &= ~self.cached
        hidden = forward_rows(self.model, self.cache, ids, places, limits, write)
        self.cached |= present & ~self.masked
        confidence, candidate = self.model.logits(hidden).float().softmax(-1).max(-1)
        confidence = confidence.masked_fill(~(present & self.masked), -1.0)
        best = F.one_hot(confidence.argmax(1), self.block).bool()
        commit = ((confidence > self.threshold) | best) & present & self.masked
        commit &= self.active[:, None]
        counted = present & self.masked & self.active[:, None]
        self.seen_at.scatter_add_(0, rank[counted], torch.ones_like(rank[counted]).float())
        self.committed_at.scatter_add_(0, rank[commit], torch.ones_like(rank[commit]).float())
        return commit, candidate

    def step(self) -> None:
        """One forward for every request: a denoising one, or the one that stores a clean block."""
        rank = self.masked.cumsum(1) - self.masked.int()
        present = rank < self.chunk
        denoising = self.masked.any(1)
        self.forwards += denoising & self.active
        commit, candidate = self._evaluate(rank, present)
        places = self.base[:, None] + self.offsets
        tokens = torch.where(commit, candidate, self.ids.gather(1, places))
        self.ids.scatter_(1, places, tokens)
        self.masked &= ~commit
        answer = places >= self.lengths[:, None]
        clean_prefix = self.masked.cumsum(1) == 0
        self.active &= ~((tokens == self.eos) & answer & clean_prefix).any(1)
        full = self.base + 2 * self.block > self.ids.shape[1]
        self.active &= ~(full & ~denoising)
        advance = ~denoising & self.active
        self.base = torch.where(advance, self.base + self.block, self.base)
        self.masked |= advance[:, None]
        self.cached &= ~advance[:, None]

    def run(self) -> Result:
        """Steps until all requests are done."""
        while self.active.any():
            self.step()
        ends = self.base + self.block
        outputs = _collect(self.ids, self.lengths, ends, self.eos)
        finished = torch.tensor(
            [self.eos in row[n:e] for row, n, e in zip(
                self.ids.tolist(), self.lengths.tolist(), ends.tolist(), strict=True)]
        )  # fmt: skip
        return Result(outputs, self.forwards.cpu(), self.seen_at.cpu(),
                      self.committed_at.cpu(), finished)  # fmt: skip


@torch.inference_mode()
def decode_blocks(
    model: DemoModel,
    prompts: list[list[int]],
    max_answer: int,
    *,
    threshold: float,
    chunk: int | None = None,
    freeze: bool = False,
) -> Result:
    """Block decoding (`chunk` None) or chunk decoding."""
    size = chunk or model.config.block_size
    return BlockDecoder(model, prompts, max_answer, threshold, size, freeze).run()
