"""The offline interface: `LLM`."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .calibration import Calibration, CalibrationSource
from .config import DEMO_MODEL, Checkpoint, load_checkpoint
from .events import Event, queue_block_events, queue_denoise_events
from .grow import grown_in_memory, load_grown_weights
from .native import _C
from .options import (
    DEFAULT_KV_POLICY,
    ELASTIC_MODES,
    EngineOptions,
    resolve_device,
    resolve_dtype,
)
from .outputs import RequestOutput
from .profiles import Profile, measured_profile, to_profile
from .progress import progress_bar
from .prompts import Prompt, as_list, as_token_ids, check_prompt
from .sampling_params import SamplingParams, check_params, params_of_each
from .tokenizer import Message, Tokenizer
from .tracker import LiveRequest, RequestTracker
from .weights import load_weights

Params = SamplingParams | Sequence[SamplingParams] | None

_log = logging.getLogger("optimus")


@dataclass(frozen=True)
class _Request:
    """A checked request, not yet queued."""

    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    native: _C.SamplingParams


class LLM:
    """A model with an engine around it. Not thread-safe; one thread drives an LLM.

    model: directory of a Hugging Face checkpoint; None is the demo model of the package.
    device: "cpu", "cuda", or "auto": "cuda" where the build has it and a GPU answers.
    dtype: of weights, activations and KV. "auto": "float32" on the CPU, where a row's outputs are
        the same, to the bit, whatever is in the batch; "bfloat16" on CUDA, which has no other.
    grow_to: larger shapes to grow the model to while it is loaded, as for `optimus grow`:
        "sdar-8b", or the path of a config.json. It decodes as before, at the larger model's cost.
    decode_mode: "ar" (one token per forward), "block" (the published block-diffusion loop),
        "chunk" (`chunk_length` masked positions per forward), "elastic" (the chunk length follows
        load and measured time, and so may a request's tokens; the other modes repeat exactly,
        unless kv_policy is "auto").
    chunk_length: 1..block_length, for "chunk" only; default 4. chunk_arms: the lengths "elastic"
        may choose from; default powers of two. recompute_block: "chunk" feeds the whole block each
        step.
    chunk_schedule: for "schedule": {"1-16": 16, "17-64": 8, "65-": 4}, from the number of decoding
        requests to a chunk length.
    quality_floor: elastic modes never use a way of decoding that a calibration measured below it:
        "block" (not measurably below block decoding), an accuracy in [0, 1], or None. Without a
        calibration of the model nothing is excluded (logged once).
    calibration: a file of `optimus calibrate`; "auto" looks for calibration.json in the model's
        directory, then in the cache directory; None uses none.
    target_tpot_ms, target_ttft_ms: time per output token of a request, and from arrival to its
        first token, that the controller tries to keep; best effort.
    step_log_size: steps that `step_records` remembers.
    kv_policy: "freeze" keeps the KV of a finished block, "refresh" computes it once more from the
        clean block, "auto" refreshes when the latency profile says the rows are free. "block" and
        "ar" have one way only.
    max_num_seqs: most requests decoding at once. max_num_batched_rows: most rows per step.
    kv_cache_memory: bytes or "512MiB". Default on the CPU: max_num_seqs requests of max_model_len,
        at most 1 GiB, at least one request; on CUDA: what gpu_memory_utilization leaves.
    gpu_memory_utilization: share of the GPU's memory that is in use at most, everybody's counted.
    cuda_graphs: False launches CUDA kernels one by one, with the same results.
    async_scheduling: plan each step before the results of the one in progress are known, so that
        the device hardly waits for the host; not in "elastic_per_request". Default: on CUDA.
    max_model_len: most tokens of prompt and output; default max_position_embeddings.
    page_size: tokens per KV page, a multiple or a divisor of block_length.
    enable_prefix_cache: reuse KV of prompts that begin alike.
    block_length, mask_token_id: override the checkpoint's files, which may lack them.
    num_threads: None = all cores.
    seed: of requests without a seed of their own.
    latency_profile: a LatencyProfile, or [(rows, milliseconds), ...]. Default: the one kept on disk
        for this device, model and shape of engine, or measured at construction, for the elastic
        modes and for the policy "auto". "none": the elastic modes decode the trained block.

    Raises ValueError for anything that does not fit, with the values in its text.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        grow_to: str | Path | None = None,
        decode_mode: str = "elastic",
        chunk_length: int | None = None,
        chunk_arms: Sequence[int] = (),
        chunk_schedule: Mapping[str, int] | None = None,
        quality_floor: float | str | None = "block",
        target_tpot_ms: float | None = None,
        target_ttft_ms: float | None = None,
        recompute_block: bool = False,
        kv_policy: str = DEFAULT_KV_POLICY,
        max_num_seqs: int = 32,
        max_num_batched_rows: int = 512,
        kv_cache_memory: int | str | None = None,
        gpu_memory_utilization: float = 0.9,
        cuda_graphs: bool = True,
        async_scheduling: bool | None = None,
        max_model_len: int | None = None,
        page_size: int | None = None,
        enable_prefix_cache: bool = True,
        block_length: int | None = None,
        mask_token_id: int | None = None,
        num_threads: int | None = None,
        step_log_size: int = 4096,
        seed: int = 0,
        latency_profile: Profile | Literal["none"] | None = None,
        calibration: str | Path | None = "auto",
    ) -> None:
        options = EngineOptions(
            decode_mode=decode_mode, chunk_length=chunk_length, chunk_arms=tuple(chunk_arms),
            chunk_schedule=chunk_schedule, quality_floor=quality_floor,
            target_tpot_ms=target_tpot_ms, target_ttft_ms=target_ttft_ms,
            step_log_size=step_log_size, recompute_block=recompute_block, kv_policy=kv_policy,
            max_num_seqs=max_num_seqs, max_num_batched_rows=max_num_batched_rows,
            kv_cache_memory=kv_cache_memory, gpu_memory_utilization=gpu_memory_utilization,
            cuda_graphs=cuda_graphs, async_scheduling=async_scheduling, max_model_len=max_model_len,
            page_size=page_size, enable_prefix_cache=enable_prefix_cache, num_threads=num_threads,
            seed=seed,
        )  # fmt: skip
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        parent = load_checkpoint(
            DEMO_MODEL if model is None else model,
            block_length=block_length,
            mask_token_id=mask_token_id,
        )
        self.checkpoint: Checkpoint = grown_in_memory(parent, grow_to) if grow_to else parent
        native = options.to_native(self.checkpoint, self.dtype, self.device)  # before any weights
        self._calibration = CalibrationSource(self.checkpoint, calibration)
        self.tokenizer = Tokenizer.load(self.checkpoint.path)
        self._model = _C.Model(self.checkpoint.model_config(self.dtype), self.device)
        if grow_to:
            load_grown_weights(self._model, parent, self.checkpoint, self.dtype)
        else:
            load_weights(self._model, self.checkpoint.path)
        self._measures_profile = latency_profile != "none"
        self._start_engine(options, native, to_profile(latency_profile))

    def with_options(self, **changes: Any) -> LLM:
        """A new LLM with its own engine over the same weights and tokenizer (nothing is copied).

        changes: engine options of the constructor (not of the model, calibration or
        latency_profile). Another decode_mode resets the options that belong to one mode. A measured
        latency profile is used again unless num_threads or max_num_batched_rows changes.
        Raises TypeError for an unknown name and ValueError for a bad value.
        """
        if "decode_mode" in changes:
            changes = {
                "chunk_length": None, "chunk_arms": (), "chunk_schedule": None,
                "recompute_block": False,
            } | changes  # fmt: skip
        options = dataclasses.replace(self.options, **changes)
        kept = all(
            getattr(options, name) == getattr(self.options, name)
            for name in ("num_threads", "max_num_batched_rows")
        )
        other = copy.copy(self)
        native = options.to_native(self.checkpoint, self.dtype, self.device)
        other._start_engine(options, native, self.latency_profile if kept else None)
        return other

    def _start_engine(
        self,
        options: EngineOptions,
        native: _C.EngineConfig,
        profile: _C.LatencyProfile | None,
    ) -> None:
        self.options = options
        if options.decode_mode in ELASTIC_MODES:
            native.measured_arms = self._calibration.measured_arms(options.quality_floor)
        try:
            self.engine = _C.Engine(self._model, native)
        except MemoryError:
            raise MemoryError(
                f"[llm] no memory for {native.num_pages} pages of {native.page_size} tokens "
                f"(kv_cache_memory={options.kv_cache_memory!r}) and the buffers of a step"
            ) from None
        self._tracker = RequestTracker(self.engine, self.tokenizer)
        self._num_requests = 0
        self.latency_profile = profile
        if profile is not None:
            self.engine.set_profile(profile)
        elif options.uses_latency_profile() and not self._measures_profile:
            _log.warning(
                "no latency profile: decode_mode %s has no measure of rows against time "
                "and decodes the trained block",
                options.decode_mode,
            )
        elif options.uses_latency_profile():
            self.latency_profile = measured_profile(
                self.engine, self.checkpoint, device=self.device, dtype=self.dtype
            )

    @property
    def calibration(self) -> Calibration | None:
        """What is known of the accuracy of this model's ways of decoding."""
        return self._calibration.find()

    @property
    def memory(self) -> dict[str, int]:
        """Bytes: weights, kv_cache, activations, state, graphs."""
        return self.engine.memory

    @property
    def num_parameters(self) -> int:
        return self._model.num_parameters()

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and output together."""
        return self.engine.config.max_model_len

    @property
    def on_step(self) -> Callable[[_C.StepRecord], None] | None:
        """Called with the record of every engine step, if set."""
        return self._tracker.on_step

    @on_step.setter
    def on_step(self, callback: Callable[[_C.StepRecord], None] | None) -> None:
        self._tracker.on_step = callback

    def step_records(self) -> list[_C.StepRecord]:
        """What the last `step_log_size` engine steps did and why, oldest first.

        `optimus.step_log` dumps and explains them.
        """
        return self.engine.step_records()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        sampling_params: Params = None,
        *,
        prompt_token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continues prompts; one output per prompt, in order (one prompt: a list of one).

        prompts: a string, a list of strings, or token ids in their place. sampling_params: one for
        all, or one per prompt. use_tqdm: a progress bar on stderr, if that is a terminal.
        Everything is checked before anything is queued. An exception or interrupt ends this call's
        requests and leaves the LLM usable.
        Raises ValueError for an empty or too long prompt, ids out of range, text without a
        tokenizer, or parameters that do not fit.
        """
        return self._run(
            self._requests(as_list(prompts, prompt_token_ids), sampling_params), use_tqdm
        )

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        *,
        chat_template: str | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers a conversation, or a list of them; like `generate` otherwise.

        messages: [{"role": "user", "content": "..."}, ...].
        Raises ValueError for malformed messages or when there is no tokenizer or template.
        """
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = [messages] if single or not messages else messages
        prompts = [self.render_chat(c, chat_template=chat_template) for c in conversations]
        return self._run(self._requests(prompts, sampling_params, is_chat=True), use_tqdm)

    def render_chat(self, messages: Sequence[Message], *, chat_template: str | None = None) -> str:
        """The prompt text of a conversation."""
        return self._require_tokenizer("a chat").render_chat(messages, chat_template=chat_template)

    def stream(
        self,
        prompt: Prompt | Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        mode: Literal["block", "denoise"] = "block",
    ) -> Iterator[Event]:
        """Yields events while one prompt (text, token ids, or chat messages) is decoded.

        mode: "block" gives `BlockEvent`s, text in order as it becomes final; "denoise" gives
        `DenoiseEvent`s, a snapshot with masks after each step. The last event holds the output.
        The prompt is checked at the call, queued at the first `next`; closing the iterator early
        ends the request. Several streams and `generate` may interleave.
        """
        if mode not in ("block", "denoise"):
            raise ValueError(f"[llm] mode must be 'block' or 'denoise', got {mode!r}")
        is_chat = not isinstance(prompt, str) and any(isinstance(m, Mapping) for m in prompt)
        if is_chat:
            prompt = self.render_chat(prompt)  # type: ignore[arg-type]
        params = SamplingParams() if sampling_params is None else sampling_params
        if not isinstance(params, SamplingParams):
            raise ValueError(f"[llm] a stream takes one SamplingParams, got {params!r}")
        [request] = self._requests([prompt], params, is_chat=is_chat)  # type: ignore[list-item]
        return self._stream(request, mode)

    def _stream(self, request: _Request, mode: str) -> Iterator[Event]:
        with self._tracker.in_use():
            live = self._add(request, follow=True)
        if mode == "block":
            events = queue_block_events(live)
        else:
            block = 0 if self.options.decode_mode == "ar" else self.engine.config.block_length
            events = queue_denoise_events(live, self.tokenizer, block, self.max_model_len)
        try:
            while live.output is None or events:
                while not events:
                    self._tracker.step()
                yield events.popleft()
        finally:
            self._tracker.abort(live)

    def _run(self, requests: list[_Request], use_tqdm: bool) -> list[RequestOutput]:
        live: list[LiveRequest] = []
        num_left = len(requests)
        newest_before = self._tracker.newest_id
        progress = progress_bar(len(requests), enabled=use_tqdm)
        with self._tracker.in_use(), progress as advance:

            def on_finish(output: RequestOutput) -> None:
                nonlocal num_left
                num_left -= 1
                advance(len(output.outputs[0].token_ids))

            try:
                for request in requests:
                    live.append(self._add(request))
                    live[-1].on_finish = on_finish
                while num_left:
                    self._tracker.step()
            except BaseException:
                self._tracker.abort_newer(newest_before)
                raise
        return [item.output for item in live if item.output is not None]

    def _add(self, request: _Request, *, follow: bool = False) -> LiveRequest:
        return self._tracker.add(
            request.prompt, request.prompt_token_ids, request.params, request.native, follow=follow
        )

    def _requests(
        self, prompts: Sequence[Prompt], sampling_params: Params, *, is_chat: bool = False
    ) -> list[_Request]:
        """Tokenises and checks everything; queues nothing."""
        params = params_of_each(sampling_params, len(prompts))
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        encoded: Iterator[list[int]] = iter(())
        if texts:
            tokenizer = self._require_tokenizer("a text prompt")
            encoded = iter(tokenizer.encode_batch(texts, add_special_tokens=not is_chat))
        return [
            self._request(i, prompt, next(encoded) if isinstance(prompt, str) else prompt, p)
            for i, (prompt, p) in enumerate(zip(prompts, params, strict=True))
        ]

    def _request(
        self, index: int, prompt: Prompt, token_ids: Sequence[int], params: SamplingParams
    ) -> _Request:
        ids = as_token_ids(index, token_ids)
        check_prompt(index, ids, self.checkpoint.vocab_size, self.max_model_len)
        if params.stop:
            self._require_tokenizer("a stop string")
        check_params(params, self.checkpoint.vocab_size, self.checkpoint.block_length)
        self._num_requests += 1
        seed = (self.options.seed * 0x9E3779B97F4A7C15 + self._num_requests) % 2**64
        text = prompt if isinstance(prompt, str) else None
        return _Request(text, ids, params, params.to_native(self.checkpoint.generation, seed))

    def _require_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                f"[llm] {what} needs a tokenizer, but {self.checkpoint.path} has no "
                "tokenizer.json: pass token ids"
            )
        return self.tokenizer
