"""Reading and writing weights and training state."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

# A shard stays under 16 MiB, so that weights pass through channels with a small file limit.
SHARD_BYTES = 15 * 2**20


def save_shards(state: dict[str, Tensor], directory: Path) -> None:
    """Writes fp32 weights as model-0000i-of-0000n.safetensors with an index file."""
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        if size + tensor.nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    weight_map = {}
    for index, shard in enumerate(shards, 1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def load_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory, in one file or in shards."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return load_file(directory / "model.safetensors")
    files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return {name: t for file in files for name, t in load_file(directory / file).items()}


def save_training(
    directory: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], progress: dict
) -> None:
    """Weights in shards, progress.json, and optimizer.pt beside them.

    optimizer.pt may be thrown away: without it a resumed run warms its momentum up again.
    """
    save_shards(model.state_dict(), directory)
    (directory / "progress.json").write_text(json.dumps(progress, indent=1) + "\n")
    torch.save([o.state_dict() for o in optimizers], directory / "optimizer.pt")


def load_training(
    directory: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> dict:
    """Restores what `save_training` wrote; returns the progress record."""
    model.load_state_dict(load_weights(directory))
    file = directory / "optimizer.pt"
    if file.exists():
        states = torch.load(file, map_location="cpu", weights_only=True)
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict(state)
    return json.loads((directory / "progress.json").read_text())
