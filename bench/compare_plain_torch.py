"""Block decoding: the engine against a plain PyTorch loop of the same algorithm, on the CPU.

    python bench/compare_plain_torch.py --output bench/results/compare_plain_torch_cpu.json

The plain loop is what one writes first: transformers' Qwen3ForCausalLM, a DynamicCache that holds
the finished prefix, the current block forwarded whole with a 4-D mask until no mask is left, then
once more to keep its KV. At concurrency n it decodes n prompts as one padded batch, block by block
in lock step; and also one after another, which may be faster: the better of the two is the
baseline. Both sides use the same weights, prompts, dtype and number of threads; runs alternate,
medians are compared, and the outputs must be the same tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

import optimus
from optimus.config import DEMO_MODEL
from optimus.evaluate import load_tasks
from optimus.machine import git_commit, machine


def load_plain_model(path: Path, dtype: torch.dtype) -> Qwen3ForCausalLM:
    """The SDAR backbone is Qwen3: same names, same shapes."""
    from safetensors.torch import load_file

    fields = json.loads((path / "config.json").read_text())
    for name in ("architectures", "model_type", "torch_dtype"):
        fields.pop(name, None)
    config = Qwen3Config(**fields, attn_implementation="sdpa")
    model = Qwen3ForCausalLM(config).to(dtype).eval()
    weights = {
        name: value.to(dtype) for name, value in load_file(path / "model.safetensors").items()
    }
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model


class PlainBlockDecoder:
    """Static batch, greedy, low_confidence_dynamic with one commit at least."""

    def __init__(self, model: Qwen3ForCausalLM, block_length: int, mask_id: int, eos_id: int):
        self.model, self.block_length = model, block_length
        self.mask_id, self.eos_id = mask_id, eos_id
        self.num_forwards = 0

    def forward(
        self, ids: torch.Tensor, positions: torch.Tensor, cache: DynamicCache, visible: torch.Tensor
    ) -> torch.Tensor:
        """ids, positions [batch, n]; visible [batch, n, cached + n]; appends n entries of KV."""
        self.num_forwards += 1
        return self.model(
            input_ids=ids,
            position_ids=positions,
            past_key_values=cache,
            attention_mask=visible[:, None],
            use_cache=True,
        ).logits

    def prefill(self, prompts: list[list[int]], cache: DynamicCache) -> torch.Tensor:
        """Whole blocks of all prompts, right-padded; returns which cache entries are real."""
        block, batch = self.block_length, len(prompts)
        lengths = [len(p) // block * block for p in prompts]
        width = max(lengths)
        valid = torch.zeros(batch, width, dtype=torch.bool)
        if width == 0:
            return valid
        ids = torch.zeros(batch, width, dtype=torch.long)
        for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            ids[i, :length] = torch.tensor(prompt[:length])
            valid[i, :length] = True
        positions = torch.arange(width).expand(batch, width)
        staircase = (positions[0] // block)[:, None] >= (positions[0] // block)[None]
        # A padding row sees itself, so that no softmax is empty.
        visible = (staircase[None] & valid[:, None]) | torch.eye(width, dtype=torch.bool)[None]
        self.forward(ids, positions, cache, visible)
        return valid

    @torch.inference_mode()
    def generate(
        self, prompts: list[list[int]], max_tokens: int, threshold: float
    ) -> list[list[int]]:
        block, batch = self.block_length, len(prompts)
        cache = DynamicCache()
        valid = self.prefill(prompts, cache)
        starts = torch.tensor([len(p) // block * block for p in prompts])
        tokens = [list(p) for p in prompts]
        running = torch.ones(batch, dtype=torch.bool)
        offsets = torch.arange(block)
        while running.any():
            ids = torch.full((batch, block), self.mask_id)
            masked = torch.ones(batch, block, dtype=torch.bool)
            for i in range(batch):
                tail = tokens[i][int(starts[i]) :]
                ids[i, : len(tail)] = torch.tensor(tail, dtype=torch.long)
                masked[i, : len(tail)] = False
            masked &= running[:, None]
            positions = starts[:, None] + offsets
            visible = torch.cat([valid, torch.ones(batch, block, dtype=torch.bool)], 1)
            visible = visible[:, None].expand(batch, block, -1)
            while masked.any():
                logits = self.forward(ids, positions, cache, visible)
                cache.crop(-block)
                confidence, candidate = logits.float().softmax(-1).max(-1)
                confidence = confidence.masked_fill(~masked, -1.0)
                commit = confidence > threshold
                best = confidence.argmax(-1)
                commit[torch.arange(batch), best] |= masked.any(-1)
                commit &= masked
                ids = torch.where(commit, candidate, ids)
                masked &= ~commit
                # Nothing after an end token with no mask before it matters any more.
                for i in torch.nonzero(masked.any(-1)).flatten().tolist():
                    first_mask = int(masked[i].int().argmax())
                    new = ids[i, max(0, len(prompts[i]) - int(starts[i])) : first_mask]
                    if (new == self.eos_id).any():
                        masked[i] = False
            self.forward(ids, positions, cache, visible)
            valid = torch.cat([valid, torch.ones(batch, block, dtype=torch.bool)], 1)
            for i in torch.nonzero(running).flatten().tolist():
                tokens[i][int(starts[i]) :] = ids[i].tolist()
                output = tokens[i][len(prompts[i]) :]
                running[i] = self.eos_id not in output and len(output) < max_tokens
            starts += block
        return [self.trim(t[len(p) :], max_tokens) for t, p in zip(tokens, prompts, strict=True)]

    def trim(self, output: list[int], max_tokens: int) -> list[int]:
        if self.eos_id in output:
            output = output[: output.index(self.eos_id) + 1]
        return output[:max_tokens]


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(arguments.threads)
    path = Path(arguments.model) if arguments.model else DEMO_MODEL
    llm = optimus.LLM(
        path, decode_mode="block", dtype=arguments.dtype, num_threads=arguments.threads,
        enable_prefix_cache=False, max_num_seqs=1,
    )  # fmt: skip
    checkpoint, tokenizer = llm.checkpoint, llm.tokenizer
    assert (
        tokenizer is not None and checkpoint.block_length and checkpoint.mask_token_id is not None
    )
    tasks = load_tasks(None, arguments.num_prompts)
    prompts = [
        tokenizer.encode(
            llm.render_chat([{"role": "user", "content": t.prompt}]), add_special_tokens=False
        )
        for t in tasks
    ]
    plain = PlainBlockDecoder(
        load_plain_model(path, getattr(torch, arguments.dtype)),
        checkpoint.block_length,
        checkpoint.mask_token_id,
        checkpoint.eos_token_ids[0],
    )
    params = optimus.SamplingParams(
        temperature=0.0, max_tokens=arguments.max_tokens, confidence_threshold=arguments.threshold
    )

    def run_engine(concurrency: int) -> list[list[int]]:
        engine = engines[concurrency]
        outputs = engine.generate(prompt_token_ids=prompts, sampling_params=params, use_tqdm=False)
        return [o.outputs[0].token_ids for o in outputs]

    def run_plain(batch: int) -> list[list[int]]:
        outputs: list[list[int]] = []
        for begin in range(0, len(prompts), batch):
            part = prompts[begin : begin + batch]
            outputs += plain.generate(part, arguments.max_tokens, arguments.threshold)
        return outputs

    engines = {c: llm.with_options(max_num_seqs=c) for c in arguments.concurrency}
    arms: dict[str, Any] = {f"engine at {c}": (run_engine, c) for c in arguments.concurrency}
    batches = sorted({1, *arguments.concurrency})
    arms |= {f"plain, batch {b}": (run_plain, b) for b in batches}
    rates: dict[str, list[float]] = {name: [] for name in arms}
    outputs: dict[str, list[list[int]]] = {}
    for repeat in range(arguments.repeats + 1):  # the first round warms up
        for name, (run, size) in arms.items():
            start = time.perf_counter()
            outputs[name] = run(size)
            seconds = time.perf_counter() - start
            if repeat:
                rates[name].append(sum(len(o) for o in outputs[name]) / seconds)
    return summarise(arguments, rates, outputs)


def summarise(
    arguments: argparse.Namespace, rates: dict[str, list[float]], outputs: dict[str, Any]
) -> dict[str, Any]:
    medians = {name: statistics.median(values) for name, values in rates.items()}
    rows = []
    for concurrency in arguments.concurrency:
        plains = {f"plain, batch {b}": medians[f"plain, batch {b}"] for b in {1, concurrency}}
        baseline = max(plains, key=plains.__getitem__)
        engine = f"engine at {concurrency}"
        same = sum(a == b for a, b in zip(outputs[engine], outputs[baseline], strict=True))
        rows.append(
            {
                "concurrency": concurrency,
                "engine_tokens_per_second": medians[engine],
                "plain_tokens_per_second": plains,
                "baseline": baseline,
                "speedup": medians[engine] / medians[baseline],
                "same_outputs": same,
                "num_prompts": len(outputs[engine]),
            }
        )
    return {
        "benchmark": "compare_plain_torch",
        "commit": git_commit(),
        "machine": machine(),
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()},
        "rows": rows,
        "tokens_per_second": rates,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--model", default=None, help="checkpoint; default: the demo model")
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    result = compare(arguments)
    for row in result["rows"]:
        print(
            f"concurrency {row['concurrency']}: engine "
            f"{row['engine_tokens_per_second']:.0f} tok/s, {row['baseline']} "
            f"{row['plain_tokens_per_second'][row['baseline']]:.0f} tok/s, "
            f"{row['speedup']:.2f}x, same outputs {row['same_outputs']}/{row['num_prompts']}"
        )
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
