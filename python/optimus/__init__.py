"""Optimus: an inference engine for block-diffusion language models.

    from optimus import LLM, SamplingParams

    llm = LLM()  # the demo model that ships with the package
    print(llm.generate("...", SamplingParams(max_tokens=64))[0].outputs[0].text)

Importing the package is cheap: torch and the C++ extension load with the first name used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .events import BlockEvent, DenoiseEvent
    from .llm import LLM
    from .outputs import CompletionOutput, RequestMetrics, RequestOutput
    from .sampling_params import SamplingParams

__version__ = "0.1.0"

_HOMES = {
    "LLM": "llm",
    "SamplingParams": "sampling_params",
    "RequestOutput": "outputs",
    "CompletionOutput": "outputs",
    "RequestMetrics": "outputs",
    "BlockEvent": "events",
    "DenoiseEvent": "events",
}

__all__ = [
    "LLM",
    "BlockEvent",
    "CompletionOutput",
    "DenoiseEvent",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "_C":  # `from optimus import _C` works without importing torch by hand
        importlib.import_module("torch")
        return importlib.import_module("optimus._C")
    if name not in _HOMES:
        raise AttributeError(f"module 'optimus' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
