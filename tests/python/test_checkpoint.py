"""Checkpoint directories: config.json, generation_config.json, safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import make_checkpoint, save_sharded
from optimus import LLM, SamplingParams
from optimus.config import load_checkpoint
from optimus.inspect_checkpoint import inspect_checkpoint
from optimus.native import _C
from optimus.weights import load_weights, num_elements, read_headers

GREEDY = SamplingParams(max_tokens=12)


def output_ids(path: Path, **options: Any) -> list[int]:
    llm = LLM(path, decode_mode="block", num_threads=1, **options)
    return llm.generate([5, 6, 7], GREEDY)[0].outputs[0].token_ids


def rewrite_config(path: Path, changes: dict[str, Any], file: str = "config.json") -> None:
    config = json.loads((path / file).read_text())
    config = {k: v for k, v in (config | changes).items() if v is not ...}
    (path / file).write_text(json.dumps(config))


def test_facts_of_a_config(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, generation_config={"eos_token_id": [3, 4], "top_p": 0.9})
    c = load_checkpoint(tmp_path)
    assert (c.architecture, c.vocab_size, c.hidden_size) == ("SDARForCausalLM", 97, 64)
    assert (c.num_layers, c.num_q_heads, c.num_kv_heads, c.head_dim) == (2, 4, 2, 16)
    assert (c.block_length, c.block_length_source) == (8, "config.json (block_size)")
    assert (c.mask_token_id, c.mask_token_id_source) == (96, "config.json (mask_token_id)")
    assert c.eos_token_ids == (3, 4)
    assert (c.generation.top_p, c.generation.temperature) == (0.9, 0.0)
    native = c.model_config("bfloat16")
    assert (native.num_kv_heads, native.mask_token_id, native.dtype) == (2, 96, "bfloat16")


def test_generation_config_may_hold_the_decoding_facts(tmp_path: Path) -> None:
    facts = {"block_length": 4, "mask_token_id": 9, "eos_token_id": 2}
    make_checkpoint(tmp_path, block_size=None, mask_token_id=None, generation_config=facts)
    c = load_checkpoint(tmp_path)
    assert (c.block_length, c.mask_token_id, c.eos_token_ids) == (4, 9, (2,))
    assert c.block_length_source == "generation_config.json (block_length)"
    c = load_checkpoint(tmp_path, block_length=16, mask_token_id=1)
    assert (c.block_length, c.mask_token_id, c.block_length_source) == (16, 1, "argument")


def test_a_config_of_transformers_5(tmp_path: Path) -> None:
    """rope_theta inside rope_parameters, `dtype` for `torch_dtype`."""
    make_checkpoint(tmp_path / "old", rope_theta=5000.0)
    make_checkpoint(
        tmp_path / "new",
        config_overrides={
            "rope_theta": ...,
            "rope_scaling": ...,
            "torch_dtype": ...,
            "dtype": "float32",
            "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"},
            "layer_types": ["full_attention"] * 2,
        },
    )
    new = load_checkpoint(tmp_path / "new")
    assert (new.rope_theta, new.stored_dtype) == (5000.0, "float32")
    assert output_ids(tmp_path / "old") == output_ids(tmp_path / "new")


def test_do_sample_false_means_greedy(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, generation_config={"do_sample": False, "temperature": 0.6})
    assert load_checkpoint(tmp_path).generation.temperature == 0.0
    make_checkpoint(tmp_path, generation_config={"do_sample": True, "temperature": 0.6})
    assert load_checkpoint(tmp_path).generation.temperature == 0.6


def test_block_length_and_mask_are_never_guessed(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "SDAR-tiny-b8", block_size=None, mask_token_id=None)
    with pytest.raises(ValueError) as error:
        LLM(path)
    assert "pass block_length= and mask_token_id=" in str(error.value)
    assert "suggests block_length=8" in str(error.value)
    with pytest.raises(ValueError, match=r"pass mask_token_id=$"):
        LLM(path, block_length=8)
    given = output_ids(path, block_length=8, mask_token_id=96)
    assert given == output_ids(make_checkpoint(tmp_path / "full"))
    assert LLM(path, decode_mode="ar").generate([5], GREEDY)[0].outputs[0].token_ids


def test_a_qwen3_model_has_mode_ar(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, architecture="Qwen3ForCausalLM")
    with pytest.raises(ValueError, match=r"decode_mode must be 'ar', got 'elastic'"):
        LLM(path)
    assert LLM(path, decode_mode="ar").generate([5], GREEDY)[0].metrics.nfe == 12
    assert len(output_ids(path, block_length=8, mask_token_id=96)) == 12


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_single_and_sharded_files_hold_the_same_model(tmp_path: Path, dtype: str) -> None:
    single = make_checkpoint(tmp_path / "single", dtype=dtype)
    sharded = make_checkpoint(tmp_path / "sharded", dtype=dtype, shards=3)
    assert len(list(sharded.glob("*.safetensors"))) == 3
    assert output_ids(single) == output_ids(sharded)
    headers = read_headers(sharded)
    assert headers.keys() == read_headers(single).keys()
    model = _C.Model(load_checkpoint(single).model_config("float32"))
    assert num_elements(headers) == model.num_parameters()


def test_weights_arrive_exactly(tmp_path: Path) -> None:
    """bf16 files into an fp32 model: embedding and head checked through the engine's own eyes."""
    path = make_checkpoint(tmp_path, dtype="bfloat16", num_hidden_layers=1)
    rounded = tmp_path / "rounded"
    make_checkpoint(rounded, num_hidden_layers=1)
    tensors = load_file(path / "model.safetensors")
    save_file({n: t.float() for n, t in tensors.items()}, rounded / "model.safetensors")
    logits = []
    for directory in (path, rounded):
        engine = LLM(directory, decode_mode="block", num_threads=1).engine
        logits.append(engine.forward([1, 2, 3], [0, 1, 2], [3, 3, 3], [0]))
    np.testing.assert_array_equal(*logits)


def test_tied_embeddings_and_harmless_tensors(tmp_path: Path) -> None:
    tied = make_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    tensors = load_file(tied / "model.safetensors")
    assert "lm_head.weight" not in tensors
    expected = output_ids(tied)
    tensors["lm_head.weight"] = torch.zeros(97, 64)  # ignored: the embeddings are the head
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(tensors, tied / "model.safetensors")
    assert output_ids(tied) == expected


def is_mapped_from(address: int, directory: Path) -> bool:
    """Whether an address of this process lies in a memory-mapped file of `directory`."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, name = line.partition(" ")
        low, high = (int(part, 16) for part in span.split("-"))
        if low <= address < high:
            return str(directory) in name
    return False


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_not_held_twice(tmp_path: Path, dtype: str) -> None:
    """The model copies each tensor straight out of the mapped file."""
    path = make_checkpoint(tmp_path, shards=2, dtype=dtype)

    class Recorder:
        config = load_checkpoint(path).model_config("float32")
        expected = _C.Model(config).expected_tensors()

        def __init__(self) -> None:
            self.names: list[str] = []
            self.finished = False

        def expected_tensors(self) -> dict[str, tuple[int, ...]]:
            return self.expected

        def load_tensor(self, name: str, data: np.ndarray) -> None:
            address = data.__array_interface__["data"][0]
            assert is_mapped_from(address, path), f"{name} was copied on the way"
            self.names.append(name)

        def finish_loading(self) -> None:
            self.finished = True

    recorder = Recorder()
    load_weights(recorder, path)  # type: ignore[arg-type]
    assert sorted(recorder.names) == sorted(recorder.expected) and recorder.finished


def test_inspect_says_what_was_understood(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, tokenizer=True, shards=2, dtype="bfloat16")
    found = inspect_checkpoint(path)
    assert found.problems == []
    facts = found.facts
    assert facts["block length"] == "8 (from config.json (block_size))"
    assert facts["decode modes"] == "ar, block, chunk, elastic"
    assert facts["eos token ids"] == "262"
    assert "BF16" in facts["weights"] and "2 files" in facts["weights"]
    assert facts["chat template"] == "yes"
    assert int(facts["parameters"].replace(",", "")) == num_elements(read_headers(path))


def test_inspect_lists_problems(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, block_size=None)
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(65)
    tensors["stranger"] = torch.zeros(1)
    save_sharded(tensors, path, 1)
    problems = "\n".join(inspect_checkpoint(path).problems)
    assert "pass block_length=" in problems
    assert "model.norm.weight has a wrong shape: expected [64], got [65]" in problems
    assert "1 tensors are unexpected: stranger" in problems
    (path / "model.safetensors").unlink()
    assert "has neither" in inspect_checkpoint(path).problems[-1]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architectures": ["LlamaForCausalLM"]}, "unknown architecture LlamaForCausalLM; supp"),
        ({"architectures": ...}, "unknown architecture model_type 'sdar2'; supported: SDARFor"),
        ({"architectures": "SDAR"}, "architectures must be of type list, got 'SDAR'"),
        ({"rope_parameters": 5}, "rope_parameters must be of type dict, got 5"),
        ({"layer_types": 5}, "layer_types must be of type list, got 5"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be of type bool, got 'false'"),
        ({"grown_from": 5}, "grown_from must be of type dict, got 5"),
        ({"vocab_size": 2**31}, r"vocab_size must be below 2\*\*31, got 2147483648"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling = .*'yarn'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type = 'yarn' is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window = True is not supported"),
        ({"layer_types": ["sliding_attention"]}, "layer_types = 'sliding_attention'"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config = \{'bits': 4\}"),
        ({"hidden_size": ...}, "config.json lacks hidden_size"),
        ({"hidden_size": "64"}, "hidden_size must be an int >= 1, got '64'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be an int >= 1, got 0"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of .* 3"),
        ({"head_dim": 15}, "head_dim must be even, got 15"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number > 0, got nan"),
        ({"rope_theta": -1}, "rope_theta must be a number > 0, got -1"),
        ({"mask_token_id": 97}, r"mask_token_id must be an int in \[0, 97\), got 97"),
        ({"block_size": 0}, r"block_length must be an int in \[1, 513\), got 0"),
        ({"eos_token_id": [3, 200]}, r"eos_token_id must be an int in \[0, 97\), got 200"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = make_checkpoint(tmp_path)
    rewrite_config(path, {"model_type": "sdar2"} | changes)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path)


def test_generation_config_values_are_checked(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, generation_config={"top_p": 1.5})
    with pytest.raises(ValueError, match=r"generation_config\.json: .*top_p .*got 1\.5"):
        load_checkpoint(tmp_path)


def test_an_eos_of_null_does_not_hide_the_other_files(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, eos_token_id=5, generation_config={"eos_token_id": None})
    assert load_checkpoint(tmp_path).eos_token_ids == (5,)


def test_broken_json(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path)
    (path / "config.json").write_text('{"architectures": ')
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load_checkpoint(path)
    (path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object, got list"):
        load_checkpoint(path)
