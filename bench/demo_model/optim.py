"""Muon for the matrices, AdamW for embeddings and gains, one schedule for both."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def orthogonalize(update: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration towards the nearest orthogonal matrix, batched.

    update [N, rows, cols], any scale -> [N, rows, cols] with singular values near 1, in bf16.
    The quintic's coefficients trade exactness for a steep start (Jordan et al., 2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = update.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised per matrix; matrices of one shape are handled in one batch."""

    def __init__(
        self, params: list[nn.Parameter], lr: float, momentum: float, weight_decay: float
    ) -> None:
        shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for p in params:
            shapes.setdefault(p.shape, []).append(p)
        super().__init__(
            [{"params": group} for group in shapes.values()],
            {"lr": lr, "momentum": momentum, "weight_decay": weight_decay},
        )
        self._orthogonalize = orthogonalize

    def compile(self) -> None:
        """Compiles the iteration (one graph per shape)."""
        self._orthogonalize = torch.compile(orthogonalize, dynamic=False)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update of all matrices."""
        for group in self.param_groups:
            params = group["params"]
            grads = torch.stack([p.grad for p in params])
            state = self.state[params[0]]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(grads)
            buffer = state["momentum"]
            buffer.lerp_(grads, 1 - group["momentum"])
            update = self._orthogonalize(grads.lerp(buffer, group["momentum"]))
            rows, cols = params[0].shape
            scale = group["lr"] * max(1.0, rows / cols) ** 0.5
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, list(update.to(grads.dtype).unbind()), alpha=-scale)


def build_optimizers(
    model: nn.Module, muon_lr: float, adam_lr: float
) -> list[torch.optim.Optimizer]:
    """Muon over the layers' matrices, AdamW over the rest."""
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and ".layers." in n]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    fused = rest[0].is_cuda
    return [
        Muon(matrices, lr=muon_lr, momentum=0.95, weight_decay=0.05),
        torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=fused),
    ]


def lr_factor(progress: float, warmup: float = 0.01, decay: float = 0.5) -> float:
    """Warm-up, plateau, then linear decay to zero. `progress` runs from 0 to 1."""
    if progress < warmup:
        return max(progress, 1e-4) / warmup
    return min(1.0, max(0.0, (1.0 - progress) / decay))
