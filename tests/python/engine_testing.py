"""The engine under test: built from an oracle's weights, driven to the end, compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import Qwen3ForCausalLM

from optimus import _C
from reference_decoding import DecodeParams, Result


def engine_model(
    oracle: Qwen3ForCausalLM, *, dtype: str = "float32", mask_token_id: int | None = None
) -> _C.Model:
    """The oracle's weights in an engine model. mask_token_id: default the vocabulary's last id."""
    shape = oracle.config
    config = _C.ModelConfig()
    config.vocab_size = shape.vocab_size
    config.hidden_size = shape.hidden_size
    config.intermediate_size = shape.intermediate_size
    config.num_layers = shape.num_hidden_layers
    config.num_q_heads = shape.num_attention_heads
    config.num_kv_heads = shape.num_key_value_heads
    config.head_dim = shape.head_dim
    config.max_position_embeddings = shape.max_position_embeddings
    config.rms_norm_eps = shape.rms_norm_eps
    config.rope_theta = shape.rope_parameters["rope_theta"]
    config.tie_word_embeddings = shape.tie_word_embeddings
    config.mask_token_id = shape.vocab_size - 1 if mask_token_id is None else mask_token_id
    config.dtype = dtype
    model = _C.Model(config)
    tensors = oracle.state_dict()
    for name in model.expected_tensors():
        tensor = tensors[name].contiguous()
        if dtype == "bfloat16":
            model.load_tensor(name, tensor.bfloat16().view(torch.uint16).numpy())
        else:
            model.load_tensor(name, tensor.numpy())
    model.finish_loading()
    return model


def make_engine(model: _C.Model, **overrides: Any) -> _C.Engine:
    """An engine with small defaults; `overrides` are fields of EngineConfig."""
    config = _C.EngineConfig()
    values: dict[str, Any] = {
        "decode_mode": "block",
        "kv_policy": "refresh",
        "block_length": 8,
        "chunk_length": 4,
        "recompute_block": False,
        "max_num_seqs": 16,
        "max_num_batched_rows": 256,
        "max_model_len": 256,
        "page_size": 16,
        "num_pages": 256,
        "enable_prefix_cache": False,
        "num_threads": 1,
        "eos_token_ids": [],
        "shuffle_pages": True,
    }
    values |= overrides
    for name, value in values.items():
        if not hasattr(config, name):
            raise AttributeError(f"EngineConfig has no field {name}")
        setattr(config, name, value)
    return _C.Engine(model, config)


def latency_profile(decode: Sequence[tuple[int, float]]) -> _C.LatencyProfile:
    """Steps that take the time of this table (rows, ms), whatever they read."""
    profile = _C.LatencyProfile()
    profile.decode = list(decode)
    return profile


def sampling_params(params: DecodeParams, **overrides: Any) -> _C.SamplingParams:
    """The engine's sampling parameters for the reference's; EOS ids travel as stop ids."""
    result = _C.SamplingParams()
    result.temperature = params.temperature
    result.top_k = params.top_k
    result.top_p = params.top_p
    result.seed = params.seed
    result.max_tokens = params.max_tokens
    result.ignore_eos = False
    result.stop_token_ids = sorted(params.eos_token_ids)
    result.unmasking_strategy = params.unmasking_strategy
    result.confidence_threshold = params.confidence_threshold
    result.entropy_bound = params.entropy_bound
    result.denoising_steps = params.denoising_steps
    for name, value in overrides.items():
        if not hasattr(result, name):
            raise AttributeError(f"SamplingParams has no field {name}")
        setattr(result, name, value)
    return result


@dataclass
class Finished:
    """What the engine says about a finished request."""

    state: _C.RequestState

    @property
    def token_ids(self) -> list[int]:
        return list(self.state.output_token_ids)

    @property
    def logprob_bits(self) -> bytes:
        """For bit-for-bit comparison."""
        logprobs = np.asarray(self.state.output_logprobs, dtype=np.float32)
        confidences = np.asarray(self.state.output_confidences, dtype=np.float32)
        return logprobs.tobytes() + confidences.tobytes()


def run_until_done(engine: _C.Engine, max_steps: int = 100_000) -> list[_C.StepRecord]:
    records = []
    while engine.has_unfinished():
        records.append(engine.step().record)
        assert len(records) <= max_steps, f"unfinished after {max_steps} steps"
    return records


def generate(
    engine: _C.Engine, prompts: Sequence[Sequence[int]], params: Sequence[_C.SamplingParams]
) -> list[Finished]:
    """Runs the requests together to their end and forgets them."""
    ids = [engine.add_request(list(p), s) for p, s in zip(prompts, params, strict=True)]
    run_until_done(engine)
    finished = []
    for request_id in ids:
        state = engine.request(request_id)
        assert state.status == "finished", f"request {request_id} is {state.status}"
        finished.append(Finished(state))
        engine.release(request_id)
    return finished


def assert_same_decoding(actual: Finished, expected: Result, what: str) -> None:
    """Tokens, the step of every commit and the end are equal; probabilities up to rounding."""
    state = actual.state
    assert actual.token_ids == expected.token_ids, what
    assert list(state.output_steps) == expected.steps, what
    assert state.finish_reason == expected.finish_reason, what
    assert state.metrics.nfe == expected.nfe, what
    np.testing.assert_allclose(state.output_logprobs, expected.logprobs, atol=2e-4, err_msg=what)
    np.testing.assert_allclose(
        state.output_confidences, expected.confidences, atol=2e-4, err_msg=what
    )
