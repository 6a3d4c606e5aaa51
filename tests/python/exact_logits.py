"""transformers in float64, and how far from it fp32 logits may be."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from reference_decoding import Forward, transformers_forward

TOLERANCE = 1e-4


def norm_in_float64(module: Any, x: torch.Tensor) -> torch.Tensor:
    assert x.dtype == torch.float64
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)
    return module.weight * x * scale


def exact_forward(oracle: Any) -> Forward:
    """transformers in float64, except for the angles, which are fp32 by definition. Its norms would
    compute in fp32 whatever the weights are."""
    exact = copy.deepcopy(oracle).double()
    for module in exact.modules():
        if isinstance(module, Qwen3RMSNorm):
            module.forward = partial(norm_in_float64, module)
    return transformers_forward(exact)


class ExactLogits:
    """Logits of a sequence, and a check against them that knows what fp32 can tell.

    In a rare row of a random model (a tie in a softmax, a head whose norm divides by almost zero)
    weights that move by half a unit in the last place already move the exact logits by 1e-4. Such
    a row may be off by a few times of what that does to it; all others by TOLERANCE.
    """

    def __init__(self, oracle: Any, tokens: Any, visible: Any) -> None:
        self.oracle = oracle
        self.inputs = (np.asarray(tokens), np.arange(len(tokens)), visible)
        self.logits = exact_forward(oracle)(*self.inputs)

    def check(self, actual: Any, positions: list[int]) -> None:
        expected = self.logits[positions]
        assert actual.shape == expected.shape and actual.dtype == np.float32
        error = np.abs(actual - expected).max(axis=1)
        assert not np.isnan(error).any()
        if (error > TOLERANCE).any():
            bound = np.maximum(TOLERANCE, 4 * self.sensitivity()[positions])
            assert (error <= bound).all(), f"rows {positions}: errors {error}, bounds {bound}"

    def sensitivity(self) -> Any:
        """[rows] the most that re-rounded weights move a logit, of four draws."""
        moved = []
        for seed in range(4):
            noise = torch.Generator().manual_seed(seed)
            other = copy.deepcopy(self.oracle)
            with torch.no_grad():
                for weight in other.parameters():
                    steps = torch.randn(weight.shape, generator=noise, dtype=torch.float64)
                    weight.copy_(weight.double() * (1 + 2.0**-24 * steps))
            moved.append(np.abs(exact_forward(other)(*self.inputs) - self.logits).max(axis=1))
        return np.max(moved, axis=0)
