"""What `LLM.stream` yields."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from .outputs import RequestOutput
from .tokenizer import Tokenizer
from .tracker import LiveRequest

MASK_GLYPH = "\u2591"  # light shade


@dataclass(frozen=True)
class BlockEvent:
    """Text that became final, in order.

    text: new characters ("" without a tokenizer); deltas add up to the output's text.
    token_ids: new tokens.
    output: the finished request in the last event, else None.
    """

    text: str
    token_ids: list[int]
    output: RequestOutput | None = None


@dataclass(frozen=True)
class DenoiseEvent:
    """A snapshot after a step that committed something.

    token_ids: output tokens up to the end of the current block, None where masked.
    text: the same decoded, `MASK_GLYPH` per mask; None without a tokenizer.
    committed: positions in the output that this step committed.
    step: forward evaluations of the request so far.
    output: the finished request in the last event, else None.
    """

    token_ids: list[int | None]
    text: str | None
    committed: list[int]
    step: int
    output: RequestOutput | None = None


Event = BlockEvent | DenoiseEvent
PieceKind = Literal["known", "fresh", "mask"]


def snapshot_pieces(
    tokenizer: Tokenizer, token_ids: Sequence[int | None], committed: Collection[int] = ()
) -> list[tuple[str, PieceKind]]:
    """Splits a snapshot into pieces of text: each mask is a `MASK_GLYPH` of kind "mask", tokens at
    positions in `committed` are "fresh", all others "known"."""
    pieces: list[tuple[str, PieceKind]] = []
    run: list[int] = []
    for i, token_id in enumerate([*token_ids, None]):
        if token_id is not None:
            run.append(token_id)
            continue
        if run:
            fresh = [i - len(run) + j in committed for j in range(len(run))]
            pieces += _run_pieces(tokenizer, run, fresh)
            run = []
        if i < len(token_ids):
            pieces.append((MASK_GLYPH, "mask"))
    return pieces


def _run_pieces(
    tokenizer: Tokenizer, run: list[int], fresh: list[bool]
) -> list[tuple[str, PieceKind]]:
    """Pieces of a run without masks; a character of several tokens goes to its last one."""
    pieces: list[tuple[str, PieceKind]] = []
    done = 0
    for i in range(len(run)):
        last = i + 1 == len(run)
        if not last and fresh[i] == fresh[i + 1]:
            continue
        text = tokenizer.decode(run[: i + 1])
        end = len(text if last else text.rstrip("\ufffd"))
        if end > done:
            pieces.append((text[done:end], "fresh" if fresh[i] else "known"))
            done = end
    return pieces


def snapshot_text(tokenizer: Tokenizer | None, token_ids: Sequence[int | None]) -> str | None:
    """Text of a snapshot, or None without a tokenizer."""
    if tokenizer is None:
        return None
    return "".join(text for text, _ in snapshot_pieces(tokenizer, token_ids))


def queue_block_events(live: LiveRequest) -> deque[Event]:
    """A queue that fills with `BlockEvent`s whenever a step changes the request."""
    events: deque[Event] = deque()
    sent_text = sent_tokens = 0

    def on_update(live: LiveRequest, committed: list[int]) -> None:
        nonlocal sent_text, sent_tokens
        text = "" if live.text is None else live.text.text[sent_text : live.text.released]
        known = live.token_ids[: live.num_known]
        if live.output is not None:
            known = list(live.output.outputs[0].token_ids)
        token_ids = [t for t in known[sent_tokens:] if t is not None]
        sent_text += len(text)
        sent_tokens = len(known)
        if text or token_ids or live.output is not None:
            events.append(BlockEvent(text, token_ids, live.output))

    live.on_update = on_update
    return events


def queue_denoise_events(
    live: LiveRequest, tokenizer: Tokenizer | None, block_length: int, max_model_len: int
) -> deque[Event]:
    """A queue that fills with `DenoiseEvent`s. block_length: 0 if there are no blocks."""
    events: deque[Event] = deque()

    def on_update(live: LiveRequest, committed: list[int]) -> None:
        token_ids = list(live.token_ids)
        if live.output is not None:
            token_ids = list(live.output.outputs[0].token_ids)
        else:
            token_ids += [None] * (_block_end(live, block_length, max_model_len) - len(token_ids))
        committed = [i for i in committed if i < len(token_ids)]
        if committed or live.output is not None:
            text = snapshot_text(tokenizer, token_ids)
            events.append(DenoiseEvent(token_ids, text, committed, live.num_forwards, live.output))

    live.on_update = on_update
    return events


def _block_end(live: LiveRequest, block_length: int, max_model_len: int) -> int:
    """Output length at the end of the block that is being decoded; 0 if there are no blocks."""
    if block_length == 0:
        return 0
    prompt_len = len(live.prompt_token_ids)
    end = ((prompt_len + live.num_known) // block_length + 1) * block_length
    limit = max_model_len
    if live.params.max_tokens is not None:
        limit = min(limit, prompt_len + live.params.max_tokens)
    return min(end, limit) - prompt_len
