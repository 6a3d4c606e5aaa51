"""The tensors of a checkpoint grown to larger shapes, computing the same function.

The parent's weights become a sub-network of the target: a corner of every matrix, some heads, some
layers. Real outputs read real inputs only (their weights on added inputs are zero); everything
else is random: added channels, heads, neurons, layers and vocabulary rows are computed from live
values, at the cost of the target's shapes.

Added channels of the residual stream carry values too, but FAINT times smaller than the parent's;
their norm gains bring them back to ordinary size. Zeros there would be exact, and would flatter the
measurement: with inputs that are mostly zero a GPU at its power limit clocks higher. Measured on
one NVIDIA H100, 8B shapes, 1,024 rows: GEMMs 16% faster than with dense random numbers; grown
weights and activations with live channels are within 1.5%.

Where the function is preserved, and how well:
- RMSNorm over the hidden size. The mean runs over more channels: gains take sqrt(d / D) (parent
  over target size) and eps takes d / D, which is exact. The faint channels change the mean square
  by about FAINT**2 = 1e-12 relative, below fp32 rounding.
- QK-norm shares that eps. Real query and key rows are scaled by the power of two that brings its
  effective eps nearest to the parent's: between 1/2 and 2 times (see `head_scale`). A power of two
  changes no bit of a mantissa.
- A head h wide in one H = r h wide: pair i becomes pair r i, whose rotary frequency
  theta ** (-2 r i / H) is the same. The key gain takes sqrt(h / H), the query gain none: together
  they stand for the other mean, twice, and the other softmax scale 1 / sqrt(H). Added elements of
  real heads are faint, so that neither norm nor scores notice them.
- Each query head stays with its key/value head; added ones follow behind, in every group.
- In bfloat16, hidden norm gains and key gains are rounded once more (2**-9 relative); all other
  real weights keep their bits.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import cached_property, partial
from typing import Any

import torch
from safetensors import safe_open

from .config import Checkpoint
from .weights import TensorInfo, read_headers

FAINT = 2.0**-20
# Size of added channels after a norm, against the parent's embedding: small enough that the added
# part, which feeds on itself, cannot run away.
_ADDED_GAIN = 0.25
_CHUNK = 1 << 24  # random numbers drawn at once
_MOST_THREADS = 16

Maker = Callable[[], torch.Tensor]


def check_fits(parent: Checkpoint, target: Checkpoint) -> None:
    """Raises ValueError naming every shape of `target` that `parent` does not fit into."""
    found = []
    for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_q_heads",
        "num_kv_heads", "head_dim",
    ):  # fmt: skip
        ours, theirs = getattr(parent, name), getattr(target, name)
        if theirs < ours:
            found.append(f"{name} must be at least the parent's {ours}, got {theirs}")
    if target.num_q_heads % target.num_kv_heads:
        found.append(
            f"num_q_heads {target.num_q_heads} must be a multiple of num_kv_heads "
            f"{target.num_kv_heads}"
        )
    elif _group(target) < _group(parent):
        found.append(
            f"query heads per key/value head must be at least the parent's {_group(parent)}, got "
            f"{_group(target)}"
        )
    if target.head_dim % parent.head_dim:
        found.append(
            f"head_dim must be a multiple of the parent's {parent.head_dim}, got {target.head_dim}"
        )
    if target.tie_word_embeddings and not parent.tie_word_embeddings:
        found.append("tie_word_embeddings must be false, since the parent's are untied, got true")
    if found:
        raise ValueError(f"[grow] {parent.path} does not fit: " + "; ".join(found))


def _group(checkpoint: Checkpoint) -> int:
    return checkpoint.num_q_heads // checkpoint.num_kv_heads


def head_scale(parent: Checkpoint, target: Checkpoint) -> float:
    """The power of two by which real query and key rows are scaled.

    A head's norm sees mean square t**2 h / H and the target's eps, so relative to the parent's
    mean square its eps is eps_target * H / (t**2 h): nearest to the parent's eps in ratio.
    """
    square = target.rms_norm_eps / parent.rms_norm_eps * target.head_dim / parent.head_dim
    return 2.0 ** round(math.log2(square) / 2)


def layer_places(parent: Checkpoint, target: Checkpoint) -> dict[int, int]:
    """Target layer -> parent layer; the added layers lie evenly between the real ones."""
    return {i * target.num_layers // parent.num_layers: i for i in range(parent.num_layers)}


def tensor_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a dense Qwen3 checkpoint, in the order of `grow_tensors`."""
    c = checkpoint
    hidden, mlp = c.hidden_size, c.intermediate_size
    q_size, kv_size = c.num_q_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c.vocab_size, hidden)}
    for layer in range(c.num_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "self_attn.q_proj.weight": (q_size, hidden),
            prefix + "self_attn.k_proj.weight": (kv_size, hidden),
            prefix + "self_attn.v_proj.weight": (kv_size, hidden),
            prefix + "self_attn.q_norm.weight": (c.head_dim,),
            prefix + "self_attn.k_norm.weight": (c.head_dim,),
            prefix + "self_attn.o_proj.weight": (hidden, q_size),
            prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "mlp.gate_proj.weight": (mlp, hidden),
            prefix + "mlp.up_proj.weight": (mlp, hidden),
            prefix + "mlp.down_proj.weight": (hidden, mlp),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not c.tie_word_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, hidden)
    return shapes


def grow_tensors(
    parent: Checkpoint,
    target: Checkpoint,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    *,
    in_order: bool = True,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of the grown model, one at a time, in the order of `tensor_shapes(target)`.

    parent: its weights are read from parent.path as they are needed.
    target: of `grown_checkpoint`. seed: of the random weights; each tensor has its own stream.
    in_order: False makes a few at a time, on all cores, the largest first; the same tensors.
    """
    makers = _Grower(parent, target, seed, dtype).makers()
    if in_order:
        return ((name, make()) for name, make in makers)
    return _made_in_parallel(list(makers), tensor_shapes(target))


def _made_in_parallel(
    makers: list[tuple[str, Maker]], shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, torch.Tensor]]:
    num_threads = min(os.cpu_count() or 1, _MOST_THREADS)
    waiting = sorted(makers, key=lambda item: math.prod(shapes[item[0]]))
    running: dict[Future[torch.Tensor], str] = {}
    # Random numbers come from one thread a tensor; torch's own threads would only add to them.
    with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        while waiting or running:
            while waiting and len(running) < num_threads + 1:
                name, make = waiting.pop()
                running[pool.submit(make)] = name
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield running.pop(future), future.result()


class _Grower:
    """Index maps from the parent's rows and columns into the target's, and the random rest."""

    def __init__(
        self, parent: Checkpoint, target: Checkpoint, seed: int, dtype: torch.dtype
    ) -> None:
        check_fits(parent, target)
        self.parent, self.target, self.seed, self.dtype = parent, target, seed, dtype
        self.headers: dict[str, TensorInfo] = read_headers(parent.path)
        self.shapes = tensor_shapes(target)
        self.channels = torch.arange(parent.hidden_size)
        self.neurons = torch.arange(parent.intermediate_size)
        # Half-split rotary pairs (i, i + h / 2) -> (r i, r i + H / 2).
        half, ratio = parent.head_dim // 2, target.head_dim // parent.head_dim
        first = torch.arange(half) * ratio
        self.head_dims = torch.cat([first, first + target.head_dim // 2])
        kv = torch.arange(parent.num_kv_heads)
        q = torch.arange(parent.num_q_heads)
        group = _group(parent)
        self.kv_heads = kv
        self.q_heads = q // group * _group(target) + q % group
        self.size_ratio = math.sqrt(parent.hidden_size / target.hidden_size)
        # Depth of the stream: every added contribution is divided by sqrt(2 * layers).
        self.branch = FAINT * self.unit / math.sqrt(2 * target.num_layers)

    @cached_property
    def unit(self) -> float:
        """Root mean square of the parent's embedding, of which added channels have FAINT."""
        embedding = self.real("model.embed_tokens.weight")
        return max(float(embedding.square().mean().sqrt()), 1e-6)

    def makers(self) -> Iterator[tuple[str, Maker]]:
        """Names, and what makes each tensor; any of them may be called in any thread."""
        yield "model.embed_tokens.weight", self.embedding
        places = layer_places(self.parent, self.target)
        for layer in range(self.target.num_layers):
            yield from self.layer(f"model.layers.{layer}.", places.get(layer))
        # A tied head multiplies the faint columns of the embedding too: no gain for them there.
        tied = self.target.tie_word_embeddings
        final = "model.norm.weight"
        yield final, lambda: self.norm(final, self.real(final), 1.0 if tied else 1 / FAINT)
        if not tied:
            yield "lm_head.weight", self.head

    def head(self) -> torch.Tensor:
        name = "lm_head.weight"
        source = "model.embed_tokens.weight" if self.parent.tie_word_embeddings else name
        rows = torch.arange(self.parent.vocab_size)
        return self.matrix(name, rows, self.channels, self.real(source))

    def embedding(self) -> torch.Tensor:
        name = "model.embed_tokens.weight"
        table = self.noise(name, self.unit)
        table[:, self.parent.hidden_size :] *= FAINT
        table[: self.parent.vocab_size, : self.parent.hidden_size] = self.real(name).to(self.dtype)
        return table

    def layer(self, prefix: str, place: int | None) -> Iterator[tuple[str, Maker]]:
        """place: the parent's layer that lives here, or None for an added one."""
        q_rows, kv_rows = self.head_rows(self.q_heads), self.head_rows(self.kv_heads)
        t = head_scale(self.parent, self.target)
        key_gain = math.sqrt(self.parent.head_dim / self.target.head_dim)

        def made(name: str, make: Callable[..., torch.Tensor], *args: Any) -> tuple[str, Maker]:
            real_name = None if place is None else f"model.layers.{place}.{name}"
            return prefix + name, partial(make, prefix + name, real_name, *args)

        yield made("input_layernorm.weight", self.layer_norm)
        yield made("self_attn.q_proj.weight", self.reads, q_rows, self.q_heads, t)
        yield made("self_attn.k_proj.weight", self.reads, kv_rows, self.kv_heads, t)
        yield made("self_attn.v_proj.weight", self.reads, kv_rows)
        yield made("self_attn.q_norm.weight", self.head_norm, 1.0)
        yield made("self_attn.k_norm.weight", self.head_norm, key_gain)
        yield made("self_attn.o_proj.weight", self.writes, q_rows)
        yield made("post_attention_layernorm.weight", self.layer_norm)
        yield made("mlp.gate_proj.weight", self.reads, self.neurons)
        yield made("mlp.up_proj.weight", self.reads, self.neurons)
        yield made("mlp.down_proj.weight", self.writes, self.neurons)

    # Of a layer: `real_name` is the parent's tensor, None in an added layer.

    def layer_norm(self, name: str, real_name: str | None) -> torch.Tensor:
        return self.norm(name, None if real_name is None else self.real(real_name))

    def head_norm(self, name: str, real_name: str | None, gain: float) -> torch.Tensor:
        weight = self.gains(name)
        if real_name is not None:
            weight[self.head_dims] = self.real(real_name) * gain
        return weight.to(self.dtype)

    def reads(
        self,
        name: str,
        real_name: str | None,
        rows: torch.Tensor,
        heads: torch.Tensor | None = None,
        scale: float = 1.0,
    ) -> torch.Tensor:
        """A matrix that reads the stream: rows are heads or neurons."""
        none = torch.arange(0)
        if real_name is None:
            return self.matrix(name, none, none, torch.empty(0, 0))
        faint = None if heads is None else self.head_rows(heads, added=True)
        return self.matrix(name, rows, self.channels, self.real(real_name) * scale, faint)

    def writes(self, name: str, real_name: str | None, cols: torch.Tensor) -> torch.Tensor:
        """A matrix that adds to the stream: an added layer adds nothing to real channels."""
        if real_name is None:
            cols, real = torch.arange(0), torch.empty(self.parent.hidden_size, 0)
        else:
            real = self.real(real_name)
        return self.matrix(name, self.channels, cols, real, scale=self.branch)

    def norm(
        self, name: str, real: torch.Tensor | None, amplify: float = 1 / FAINT
    ) -> torch.Tensor:
        """Gains over the stream; `amplify` brings added channels back to ordinary size."""
        weight = self.gains(name) * self.size_ratio
        weight[self.parent.hidden_size :] *= _ADDED_GAIN * amplify
        if real is not None:
            weight[: self.parent.hidden_size] = real * self.size_ratio
        return weight.to(self.dtype)

    def matrix(
        self,
        name: str,
        rows: torch.Tensor,
        cols: torch.Tensor,
        real: torch.Tensor,
        faint_rows: torch.Tensor | None = None,
        scale: float = 1.0,
    ) -> torch.Tensor:
        """Random, but for `rows`: `real` in `cols` and zero elsewhere.

        faint_rows: computed values that the real ones must not notice. scale: of the random part.
        """
        weight = self.noise(name, scale / math.sqrt(self.shapes[name][1]))
        if faint_rows is not None:
            weight[faint_rows] *= FAINT
        weight[rows] = 0
        if cols.numel():
            weight[rows[:, None], cols] = real.to(self.dtype)
        return weight

    def head_rows(self, heads: torch.Tensor, added: bool = False) -> torch.Tensor:
        """Rows of the parent's elements in `heads` of the target, or of the other elements."""
        dims = self.head_dims
        if added:
            is_added = torch.ones(self.target.head_dim, dtype=torch.bool)
            is_added[dims] = False
            dims = is_added.nonzero().flatten()
        return (heads[:, None] * self.target.head_dim + dims).flatten()

    def noise(self, name: str, std: float) -> torch.Tensor:
        """Uniform random numbers of this tensor's own stream; the same in every dtype, rounded."""
        out = torch.empty(self.shapes[name], dtype=self.dtype)
        generator = self.generator(name)
        limit = math.sqrt(3) * std
        for part in out.view(-1).split(_CHUNK):
            part.copy_(torch.empty(part.shape).uniform_(-limit, limit, generator=generator))
        return out

    def gains(self, name: str) -> torch.Tensor:
        """Random fp32 norm gains around 1."""
        return torch.empty(self.shapes[name]).uniform_(0.8, 1.2, generator=self.generator(name))

    def generator(self, name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    def real(self, name: str) -> torch.Tensor:
        """A tensor of the parent, fp32."""
        if name not in self.headers:
            raise ValueError(f"[grow] {self.parent.path} has no tensor {name}")
        with safe_open(self.headers[name].file, framework="pt") as tensors:
            return tensors.get_tensor(name).float()
