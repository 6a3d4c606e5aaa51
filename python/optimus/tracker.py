"""Requests in flight: the host side of the engine's updates."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .detokenizer import TextBuilder
from .outputs import CompletionOutput, RequestMetrics, RequestOutput
from .sampling_params import SamplingParams
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from . import _C

_MAX_IDLE_STEPS = 100


class LiveRequest:
    """One request from `RequestTracker.add` to its output.

    output: set when the request is finished.
    on_finish: called with the output then.
    Of a request that is followed step by step:
    token_ids: committed output tokens by position, None where masked.
    num_known: leading positions that are final without a gap.
    text: None without a tokenizer.
    on_update: called after every step that changed the request, with the positions committed.
    """

    def __init__(
        self,
        id: int,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        end_ids: frozenset[int],
        text: TextBuilder | None,
    ) -> None:
        self.id = id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.end_ids = end_ids
        self.text = text
        self.token_ids: list[int | None] = []
        self.num_known = 0
        self.num_forwards = 0
        self.output: RequestOutput | None = None
        self.on_finish: Callable[[RequestOutput], None] | None = None
        self.on_update: Callable[[LiveRequest, list[int]], None] | None = None

    def apply_commits(self, update: _C.RequestUpdate) -> list[int]:
        """Writes commits down; returns their positions."""
        positions, token_ids = update.positions, update.token_ids
        if not positions:
            return positions
        missing = max(positions) + 1 - len(self.token_ids)
        if missing > 0:
            self.token_ids.extend([None] * missing)
        for position, token_id in zip(positions, token_ids, strict=True):
            self.token_ids[position] = token_id
        self.num_forwards = update.num_forwards
        return positions

    def advance(self, num_known: int) -> int | None:
        """Feeds new contiguous tokens to the text.

        Returns how many output tokens to keep if a stop string is complete, else None.
        """
        for i in range(self.num_known, num_known):
            token_id = self.token_ids[i]
            assert token_id is not None, f"position {i} is known but was never committed"
            self.num_known = i + 1
            if token_id in self.end_ids:
                continue
            if self.text is not None and self.text.push(token_id):
                return self.num_known
        return None


class RequestTracker:
    """Adds requests to an engine, runs its steps, and builds outputs. Not thread-safe.

    What nobody looks at before a request is finished stays in the engine until then: a step costs
    Python nothing for requests that are not followed.
    on_step: called with the record of every step.
    """

    def __init__(self, engine: _C.Engine, tokenizer: Tokenizer | None) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.on_step: Callable[[_C.StepRecord], None] | None = None
        self._eos_ids = frozenset(engine.config.eos_token_ids)
        self._live: dict[int, LiveRequest] = {}
        self._followed: dict[int, LiveRequest] = {}  # of those
        self._idle_steps = 0
        self._results: list[_C.StepOutput] = []  # of the last step, until it is handed out
        self._num_applied = 0  # of its updates
        self._unclaimed: list[int] = []  # ids that the engine gave out and add() has not kept yet
        self.newest_id = 0
        self._user: int | None = None  # thread that is inside

    def add(
        self,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        native: _C.SamplingParams,
        *,
        follow: bool = False,
    ) -> LiveRequest:
        """Queues a request. Raises ValueError, changing nothing, if the engine refuses it.

        follow: keep its tokens and text up to date in every step; stop strings need that anyway.
        """
        follow = follow or bool(params.stop)
        self._unclaimed.extend(map(self.engine.add_request, (prompt_token_ids,), (native,)))
        request_id = self._unclaimed[-1]
        eos_ids = frozenset() if params.ignore_eos else self._eos_ids
        text = None
        if follow and self.tokenizer is not None:
            text = TextBuilder(self.tokenizer, params.stop)
        live = LiveRequest(
            request_id, prompt, prompt_token_ids, params, eos_ids | set(params.stop_token_ids), text
        )
        self._live[request_id] = live
        if follow:
            self._followed[request_id] = live
        self.newest_id = request_id
        self._unclaimed.clear()
        return live

    def step(self) -> None:
        """Runs one engine step and hands its updates out.

        An interrupt may come at any time and is not ours: what a step committed is kept until every
        request has its part, and the next call goes on where this one was stopped. (extend and map
        store the result before any byte code, and so any signal handler, can run.)
        """
        with self.in_use():
            self._step()

    def _step(self) -> None:
        if not self._results:
            self._num_applied = 0
            self._results.extend(map(type(self.engine).step, (self.engine,)))
        result = self._results[0]
        if self._followed:
            for update in result.updates[self._num_applied :]:
                live = self._followed.get(update.id)
                if live is not None:
                    self._apply(live, update)
                self._num_applied += 1
        for request_id in result.finished_ids:
            live = self._live.get(request_id)
            if live is not None:
                self._finish(live, None)
        self._results.clear()
        self._idle_steps = self._idle_steps + 1 if result.is_idle else 0
        if self._idle_steps >= _MAX_IDLE_STEPS and self._live:
            raise RuntimeError(
                f"[tracker] {self._idle_steps} steps did nothing while {len(self._live)} requests "
                f"wait ({self.engine.num_free_pages} pages free)"
            )
        if self.on_step is not None:
            self.on_step(result.record)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The engine runs its steps without the interpreter's lock: no other thread may come near.
        Raises RuntimeError if one is there."""
        me, outer = threading.get_ident(), self._user
        if outer not in (None, me):
            raise RuntimeError(
                "[llm] another thread is using this LLM: give each thread its own (with_options "
                "shares the weights)"
            )
        self._user = me
        try:
            yield
        finally:
            self._user = outer

    def abort(self, live: LiveRequest) -> None:
        """Ends a request that has not finished yet, and frees what it holds."""
        if live.output is not None or live.id not in self._live:
            return
        try:
            self.engine.abort(live.id)
            self._finish(live, None)
        except ValueError:  # an interrupt came when _finish() had released it, and nothing more
            self._live.pop(live.id, None)
            self._followed.pop(live.id, None)

    def abort_newer(self, request_id: int) -> None:
        """Ends all requests that were added after `request_id`, and one whose add() was cut off."""
        for unclaimed in self._unclaimed:
            if unclaimed not in self._live and unclaimed > request_id:
                self.engine.abort(unclaimed)
                self.engine.release(unclaimed)
        self._unclaimed.clear()
        for live in [item for item in self._live.values() if item.id > request_id]:
            self.abort(live)

    def _apply(self, live: LiveRequest, update: _C.RequestUpdate) -> None:
        committed = live.apply_commits(update)
        keep = live.advance(update.num_known)
        if keep is not None and update.finish_reason is None:
            self.engine.stop_request(live.id, keep)
        if keep is not None or update.finish_reason is not None:
            self._finish(live, keep)
        if live.on_update is not None:
            live.on_update(live, committed)

    def _finish(self, live: LiveRequest, keep: int | None) -> None:
        """Builds the output of a finished request; `keep` tokens if a stop string ended it."""
        state = self.engine.request(live.id)
        self.engine.release(live.id)
        del self._live[live.id]
        token_ids = state.output_token_ids
        if self._followed.pop(live.id, None) is not None:  # what was shown, and not what came since
            token_ids = token_ids[: live.num_known if keep is None else keep]
        num_tokens = len(token_ids)
        reason = state.finish_reason or "abort"
        if live.text is not None and live.text.finish():
            reason = "stop"
        completion = CompletionOutput(
            index=0,
            text=self._text(live, token_ids),
            token_ids=token_ids,
            logprobs=state.output_logprobs[:num_tokens] if live.params.wants_logprobs else None,
            confidences=state.output_confidences[:num_tokens],
            steps=state.output_steps[:num_tokens],
            finish_reason=reason,
            stop_reason=self._stop_reason(live, token_ids, reason),
        )
        metrics = RequestMetrics.from_native(state.metrics, num_tokens)
        live.output = RequestOutput(
            live.id, live.prompt, live.prompt_token_ids, [completion], metrics
        )
        if live.on_finish is not None:
            live.on_finish(live.output)

    def _text(self, live: LiveRequest, token_ids: list[int]) -> str | None:
        if live.text is not None:
            return live.text.text
        if self.tokenizer is None:
            return None
        return self.tokenizer.decode([i for i in token_ids if i not in live.end_ids])

    def _stop_reason(
        self, live: LiveRequest, token_ids: list[int], reason: str
    ) -> str | int | None:
        if reason != "stop":
            return None
        if live.text is not None and live.text.stop_reason is not None:
            return live.text.stop_reason
        last = token_ids[-1] if token_ids else None
        is_eos = last in self._eos_ids and not live.params.ignore_eos
        return last if last in live.params.stop_token_ids and not is_eos else None
