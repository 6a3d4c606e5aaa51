"""LLM: generate, chat, stream, parameters, results, lifecycle."""

from __future__ import annotations

import dataclasses
import logging
import signal
import threading
import traceback
from pathlib import Path
from typing import Any

import pytest

from checkpoints import make_checkpoint
from optimus import LLM, SamplingParams
from optimus.events import MASK_GLYPH, BlockEvent, DenoiseEvent, snapshot_pieces
from optimus.native import _C

PROMPTS = ["hello", "the thin man", "a", "in the beginning there was nothing but é 你好"]
SHORT = SamplingParams(max_tokens=20)
MODES: list[dict[str, Any]] = [
    {"decode_mode": "ar"},
    {"decode_mode": "block"},
    {"decode_mode": "chunk", "chunk_length": 3, "kv_policy": "refresh"},
    {"decode_mode": "schedule", "chunk_schedule": {"1-2": 6, "3-": 2}, "kv_policy": "refresh"},
    {"decode_mode": "elastic"},
    {"decode_mode": "elastic_per_request"},
]
PROFILE = [(1, 1.0), (32, 1.1), (64, 2.0), (256, 8.0)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    return make_checkpoint(path, tokenizer=True, max_position_embeddings=128)


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> LLM:
    return LLM(
        checkpoint,
        decode_mode="block",
        max_num_seqs=4,
        max_num_batched_rows=64,
        num_threads=1,
        latency_profile=PROFILE,
    )


def assert_idle(llm: LLM) -> None:
    """Nothing of any request is left in the engine."""
    assert not llm.engine.has_unfinished()
    engine = llm.engine
    assert engine.num_free_pages + engine.num_cached_pages == engine.config.num_pages
    assert not llm._tracker._live


def texts(outputs: list[Any]) -> list[str]:
    return [o.outputs[0].text for o in outputs]


@pytest.mark.parametrize("mode", MODES, ids=lambda m: m["decode_mode"])
def test_generate_returns_outputs_in_order(llm: LLM, mode: dict[str, Any]) -> None:
    llm = llm.with_options(**mode)
    outputs = llm.generate(PROMPTS, SHORT)
    assert [o.prompt for o in outputs] == PROMPTS
    assert llm.tokenizer is not None
    for output in outputs:
        assert output.prompt_token_ids == llm.tokenizer.encode(output.prompt)
        [completion] = output.outputs
        n = len(completion.token_ids)
        assert n == 20 or completion.finish_reason == "stop"
        assert len(completion.confidences) == len(completion.steps) == n
        assert all(0 < c <= 1 for c in completion.confidences)
        assert min(completion.steps) >= 1 and max(completion.steps) <= output.metrics.nfe
        body = completion.token_ids
        assert completion.text == llm.tokenizer.decode(body)
        metrics = output.metrics
        assert metrics.num_output_tokens == n
        assert metrics.tokens_per_forward == n / metrics.nfe
        assert metrics.rows_per_token == metrics.decode_rows / n
        assert sum(metrics.chunk_histogram.values()) == metrics.nfe
        assert metrics.time_to_first_token is not None
        assert 0 < metrics.time_to_first_token <= metrics.latency
    assert_idle(llm)


def test_one_string_and_token_ids_give_lists_of_one(llm: LLM) -> None:
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode("hello")
    by_text = llm.generate("hello", SHORT)
    for outputs in (
        llm.generate(ids, SHORT),
        llm.generate(prompt_token_ids=ids, sampling_params=SHORT),
        llm.generate(prompt_token_ids=[ids], sampling_params=SHORT),
    ):
        assert len(outputs) == len(by_text) == 1
        assert outputs[0].prompt is None
        assert outputs[0].outputs[0].token_ids == by_text[0].outputs[0].token_ids
    assert llm.generate([]) == []


def test_params_per_prompt(llm: LLM) -> None:
    outputs = llm.generate(
        PROMPTS[:2], [SamplingParams(max_tokens=3), SamplingParams(max_tokens=9, logprobs=True)]
    )
    first, second = (o.outputs[0] for o in outputs)
    assert (len(first.token_ids), first.logprobs) == (3, None)
    assert len(second.token_ids) == 9 and second.logprobs is not None
    assert len(second.logprobs) == 9 and all(p <= 0 for p in second.logprobs)
    with pytest.raises(ValueError, match="2 prompts but 1 sampling_params"):
        llm.generate(PROMPTS[:2], [SHORT])


def test_seed_reproduces_and_default_seed_varies(llm: LLM) -> None:
    def sample(seed: int | None, count: int = 1) -> list[str]:
        params = SamplingParams(max_tokens=16, temperature=1.5, seed=seed)
        return texts(llm.generate(["hello"] * count, params))

    assert sample(7) == sample(7) == sample(7, 3)[2:]
    assert sample(7) != sample(8)
    assert len(set(sample(None, 4))) > 1


def test_llm_seed_reproduces_unseeded_requests(llm: LLM) -> None:
    params = SamplingParams(max_tokens=16, temperature=1.5)
    first, second, other = (
        texts(llm.with_options(seed=s).generate(PROMPTS, params)) for s in (3, 3, 4)
    )
    assert first == second != other


def test_generation_config_supplies_defaults(tmp_path: Path) -> None:
    make_checkpoint(
        tmp_path,
        tokenizer=True,
        generation_config={"temperature": 0.7, "top_k": 5, "confidence_threshold": 0.5},
    )
    llm = LLM(tmp_path, decode_mode="block")
    native = SamplingParams().to_native(llm.checkpoint.generation, 1)
    assert (round(native.temperature, 6), native.top_k) == (0.7, 5)
    assert native.confidence_threshold == 0.5
    native = SamplingParams(temperature=0, top_k=-1).to_native(llm.checkpoint.generation, 1)
    assert (native.temperature, native.top_k, native.top_p) == (0, 0, 1)


def test_stop_string_across_token_borders(llm: LLM) -> None:
    """Any substring of an output ends it, wherever the tokens split."""
    free = llm.generate("hello", SHORT)[0].outputs[0]
    assert free.text is not None and len(free.text) > 6
    for start in range(len(free.text) - 3):
        stop = free.text[start : start + 3]
        if "\ufffd" in stop:
            continue
        got = llm.generate("hello", SamplingParams(max_tokens=20, stop=["@@@@", stop]))[0]
        completion = got.outputs[0]
        assert completion.text == free.text[: free.text.index(stop)]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
        n = len(completion.token_ids)
        assert completion.token_ids == free.token_ids[:n]
        assert llm.tokenizer is not None
        assert stop in llm.tokenizer.decode(completion.token_ids)
        assert stop not in llm.tokenizer.decode(completion.token_ids[:-1])
        assert len(completion.steps) == len(completion.confidences) == n
    assert_idle(llm)


def test_stop_token_id_and_ignore_eos(llm: LLM, checkpoint: Path, tmp_path: Path) -> None:
    free = llm.generate("hello", SHORT)[0].outputs[0]
    token = free.token_ids[6]
    cut = free.token_ids.index(token) + 1
    stopped = llm.generate("hello", SamplingParams(max_tokens=20, stop_token_ids=[token]))[0]
    completion = stopped.outputs[0]
    assert completion.token_ids == free.token_ids[:cut]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", token)
    assert llm.tokenizer is not None
    assert completion.text == llm.tokenizer.decode(free.token_ids[: cut - 1])

    config = {"eos_token_id": [token]}
    make_checkpoint(tmp_path, tokenizer=True, max_position_embeddings=128, config_overrides=config)
    with_eos = LLM(tmp_path, decode_mode="block")
    completion = with_eos.generate("hello", SHORT)[0].outputs[0]
    assert completion.token_ids == free.token_ids[:cut]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", None)
    ignoring = SamplingParams(max_tokens=20, ignore_eos=True)
    assert len(with_eos.generate("hello", ignoring)[0].outputs[0].token_ids) == 20


def test_outputs_end_at_the_context(llm: LLM) -> None:
    output = llm.generate("hello", SamplingParams(ignore_eos=True))[0]
    total = len(output.prompt_token_ids) + len(output.outputs[0].token_ids)
    assert (total, output.outputs[0].finish_reason) == (128, "length")


def test_chat_is_generate_of_the_rendered_prompt(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hello"}]
    rendered = llm.render_chat(messages)
    assert rendered == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    single = llm.chat(messages, SHORT)
    many = llm.chat([messages, messages], SHORT)
    direct = llm.generate(rendered, SHORT)
    assert len(single) == 1 and len(many) == 2
    assert texts(single) == texts(direct) == texts(many)[1:]
    assert single[0].prompt == rendered


@pytest.mark.parametrize("mode", MODES[:4], ids=lambda m: m["decode_mode"])
def test_streams_agree_with_generate(llm: LLM, mode: dict[str, Any]) -> None:
    llm = llm.with_options(**mode)
    for prompt in PROMPTS:
        expected = llm.generate(prompt, SHORT)[0].outputs[0]
        blocks = list(llm.stream(prompt, SHORT))
        assert all(isinstance(e, BlockEvent) and e.output is None for e in blocks[:-1])
        assert "".join(e.text for e in blocks) == expected.text
        assert [t for e in blocks for t in e.token_ids] == expected.token_ids
        assert blocks[-1].output is not None
        assert blocks[-1].output.outputs[0] == expected

        snapshots = [e for e in llm.stream(prompt, SHORT, mode="denoise")]
        assert all(isinstance(e, DenoiseEvent) for e in snapshots)
        check_snapshots(snapshots, expected.token_ids)  # type: ignore[arg-type]
    assert_idle(llm)


def check_snapshots(snapshots: list[DenoiseEvent], token_ids: list[int]) -> None:
    assert snapshots[-1].token_ids == token_ids
    seen: set[int] = set()
    for event in snapshots:
        for i, token in enumerate(event.token_ids[: len(token_ids)]):
            assert (token is not None) == (i in seen or i in event.committed)
            assert token is None or token == token_ids[i]
        seen |= set(event.committed)
        assert event.text is not None
        assert event.text.count(MASK_GLYPH) == event.token_ids.count(None)
    assert [e.step for e in snapshots] == sorted(e.step for e in snapshots)


def test_stream_of_messages_with_a_stop_string(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hello"}]
    free = llm.chat(messages, SHORT)[0].outputs[0]
    assert free.text is not None
    stop = free.text[4:7]
    params = SamplingParams(max_tokens=20, stop=stop)
    events = list(llm.stream(messages, params))
    assert "".join(e.text for e in events) == free.text[: free.text.index(stop)]  # type: ignore
    assert events[-1].output is not None
    assert events[-1].output.outputs[0].stop_reason == stop


def test_streams_interleave_with_each_other_and_with_generate(llm: LLM) -> None:
    expected = [llm.generate(p, SHORT)[0].outputs[0].text for p in PROMPTS[:3]]
    first, second = (llm.stream(p, SHORT) for p in PROMPTS[:2])
    got = ["", ""]
    for _ in range(2):
        got[0] += next(first).text or ""
        got[1] += next(second).text or ""
    assert texts(llm.generate(PROMPTS[2], SHORT)) == expected[2:]
    got[1] += "".join(e.text or "" for e in second)
    got[0] += "".join(e.text or "" for e in first)
    assert got == expected[:2]
    assert_idle(llm)


def test_closing_a_stream_ends_its_request(llm: LLM) -> None:
    events = llm.stream("hello", SHORT, mode="denoise")
    next(events)
    assert llm.engine.has_unfinished()
    events.close()  # type: ignore[attr-defined]
    assert_idle(llm)


def test_interrupt_in_the_middle_leaves_the_llm_usable(llm: LLM) -> None:
    expected = texts(llm.generate(PROMPTS, SHORT))
    other = llm.stream("hello", SHORT)
    begun = next(other).text
    steps = 0

    def interrupt(record: object) -> None:
        nonlocal steps
        steps += 1
        if steps == 3:
            signal.raise_signal(signal.SIGINT)

    llm.on_step = interrupt
    # Ignored where the tests run in the background.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS * 3, SHORT)
    finally:
        signal.signal(signal.SIGINT, before)
        llm.on_step = None
    # The stream that was running meanwhile lost nothing.
    assert begun + "".join(e.text or "" for e in other) == expected[0]
    assert_idle(llm)
    assert texts(llm.generate(PROMPTS, SHORT)) == expected


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers")
def test_interrupts_at_any_time_lose_nothing_of_other_requests(llm: LLM) -> None:
    """A signal that comes while a step runs is seen when it returns: its commits must not be lost
    on those who did not ask for the interrupt."""
    [expected] = texts(llm.generate("hello", SHORT))

    def interrupt(signal_number: int, frame: object) -> None:
        raise KeyboardInterrupt

    num_in_steps = 0
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for delay_ms in range(1, 21):
            other = llm.with_options()
            stream = other.stream("hello", SHORT)
            begun = next(stream).text or ""
            signal.setitimer(signal.ITIMER_REAL, 1e-3 * delay_ms)
            try:
                other.generate(PROMPTS * 10, SHORT)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt as error:
                innermost = traceback.extract_tb(error.__traceback__)[-2]  # the last is `interrupt`
                if "engine).step" not in (innermost.line or ""):
                    continue  # of Python's own work, some microseconds are not safe
                num_in_steps += 1
            assert begun + "".join(event.text or "" for event in stream) == expected
            assert_idle(other)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert num_in_steps > 0


def test_without_a_profile_the_trained_block_is_decoded(
    checkpoint: Path, llm: LLM, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        blind = LLM(checkpoint, latency_profile="none", quality_floor=None)
        output = blind.generate("hello", SHORT)[0]
    assert sum("no latency profile" in r.getMessage() for r in caplog.records) == 1
    assert blind.latency_profile is None
    block = llm.engine.config.block_length
    whole = llm.with_options(decode_mode="chunk", chunk_length=block, kv_policy="refresh")
    assert output.outputs[0].token_ids == whole.generate("hello", SHORT)[0].outputs[0].token_ids
    assert max(output.metrics.chunk_histogram) == block
    # Its likes are not measured behind one's back either.
    assert blind.with_options(max_num_seqs=2).latency_profile is None


def test_a_second_thread_is_refused(llm: LLM) -> None:
    """Two threads in one engine would crash the process; the first one must not notice."""
    expected = texts(llm.generate(PROMPTS * 10, SHORT))
    other = llm.with_options()
    errors: list[str] = []
    begun, done = threading.Event(), threading.Event()

    def intrude() -> None:
        begun.wait()
        while not done.is_set():
            try:
                other.generate("intruder", SHORT)
            except RuntimeError as error:
                errors.append(str(error))

    thread = threading.Thread(target=intrude)
    thread.start()
    other.on_step = lambda record: begun.set()
    try:
        assert texts(other.generate(PROMPTS * 10, SHORT)) == expected
    finally:
        done.set()
        begun.set()
        thread.join()
    assert errors and "another thread is using this LLM" in errors[0]
    assert_idle(other)


def test_with_options_shares_weights(llm: LLM) -> None:
    other = llm.with_options(decode_mode="chunk", chunk_length=2, max_num_seqs=2)
    assert other._model is llm._model and other.engine is not llm.engine
    assert other.latency_profile is llm.latency_profile is not None
    assert other.latency_profile.decode == PROFILE
    assert llm.options.decode_mode == "block"
    assert other.with_options(decode_mode="ar").options.chunk_length is None
    with pytest.raises(TypeError, match="chunk_size"):
        llm.with_options(chunk_size=2)


def test_profile_is_measured_where_it_is_needed(llm: LLM) -> None:
    for mode in ("elastic", "elastic_per_request"):
        profile = llm.with_options(decode_mode=mode, max_num_batched_rows=32).latency_profile
        assert profile is not None
        for curve in (profile.decode, profile.prefill):
            assert [rows for rows, _ in curve][-1] == 32
            assert all(ms > 0 for _, ms in curve)
        assert [keys for keys, _ in profile.kv] == sorted(keys for keys, _ in profile.kv)
    assert llm.with_options(max_num_batched_rows=32).latency_profile is None


def test_controller_options_reach_the_engine(llm: LLM) -> None:
    ranges = {"1-2": 6, "3-8": 4, "9-": 2}
    config = llm.with_options(decode_mode="schedule", chunk_schedule=ranges).engine.config
    assert config.chunk_schedule == [(2, 6), (8, 4), (2**31 - 1, 2)]
    assert config.quality_floor is None and config.target_tpot_ms == config.target_ttft_ms == 0
    config = llm.with_options(
        decode_mode="elastic", quality_floor=0.5, target_tpot_ms=7, target_ttft_ms=90.5,
        step_log_size=3,
    ).engine.config  # fmt: skip
    assert (config.quality_floor, config.step_log_size) == (0.5, 3)
    assert (config.target_tpot_ms, config.target_ttft_ms) == (7, 90.5)


def test_a_schedule_follows_the_number_of_requests(llm: LLM) -> None:
    llm = llm.with_options(
        decode_mode="schedule", chunk_schedule={"1-2": 6, "3-": 2}, enable_prefix_cache=False
    )
    llm.generate(PROMPTS, [SamplingParams(max_tokens=n) for n in (20, 20, 10, 10)])
    records = [r for r in llm.engine.step_records() if r.num_decoding]
    assert {r.num_decoding > 2 for r in records} == {True, False}
    for record in records:
        assert record.chunk_length == (6 if record.num_decoding <= 2 else 2)
        assert len(record.chunk_lengths) == record.num_decoding
        assert max(record.chunk_lengths) <= record.chunk_length and record.reason == "schedule"


def test_step_records_explain_the_choice(llm: LLM) -> None:
    llm = llm.with_options(decode_mode="elastic", step_log_size=4)
    llm.generate(PROMPTS, SHORT)
    records = llm.engine.step_records()
    assert len(records) == 4
    assert [r.step for r in records] == list(range(records[0].step, records[0].step + 4))
    for record in records:
        assert record.rows >= record.logit_rows >= record.commits >= 0
        assert record.logit_rows == sum(record.chunk_lengths)
        assert record.predicted_ms > 0 and record.step_ms >= record.forward_ms > 0
        # Without a device the step is computed while it is launched.
        assert record.launch_ms >= record.forward_ms and record.plan_ms > 0 and record.apply_ms > 0
        host_ms = record.plan_ms + record.launch_ms + record.wait_ms
        assert host_ms <= record.step_ms + 1e-6
        assert 0 <= record.rows_ms <= record.idle_ms
        verdicts = [(arm.chunk_length, arm.verdict) for arm in record.arms]
        assert (record.chunk_length, "chosen") in verdicts
        assert {c for c, _ in verdicts} == {2, 4, 8}
    for bins in llm.engine.reliability().values():
        for masks, predicted, committed in bins:
            assert 0 <= predicted <= masks + 1e-6 and 0 <= committed <= masks


def test_without_a_tokenizer_ids_go_in_and_out(tmp_path: Path) -> None:
    llm = LLM(make_checkpoint(tmp_path), decode_mode="block")
    output = llm.generate([[1, 2, 3], [4]], SHORT)[1].outputs[0]
    assert output.text is None and len(output.token_ids) == 20
    events = list(llm.stream([1, 2, 3], SHORT, mode="denoise"))
    assert events[0].text is None and len(events[-1].token_ids) == 20
    for call in (
        lambda: llm.generate("text"),
        lambda: llm.chat([{"role": "user", "content": "text"}]),
        lambda: llm.generate([1], SamplingParams(stop="x")),
    ):
        with pytest.raises(ValueError, match=r"needs a tokenizer.*pass token ids"):
            call()


def test_bfloat16_and_options_reach_the_engine(checkpoint: Path) -> None:
    llm = LLM(
        checkpoint, dtype="bfloat16", decode_mode="block", kv_cache_memory="64KiB",
        max_model_len=64, page_size=8, num_threads=1,
    )  # fmt: skip
    config = llm.engine.config
    page_bytes = 2 * 2 * 2 * 8 * 16 * 2  # K and V, layers, heads, tokens, head_dim, bytes
    assert config.num_pages == 64 * 1024 // page_bytes
    assert (config.max_model_len, config.page_size, config.num_threads) == (64, 8, 1)
    assert llm.memory["kv_cache"] == config.num_pages * page_bytes
    assert len(llm.generate("hello", SHORT)[0].outputs[0].token_ids) == 20


def test_snapshot_pieces(llm: LLM) -> None:
    assert llm.tokenizer is not None
    ids: list[int | None] = [*llm.tokenizer.encode("é1")]
    pieces = snapshot_pieces(llm.tokenizer, [*ids, None, *ids], {0, 1})
    assert pieces == [("é", "fresh"), ("1", "known"), (MASK_GLYPH, "mask"), ("é1", "known")]
    # Half a character is shown with the token that completes it.
    assert snapshot_pieces(llm.tokenizer, ids, {0}) == [("é1", "known")]


def test_outputs_are_plain_data(llm: LLM) -> None:
    output = llm.generate("hello", SHORT)[0]
    assert output.to_dict()["outputs"][0]["token_ids"] == output.outputs[0].token_ids
    with pytest.raises(dataclasses.FrozenInstanceError):
        output.request_id = 3  # type: ignore[misc]


@pytest.mark.skipif(not _C.cuda_problem(), reason="there is a GPU")
def test_cuda_where_there_is_none_says_why() -> None:
    with pytest.raises(ValueError, match=r"device 'cuda' cannot be used: .*CUDA"):
        LLM(device="cuda")
    assert LLM(device="auto", decode_mode="ar").device == "cpu"
