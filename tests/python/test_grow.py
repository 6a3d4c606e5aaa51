"""Grown checkpoints compute the parent's function: against transformers and through the engine."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from checkpoints import make_checkpoint
from engine_testing import engine_model, make_engine
from exact_logits import TOLERANCE, ExactLogits
from optimus import LLM, SamplingParams
from optimus.cli import main
from optimus.config import DEMO_MODEL, load_checkpoint
from optimus.evaluate import load_tasks
from optimus.grow import PRESETS, grow, grown_checkpoint, load_target, weights_sha256
from optimus.grow_tensors import FAINT, grow_tensors, head_scale, layer_places, tensor_shapes
from oracle_models import fresh_seed
from reference_decoding import block_kv_limits, block_visibility, transformers_forward

DEMO_TARGET = {
    "vocab_size": 3000, "hidden_size": 512, "intermediate_size": 1280, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128,
    "tie_word_embeddings": False,
}  # fmt: skip


def shape(
    vocab: int, hidden: int, mlp: int, layers: int, q: int, kv: int, head: int, tied: bool
) -> dict[str, Any]:
    return {
        "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": mlp,
        "num_hidden_layers": layers, "num_attention_heads": q, "num_key_value_heads": kv,
        "head_dim": head, "tie_word_embeddings": tied,
    }  # fmt: skip


# parent, target
GROWTHS = {
    "nothing": (shape(64, 32, 48, 2, 4, 2, 16, False),) * 2,
    "everything": (
        shape(64, 32, 48, 2, 4, 2, 16, False), shape(131, 96, 200, 5, 12, 4, 32, False),
    ),
    "odd": (shape(61, 33, 47, 2, 3, 3, 12, True), shape(77, 71, 50, 3, 10, 5, 36, False)),
    "tied-stays-tied": (shape(50, 24, 40, 1, 4, 1, 8, True), shape(90, 40, 41, 4, 5, 1, 32, True)),
    "heads-alone": (shape(40, 48, 64, 2, 2, 1, 16, False), shape(40, 48, 64, 2, 8, 2, 16, False)),
    "head-dim-alone": (
        shape(40, 48, 64, 2, 2, 1, 16, False), shape(40, 48, 64, 2, 2, 1, 32, False),
    ),
    "hidden-alone": (shape(40, 48, 64, 2, 2, 1, 16, True), shape(40, 480, 64, 2, 2, 1, 16, True)),
    "layers-alone": (shape(40, 48, 64, 3, 2, 1, 16, False), shape(40, 48, 64, 8, 2, 1, 16, False)),
    "ten-fold": (shape(64, 20, 30, 2, 2, 1, 8, False), shape(640, 200, 300, 20, 20, 10, 80, False)),
}  # fmt: skip


def write_target(path: Path, shapes: dict[str, Any]) -> Path:
    """A config.json of the given shapes."""
    path.mkdir(exist_ok=True)
    config = {
        "architectures": ["SDARForCausalLM"], "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, **shapes,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return path


def grown(tmp_path: Path, name: str, seed: int, **arguments: Any) -> tuple[Path, Path]:
    parent_shape, target_shape = GROWTHS[name]
    parent = make_checkpoint(tmp_path / "parent", seed=seed, **parent_shape)
    target = write_target(tmp_path / "target", target_shape)
    arguments = {"dtype": "float32", "seed": seed} | arguments
    grow(parent, target, tmp_path / "grown", **arguments)
    return parent, tmp_path / "grown"


def oracle(path: Path) -> Qwen3ForCausalLM:
    """The checkpoint in transformers, fp32."""
    config = json.loads((path / "config.json").read_text())
    tensors = {n: t.float() for f in path.glob("*.safetensors") for n, t in load_file(f).items()}
    if config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    names = (*DEMO_TARGET, "max_position_embeddings", "rms_norm_eps")
    model = Qwen3ForCausalLM(
        Qwen3Config(
            **{name: config[name] for name in names},
            rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
            attention_bias=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
            attn_implementation="sdpa",
        )
    ).eval()
    model.load_state_dict(tensors, strict=True)
    return model


def transformers_logits(model: Qwen3ForCausalLM, tokens: np.ndarray, block: int) -> np.ndarray:
    count = len(tokens)
    return transformers_forward(model)(tokens, np.arange(count), block_visibility(count, block))


def engine_logits(model: Qwen3ForCausalLM, tokens: np.ndarray, block: int) -> np.ndarray:
    engine = make_engine(engine_model(model), num_pages=16, page_size=16)
    positions = list(range(len(tokens)))
    limits = block_kv_limits(positions, block)
    return engine.forward(tokens.tolist(), positions, limits, [3, 1, 7, 5])


@pytest.mark.parametrize("name", GROWTHS)
def test_logits_are_the_parents(tmp_path: Path, name: str) -> None:
    seed = fresh_seed()
    parent, path = grown(tmp_path, name, seed)
    small, big = oracle(parent), oracle(path)
    vocab = small.config.vocab_size
    tokens = np.random.default_rng(seed).integers(0, vocab, 56)
    exact = ExactLogits(small, tokens, block_visibility(len(tokens), 8))
    assert exact.logits.std() > 1
    for logits in (transformers_logits(big, tokens, 8), engine_logits(big, tokens, 8)):
        assert logits.shape[1] == big.config.vocab_size
        exact.check(logits[:, :vocab], list(range(len(tokens))))


def test_demo_logits_are_the_parents(tmp_path: Path) -> None:
    grow(DEMO_MODEL, write_target(tmp_path, DEMO_TARGET), tmp_path / "grown", dtype="float32")
    small, big = oracle(DEMO_MODEL), oracle(tmp_path / "grown")
    tokens = np.array(LLM(decode_mode="block").tokenizer.encode(load_tasks(None, 1)[0].prompt))
    tokens = np.concatenate([tokens[:24], np.full(40, 5)])  # 5 is the mask
    expected = transformers_logits(small, tokens, 32)
    for logits in (transformers_logits(big, tokens, 32), engine_logits(big, tokens, 32)):
        error = np.abs(logits[:, :2048] - expected).max()
        print(f"largest error {error:.2e}, logits {expected.std():.2f}")
        assert error < 2e-4


@pytest.mark.parametrize("mode", ["block", "chunk", "ar"])
def test_demo_generates_the_same(tmp_path: Path, mode: str) -> None:
    checkpoint = grow(
        DEMO_MODEL, write_target(tmp_path, DEMO_TARGET), tmp_path / "grown", dtype="float32"
    )
    prompts = [[{"role": "user", "content": task.prompt}] for task in load_tasks(None, 6)]
    params = SamplingParams(max_tokens=96)
    # Not "auto", which refreshes where measured times allow.
    kv_policy = "freeze" if mode == "chunk" else "auto"
    parent = LLM(decode_mode=mode, kv_policy=kv_policy, max_num_seqs=6)
    big = LLM(checkpoint.path, decode_mode=mode, kv_policy=kv_policy, max_num_seqs=6)
    assert big.checkpoint.generation == parent.checkpoint.generation
    for a, b in zip(parent.chat(prompts, params), big.chat(prompts, params), strict=True):
        assert a.outputs[0].text == b.outputs[0].text
        assert a.outputs[0].token_ids == b.outputs[0].token_ids
        assert a.outputs[0].steps == b.outputs[0].steps


def test_bfloat16_error_is_rounding(tmp_path: Path) -> None:
    """Against the fp32 parent: bf16 weights of the grown model cost what bf16 gains cost."""
    grow(DEMO_MODEL, write_target(tmp_path, DEMO_TARGET), tmp_path / "grown", dtype="bfloat16")
    small, big = oracle(DEMO_MODEL), oracle(tmp_path / "grown")
    tokens = np.random.default_rng(0).integers(6, 2048, 64)
    expected = transformers_logits(small, tokens, 32)
    error = transformers_logits(big, tokens, 32)[:, :2048] - expected
    relative = float(np.sqrt((error**2).mean() / (expected**2).mean()))
    print(f"relative error {relative:.4f}")
    assert relative < 0.01


def test_padded_tokens_are_never_generated(tmp_path: Path) -> None:
    """Their logits are often the largest, at any temperature."""
    parent = make_checkpoint(tmp_path / "parent", vocab_size=64, logit_scale=0.5)
    target = write_target(tmp_path / "target", GROWTHS["everything"][1] | {"vocab_size": 900})
    checkpoint = grow(parent, target, tmp_path / "grown", dtype="float32")
    assert (checkpoint.true_vocab_size, checkpoint.vocab_size) == (64, 900)
    tokens = np.arange(40)
    logits = transformers_logits(oracle(checkpoint.path), tokens, 8)
    assert (logits.argmax(-1) >= 64).mean() > 0.5
    small, big = (LLM(path, decode_mode="block", seed=3) for path in (parent, checkpoint.path))
    for temperature in (0.0, 1.0, 5.0):
        params = SamplingParams(max_tokens=64, temperature=temperature, logprobs=0)
        prompts = [[1, 2, 3], [9] * 20]
        for a, b in zip(
            small.generate(prompts, params), big.generate(prompts, params), strict=True
        ):
            assert a.outputs[0].token_ids == b.outputs[0].token_ids
            np.testing.assert_allclose(a.outputs[0].logprobs, b.outputs[0].logprobs, atol=1e-4)


def test_everything_is_alive(tmp_path: Path) -> None:
    """Weights are zero only where a real output would read an added input; no activation is."""
    parent, path = grown(tmp_path, "everything", 1)
    real, added = load_checkpoint(parent), load_checkpoint(path)
    tensors = load_file(path / "model.safetensors")
    real_layers = set(layer_places(real, added))
    assert real_layers == {0, 2}
    h, big_h = real.hidden_size, added.hidden_size
    added_heads = added.num_q_heads * added.head_dim - real.num_q_heads * real.head_dim
    for name, tensor in tensors.items():
        zeros = int((tensor == 0).sum())
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        expected = 0
        if layer in real_layers:
            expected = {
                "q_proj": real.num_q_heads * real.head_dim * (big_h - h),
                "k_proj": real.num_kv_heads * real.head_dim * (big_h - h),
                "v_proj": real.num_kv_heads * real.head_dim * (big_h - h),
                "gate_proj": real.intermediate_size * (big_h - h),
                "up_proj": real.intermediate_size * (big_h - h),
                "o_proj": h * added_heads,
                "down_proj": h * (added.intermediate_size - real.intermediate_size),
                "lm_head": real.vocab_size * (big_h - h),
            }.get(name.split(".")[-2], 0)
        elif "o_proj" in name or "down_proj" in name:
            expected = h * tensor.shape[1]
        assert expected <= zeros <= expected + 2, name  # a random number may be zero
    with torch.no_grad():
        states = oracle(path)(torch.arange(64)[None], output_hidden_states=True).hidden_states
    for state in states[:-1]:
        faint = state[..., h:].square().mean().sqrt() / state[..., :h].square().mean().sqrt()
        assert 0.02 * FAINT < faint < 10 * FAINT
        assert (state == 0).sum() == 0
    assert states[-1][..., h:].square().mean().sqrt() > 1e-3  # after the norm: ordinary numbers


def test_seeds_and_dtypes(tmp_path: Path) -> None:
    parent, path = grown(tmp_path, "everything", 1)
    target = load_checkpoint(path)
    first = dict(grow_tensors(load_checkpoint(parent), target, 1, torch.float32))
    written = load_file(path / "model.safetensors")
    assert list(first) == list(tensor_shapes(target))
    assert all(torch.equal(written[name], tensor) for name, tensor in first.items())
    half = dict(grow_tensors(load_checkpoint(parent), target, 1, torch.bfloat16))
    for name, tensor in half.items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.float(), first[name], rtol=2**-7, atol=0)
    other = dict(grow_tensors(load_checkpoint(parent), target, 2, torch.float32))
    name = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first["model.layers.3.mlp.up_proj.weight"])


def test_shards_hold_the_same(tmp_path: Path) -> None:
    parent, path = grown(tmp_path, "everything", 1)
    whole = load_file(path / "model.safetensors")
    sharded = tmp_path / "sharded"
    seen: list[tuple[str, int, int]] = []
    grow(
        parent, tmp_path / "target", sharded, dtype="float32", seed=1, max_shard_bytes=300_000,
        on_tensor=lambda *event: seen.append(event),
    )  # fmt: skip
    assert [event[1] for event in seen] == list(range(1, len(whole) + 1))
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 3 and not (sharded / "model.safetensors").exists()
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in whole.values())
    parts = {file: load_file(sharded / file) for file in files}
    assert index["weight_map"] == {name: file for file, part in parts.items() for name in part}
    for part in parts.values():
        assert sum(t.numel() * 4 for t in part.values()) <= 300_000
        assert all(torch.equal(whole[name], tensor) for name, tensor in part.items())
    assert weights_sha256(sharded) != weights_sha256(path)
    LLM(sharded, decode_mode="block").generate([[1, 2]], SamplingParams(max_tokens=4))


def test_the_target_says_where_it_comes_from(tmp_path: Path) -> None:
    parent, path = grown(tmp_path, "everything", 5)
    config = json.loads((path / "config.json").read_text())
    assert config["grown_from"] == {
        "name": "parent", "weights_sha256": weights_sha256(parent), "to": "target", "seed": 5,
    }  # fmt: skip
    assert config["true_vocab_size"] == 64 and config["vocab_size"] == 131
    assert config["rms_norm_eps"] == pytest.approx(1e-6 * 32 / 96)
    assert config["rope_theta"] == 10000.0  # the parent's
    assert config["block_size"] == 8 and config["mask_token_id"] == 63


def test_growing_twice(tmp_path: Path) -> None:
    parent, path = grown(tmp_path, "everything", 1)
    target = write_target(tmp_path / "larger", shape(200, 128, 256, 6, 16, 4, 64, False))
    twice = grow(path, target, tmp_path / "twice", dtype="float32")
    assert twice.true_vocab_size == 64
    tokens = np.arange(50)
    expected = transformers_logits(oracle(parent), tokens, 8)
    actual = transformers_logits(oracle(twice.path), tokens, 8)[:, :64]
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 31}, "hidden_size must be at least the parent's 32, got 31"),
        ({"vocab_size": 60}, "vocab_size must be at least the parent's 64, got 60"),
        ({"intermediate_size": 40}, "intermediate_size must be at least the parent's 48, got 40"),
        ({"num_hidden_layers": 1}, "num_layers must be at least the parent's 2, got 1"),
        ({"num_attention_heads": 13}, "num_attention_heads 13 is no multiple"),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 4},
            "query heads per key/value head must be at least the parent's 2, got 1",
        ),
        ({"num_key_value_heads": 1}, "num_kv_heads must be at least the parent's 2, got 1"),
        ({"head_dim": 24}, "head_dim must be a multiple of the parent's 16, got 24"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings must be false"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    parent_shape, target_shape = GROWTHS["everything"]
    parent = make_checkpoint(tmp_path / "parent", **parent_shape)
    target = write_target(tmp_path / "target", target_shape | change)
    with pytest.raises(ValueError, match=re.escape(message)):
        grow(parent, target, tmp_path / "grown")
    assert not (tmp_path / "grown").exists()


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown target 'sdar-9b': neither a preset"):
        grow(DEMO_MODEL, "sdar-9b", tmp_path / "grown")
    with pytest.raises(ValueError, match="dtype must be one of bfloat16, float32, got 'float16'"):
        grow(DEMO_MODEL, "sdar-8b", tmp_path / "grown", dtype="float16")
    (tmp_path / "grown").mkdir()
    (tmp_path / "grown" / "file").write_text("mine")
    with pytest.raises(ValueError, match="grown exists and is no empty directory"):
        grow(DEMO_MODEL, "sdar-8b", tmp_path / "grown")
    with pytest.raises(ValueError, match=r"must be named config\.json"):
        grow(DEMO_MODEL, tmp_path / "grown" / "file", tmp_path / "other")
    parent = load_checkpoint(DEMO_MODEL)
    with pytest.raises(ValueError, match="multiple of num_kv_heads 5"):
        grown_checkpoint(parent, dataclasses.replace(parent, num_kv_heads=5, num_q_heads=11), parent.path)  # fmt: skip  # noqa: E501


@pytest.mark.parametrize(("name", "billions"), [("1.7b", 2.0), ("4b", 4.4), ("8b", 8.2)])
def test_presets(name: str, billions: float) -> None:
    parent = load_checkpoint(DEMO_MODEL)
    target = grown_checkpoint(parent, load_target(f"sdar-{name}", parent), parent.path)
    total = sum(int(np.prod(shape)) for shape in tensor_shapes(target).values())
    assert total / 1e9 == pytest.approx(billions, abs=0.06)
    assert target.true_vocab_size == parent.vocab_size and target.vocab_size == 151936
    assert target.block_length == 32 and target.max_position_embeddings == 2048
    # A head's eps stays within a factor of two of the parent's.
    eps = target.rms_norm_eps * target.head_dim / (head_scale(parent, target) ** 2 * 64)
    assert 0.5 <= eps / parent.rms_norm_eps <= 2
    assert f"sdar-{name}" in PRESETS


def test_reports_name_the_parent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = write_target(tmp_path / "target", DEMO_TARGET)
    checkpoint = grow(DEMO_MODEL, target, tmp_path / "grown", dtype="float32")
    common = ["--num-prompts", "1", "--max-tokens", "8", "--json"]
    for command in (
        ["eval", "--mode", "block"],
        ["bench", "offline", "--modes", "block", "--concurrency", "1"],
    ):
        for model, expected in ((checkpoint.path, checkpoint.grown_from), (DEMO_MODEL, None)):
            with pytest.raises(SystemExit):
                main([*command, *common, "--model", str(model)])
            assert json.loads(capsys.readouterr().out)["grown_from"] == expected


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parent = make_checkpoint(tmp_path / "parent", tokenizer=True, **{**GROWTHS["odd"][0], "vocab_size": 264})  # fmt: skip  # noqa: E501
    target = write_target(tmp_path / "target", GROWTHS["odd"][1] | {"vocab_size": 300})
    out = tmp_path / "grown"
    with pytest.raises(SystemExit) as finished:
        main(["grow", str(out), "--to", str(target), "--model", str(parent), "--seed", "7"])
    assert finished.value.code == 0
    printed = capsys.readouterr().out
    assert "264, padded to 300" in printed and "seed 7" in printed
    with pytest.raises(SystemExit):
        main(["inspect", str(out), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert not report["problems"]
    assert report["facts"]["grown from"].endswith(weights_sha256(parent))
    with pytest.raises(SystemExit) as finished:
        main(["grow", str(out), "--to", str(target)])
    assert finished.value.code == 2


def test_made_in_parallel_are_the_same_tensors(tmp_path: Path) -> None:
    parent = load_checkpoint(DEMO_MODEL)
    target = dataclasses.replace(
        parent, hidden_size=512, num_layers=8, intermediate_size=1280, num_q_heads=8,
        num_kv_heads=4, head_dim=128, vocab_size=2304, tie_word_embeddings=False,
    )  # fmt: skip
    target = grown_checkpoint(parent, target, tmp_path)
    in_order = dict(grow_tensors(parent, target, 3))
    in_parallel = dict(grow_tensors(parent, target, 3, in_order=False))
    assert in_parallel.keys() == in_order.keys()
    for name, tensor in in_order.items():
        assert torch.equal(tensor.view(torch.int16), in_parallel[name].view(torch.int16)), name


def test_grown_while_loaded_is_the_grown_directory(tmp_path: Path) -> None:
    config = tmp_path / "target" / "config.json"
    config.parent.mkdir()
    shapes = json.loads((DEMO_MODEL / "config.json").read_text()) | {
        "hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1280,
    }  # fmt: skip
    config.write_text(json.dumps(shapes))
    grow(DEMO_MODEL, config, tmp_path / "grown", dtype="float32")
    options: dict[str, Any] = {"device": "cpu", "decode_mode": "block", "num_threads": 1}
    stored = LLM(tmp_path / "grown", dtype="float32", **options)
    loaded = LLM(grow_to=config, dtype="float32", **options)
    assert loaded.num_parameters == stored.num_parameters
    assert loaded.checkpoint.grown_from == stored.checkpoint.grown_from
    prompt, params = [9, 40, 300, 7], SamplingParams(temperature=0.0, max_tokens=40)
    ours, theirs = (llm.generate([prompt], params)[0].outputs[0] for llm in (loaded, stored))
    assert ours.token_ids == theirs.token_ids and ours.confidences == theirs.confidences
