"""A small simulated engine for tests of the load harness: made-up traces, a made-up curve."""

from __future__ import annotations

from typing import Any

import optimus

_C = optimus._C
BLOCK = 8


def make_trace(num_blocks: int = 4, prompt_len: int = 16) -> _C.CommitTrace:
    """An answer of whole blocks in which the first two masks are always sure."""
    begin, confidences = [0], []
    for position in range(num_blocks * BLOCK):
        row = [0.95, 0.95] + [0.5] * BLOCK
        confidences += row[: BLOCK - position % BLOCK]
        begin.append(len(confidences))
    return _C.CommitTrace(prompt_len=prompt_len, row_begin=begin, confidences=confidences)


def make_profile(base_ms: float = 4.0, ms_per_row: float = 0.02) -> _C.LatencyProfile:
    """A line from one row to 4096."""
    profile = _C.LatencyProfile()
    profile.decode = [(rows, base_ms + ms_per_row * rows) for rows in (1, 64, 512, 4096)]
    return profile


def engine_config(**fields: Any) -> _C.EngineConfig:
    config = _C.EngineConfig()
    values: dict[str, Any] = {
        "decode_mode": "elastic", "kv_policy": "auto", "block_length": BLOCK, "max_num_seqs": 8,
        "max_num_batched_rows": 256, "max_model_len": 256, "page_size": 16, "num_pages": 256,
    }  # fmt: skip
    for name, value in (values | fields).items():
        setattr(config, name, value)
    return config


def simulator_config(**fields: Any) -> _C.SimulatorConfig:
    """`fields` of the engine's configuration."""
    config = _C.SimulatorConfig()
    config.engine = engine_config(**fields)
    config.latency = make_profile()
    return config


def sampling_params(max_tokens: int) -> _C.SamplingParams:
    params = _C.SamplingParams()
    params.max_tokens = max_tokens
    params.ignore_eos = True
    return params


def run_simulator(num_requests: int = 6, **fields: Any) -> _C.Simulator:
    """Requests of 32 tokens that arrive 5 ms apart, run to their end."""
    simulator = _C.Simulator(simulator_config(**fields), [make_trace()])
    for i in range(num_requests):
        simulator.add_request(0.005 * i, 16, 0, sampling_params(32))
    simulator.run(1e9, 100_000)
    return simulator
