"""Bad input: a clear error with the values in it, and an engine that stays usable."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import SPECIAL_TOKENS, make_checkpoint
from optimus import LLM, SamplingParams

SHORT = SamplingParams(max_tokens=10)
PROMPT = "hello there"


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    path = make_checkpoint(
        tmp_path_factory.mktemp("checkpoint"), tokenizer=True, max_position_embeddings=64
    )
    return LLM(path, decode_mode="block", max_num_seqs=4, num_threads=1)


@pytest.fixture
def usable(llm: LLM) -> Iterator[LLM]:
    """The LLM; afterwards it must be idle and answer as before, also a stream that was running."""
    expected = llm.generate(PROMPT, SHORT)[0].outputs[0]
    running = llm.stream(PROMPT, SHORT, mode="denoise")
    next(running)
    yield llm
    [*_, last] = running
    assert last.output is not None and last.output.outputs[0] == expected
    assert not llm.engine.has_unfinished()
    engine = llm.engine
    assert engine.num_free_pages + engine.num_cached_pages == engine.config.num_pages
    assert llm.generate(PROMPT, SHORT)[0].outputs[0] == expected


# ---------------------------------------------------------------------------- prompts, parameters


@pytest.mark.parametrize(
    "prompt, message",
    [
        ("", "prompt 1 is empty"),
        ([], "prompt 1 is empty"),
        ("x" * 64, "prompt 1 has 64 tokens, which leaves no room for output in max_model_len 64"),
        ([5] * 1000, "prompt 1 has 1000 tokens"),
        ([3, 264, 5], r"prompt 1 holds token id 264, the vocabulary is \[0, 264\)"),
        ([3, -1, 5], "prompt 1 holds token id -1"),
        ([2**70], "prompt 1 holds token id"),
    ],
)
def test_a_bad_prompt_queues_nothing(usable: LLM, prompt: Any, message: str) -> None:
    waiting = usable.engine.num_waiting + usable.engine.num_running
    with pytest.raises(ValueError, match=message):
        usable.generate([PROMPT, prompt, PROMPT], SHORT)
    assert usable.engine.num_waiting + usable.engine.num_running == waiting
    with pytest.raises(ValueError):
        usable.stream(prompt, SHORT)  # at the call, not at the first event


def test_prompts_of_a_wrong_type(usable: LLM) -> None:
    for prompts, params, message in (
        ([[1.5, 2.5]], SHORT, "prompt 0 must be text or token ids: 'float'"),
        ([[True, False]], SHORT, "prompt 0 must be text or token ids: a bool"),
        ([[5], np.array([[1, 2]])], SHORT, "prompt 1 must be text or token ids: only"),
        ({"prompt": "a"}, SHORT, "prompts must be text, token ids or a list of them, got {'prompt"),
        (7, SHORT, "prompts must be text, token ids or a list of them, got 7"),
        ("\ud800", SHORT, "text 0 is not Unicode"),
        ("a", {"max_tokens": 1}, "sampling_params must hold SamplingParams, got 'max_tokens'"),
        (["a"], [None], "sampling_params must hold SamplingParams, got None"),
        ("a", 3, "sampling_params must be SamplingParams, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            usable.generate(prompts, params)
    with pytest.raises(ValueError, match="a stream takes one SamplingParams"):
        usable.stream("a", [SHORT])  # type: ignore[arg-type]
    one_each = usable.generate([np.array([5]), np.array([7])], SHORT)
    assert [output.prompt_token_ids for output in one_each] == [[5], [7]]
    with pytest.raises(ValueError, match="either prompts or prompt_token_ids"):
        usable.generate()
    with pytest.raises(ValueError, match="either prompts or prompt_token_ids"):
        usable.generate(PROMPT, prompt_token_ids=[1])
    with pytest.raises(ValueError, match="mode must be 'block' or 'denoise', got 'x'"):
        usable.stream(PROMPT, mode="x")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name, value, message",
    [
        (
            "temperature",
            float("nan"),
            "temperature must be 0 \\(greedy\\) or in \\[0.0001, 1000000\\], got nan",
        ),
        (
            "temperature",
            -0.5,
            "temperature must be 0 \\(greedy\\) or in \\[0.0001, 1000000\\], got -0.5",
        ),
        (
            "temperature",
            float("inf"),
            "temperature must be 0 \\(greedy\\) or in \\[0.0001, 1000000\\], got inf",
        ),
        (
            "temperature",
            1e-5,
            "temperature must be 0 \\(greedy\\) or in \\[0.0001, 1000000\\], got 1e-05",
        ),
        (
            "temperature",
            1e20,
            "temperature must be 0 \\(greedy\\) or in \\[0.0001, 1000000\\], got 1e\\+20",
        ),
        ("temperature", "hot", "temperature must be a number, got 'hot'"),
        ("top_k", -2, "top_k must be >= -1, got -2"),
        ("top_k", 1.5, "top_k must be an int, got 1.5"),
        ("top_p", float("nan"), r"top_p must be in \(0, 1\], got nan"),
        ("top_p", 0.0, r"top_p must be in \(0, 1\], got 0.0"),
        ("top_p", 1.01, r"top_p must be in \(0, 1\], got 1.01"),
        ("temperature", 10**400, "temperature must be 0 .*, got 1000"),
        ("top_k", 2**31, "top_k must be < 2147483648, got 2147483648"),
        ("seed", -1, "seed must be >= 0, got -1"),
        ("seed", 2**64, "seed must be < 18446744073709551616, got 18446744073709551616"),
        ("max_tokens", 2**31, "max_tokens must be < 2147483648, got 2147483648"),
        ("max_tokens", 0, "max_tokens must be >= 1, got 0"),
        ("max_tokens", True, "max_tokens must be an int, got True"),
        ("stop", "", r"stop must hold non-empty strings, got ''"),
        ("stop", [3], "stop must hold non-empty strings, got 3"),
        ("stop", 0, "stop must be a list, got 0"),
        ("stop_token_ids", [-3], "stop_token_ids must be >= 0, got -3"),
        ("stop_token_ids", 0, "stop_token_ids must be a list, got 0"),
        ("stop_token_ids", "12", "stop_token_ids must be a list, got '12'"),
        ("confidence_threshold", float("nan"), r"confidence_threshold must be in \[0, 1\], got n"),
        ("confidence_threshold", 1.5, "confidence_threshold .*got 1.5"),
        ("unmasking_strategy", "random", "unmasking_strategy must be one of .*, got 'random'"),
        ("entropy_bound", -1.0, "entropy_bound must be >= 0, got -1.0"),
        ("entropy_bound", float("nan"), "entropy_bound must be >= 0, got nan"),
        ("denoising_steps", 0, "denoising_steps must be >= 1, got 0"),
        ("ignore_eos", "yes", "ignore_eos must be a bool, got 'yes'"),
        ("logprobs", 5, "logprobs must be None, a bool, 0 or 1"),
    ],
)
def test_bad_sampling_values(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r"^\[sampling_params\] " + message):
        SamplingParams(**{name: value})


def test_unknown_names_raise(llm: LLM) -> None:
    with pytest.raises(TypeError, match="top_q"):
        SamplingParams(top_q=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="chunk_size"):
        LLM(llm.checkpoint.path, chunk_size=4)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "params, message",
    [
        ({"denoising_steps": 9}, r"denoising_steps must be in \[1, block_length 8\], got 9"),
        ({"stop_token_ids": [264]}, r"stop_token_ids must be in \[0, 264\), got 264"),
    ],
)
def test_parameters_that_do_not_fit_the_model(
    usable: LLM, params: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        usable.generate([PROMPT, PROMPT], [SHORT, SamplingParams(**params)])


def test_the_engine_checks_for_itself(usable: LLM) -> None:
    """What the Python side refuses first, the C++ engine refuses as well, changing nothing."""
    engine = usable.engine
    waiting = engine.num_waiting
    good = SHORT.to_native(usable.checkpoint.generation, 1)
    for prompt in ([], [264], [-1], [5] * 64):
        with pytest.raises(ValueError):
            engine.add_request(prompt, good)
    for name, value in {"temperature": float("nan"), "top_p": float("nan"), "top_k": -1,
                        "confidence_threshold": float("nan"), "max_tokens": 0,
                        "entropy_bound": -1.0}.items():  # fmt: skip
        bad = SHORT.to_native(usable.checkpoint.generation, 1)
        setattr(bad, name, value)
        with pytest.raises(ValueError, match=name):
            engine.add_request([5], bad)
    for call in (engine.request, engine.abort, engine.release):
        with pytest.raises(ValueError, match="999999"):
            call(999999)
    assert engine.num_waiting == waiting


@pytest.mark.parametrize("mode", ["ar", "block", "chunk"])
def test_a_prompt_with_the_text_of_the_mask_token(llm: LLM, mode: str) -> None:
    """The mask's id is input like any other: only positions of the output are masked."""
    mask_id = 260 + SPECIAL_TOKENS.index("<|MASK|>")
    assert llm.checkpoint.mask_token_id == mask_id
    prompt = "a<|MASK|>b<|MASK|><|MASK|>"
    outputs = llm.with_options(decode_mode=mode).generate([prompt, "ab"], SHORT)
    assert outputs[0].prompt_token_ids.count(mask_id) == 3
    for output in outputs:
        n = len(output.outputs[0].token_ids)
        assert n == 10 or output.outputs[0].finish_reason == "stop"
        assert len(output.outputs[0].confidences) == n


def test_an_error_inside_a_step_ends_the_calls_requests(usable: LLM) -> None:
    def fail(record: object) -> None:
        raise RuntimeError("injected")

    usable.on_step = fail
    try:
        with pytest.raises(RuntimeError, match="injected"):
            usable.generate([PROMPT] * 3, SHORT)
    finally:
        usable.on_step = None


# ------------------------------------------------------------------------------------ construction


def schedule(ranges: dict[str, Any]) -> dict[str, Any]:
    return {"decode_mode": "schedule", "chunk_schedule": ranges}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"decode_mode": "fast"}, "decode_mode must be one of ar, block, .* got 'fast'"),
        ({"kv_policy": "drop"}, "kv_policy must be one of freeze, refresh, auto, got 'drop'"),
        ({"decode_mode": "chunk", "chunk_length": 9}, r"chunk_length must be in .* 8\], got 9"),
        ({"decode_mode": "chunk", "chunk_length": 0}, "chunk_length must be an int >= 1, got 0"),
        ({"decode_mode": "chunk", "chunk_length": -4}, "chunk_length must be an .* got -4"),
        ({"decode_mode": "elastic", "chunk_arms": [2, 16]}, r"chunk_arms must be .* got 16"),
        ({"chunk_length": 4}, "chunk_length=4 has a meaning in decode_mode 'chunk' only"),
        ({"async_scheduling": 1.5}, "async_scheduling must be a bool or None, got 1.5"),
        (
            {"decode_mode": "elastic_per_request", "async_scheduling": True},
            "async_scheduling=True has a meaning in .*'elastic' only, got .*_per_request",
        ),
        ({"decode_mode": "block", "chunk_arms": [2]}, "chunk_arms=.* 'elastic_per_request' only"),
        (
            {"decode_mode": "schedule", "recompute_block": True, "chunk_schedule": {"1-": 4}},
            "recompute_block=True has a meaning in decode_mode 'chunk' only",
        ),
        ({"decode_mode": "schedule"}, "chunk_schedule and decode_mode 'schedule' go together"),
        ({"chunk_schedule": {"1-": 4}}, "chunk_schedule and decode_mode 'schedule' go together"),
        (schedule({}), r"chunk_schedule must hold at least one range, got \{\}"),
        (schedule({"2-": 4}), r"ascend without gaps .* got '2-' where a range from 1 should be"),
        (schedule({"1-4": 4, "6-": 2}), "got '6-' where a range from 5 should be"),
        (schedule({"1-4": 4, "3-": 2}), "got '3-' where a range from 5 should be"),
        (schedule({"1-": 4, "9-": 2}), "got '9-' where a range from .* should be"),
        (schedule({"4-1": 4}), "got '4-1' where a range from 1 should be"),
        (schedule({"1-4-8": 4}), "got '1-4-8' where a range from 1 should be"),
        (schedule({"-4": 4}), "got '-4' where a range from 1 should be"),
        (schedule({"many": 4}), "got 'many' where a range from 1 should be"),
        (schedule({"1-": 0}), "chunk_schedule must be an int >= 1, got 0"),
        (schedule({"1-": 9}), r"chunk_schedule must be in \[1, block_length 8\], got 9"),
        (schedule({"1-": 2.5}), "chunk_schedule must be an int >= 1, got 2.5"),
        ({"quality_floor": 1.01}, r"quality_floor must be .* in \[0, 1\] or None, got 1.01"),
        ({"quality_floor": -0.1}, "quality_floor must be .*, got -0.1"),
        ({"quality_floor": float("nan")}, "quality_floor must be .*, got nan"),
        ({"quality_floor": "ar"}, "quality_floor must be 'block', .* got 'ar'"),
        ({"quality_floor": True}, "quality_floor must be .*, got True"),
        ({"target_tpot_ms": 0}, "target_tpot_ms must be a number > 0, got 0"),
        ({"target_tpot_ms": float("inf")}, "target_tpot_ms must be a number > 0, got inf"),
        ({"target_ttft_ms": -1.0}, "target_ttft_ms must be a number > 0, got -1.0"),
        ({"target_ttft_ms": float("nan")}, "target_ttft_ms must be a number > 0, got nan"),
        ({"target_ttft_ms": True}, "target_ttft_ms must be a number > 0, got True"),
        ({"step_log_size": -1}, "step_log_size must be an int >= 0, got -1"),
        ({"device": "tpu"}, "device must be one of auto, cpu, cuda, got .tpu."),
        ({"dtype": "int8"}, "dtype must be one of auto, float32, bfloat16, got 'int8'"),
        ({"max_num_seqs": 0}, "max_num_seqs must be an int >= 1, got 0"),
        ({"max_num_batched_rows": 8}, "max_num_batched_rows must be at least 32, got 8"),
        ({"max_model_len": 65}, "max_model_len 65 is above .* 64"),
        ({"page_size": 12}, "page_size must be a multiple of block_length 8 .* got 12"),
        ({"kv_cache_memory": "1 fortnight"}, "kv_cache_memory must be bytes .*got '1 fortnight'"),
        ({"kv_cache_memory": -5}, "kv_cache_memory must be bytes .*got -5"),
        ({"seed": -1}, "seed must be an int >= 0, got -1"),
        ({"seed": None}, "seed must be an int, got None"),
        ({"max_num_seqs": None}, "max_num_seqs must be an int, got None"),
        ({"max_num_seqs": 2**31}, "max_num_seqs must be an int < 2147483648, got 2147483648"),
        ({"kv_cache_memory": 2**60}, "kv_cache_memory 1152921504606846976 bytes is .* too many"),
        (schedule([1]), r"chunk_schedule must be like .*, got \[1\]"),  # type: ignore[arg-type]
        ({"latency_profile": "fast"}, r"a latency profile is \[\(rows, ms\), ...\], got 'fast'"),
        ({"num_threads": 0}, "num_threads must be an int >= 1, got 0"),
        ({"block_length": 0}, "block_length must be an int in .*, got 0"),
        ({"mask_token_id": 264}, r"mask_token_id must be an int in \[0, 264\), got 264"),
    ],
)
def test_bad_options(llm: LLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(llm.checkpoint.path, **options)


def test_kv_memory_too_small_for_one_request(llm: LLM) -> None:
    page_bytes = 2 * 2 * 2 * 16 * 16 * 4
    with pytest.raises(ValueError) as error:
        LLM(llm.checkpoint.path, kv_cache_memory=3 * page_bytes)
    assert f"{3 * page_bytes} bytes holds 3 pages" in str(error.value)
    assert f"needs 4 pages, {4 * page_bytes} bytes" in str(error.value)
    fits = LLM(llm.checkpoint.path, decode_mode="block", kv_cache_memory=4 * page_bytes)
    assert fits.engine.config.num_pages == 4
    # Many requests share what fits one: they wait or are preempted, and none is lost.
    alone = llm.generate(PROMPT, SHORT)[0].outputs[0].token_ids
    outputs = fits.generate([PROMPT] * 6, SHORT)
    assert [o.outputs[0].token_ids for o in outputs] == [alone] * 6


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing is not a directory"):
        LLM(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        LLM(tmp_path)


# ----------------------------------------------------------------------------------------- weights


def load_error(path: Path) -> str:
    with pytest.raises(ValueError) as error:
        LLM(path, decode_mode="block")
    return str(error.value)


def test_missing_weights(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, shards=3)
    (path / "model-00002-of-00003.safetensors").unlink()
    message = load_error(path)
    assert "1 of 3 files" in message and "model-00002-of-00003.safetensors" in message
    (path / "model.safetensors.index.json").unlink()
    assert "neither model.safetensors nor" in load_error(path)


@pytest.mark.parametrize("keep", [0.0, 0.00001, 0.5, 0.999])
def test_truncated_weights(tmp_path: Path, keep: float) -> None:
    path = make_checkpoint(tmp_path)
    file = path / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data))])
    message = load_error(path)
    assert str(file) in message and f"{int(keep * len(data))} bytes" in message


def test_wrong_shape_names_tensor_expected_and_got(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path)
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors[name] = torch.zeros(16, 64)
    save_file(tensors, path / "model.safetensors")
    message = load_error(path)
    assert f"{name} has a wrong shape: expected [32, 64], got [16, 64]" in message


def test_missing_unexpected_and_integer_tensors(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path)
    tensors = load_file(path / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.extra.weight"] = torch.zeros(2)
    tensors["lm_head.weight"] = torch.zeros(97, 64, dtype=torch.int32)
    save_file(tensors, path / "model.safetensors")
    message = load_error(path)
    assert "1 tensors are missing: model.norm.weight" in message
    assert "1 tensors are unexpected: model.layers.0.mlp.extra.weight" in message
    assert "lm_head.weight has dtype I32" in message


@pytest.mark.parametrize("weight_map", [None, {}, {"a": "../elsewhere.safetensors"}])
def test_bad_index(tmp_path: Path, weight_map: dict[str, str] | None) -> None:
    path = make_checkpoint(tmp_path, shards=2)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "model.safetensors.index.json" in load_error(path)
