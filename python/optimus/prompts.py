"""Prompts as callers pass them."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Prompt = str | Sequence[int]


def as_list(
    prompts: Prompt | Sequence[Prompt] | None,
    prompt_token_ids: Sequence[int] | Sequence[Sequence[int]] | None,
) -> list[Prompt]:
    """A list of prompts, whether one or many were given, in one argument or the other."""
    if (prompts is None) == (prompt_token_ids is None):
        raise ValueError("[llm] pass either prompts or prompt_token_ids")
    given: Any = prompts if prompts is not None else prompt_token_ids
    if isinstance(given, str):
        return [given]
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        raise ValueError(f"[llm] prompts must be text, token ids or a list of them, got {given!r}")
    items = list(given)
    # One-element arrays have an __index__ too.
    if items and all(hasattr(i, "__index__") and not getattr(i, "ndim", 0) for i in items):
        return [items]  # the ids of one prompt
    return items


def as_token_ids(index: int, prompt: Sequence[Any]) -> list[int]:
    """Raises ValueError for what is no sequence of ints."""
    try:
        if any(isinstance(i, bool) for i in prompt):
            raise TypeError("a bool is no token id")
        return [operator.index(i) for i in prompt]
    except TypeError as error:
        raise ValueError(f"[llm] prompt {index} must be text or token ids: {error}") from None


def check_prompt(index: int, ids: Sequence[int], vocab_size: int, max_model_len: int) -> None:
    """Raises ValueError for a prompt that is empty, too long, or not of this vocabulary."""
    if not ids:
        raise ValueError(f"[llm] prompt {index} is empty")
    if len(ids) >= max_model_len:
        raise ValueError(
            f"[llm] prompt {index} has {len(ids)} tokens, which leaves no room for output in "
            f"max_model_len {max_model_len}"
        )
    if min(ids) < 0 or max(ids) >= vocab_size:
        bad = next(i for i in ids if not 0 <= i < vocab_size)
        raise ValueError(
            f"[llm] prompt {index} holds token id {bad}, the vocabulary is [0, {vocab_size})"
        )
