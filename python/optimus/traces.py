"""Commit traces: what a model says about the masks of real answers, for the simulator to replay.

csrc/engine/commit_process.h says what a trace holds. The demo model's ship with the package.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .cache import model_hash, write_atomically
from .config import DEMO_MODEL
from .evaluate import Task, generate_answers
from .llm import LLM
from .machine import git_commit
from .sampling_params import SamplingParams

if TYPE_CHECKING:
    from . import _C

DEMO_TRACES = DEMO_MODEL / "commit_traces.npz"
# A confidence is stored as one byte, floor(CODES_PER_DECADE * -log10(1 - confidence)), and read
# back at the middle of its step: 1 - confidence to 3.7%, in order up to where float32 ends, and on
# the right side of thresholds like 0.9, 0.99 and 0.999.
CODES_PER_DECADE = 32
_MAX_CODE = 255


@dataclass(frozen=True)
class Trace:
    """One answer. Row j of `confidences`: of output positions j, j + 1, ... to the end of j's
    block, while everything before j is known. family: of the task.
    """

    family: str
    prompt_len: int
    num_tokens: int
    block_length: int
    confidences: np.ndarray

    def row_begin(self) -> np.ndarray:
        """[num_tokens + 1] where each row begins: rows end with their block."""
        positions = self.prompt_len + np.arange(self.num_tokens)
        lengths = self.block_length - positions % self.block_length
        return np.concatenate([[0], np.cumsum(lengths)])

    def to_native(self) -> _C.CommitTrace:
        from .native import _C

        return _C.CommitTrace(
            prompt_len=self.prompt_len,
            row_begin=self.row_begin().tolist(),
            confidences=self.confidences.tolist(),
        )


def record_traces(llm: LLM, tasks: Sequence[Task], params: SamplingParams) -> list[Trace]:
    """Decodes every task in block mode, and then asks the model for every row of every answer: one
    forward of a block per output token.

    llm: its weights; an engine of its own runs. Raises ValueError unless decoding is greedy: a
    sampled token's confidence is another matter.
    """
    native = params.to_native(llm.checkpoint.generation, 0)
    if native.temperature != 0:
        raise ValueError(f"[traces] temperature must be 0, got {native.temperature}")
    llm = llm.with_options(decode_mode="block", enable_prefix_cache=False)
    traces = []
    for task, output in zip(tasks, generate_answers(llm, tasks, params), strict=True):
        prompt, answer = output.prompt_token_ids, output.outputs[0].token_ids
        if not answer:
            continue
        confidences = _rows_of(llm, prompt, answer)
        block = llm.engine.config.block_length
        traces.append(Trace(task.family, len(prompt), len(answer), block, confidences))
    return traces


def _rows_of(llm: LLM, prompt: Sequence[int], answer: Sequence[int]) -> np.ndarray:
    engine, block, mask = llm.engine, llm.engine.config.block_length, llm.checkpoint.mask_token_id
    assert mask is not None
    known = [*prompt, *answer]
    pages = list(range(-(-(len(known) + block) // engine.config.page_size)))
    first = len(prompt) // block * block
    stride = engine.config.max_num_batched_rows // block * block

    def forward(begin: int, token_ids: list[int]) -> np.ndarray:
        positions = range(begin, begin + len(token_ids))
        limits = [(p // block + 1) * block for p in positions]
        return engine.forward(token_ids, list(positions), limits, pages)

    for begin in range(0, first, stride):
        forward(begin, known[begin : min(begin + stride, first)])
    rows = []
    for begin in range(first, len(known), block):
        end = begin + block
        for j in range(max(begin, len(prompt)), min(end, len(known))):
            logits = forward(begin, known[begin:j] + [mask] * (end - j))
            rows.append(_top_probability(logits[j - begin :]))
        if end < len(known):  # the clean block, for the next ones to see
            forward(begin, known[begin:end])
    return np.concatenate(rows)


def _top_probability(logits: np.ndarray) -> np.ndarray:
    """The probability of each row's most likely token."""
    highest = logits.max(axis=1, keepdims=True)
    return (1.0 / np.exp(logits - highest, dtype=np.float64).sum(axis=1)).astype(np.float32)


# ------------------------------------------------------------------------------------------- files


def describe_traces(llm: LLM, params: SamplingParams) -> dict[str, Any]:
    """How traces were made: what `save_traces` keeps of it."""
    native = params.to_native(llm.checkpoint.generation, 0)
    return {
        "model_hash": model_hash(llm.checkpoint.path),
        "confidence_threshold": round(native.confidence_threshold, 6),
        "dtype": llm.dtype,
        "commit": git_commit(),
    }


def save_traces(file: Path, traces: Sequence[Trace], about: dict[str, Any]) -> None:
    """Writes a compressed .npz: about (JSON text), block_length, families (names), and per trace
    family (an index), prompt_len, num_tokens; then the codes of all confidences in one array."""
    if not traces or len({t.block_length for t in traces}) != 1:
        raise ValueError("[traces] needs traces of one block length")
    families = sorted({t.family for t in traces})
    data = io.BytesIO()
    np.savez_compressed(
        data,
        about=np.array(json.dumps(about)),
        block_length=np.array(traces[0].block_length),
        families=np.array(families),
        family=np.array([families.index(t.family) for t in traces], np.int32),
        prompt_len=np.array([t.prompt_len for t in traces], np.int32),
        num_tokens=np.array([t.num_tokens for t in traces], np.int32),
        codes=encode(np.concatenate([t.confidences for t in traces])),
    )
    write_atomically(file, data.getvalue())


def load_traces(path: str | Path | None = None) -> list[Trace]:
    """Traces of a file of `save_traces`; None is the demo model's. Raises ValueError."""
    file = DEMO_TRACES if path is None else Path(path)
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return _parse(arrays)
    except (OSError, KeyError, ValueError, IndexError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"[traces] {file} is no file of commit traces: {error!r}") from None


def trace_info(path: str | Path | None = None) -> dict[str, Any]:
    """What `save_traces` was told about a file."""
    with np.load(DEMO_TRACES if path is None else Path(path), allow_pickle=False) as arrays:
        return dict(json.loads(str(arrays["about"])))


def _parse(arrays: Any) -> list[Trace]:
    names = [str(name) for name in arrays["families"]]
    block_length = int(arrays["block_length"])
    confidences = decode(arrays["codes"])
    traces, begin = [], 0
    for family, prompt_len, num_tokens in zip(
        arrays["family"], arrays["prompt_len"], arrays["num_tokens"], strict=True
    ):
        trace = Trace(names[family], int(prompt_len), int(num_tokens), block_length, confidences)
        end = begin + int(trace.row_begin()[-1])
        traces.append(
            Trace(
                trace.family, trace.prompt_len, trace.num_tokens, block_length,
                confidences[begin:end],
            )
        )  # fmt: skip
        begin = end
    if begin != len(confidences):
        raise ValueError(f"{len(confidences)} confidences, {begin} were expected")
    return traces


def encode(confidences: np.ndarray) -> np.ndarray:
    """Bytes, as CODES_PER_DECADE says."""
    rest = np.maximum(1.0 - confidences.astype(np.float64), 1e-12)
    return np.clip(-np.log10(rest) * CODES_PER_DECADE, 0, _MAX_CODE).astype(np.uint8)


def decode(codes: np.ndarray) -> np.ndarray:
    return (1.0 - 10.0 ** (-(codes + 0.5) / CODES_PER_DECADE)).astype(np.float32)
