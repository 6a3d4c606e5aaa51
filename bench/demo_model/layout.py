"""How a document becomes rows of a training batch.

Words used here: a *context* token is a clean or an autoregressive one; other tokens may look at
it. A *noisy* token belongs to a masked copy of one block (a *cell*) and is seen by its own cell
only. Query q may see key k of the same document if

    k is a context token and positions[k] < limits[q], or q and k share a noisy cell.

The limit alone tells the streams apart: p + 1 for an autoregressive token, the end of its block
for a clean one, the start of its block for a noisy one.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

IGNORE = -100


@dataclass
class Stream:
    """Parallel int32 arrays [T], one entry per row of the batch."""

    ids: np.ndarray
    positions: np.ndarray
    limits: np.ndarray
    cells: np.ndarray  # 0 for context tokens, else a number of the noisy cell within the document
    labels: np.ndarray  # IGNORE where there is no loss
    docs: np.ndarray | None = None  # set when documents are packed

    def __len__(self) -> int:
        return len(self.ids)


def _stream(ids, positions, limits, cells, labels) -> Stream:
    return Stream(*(np.asarray(a, dtype=np.int32) for a in (ids, positions, limits, cells, labels)))


def causal_stream(prompt: list[int], answer: list[int], pad_id: int, block: int) -> Stream:
    """A plain autoregressive row: the token at p predicts the one at p + 1 of the answer.

    `answer` ends with eos. The row is filled to whole blocks with tokens nobody uses.
    """
    ids = prompt + answer
    length = -(-len(ids) // block) * block
    filled = np.full(length, pad_id, dtype=np.int32)
    filled[: len(ids)] = ids
    labels = np.full(length, IGNORE, dtype=np.int32)
    labels[len(prompt) - 1 : len(ids) - 1] = answer
    positions = np.arange(length)
    return _stream(filled, positions, positions + 1, np.zeros(length), labels)


def draw_mask(rng: np.random.Generator, maskable: np.ndarray) -> np.ndarray:
    """Chooses the masked positions of one block among the `maskable` ones; at least one.

    Three regimes, since decoding starts from nothing and mostly grows from the left: all masked;
    a rate t ~ U(0, 1]; a known prefix with the rest masked fully or at a rate above one half.
    """
    places = np.flatnonzero(maskable)
    regime, chosen = rng.random(), np.zeros(len(maskable), dtype=bool)
    if regime < 0.15:
        chosen[places] = True
    elif regime < 0.55:
        chosen[places] = rng.random(len(places)) < 1.0 - rng.random()
    else:
        rest = places[rng.integers(len(places)) :]
        rate = 1.0 if rng.random() < 0.5 else rng.uniform(0.5, 1.0)
        chosen[rest] = rng.random(len(rest)) < rate
    if not chosen.any():
        chosen[rng.choice(places)] = True
    return chosen


def diffusion_stream(
    prompt: list[int],
    answer: list[int],
    rng: np.random.Generator,
    *,
    block: int,
    mask_id: int,
    eos_id: int,
    copies: int,
) -> Stream:
    """Clean blocks, then `copies` noisy versions of every block that holds answer tokens.

    The grid starts at token 0 of the prompt. The answer (ending with eos) is filled with eos to
    the end of its last block. The clean version of that last block is left out: no later block
    looks at it. Prompt tokens in the first answer block are never masked.
    """
    ids = prompt + answer
    length = -(-len(ids) // block) * block
    ids = np.asarray(ids + [eos_id] * (length - len(ids)), dtype=np.int32)
    places = np.arange(length, dtype=np.int32)
    starts = places // block * block
    first, clean = len(prompt) // block * block, length - block
    is_answer = places >= len(prompt)
    parts = [[ids[:clean]], [places[:clean]], [starts[:clean] + block], [np.zeros(clean)],
             [np.full(clean, IGNORE)]]  # fmt: skip
    for copy in range(copies):
        for start in range(first, length, block):
            span = slice(start, start + block)
            masked = draw_mask(rng, is_answer[span])
            cell = 1 + start // block * copies + copy
            parts[0].append(np.where(masked, mask_id, ids[span]))
            parts[1].append(places[span])
            parts[2].append(starts[span])
            parts[3].append(np.full(block, cell))
            parts[4].append(np.where(masked, ids[span], IGNORE))
    return _stream(*(np.concatenate(p) for p in parts))


def padding(length: int, pad_id: int) -> Stream:
    """Fills the end of a packed row; sees nothing but its first token."""
    return _stream(np.full(length, pad_id), np.arange(length), np.ones(length),
                   np.zeros(length), np.full(length, IGNORE))  # fmt: skip


def pack(streams: list[Stream], row_length: int, pad_id: int) -> Stream:
    """Concatenates documents into one row of `row_length` tokens and numbers them."""
    used = sum(len(s) for s in streams)
    if used < row_length:
        streams = [*streams, padding(row_length - used, pad_id)]
    joined = [
        np.concatenate([getattr(s, f.name) for s in streams])
        for f in fields(Stream)
        if f.name != "docs"
    ]
    docs = np.repeat(np.arange(len(streams), dtype=np.int32), [len(s) for s in streams])
    return Stream(*joined, docs=docs)


def visible(docs, positions, limits, cells, q, k):
    """The rule in the module's docstring. `q` and `k` index the arrays or tensors: plain indexes
    into one row's [T], or (row, index) pairs into a batch [rows, T]."""
    context = (cells[k] == 0) & (positions[k] < limits[q])
    same_cell = (cells[q] == cells[k]) & (cells[q] > 0)
    return (docs[q] == docs[k]) & (context | same_cell)
