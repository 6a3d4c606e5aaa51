"""Reads the JSON files of a Hugging Face checkpoint directory."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from . import _C

ARCHITECTURES = {"SDARForCausalLM": "block diffusion", "Qwen3ForCausalLM": "autoregressive"}
DEMO_MODEL = Path(__file__).parent / "assets" / "demo"

_T = TypeVar("_T")
_BLOCK_LENGTH_KEYS = ("block_size", "block_length")


@dataclass(frozen=True)
class GenerationDefaults:
    """What generation_config.json recommends; used where SamplingParams leaves a field None.

    temperature is 0.0 (greedy) when the file says `do_sample: false` or names no temperature.
    confidence_threshold is None when the file names none.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    confidence_threshold: float | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as understood: shapes in elements, ids in the vocabulary.

    block_length and mask_token_id are None when neither the files nor the caller gave them; the
    `*_source` fields say where a value came from.
    """

    path: Path
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    stored_dtype: str | None
    block_length: int | None
    block_length_source: str
    mask_token_id: int | None
    mask_token_id_source: str
    eos_token_ids: tuple[int, ...]
    generation: GenerationDefaults
    true_vocab_size: int  # rows of embedding and head behind it are padding, never generated
    grown_from: dict[str, Any] | None  # set by `optimus grow`: name and hash of the parent, seed

    def check_diffusion(self, decode_mode: str) -> None:
        """Raises ValueError unless block length and mask token are known, for `decode_mode`."""
        missing = [
            name
            for name, value in (
                ("block_length", self.block_length),
                ("mask_token_id", self.mask_token_id),
            )
            if value is None
        ]
        if not missing:
            return
        arguments = " and ".join(f"{name}=" for name in missing)
        if self.architecture == "Qwen3ForCausalLM":
            raise ValueError(
                f"[config] {self.path}: {self.architecture} is an autoregressive model, "
                f"decode_mode must be 'ar', got {decode_mode!r} (for a block-diffusion "
                f"fine-tune of it pass {arguments})"
            )
        raise ValueError(
            f"[config] {self.path}: neither config.json nor generation_config.json holds "
            f"{' and '.join(missing)}, which decode_mode {decode_mode!r} needs: pass {arguments}"
            + self._block_length_hint(missing)
        )

    def _block_length_hint(self, missing: list[str]) -> str:
        """The block length that stands in the directory's name, as a hint; never used."""
        digits = self.path.name.rpartition("-b")[2]
        if "block_length" in missing and digits.isdecimal():
            return f" (the directory's name suggests block_length={digits})"
        return ""

    def model_config(self, dtype: str) -> _C.ModelConfig:
        """The C++ model's configuration; `dtype` is that of weights, activations and KV."""
        from .native import _C

        config = _C.ModelConfig()
        config.vocab_size = self.vocab_size
        config.hidden_size = self.hidden_size
        config.intermediate_size = self.intermediate_size
        config.num_layers = self.num_layers
        config.num_q_heads = self.num_q_heads
        config.num_kv_heads = self.num_kv_heads
        config.head_dim = self.head_dim
        config.max_position_embeddings = self.max_position_embeddings
        config.rms_norm_eps = self.rms_norm_eps
        config.rope_theta = self.rope_theta
        config.tie_word_embeddings = self.tie_word_embeddings
        config.mask_token_id = -1 if self.mask_token_id is None else self.mask_token_id
        config.dtype = dtype
        config.true_vocab_size = self.true_vocab_size
        return config


def load_checkpoint(
    path: str | Path, *, block_length: int | None = None, mask_token_id: int | None = None
) -> Checkpoint:
    """Reads config.json and generation_config.json of a local directory.

    block_length, mask_token_id: override the files (published SDAR configs hold neither).
    Raises ValueError, naming file and value, for a missing directory or file, broken JSON, an
    unknown architecture, an unsupported feature, or a value out of range.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"[config] {path} is not a directory (models are local directories)")
    config = read_json(path / "config.json")
    if config is None:
        raise ValueError(f"[config] {path} has no config.json")
    generation = read_json(path / "generation_config.json") or {}
    architecture = _architecture(path, config)
    _check_features(path, config)
    fields = _Fields(path / "config.json", config)
    heads, kv_heads = fields.size("num_attention_heads"), fields.size("num_key_value_heads")
    if heads % kv_heads:
        raise ValueError(
            f"[config] {path}: num_attention_heads {heads} is no multiple of "
            f"num_key_value_heads {kv_heads}"
        )
    head_dim, vocab_size = fields.size("head_dim"), fields.size("vocab_size")
    if head_dim % 2:
        raise ValueError(f"[config] {path}: head_dim must be even, got {head_dim}")
    true_vocab_size = config.get("true_vocab_size", vocab_size)
    _check_range(path, "true_vocab_size", true_vocab_size, 1, vocab_size + 1)
    block, block_source = _find(block_length, _BLOCK_LENGTH_KEYS, config, generation)
    mask, mask_source = _find(mask_token_id, ("mask_token_id",), config, generation)
    _check_range(path, "block_length", block, 1, fields.size("max_position_embeddings") + 1)
    _check_range(path, "mask_token_id", mask, 0, vocab_size)
    return Checkpoint(
        path=path,
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=fields.size("hidden_size"),
        intermediate_size=fields.size("intermediate_size"),
        num_layers=fields.size("num_hidden_layers"),
        num_q_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=fields.size("max_position_embeddings"),
        rms_norm_eps=fields.positive("rms_norm_eps"),
        rope_theta=_rope_theta(path, config),
        tie_word_embeddings=fields.optional("tie_word_embeddings", bool) or False,
        stored_dtype=fields.optional("dtype", str) or fields.optional("torch_dtype", str),
        block_length=block,
        block_length_source=block_source,
        mask_token_id=mask,
        mask_token_id_source=mask_source,
        eos_token_ids=_eos_token_ids(path, config, generation),
        generation=_generation_defaults(path, generation),
        true_vocab_size=true_vocab_size,
        grown_from=fields.optional("grown_from", dict),
    )


def read_json(file: Path) -> dict[str, Any] | None:
    """A JSON object, or None if there is no such file. Raises ValueError if it is no object."""
    if not file.exists():
        return None
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"[config] {file} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"[config] {file} must hold a JSON object, got {type(value).__name__}")
    return value


class _Fields:
    """Typed access to the keys of one JSON object, with the file's name in every error."""

    def __init__(self, file: Path, values: dict[str, Any]) -> None:
        self.file, self.values = file, values

    def _get(self, key: str) -> Any:
        if self.values.get(key) is None:
            raise ValueError(f"[config] {self.file} lacks {key}")
        return self.values[key]

    def size(self, key: str) -> int:
        value = self._get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"[config] {self.file}: {key} must be an int >= 1, got {value!r}")
        if value >= 2**31:
            raise ValueError(f"[config] {self.file}: {key} must be below 2**31, got {value}")
        return value

    def optional(self, key: str, kind: type[_T]) -> _T | None:
        value = self.values.get(key)
        if value is not None and not isinstance(value, kind):
            raise ValueError(
                f"[config] {self.file}: {key} must be of type {kind.__name__}, got {value!r}"
            )
        return value

    def positive(self, key: str) -> float:
        value = self._get(key)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value <= 0:
            raise ValueError(f"[config] {self.file}: {key} must be a number > 0, got {value!r}")
        return float(value)


def _architecture(path: Path, config: dict[str, Any]) -> str:
    names = _Fields(path / "config.json", config).optional("architectures", list) or []
    for name in names:
        if name in ARCHITECTURES:
            return str(name)
    if not names and config.get("model_type") == "sdar":
        return "SDARForCausalLM"
    found = names[0] if names else f"model_type {config.get('model_type')!r}"
    raise ValueError(
        f"[config] {path}: unknown architecture {found}; supported: {', '.join(ARCHITECTURES)}"
    )


def _check_features(path: Path, config: dict[str, Any]) -> None:
    """Refuses what the engine would compute wrongly."""
    fields = _Fields(path / "config.json", config)
    windowed = config.get("use_sliding_window", config.get("sliding_window") is not None)
    scaling = config.get("rope_scaling")
    if isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type")) == "default":
        scaling = None
    rope_type = (fields.optional("rope_parameters", dict) or {}).get("rope_type", "default")
    layer_types = [t for t in fields.optional("layer_types", list) or [] if t != "full_attention"]
    unsupported = {
        "attention_bias": config.get("attention_bias") or None,
        "hidden_act": None if config.get("hidden_act", "silu") == "silu" else config["hidden_act"],
        "rope_scaling": scaling,
        "rope_parameters.rope_type": None if rope_type == "default" else rope_type,
        "use_sliding_window": True if windowed else None,
        "layer_types": layer_types[0] if layer_types else None,
        "quantization_config": config.get("quantization_config"),
    }
    for key, value in unsupported.items():
        if value is not None:
            raise ValueError(f"[config] {path}: {key} = {value!r} is not supported")


def _rope_theta(path: Path, config: dict[str, Any]) -> float:
    """Under `rope_parameters` in files written by transformers 5, at the top level before."""
    parameters = config.get("rope_parameters") or {}
    values = parameters if parameters.get("rope_theta") is not None else config
    return _Fields(path / "config.json", values).positive("rope_theta")


def _find(
    override: int | None, keys: tuple[str, ...], config: dict[str, Any], generation: dict[str, Any]
) -> tuple[int | None, str]:
    """A decoding fact and its source: the caller, config.json, or generation_config.json."""
    if override is not None:
        return override, "argument"
    for file, values in (("config.json", config), ("generation_config.json", generation)):
        for key in keys:
            if values.get(key) is not None:
                return values[key], f"{file} ({key})"
    return None, "not given"


def _check_range(path: Path, name: str, value: int | None, low: int, high: int) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value < high:
        raise ValueError(
            f"[config] {path}: {name} must be an int in [{low}, {high}), got {value!r}"
        )


def _eos_token_ids(
    path: Path, config: dict[str, Any], generation: dict[str, Any]
) -> tuple[int, ...]:
    value = generation.get("eos_token_id")
    if value is None:
        value = config.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for i in ids:
        _check_range(path, "eos_token_id", i, 0, config["vocab_size"])
    return tuple(ids)


def _generation_defaults(path: Path, generation: dict[str, Any]) -> GenerationDefaults:
    """Values are checked the way SamplingParams checks them."""
    from .sampling_params import SamplingParams

    keys = ("temperature", "top_k", "top_p", "confidence_threshold")
    values = {key: generation[key] for key in keys if generation.get(key) is not None}
    if generation.get("do_sample") is False:
        values["temperature"] = 0.0
    try:
        SamplingParams(**values)
    except ValueError as error:
        raise ValueError(f"[config] {path / 'generation_config.json'}: {error}") from None
    return GenerationDefaults(**values)
