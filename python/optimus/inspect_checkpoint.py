"""What `optimus inspect` reports about a checkpoint directory."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .config import ARCHITECTURES, Checkpoint, load_checkpoint
from .options import DTYPE_BYTES, EngineOptions, plan_kv_cache
from .sampling_params import DEFAULT_CONFIDENCE_THRESHOLD
from .tokenizer import Tokenizer
from .weights import num_elements, problems, read_headers


@dataclass
class Inspection:
    """What was understood, in order of display, and what is wrong (empty: it loads)."""

    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def inspect_checkpoint(
    path: Path, *, block_length: int | None = None, mask_token_id: int | None = None
) -> Inspection:
    """Reads the JSON files, tensor headers and tokenizer of a directory; no weights.

    Raises ValueError if config.json itself cannot be understood.
    """
    checkpoint = load_checkpoint(path, block_length=block_length, mask_token_id=mask_token_id)
    found = Inspection()
    _describe_model(checkpoint, found)
    _describe_decoding(checkpoint, found)
    _describe_weights(checkpoint, found)
    _describe_tokenizer(checkpoint, found)
    _describe_memory(checkpoint, found)
    return found


def _describe_model(checkpoint: Checkpoint, found: Inspection) -> None:
    c = checkpoint
    found.facts |= {
        "directory": str(c.path),
        "architecture": f"{c.architecture} ({ARCHITECTURES[c.architecture]})",
        "layers": c.num_layers,
        "hidden / intermediate": f"{c.hidden_size} / {c.intermediate_size}",
        "heads": f"{c.num_q_heads} query, {c.num_kv_heads} key/value, {c.head_dim} wide",
        "vocabulary": c.vocab_size,
        "embeddings": "tied" if c.tie_word_embeddings else "untied",
        "positions": f"{c.max_position_embeddings}, rope theta {c.rope_theta:g}",
        "rms norm eps": f"{c.rms_norm_eps:g}",
    }
    if c.true_vocab_size != c.vocab_size:
        found.facts["vocabulary"] = f"{c.true_vocab_size}, padded to {c.vocab_size}"
    if c.grown_from is not None:
        origin = c.grown_from
        found.facts["grown from"] = (
            f"{origin.get('name')} to {origin.get('to')}, seed {origin.get('seed')}, parent's "
            f"weights sha256 {origin.get('weights_sha256')}"
        )


def _describe_decoding(checkpoint: Checkpoint, found: Inspection) -> None:
    c, g = checkpoint, checkpoint.generation
    threshold = g.confidence_threshold
    found.facts |= {
        "block length": _with_source(c.block_length, c.block_length_source),
        "mask token id": _with_source(c.mask_token_id, c.mask_token_id_source),
        "eos token ids": ", ".join(map(str, c.eos_token_ids)) or "none: outputs end at max_tokens",
        "decode modes": "ar",
        "confidence threshold": f"{DEFAULT_CONFIDENCE_THRESHOLD} (default)"
        if threshold is None
        else f"{threshold} (generation_config.json)",
        "sampling": f"temperature {g.temperature:g}, top_k {g.top_k}, top_p {g.top_p:g}",
    }
    try:
        c.check_diffusion("elastic")
        found.facts["decode modes"] = "ar, block, chunk, elastic"
    except ValueError as error:
        if c.architecture != "Qwen3ForCausalLM":
            found.problems.append(str(error))


def _describe_weights(checkpoint: Checkpoint, found: Inspection) -> None:
    from .native import _C

    try:
        headers = read_headers(checkpoint.path)
    except ValueError as error:
        found.facts["weights"] = "cannot be read"
        found.problems.append(str(error))
        return
    dtypes = Counter(info.dtype for info in headers.values())
    files = {info.file for info in headers.values()}
    size = sum(file.stat().st_size for file in files)
    found.facts["parameters"] = f"{num_elements(headers):,}"
    found.facts["weights"] = (
        f"{len(headers)} tensors in {len(files)} file{'s' * (len(files) > 1)}, {size:,} bytes, "
        + ", ".join(dtypes)
    )
    expected = _C.Model(checkpoint.model_config("bfloat16")).expected_tensors()
    found.problems += problems(headers, expected, tied=checkpoint.tie_word_embeddings)


def _describe_tokenizer(checkpoint: Checkpoint, found: Inspection) -> None:
    try:
        tokenizer = Tokenizer.load(checkpoint.path)
    except ValueError as error:
        found.facts["tokenizer"] = "cannot be read"
        found.problems.append(str(error))
        return
    if tokenizer is None:
        found.facts["tokenizer"] = "none: token ids in and out"
        return
    found.facts["tokenizer"] = f"{tokenizer.vocab_size} entries"
    found.facts["chat template"] = "yes" if tokenizer.chat_template else "no"
    if tokenizer.vocab_size > checkpoint.vocab_size:
        found.problems.append(
            f"the tokenizer has {tokenizer.vocab_size} entries, the model {checkpoint.vocab_size}"
        )


def _describe_memory(checkpoint: Checkpoint, found: Inspection) -> None:
    from .display import format_bytes

    for dtype, size in DTYPE_BYTES.items():
        plan = plan_kv_cache(checkpoint, EngineOptions(), dtype)
        per_token = plan.page_bytes // plan.page_size
        found.facts[f"KV memory, {dtype}"] = (
            f"{format_bytes(per_token)} a token, "
            f"{format_bytes(plan.pages_per_request * plan.page_bytes)} for one request of "
            f"{plan.max_model_len} tokens"
        )
        parameters = found.facts.get("parameters")
        if parameters is not None:
            weight_bytes = int(parameters.replace(",", "")) * size
            found.facts[f"weights, {dtype}"] = format_bytes(weight_bytes)


def _with_source(value: int | None, source: str) -> str:
    return "not given" if value is None else f"{value} (from {source})"
