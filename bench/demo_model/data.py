"""Endless packed batches, made by worker processes while the GPU trains."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from . import tokenizer as tok
from .layout import IGNORE, Stream, causal_stream, diffusion_stream, pack
from .tasks import train_tasks

FIELDS = ("ids", "positions", "limits", "cells", "docs", "labels")


class PackedTasks(IterableDataset):
    """Yields batches: int32 tensors [rows, row_length] for each of FIELDS, and `loss_at` [K],
    the flat places of the tokens that carry loss (K fixed; unused entries point at place 0 with
    the label IGNORE in `loss_labels`)."""

    def __init__(
        self,
        tokenizer_file: str,
        *,
        seed: int,
        rows: int,
        row_length: int,
        block: int,
        causal_share: float,
        copies: int,
        history_share: float = 0.08,
        loss_fraction: float = 0.5,
    ) -> None:
        super().__init__()
        self.tokenizer_file, self.seed = tokenizer_file, seed
        self.rows, self.row_length, self.block = rows, row_length, block
        self.causal_share, self.copies, self.history_share = causal_share, copies, history_share
        self.loss_slots = int(rows * row_length * loss_fraction)

    def _documents(self, seed: int) -> Iterator[Stream]:
        """Documents in a fixed order for a seed."""
        tokenizer = Tokenizer.from_file(self.tokenizer_file)
        rng, noise = random.Random(seed), np.random.default_rng(seed)
        tasks = train_tasks(seed)
        while True:
            task = next(tasks)
            messages = [{"role": "user", "content": task.prompt}]
            if rng.random() < self.history_share:  # earlier turns: far positions get used, too
                for past in (next(tasks) for _ in range(rng.randint(1, 3))):
                    messages[:0] = [
                        {"role": "user", "content": past.prompt},
                        {"role": "assistant", "content": past.answer},
                    ]
            if rng.random() < 0.05:
                messages.insert(0, {"role": "system", "content": rng.choice(tok.SYSTEM_PROMPTS)})
            prompt = tokenizer.encode(tok.render(messages)).ids
            answer = [*tokenizer.encode(task.answer).ids, tok.END]
            if rng.random() < self.causal_share:
                yield causal_stream(prompt, answer, tok.PAD, self.block)
            else:
                yield diffusion_stream(
                    prompt, answer, noise, block=self.block, mask_id=tok.MASK, eos_id=tok.END,
                    copies=self.copies,
                )  # fmt: skip

    def _rows(self, seed: int) -> Iterator[Stream]:
        """Packed rows: first fit out of a small pool of waiting documents."""
        documents = self._documents(seed)
        pool = [next(documents) for _ in range(24)]
        while True:
            row, room = [], self.row_length
            while True:
                fit = next((i for i, d in enumerate(pool) if len(d) <= room), None)
                if fit is None:
                    break
                row.append(pool.pop(fit))
                room -= len(row[-1])
                pool.append(next(d for d in documents if len(d) <= self.row_length))
            yield pack(row, self.row_length, tok.PAD)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        seed = self.seed * 1000 + (worker.id if worker else 0)
        rows = self._rows(seed)
        shuffle = np.random.default_rng(seed)
        while True:
            batch = [next(rows) for _ in range(self.rows)]
            out = {f: torch.from_numpy(np.stack([getattr(r, f) for r in batch])) for f in FIELDS}
            labels = out.pop("labels").numpy().reshape(-1)
            places = np.flatnonzero(labels != IGNORE)
            if len(places) > self.loss_slots:
                places = np.sort(shuffle.choice(places, self.loss_slots, replace=False))
            loss_at = np.zeros(self.loss_slots, dtype=np.int64)
            loss_labels = np.full(self.loss_slots, IGNORE, dtype=np.int64)
            loss_at[: len(places)], loss_labels[: len(places)] = places, labels[places]
            out["loss_at"], out["loss_labels"] = map(torch.from_numpy, (loss_at, loss_labels))
            yield out


def loader(dataset: PackedTasks, workers: int) -> DataLoader:
    """Batches in the order the workers finish them round-robin: fixed for (seed, workers)."""
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
    )
