"""Writes the deployable folder: config, generation config, tokenizer, weights, held-out set.

python -m bench.demo_model.export --output DIR --weights RUN --threshold 0.99
python -m bench.demo_model.export --output DIR --random      # untrained, same layout
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from .checkpoint import load_weights
from .model import DemoModel, ModelConfig
from .tasks import heldout_tasks
from .tokenizer import SPECIAL_TOKENS, VOCAB_SIZE, save_tokenizer, train_tokenizer


def write_json(file: Path, value: object) -> None:
    """Indented JSON with a final newline."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_heldout(file: Path, seed: int, count: int) -> None:
    """One JSON object a line: id, task (the family), kind, prompt, answer."""
    with file.open("w", encoding="utf-8") as out:
        for index, t in enumerate(heldout_tasks(seed, count)):
            record = {"id": f"{t.family}-{index:05d}", "task": t.family, "kind": t.kind,
                      "prompt": t.prompt, "answer": t.answer}  # fmt: skip
            out.write(json.dumps(record, ensure_ascii=False) + "\n")


def write_configs(directory: Path, config: ModelConfig, threshold: float) -> None:
    """config.json, generation_config.json and special_tokens_map.json."""
    write_json(directory / "config.json", config.to_hf())
    write_json(
        directory / "generation_config.json",
        {
            "eos_token_id": config.eos_token_id,
            "pad_token_id": config.pad_token_id,
            "temperature": 0.0,
            "do_sample": False,
            "confidence_threshold": threshold,
            "unmasking_strategy": "low_confidence_dynamic",
        },
    )
    write_json(
        directory / "special_tokens_map.json",
        {
            "eos_token": SPECIAL_TOKENS[config.eos_token_id],
            "pad_token": SPECIAL_TOKENS[config.pad_token_id],
            "mask_token": SPECIAL_TOKENS[config.mask_token_id],
        },
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--weights", type=Path, help="run directory with trained weights")
    source.add_argument("--random", action="store_true", help="untrained weights")
    parser.add_argument("--threshold", type=float, default=0.99)
    parser.add_argument("--tokenizer", type=Path, help="keep this tokenizer.json; else train one")
    parser.add_argument("--heldout", type=int, default=1500, help="number of held-out prompts")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer = (
        Tokenizer.from_file(str(args.tokenizer)) if args.tokenizer else train_tokenizer(args.seed)
    )
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise SystemExit(f"tokenizer has {tokenizer.get_vocab_size()} entries, not {VOCAB_SIZE}")
    save_tokenizer(tokenizer, args.output)
    config = ModelConfig()
    write_configs(args.output, config, args.threshold)
    write_heldout(args.output / "heldout.jsonl", args.seed, args.heldout)
    model = DemoModel(config)
    if args.random:
        torch.manual_seed(args.seed)
        for weight in model.parameters():  # no zero matrices: a test must see every layer
            torch.nn.init.normal_(weight, 1.0 if weight.dim() < 2 else 0.0, 0.02)
    else:
        model.load_state_dict(load_weights(args.weights))
    state = {k: v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    save_file(state, args.output / "model.safetensors", metadata={"format": "pt"})
    size = sum(f.stat().st_size for f in args.output.iterdir())
    print(f"{sum(v.numel() for v in state.values())} parameters, folder {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
