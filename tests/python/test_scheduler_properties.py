"""Properties over random loads: no page leaked or shared while writable, nobody starved or lost."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine_testing import engine_model, make_engine, run_until_done, sampling_params
from optimus import _C
from oracle_models import random_oracle
from reference_decoding import DecodeParams

VOCAB_SIZE = 40
LONGEST_PROMPT, LONGEST_OUTPUT = 36, 24

relaxed = settings(
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    print_blob=True,
)


@cache
def tiny_model() -> _C.Model:
    oracle = random_oracle(
        3,
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return engine_model(oracle)


# ------------------------------------------------------------------------------------- whole engine


@dataclass
class Arrival:
    prompt: list[int]
    max_tokens: int
    step: int
    end: str  # "length" | "abort" | "stop"
    end_step: int
    threshold: float
    seed: int


@dataclass
class Load:
    settings: dict[str, Any]
    arrivals: list[Arrival]


@dataclass
class Tracked:
    """A request as its update stream shows it."""

    arrival: Arrival
    tokens: dict[int, int] = field(default_factory=dict)
    num_known: int = 0
    finish_reason: str | None = None
    stopped_at: int | None = None


@st.composite
def loads(draw: st.DrawFn) -> Load:
    mode = draw(st.sampled_from(["ar", "block", "chunk", "elastic"]))
    block_length = 1 if mode == "ar" else draw(st.sampled_from([4, 8]))
    page_size = draw(st.sampled_from([2, 4, 8, 16]))
    arrivals = []
    system = [draw(st.integers(0, VOCAB_SIZE - 1))] * 16
    for _ in range(draw(st.integers(1, 10))):
        own = draw(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=20))
        arrivals.append(
            Arrival(
                prompt=(system if draw(st.booleans()) else []) + own,
                max_tokens=draw(st.integers(1, LONGEST_OUTPUT)),
                step=draw(st.integers(0, 15)),
                end=draw(st.sampled_from(["length", "length", "abort", "stop"])),
                end_step=draw(st.integers(0, 20)),
                threshold=draw(st.sampled_from([0.1, 0.5, 1.0])),
                seed=draw(st.integers(0, 2**64 - 1)),
            )
        )
    longest = max(len(arrival.prompt) + arrival.max_tokens for arrival in arrivals)
    least_pages = -(-(-(-longest // block_length) * block_length) // page_size)
    return Load(
        settings={
            "decode_mode": mode,
            "kv_policy": draw(st.sampled_from(["freeze", "refresh", "auto"])),
            "block_length": block_length,
            "chunk_length": draw(st.integers(1, block_length)),
            "page_size": page_size,
            "num_pages": least_pages + draw(st.integers(0, 8)),
            "max_num_seqs": draw(st.integers(1, 6)),
            "max_num_batched_rows": 4 * block_length + draw(st.integers(0, 40)),
            "max_model_len": LONGEST_PROMPT + LONGEST_OUTPUT + 8,
            "enable_prefix_cache": draw(st.booleans()),
        },
        arrivals=arrivals,
    )


def keep_in_step(tracked: dict[int, Tracked], output: _C.StepOutput, replays: bool) -> None:
    """One step's updates: consistent with the record, and with what was streamed before."""
    record = output.record
    assert record.commits == sum(len(update.commits) for update in output.updates)
    assert 0 <= record.prefill_rows <= record.rows and record.logit_rows <= record.rows
    for update in output.updates:
        request = tracked[update.id]
        assert request.finish_reason is None, "an update after the end"
        for commit in update.commits:
            assert 0 <= commit.output_idx < request.arrival.max_tokens
            assert 0 <= commit.token_id < VOCAB_SIZE
            assert commit.logprob <= 1e-6 and 0 <= commit.confidence <= 1 + 1e-5
            assert commit.output_idx >= request.num_known, "a final token was committed again"
            if replays:
                assert commit.output_idx not in request.tokens, "committed twice"
            request.tokens[commit.output_idx] = commit.token_id
        assert update.num_known >= request.num_known, "a final token was taken back"
        request.num_known = update.num_known
        assert all(i in request.tokens for i in range(request.num_known))
        request.finish_reason = update.finish_reason


@settings(relaxed, max_examples=500)
@given(loads())
def test_every_request_gets_what_it_asked_for(load: Load) -> None:
    engine = make_engine(tiny_model(), **load.settings)
    num_pages = load.settings["num_pages"]
    replays = load.settings["decode_mode"] in ("ar", "block") or (
        load.settings["decode_mode"] == "chunk" and load.settings["kv_policy"] == "refresh"
    )
    tracked: dict[int, Tracked] = {}
    pending = sorted(load.arrivals, key=lambda arrival: arrival.step)
    work = sum(len(a.prompt) + a.max_tokens for a in load.arrivals)
    rows = Counter[str]()
    step = 0
    while pending or engine.has_unfinished():
        while pending and pending[0].step <= step:
            arrival = pending.pop(0)
            params = DecodeParams(
                load.settings["block_length"],
                VOCAB_SIZE - 1,
                arrival.max_tokens,
                confidence_threshold=arrival.threshold,
                temperature=0.8,
                seed=arrival.seed,
            )
            tracked[engine.add_request(arrival.prompt, sampling_params(params))] = Tracked(arrival)
        for request_id, request in tracked.items():
            if request.finish_reason is not None or request.arrival.end_step > step:
                continue
            if request.arrival.end == "abort":
                engine.abort(request_id)
                request.finish_reason = "abort"
                request.stopped_at = request.num_known
            elif request.arrival.end == "stop" and request.num_known > 0:
                request.stopped_at = request.num_known // 2
                engine.stop_request(request_id, request.stopped_at)
                request.finish_reason = "stop"
        unfinished = engine.has_unfinished()
        output = engine.step()
        keep_in_step(tracked, output, replays)
        record = output.record
        assert (record.rows > 0) == unfinished, "a step did nothing while requests wait"
        assert record.rows <= load.settings["max_num_batched_rows"]
        assert record.num_seqs <= load.settings["max_num_seqs"]
        assert engine.num_free_pages + engine.num_cached_pages <= num_pages
        rows["rows"] += record.rows
        rows["prefill"] += record.prefill_rows
        rows["logits"] += record.logit_rows
        step += 1
        assert step <= 60 + 8 * work, "starved"

    preemptions = 0
    expected_rows = Counter[str]()
    for request_id, request in tracked.items():
        state = engine.request(request_id)
        metrics = state.metrics
        assert state.status == "finished"
        assert state.finish_reason == request.finish_reason
        length = request.arrival.max_tokens if request.stopped_at is None else request.stopped_at
        if request.stopped_at is None:
            assert request.finish_reason == "length"
        assert len(state.output_token_ids) == length
        assert list(state.output_token_ids) == [request.tokens[i] for i in range(length)]
        assert len(state.output_logprobs) == len(state.output_steps) == length
        assert all(1 <= s <= metrics.nfe for s in state.output_steps)
        assert sum(metrics.chunk_histogram.values()) == metrics.nfe
        if length:
            assert metrics.nfe > 0 and metrics.arrival_s <= metrics.first_token_s
        assert metrics.arrival_s <= metrics.finish_s
        if not load.settings["enable_prefix_cache"]:
            assert metrics.cached_prompt_tokens == 0
        assert metrics.cached_prompt_tokens <= len(request.arrival.prompt)
        expected_rows["rows"] += metrics.decode_rows + metrics.prefill_rows
        expected_rows["prefill"] += metrics.prefill_rows
        expected_rows["logits"] += sum(c * n for c, n in metrics.chunk_histogram.items())
        preemptions += metrics.num_preemptions
        engine.release(request_id)
        with pytest.raises(ValueError, match=str(request_id)):
            engine.request(request_id)
    assert rows == expected_rows
    event(f"preemptions: {min(preemptions, 3)}")
    assert engine.num_waiting == engine.num_running == 0
    assert engine.num_free_pages + engine.num_cached_pages == num_pages
    if not load.settings["enable_prefix_cache"]:
        assert engine.num_free_pages == num_pages


def test_these_loads_preempt_and_hit_the_cache() -> None:
    """The property above would say little if its pools were never short."""
    params = DecodeParams(4, VOCAB_SIZE - 1, 24)
    engine = make_engine(
        tiny_model(), block_length=4, page_size=4, num_pages=14, enable_prefix_cache=True
    )
    ids = [engine.add_request([1] * 12 + [i], sampling_params(params)) for i in range(6)]
    run_until_done(engine)
    metrics = [engine.request(i).metrics for i in ids]
    assert sum(m.num_preemptions for m in metrics) > 0
    assert sum(m.cached_prompt_tokens for m in metrics) > 0


@pytest.mark.parametrize("mode", ["ar", "block", "chunk", "elastic"])
def test_a_large_request_is_not_starved_by_a_stream_of_small_ones(mode: str) -> None:
    """Small requests keep coming as fast as they are served; the large one needs most pages."""
    block_length = 1 if mode == "ar" else 4
    engine = make_engine(
        tiny_model(),
        decode_mode=mode,
        block_length=block_length,
        chunk_length=min(2, block_length),
        page_size=4,
        num_pages=20,
        max_num_seqs=4,
        max_num_batched_rows=16,
    )

    def add(prompt_len: int, max_tokens: int) -> int:
        params = DecodeParams(block_length, VOCAB_SIZE - 1, max_tokens, confidence_threshold=1.0)
        return engine.add_request([7] * prompt_len, sampling_params(params))

    small = [add(6, 8) for _ in range(6)]
    large = add(40, 36)
    for _ in range(1500):
        while engine.num_waiting < 4:
            small.append(add(6, 8))
        engine.step()
        if engine.request(large).status == "finished":
            break
    assert engine.request(large).finish_reason == "length", "starved"
    assert len(engine.request(large).output_token_ids) == 36
    run_until_done(engine)
    assert all(len(engine.request(i).output_token_ids) == 8 for i in small)
    assert engine.num_free_pages == 20


def test_abort_frees_pages_and_leaves_others_alone() -> None:
    params = sampling_params(DecodeParams(8, VOCAB_SIZE - 1, 20))
    engine = make_engine(tiny_model(), num_pages=32)
    alone = engine.add_request([1, 2, 3], params)
    run_until_done(engine)
    expected = list(engine.request(alone).output_token_ids)
    kept, aborted, waiting = (engine.add_request([1, 2, 3], params) for _ in range(3))
    engine.abort(waiting)  # before it ever ran
    for _ in range(3):
        engine.step()
    before = engine.num_free_pages
    engine.abort(aborted)
    assert engine.num_free_pages > before
    for request_id in (waiting, aborted):
        state = engine.request(request_id)
        assert (state.status, state.finish_reason) == ("finished", "abort")
    assert len(engine.request(waiting).output_token_ids) == 0
    engine.abort(aborted)  # again: nothing happens
    run_until_done(engine)
    assert list(engine.request(kept).output_token_ids) == expected
    assert engine.request(kept).finish_reason == "length"
    assert engine.num_free_pages == 32
    with pytest.raises(ValueError, match="12345"):
        engine.abort(12345)


# ---------------------------------------------------------------------------------------- page pool


class PagePoolMachine(RuleBasedStateMachine):
    """Against a dictionary of reference counts."""

    @initialize(num_pages=st.integers(0, 6))
    def start(self, num_pages: int) -> None:
        self.pool = _C.PagePool(num_pages)
        self.counts: dict[int, int] = {}
        self.num_pages = num_pages

    @rule()
    def allocate(self) -> None:
        if len(self.counts) == self.num_pages:
            with pytest.raises(RuntimeError):
                self.pool.allocate()
        else:
            page = self.pool.allocate()
            assert 0 <= page < self.num_pages and page not in self.counts
            self.counts[page] = 1

    @rule(page=st.integers(-1, 6))
    def retain(self, page: int) -> None:
        if page in self.counts:
            self.pool.retain(page)
            self.counts[page] += 1
        else:
            with pytest.raises((RuntimeError, ValueError)):
                self.pool.retain(page)

    @rule(page=st.integers(-1, 6))
    def release(self, page: int) -> None:
        if page in self.counts:
            self.counts[page] -= 1
            assert self.pool.release(page) == (self.counts[page] == 0)
            if not self.counts[page]:
                del self.counts[page]
        else:
            with pytest.raises((RuntimeError, ValueError)):
                self.pool.release(page)

    @invariant()
    def counts_agree(self) -> None:
        if not hasattr(self, "pool"):
            return
        assert self.pool.num_pages == self.num_pages
        assert self.pool.num_free == self.num_pages - len(self.counts)
        for page in range(self.num_pages):
            assert self.pool.ref_count(page) == self.counts.get(page, 0)


# ------------------------------------------------------------------------------------- prefix cache


@dataclass
class Sequence:
    tokens: list[int]
    pages: list[int]
    num_registered: int


class PrefixCacheMachine(RuleBasedStateMachine):
    """Sequences come and go over a small pool. Every page remembers what was written to it: all the
    tokens its KV depends on, which is the prefix up to the end of its last block, since a block
    sees itself in both directions. Two-letter tokens, so that prefixes are often shared."""

    @initialize(
        num_pages=st.integers(1, 24),
        page_size=st.sampled_from([1, 2, 4, 8]),
        alignment=st.sampled_from([1, 2, 4]),
    )
    def start(self, num_pages: int, page_size: int, alignment: int) -> None:
        self.page_size, self.alignment = page_size, alignment
        self.unit = max(page_size, alignment)  # both are powers of two
        self.num_pages = num_pages
        self.pool = _C.PagePool(num_pages)
        self.cache = _C.PrefixCache(self.pool, page_size, alignment)
        self.live: list[Sequence] = []
        self.written: dict[int, tuple[int, ...]] = {}

    def depends_on(self, tokens: list[int], page_idx: int) -> tuple[int, ...]:
        end = (page_idx + 1) * self.page_size
        return tuple(tokens[: -(-end // self.alignment) * self.alignment])

    @rule(
        letters=st.lists(st.integers(0, 1), max_size=6),
        extra=st.integers(0, 7),
        last=st.integers(0, 1),
    )
    def begin(self, letters: list[int], extra: int, last: int) -> None:
        """Half a unit of equal tokens for a letter, then a tail: few distinct prefixes."""
        half = max(1, self.unit // 2)
        tokens = [letter for letter in letters for _ in range(half)] + [last] * extra
        pages, num_tokens = self.cache.match(tokens)
        pages = list(pages)
        assert num_tokens == len(pages) * self.page_size <= len(tokens)
        assert num_tokens % self.alignment == 0
        for i, page in enumerate(pages):
            assert self.written[page] == self.depends_on(tokens, i), "a hit with other content"
            assert self.pool.ref_count(page) >= 2
        needed = -(-len(tokens) // self.page_size) - len(pages)
        missing = needed - self.pool.num_free
        if missing > 0:
            evictable = self.cache.num_evictable
            assert self.cache.evict(missing) == min(missing, evictable)
        if needed > self.pool.num_free:
            for page in pages:
                self.pool.release(page)
            return
        held = {page for sequence in self.live for page in sequence.pages} | set(pages)
        for _ in range(needed):
            page = self.pool.allocate()
            assert page not in held and self.pool.ref_count(page) == 1, "writable but shared"
            held.add(page)
            pages.append(page)
            self.written[page] = self.depends_on(tokens, len(pages) - 1)
        self.live.append(Sequence(tokens, pages, num_tokens // self.page_size))

    def num_found(self, sequence: Sequence, num_pages: int) -> int:
        pages, num_tokens = self.cache.match(sequence.tokens[: num_pages * self.page_size])
        for i, page in enumerate(pages):
            assert self.written[page] == self.depends_on(sequence.tokens, i), "other content"
            self.pool.release(page)
        assert num_tokens == len(pages) * self.page_size
        return len(pages)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def register(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.live))
        units = len(sequence.tokens) // self.unit
        num_full = data.draw(st.integers(0, units)) * self.unit // self.page_size
        if num_full < sequence.num_registered:
            return
        already = self.num_found(sequence, sequence.num_registered)
        self.cache.insert(sequence.tokens, sequence.pages, sequence.num_registered, num_full)
        # It is found now, whoever computed it; unless that was another one, whose pages are gone.
        if already == sequence.num_registered:
            assert self.num_found(sequence, num_full) == num_full
        sequence.num_registered = num_full

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        sequence = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        for page in sequence.pages:
            self.pool.release(page)

    @rule(num_pages=st.integers(0, 5))
    def evict(self, num_pages: int) -> None:
        evictable, free = self.cache.num_evictable, self.pool.num_free
        freed = self.cache.evict(num_pages)
        assert freed == min(num_pages, evictable)
        assert self.pool.num_free == free + freed
        assert self.cache.num_evictable == evictable - freed

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        assert self.cache.num_evictable == 0

    @invariant()
    def references_add_up(self) -> None:
        if not hasattr(self, "pool"):
            return
        total = sum(self.pool.ref_count(page) for page in range(self.num_pages))
        held = Counter(page for sequence in self.live for page in sequence.pages)
        assert total == held.total() + self.cache.num_cached
        for page, count in held.items():
            assert self.pool.ref_count(page) >= count
        assert 0 <= self.cache.num_evictable <= self.cache.num_cached

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        for sequence in self.live:
            for page in sequence.pages:
                self.pool.release(page)
        assert self.pool.num_free + self.cache.num_cached == self.num_pages, "a page leaked"
        assert self.cache.num_evictable == self.cache.num_cached
        self.cache.clear()
        assert self.pool.num_free == self.num_pages and self.cache.num_cached == 0


TestPagePool = PagePoolMachine.TestCase
TestPagePool.settings = settings(relaxed, max_examples=60, stateful_step_count=40)
TestPrefixCache = PrefixCacheMachine.TestCase
TestPrefixCache.settings = settings(relaxed, max_examples=250, stateful_step_count=40)
