"""Open-loop serving: requests arrive when they arrive, whatever the engine is doing.

A `Backend` runs arrivals to their end: the engine in real time, or the simulator in virtual time,
behind one interface, so that load and metrics know neither. Latency counts from the scheduled
arrival: a driver that is late to notice a request does not flatter it.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from .llm import LLM
from .load import Arrival
from .sampling_params import SamplingParams

if TYPE_CHECKING:
    from . import _C

_MAX_IDLE_STEPS = 100
_SIMULATED_STEPS = 1024  # between two looks at the simulator's log


@dataclass(frozen=True)
class FinishedRequest:
    """What became of an arrival. Times are seconds from the start of the run.

    first_token_s: when its first token was committed; finish_s: when its last one was. None: not
    before the run ended. token_ids: of the answer, where there is one.
    """

    arrival: Arrival
    prompt_len: int
    num_tokens: int = 0
    nfe: int = 0
    decode_rows: int = 0
    first_token_s: float | None = None
    finish_s: float | None = None
    token_ids: tuple[int, ...] = ()

    @property
    def is_finished(self) -> bool:
        return self.finish_s is not None

    @property
    def ttft_s(self) -> float:
        """Time to first token; infinite if it never came."""
        return _since(self.first_token_s, self.arrival.arrival_s)

    @property
    def latency_s(self) -> float:
        """Arrival to last token; infinite if it never came."""
        return _since(self.finish_s, self.arrival.arrival_s)

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None for one token, infinite if unfinished."""
        if self.finish_s is None or self.first_token_s is None:
            return math.inf
        if self.num_tokens < 2:
            return None
        return (self.finish_s - self.first_token_s) / (self.num_tokens - 1)


def _since(then: float | None, arrival_s: float) -> float:
    return math.inf if then is None else then - arrival_s


OnStep = Callable[[float, "_C.StepRecord"], None]  # (seconds from the start when it ended, record)
Stop = Callable[[FinishedRequest], bool]  # seen this one finish: enough?


class Backend(Protocol):
    """Whatever serves arrivals. It is idle between two runs."""

    def run(
        self,
        arrivals: Sequence[Arrival],
        *,
        on_step: OnStep | None = None,
        drain_s: float = math.inf,
        stop: Stop | None = None,
    ) -> list[FinishedRequest]:
        """Serves arrivals (ascending) and returns one entry for each, in their order.

        The run ends when all have finished, `drain_s` after the last arrival, or when `stop` says
        so; what is unfinished then is given up. Raises ValueError for a request that cannot run,
        before anything is queued.
        """
        ...


class EngineBackend:
    """The engine, in real time; the calling thread drives it, step by step.

    The LLM must be idle, and belongs to the backend during a run.
    """

    def __init__(self, llm: LLM, params: SamplingParams, *, raw: bool = False) -> None:
        """raw: text prompts are not put through the chat template."""
        self.llm = llm
        self.params = params
        tokenizer = llm.tokenizer
        self._is_chat = not raw and tokenizer is not None and tokenizer.chat_template is not None

    def run(
        self,
        arrivals: Sequence[Arrival],
        *,
        on_step: OnStep | None = None,
        drain_s: float = math.inf,
        stop: Stop | None = None,
    ) -> list[FinishedRequest]:
        engine = self.llm.engine
        prepared = [self._prepare(i, arrival) for i, arrival in enumerate(arrivals)]
        done: list[FinishedRequest | None] = [None] * len(arrivals)
        pending = deque(range(len(arrivals)))
        live: dict[int, tuple[int, float]] = {}  # engine's id -> arrival, when it was added
        deadline_s = (arrivals[-1].arrival_s if arrivals else 0.0) + drain_s
        idle_steps = 0
        start = time.perf_counter()
        try:
            while pending or live:
                now_s = time.perf_counter() - start
                while pending and arrivals[pending[0]].arrival_s <= now_s:
                    i = pending.popleft()
                    live[engine.add_request(*prepared[i])] = (i, now_s)
                if now_s > deadline_s:
                    break
                if not live:
                    time.sleep(max(0.0, arrivals[pending[0]].arrival_s - now_s))
                    continue
                output = engine.step()
                if on_step is not None:
                    on_step(time.perf_counter() - start, output.record)
                idle_steps = 0 if output.record.rows else idle_steps + 1
                if idle_steps >= _MAX_IDLE_STEPS:
                    raise RuntimeError(
                        f"[serving] {idle_steps} steps did nothing while {len(live)} requests wait"
                    )
                enough = False
                for update in output.updates:
                    if update.finish_reason is not None:
                        i, added_s = live.pop(update.id)
                        request = done[i] = self._collect(update.id, arrivals[i], added_s)
                        enough = enough or (stop is not None and stop(request))
                if enough:
                    break
        finally:
            for request_id, (i, added_s) in live.items():
                engine.abort(request_id)
                given_up = self._collect(request_id, arrivals[i], added_s)
                done[i] = replace(given_up, finish_s=None)
        return [
            FinishedRequest(arrivals[i], len(prepared[i][0])) if request is None else request
            for i, request in enumerate(done)
        ]

    def _prepare(self, index: int, arrival: Arrival) -> tuple[list[int], _C.SamplingParams]:
        """Tokenises ahead of the run: that is another thread's work in a server."""
        prompt = arrival.prompt
        if prompt is None:
            raise ValueError(f"[serving] request {index} has a length but no prompt")
        if isinstance(prompt, str):
            tokenizer = self.llm.tokenizer
            if tokenizer is None:
                raise ValueError("[serving] text prompts need a tokenizer")
            text = prompt
            if self._is_chat:
                text = self.llm.render_chat([{"role": "user", "content": prompt}])
            prompt = tokenizer.encode(text, add_special_tokens=not self._is_chat)
        if not 0 < len(prompt) < self.llm.max_model_len:
            raise ValueError(
                f"[serving] request {index} has a prompt of {len(prompt)} tokens; max_model_len is "
                f"{self.llm.max_model_len}"
            )
        params = self.params
        if arrival.output_len is not None:
            params = replace(params, max_tokens=arrival.output_len, ignore_eos=True)
        return list(prompt), params.to_native(self.llm.checkpoint.generation, index)

    def _collect(self, request_id: int, arrival: Arrival, added_s: float) -> FinishedRequest:
        """Reads a finished request and forgets it in the engine."""
        state = self.llm.engine.request(request_id)
        self.llm.engine.release(request_id)
        metrics = state.metrics
        first_s = metrics.first_token_s - metrics.arrival_s if metrics.first_token_s > 0 else None
        return FinishedRequest(
            arrival=arrival,
            prompt_len=len(state.prompt_token_ids),
            num_tokens=len(state.output_token_ids),
            nfe=metrics.nfe,
            decode_rows=metrics.decode_rows,
            first_token_s=None if first_s is None else added_s + first_s,
            finish_s=added_s + metrics.finish_s - metrics.arrival_s,
            token_ids=tuple(state.output_token_ids),
        )


class SimulatorBackend:
    """The discrete-event simulator, in virtual time. Every run starts a new one at second 0.

    A request decodes trace `item` (modulo their number); its prompt is shortened by less than a
    block, so that the trace meets the block grid as it was recorded.
    """

    def __init__(
        self,
        config: _C.SimulatorConfig,
        traces: Sequence[_C.CommitTrace],
        params: _C.SamplingParams,
    ) -> None:
        """config: its step log is set to what the backend needs. params: max_tokens is replaced."""
        self.config, self.traces, self.params = config, list(traces), params
        engine = config.engine
        engine.step_log_size = _SIMULATED_STEPS
        config.engine = engine
        self.reliability: dict[str, list[tuple[float, float, float]]] | None = None

    def run(
        self,
        arrivals: Sequence[Arrival],
        *,
        on_step: OnStep | None = None,
        drain_s: float = math.inf,
        stop: Stop | None = None,
    ) -> list[FinishedRequest]:
        from .native import _C

        simulator = _C.Simulator(self.config, self.traces)
        index_of, prompt_lens = {}, []
        for i, arrival in enumerate(arrivals):
            request_id, prompt_len = self._add(simulator, arrival)
            index_of[request_id] = i
            prompt_lens.append(prompt_len)
        done: list[FinishedRequest | None] = [None] * len(arrivals)
        deadline_s = (arrivals[-1].arrival_s if arrivals else 0.0) + drain_s
        last_step = 0
        while True:
            steps = simulator.run(deadline_s, _SIMULATED_STEPS)
            if on_step is not None:
                for record in simulator.step_records():
                    if record.step > last_step:
                        last_step = record.step
                        on_step(record.start_s + record.step_ms * 1e-3, record)
            enough = False
            for result in simulator.take_finished():
                i = index_of[result.id]
                request = done[i] = _simulated(arrivals[i], result)
                enough = enough or (stop is not None and stop(request))
            if enough or steps < _SIMULATED_STEPS:
                break
        self.reliability = simulator.reliability()
        return [
            FinishedRequest(arrivals[i], prompt_lens[i]) if request is None else request
            for i, request in enumerate(done)
        ]

    def _add(self, simulator: _C.Simulator, arrival: Arrival) -> tuple[int, int]:
        item = arrival.item % len(self.traces)
        trace, block = self.traces[item], self.config.engine.block_length
        prompt_len = trace.prompt_len if arrival.prompt_len is None else arrival.prompt_len
        prompt_len -= (prompt_len - trace.prompt_len) % block
        prompt_len += block if prompt_len < 1 else 0
        params = self.params
        params.max_tokens = arrival.output_len or trace.num_tokens
        return simulator.add_request(arrival.arrival_s, prompt_len, item, params), prompt_len


def _simulated(arrival: Arrival, result: _C.SimulatedRequest) -> FinishedRequest:
    """Virtual time starts at 0 like the run, so the metrics are times of the run."""
    metrics = result.metrics
    return FinishedRequest(
        arrival=arrival,
        prompt_len=result.prompt_len,
        num_tokens=result.num_tokens,
        nfe=metrics.nfe,
        decode_rows=metrics.decode_rows,
        first_token_s=metrics.first_token_s if metrics.first_token_s > 0 else None,
        finish_s=metrics.finish_s,
    )
