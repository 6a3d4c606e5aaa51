"""Trains the demo model: block diffusion plus a share of autoregressive rows.

    python -m bench.demo_model.train --tokenizer DIR/tokenizer.json --output RUN --seconds 720

`--steps` and `--seconds` both describe the whole schedule (whichever is used up first ends it);
`--stop-after` ends this process early with a state that `--resume` continues from.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from .checkpoint import load_training, load_weights, save_training
from .data import PackedTasks, loader
from .layout import IGNORE, visible
from .model import DemoModel, ModelConfig
from .optim import Muon, build_optimizers, lr_factor

TINY = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip


def block_mask(batch: dict[str, Tensor]) -> BlockMask:
    """The sparse attention pattern of a batch of packed rows [rows, T]."""
    docs, positions, limits, cells = (batch[k] for k in ("docs", "positions", "limits", "cells"))
    rows, length = docs.shape

    def mask_mod(b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return visible(docs, positions, limits, cells, (b, q), (b, k))

    return create_block_mask(mask_mod, rows, None, length, length, device=docs.device)


def dense_mask(batch: dict[str, Tensor]) -> Tensor:
    """The same pattern as a boolean [rows, 1, T, T], for where flex attention cannot train."""
    streams = [batch[k] for k in ("docs", "positions", "limits", "cells")]
    rows, length = batch["docs"].shape
    place = torch.arange(length)
    b = torch.arange(rows)[:, None, None]
    return visible(*streams, (b, place[:, None]), (b, place[None, :]))[:, None]


def losses(
    model: DemoModel, batch: dict[str, Tensor], mask: BlockMask | Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss over all labelled tokens, and detached means of the two kinds of rows.

    The labels are aligned with the rows that predict them: a masked row its own token, an
    autoregressive row the next one. Both streams weigh each token alike.
    """

    def attend(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if isinstance(mask, Tensor):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)

    hidden = model.hidden(batch["ids"], batch["positions"], attend, dtype)
    picked = hidden.flatten(0, 1)[batch["loss_at"]]
    labels = batch["loss_labels"]
    each = F.cross_entropy(
        model.logits(picked).float(), labels, ignore_index=IGNORE, reduction="none"
    )
    valid = labels != IGNORE
    causal = (batch["cells"].flatten()[batch["loss_at"]] == 0) & valid
    noisy = valid & ~causal
    split = each.detach()
    return (
        each.sum() / valid.sum(),
        (split * causal).sum() / causal.sum().clamp(min=1),
        (split * noisy).sum() / noisy.sum().clamp(min=1),
    )


class Trainer:
    """The loop's state: model, optimizers, clock, log."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device(args.device)
        self.dtype = torch.bfloat16
        config = ModelConfig(**(TINY if args.tiny else {}))
        self.model = DemoModel(config)
        self.model.init_weights(args.seed)
        self.model.to(self.device)
        self.optimizers = build_optimizers(self.model, args.muon_lr, args.adam_lr)
        self.base = [[g["lr"] for g in o.param_groups] for o in self.optimizers]
        self.progress = {"step": 0, "seconds": 0.0, "tokens": 0, "loss_tokens": 0, "runs": 0}
        if args.resume and (args.resume / "progress.json").exists():
            self.progress = load_training(args.resume, self.model, self.optimizers)
        if args.init:
            self.model.load_state_dict({k: v.float() for k, v in load_weights(args.init).items()})
        self.progress["runs"] += 1
        self.mask_fn, self.loss_fn = dense_mask, losses
        if self.device.type == "cuda":
            self.mask_fn = torch.compile(block_mask, dynamic=False)
            self.loss_fn = torch.compile(losses, dynamic=False)
            for optimizer in self.optimizers:
                if isinstance(optimizer, Muon):
                    optimizer.compile()
        args.output.mkdir(parents=True, exist_ok=True)
        self.log_file = (args.output / "train_log.jsonl").open("a")
        self.say(config=asdict(config), args={k: str(v) for k, v in vars(args).items()},
                 parameters=sum(p.numel() for p in self.model.parameters()))  # fmt: skip

    def say(self, **record) -> None:
        """One line to the log and to the terminal."""
        line = json.dumps(record)
        self.log_file.write(line + "\n")
        self.log_file.flush()
        print(line, flush=True)

    def fraction(self) -> float:
        """How much of the schedule is done."""
        p, a = self.progress, self.args
        return max(p["step"] / a.steps, p["seconds"] / a.seconds)

    def step(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """One forward, backward and update."""
        batch = {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}
        mask = self.mask_fn(batch)
        with torch.autocast(self.device.type, torch.bfloat16):
            loss, causal, noisy = self.loss_fn(self.model, batch, mask, self.dtype)
        loss.backward()
        factor = lr_factor(self.fraction())
        for optimizer, bases in zip(self.optimizers, self.base, strict=True):
            for group, base in zip(optimizer.param_groups, bases, strict=True):
                group["lr"] = base * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach(), causal, noisy

    def save(self) -> None:
        """Writes a state that can be resumed and deployed; the old one stays until then."""
        new, state = self.args.output / "state.new", self.args.output / "state"
        save_training(new, self.model, self.optimizers, self.progress)
        shutil.rmtree(state, ignore_errors=True)
        new.rename(state)

    def run(self) -> None:
        """Trains until the schedule or this process's share of it is over."""
        args, p = self.args, self.progress
        dataset = PackedTasks(
            str(args.tokenizer), seed=args.seed + 100 * (p["runs"] - 1), rows=args.rows,
            row_length=args.row_length, block=self.model.config.block_size,
            causal_share=args.causal_share, copies=args.copies,
        )  # fmt: skip
        started = last = last_save = time.perf_counter()
        tokens = args.rows * args.row_length
        for count, batch in enumerate(loader(dataset, args.workers)):
            found = int((batch["loss_labels"] != IGNORE).sum())
            out = self.step(batch)
            p["step"] += 1
            p["tokens"] += tokens
            p["loss_tokens"] += found
            if count < 3:  # compilation is not training time
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                self.say(compiled_step=count, seconds=round(time.perf_counter() - last, 1))
                last = time.perf_counter()
                continue
            now = time.perf_counter()
            p["seconds"] += now - last
            last = now
            over = self.fraction() >= 1.0
            if over or p["step"] % args.log_every == 0:
                values = [round(v, 4) for v in torch.stack(out).tolist()]
                self.say(step=p["step"], loss=values[0], causal=values[1], noisy=values[2],
                         seconds=round(p["seconds"], 1), tokens=p["tokens"],
                         tokens_per_s=round(p["tokens"] / max(p["seconds"], 1e-9)),
                         loss_share=round(found / tokens, 3))  # fmt: skip
            if over or (args.stop_after and now - started > args.stop_after):
                break
            if args.save_every and now - last_save > args.save_every:
                self.save()
                last_save = time.perf_counter()
        self.save()
        self.say(finished=self.fraction() >= 1.0, **p)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="run directory")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json")
    parser.add_argument("--resume", type=Path, help="state directory to continue from, if any")
    parser.add_argument("--init", type=Path, help="weights to begin a new schedule from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=10**9, help="length of the schedule")
    parser.add_argument("--seconds", type=float, default=1e9, help="length of the schedule")
    parser.add_argument("--stop-after", type=float, default=0.0, help="seconds of this process")
    parser.add_argument("--save-every", type=float, default=0.0, help="seconds between states")
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--row-length", type=int, default=4096)
    parser.add_argument("--copies", type=int, default=2, help="noisy copies of an answer block")
    parser.add_argument("--causal-share", type=float, default=0.4, help="share of documents")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.003)
    parser.add_argument("--workers", type=int, default=13)
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a toy model, to try the code out")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    Trainer(args).run()


if __name__ == "__main__":
    main()
