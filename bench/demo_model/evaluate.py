"""Measures a checkpoint on held-out tasks with the reference decoders of decode.py.

    python -m bench.demo_model.evaluate --weights RUN --tokenizer DIR/tokenizer.json \
        --heldout DIR/heldout.jsonl --output RUN
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path

import torch
from tokenizers import Tokenizer

from . import tokenizer as tok
from .checkpoint import load_weights
from .decode import Result, decode_blocks, decode_causal
from .model import DemoModel, ModelConfig
from .tasks import CHAINED, Task, check, check_final
from .train import TINY

# (name, threshold, chunk, freeze); threshold None is autoregressive decoding
Arm = tuple[str, float | None, int | None, bool]


def arms(thresholds: list[float], recommended: float) -> list[Arm]:
    """Every threshold for block decoding and chunks of four; other chunks at one threshold."""
    out: list[Arm] = [("ar", None, None, False)]
    for t in thresholds:
        out.append((f"block t={t}", t, None, False))
        out.append((f"chunk 4 freeze t={t}", t, 4, True))
    for c in (2, 8, 16):
        out.append((f"chunk {c} freeze t={recommended}", recommended, c, True))
    for c in (4, 8):
        out.append((f"chunk {c} recompute t={recommended}", recommended, c, False))
    return out


def load_heldout(file: Path, count: int, kinds: list[str] | None = None) -> list[Task]:
    """The first `count` lines of heldout.jsonl, perhaps only those of some kinds."""
    lines = file.read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    tasks = [Task(r["task"], r["kind"], r["prompt"], r["answer"]) for r in records]
    return [t for t in tasks if not kinds or t.kind in kinds][:count]


def decode_all(model: DemoModel, prompts: list[list[int]], arm: Arm, max_answer: int,
               batch: int) -> list[Result]:  # fmt: skip
    """Decodes the prompts in batches, in their order."""
    _, threshold, chunk, freeze = arm
    results = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        if threshold is None:
            results.append(decode_causal(model, part, max_answer))
        else:
            results.append(
                decode_blocks(model, part, max_answer, threshold=threshold, chunk=chunk,
                              freeze=freeze)
            )  # fmt: skip
    return results


def mean(values: list[bool]) -> float:
    """Per cent, two digits."""
    return round(100 * sum(values) / len(values), 2)


def summarize(tasks: list[Task], results: list[Result], tokenizer: Tokenizer) -> dict:
    """Accuracy per family and overall, cost, and the commit profile of one arm."""
    outputs = [tokenizer.decode(o) for r in results for o in r.outputs]
    exact, final, kinds = defaultdict(list), [], defaultdict(list)
    cost: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    wrong = []
    tokens_of = [len(o) + 1 for r in results for o in r.outputs]
    forwards_of = [float(f) for r in results for f in r.forwards]
    for task, text, count, steps in zip(tasks, outputs, tokens_of, forwards_of, strict=True):
        for name in (task.family, f"{task.family}/{task.kind}"):
            cost[name][0] += count
            cost[name][1] += steps
        good = check(task, text)
        exact[task.family].append(good)
        kinds[f"{task.family}/{task.kind}"].append(good)
        final.append(check_final(task, text))
        if not good and len(wrong) < 12:
            wrong.append({"prompt": task.prompt, "answer": task.answer, "output": text})
    forwards, tokens = sum(forwards_of), sum(tokens_of)
    seen = sum(r.seen_at for r in results)
    committed = sum(r.committed_at for r in results)
    return {
        "exact": mean([g for values in exact.values() for g in values]),
        "final": mean(final),
        "families": {k: mean(v) for k, v in exact.items()},
        "kinds": {k: mean(v) for k, v in sorted(kinds.items())},
        "tokens_per_forward": round(tokens / forwards, 3),
        "tokens_per_forward_of": {k: round(a / b, 2) for k, (a, b) in sorted(cost.items())},
        "commits_per_forward": round(float(committed.sum()) / forwards, 3),
        "mean_answer_tokens": round(tokens / len(tasks), 1),
        "unfinished": sum(int((~r.finished).sum()) for r in results),
        "commit_at_rank": [round(x, 3) for x in (committed / seen.clamp(min=1)).tolist()],
        "wrong": wrong,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="directory for eval.json")
    parser.add_argument("--count", type=int, default=10**9)
    parser.add_argument("--kinds", nargs="+", help="only these kinds of tasks ('chained': CHAINED)")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.9, 0.95, 0.98, 0.99])
    parser.add_argument("--recommended", type=float, default=0.99)
    parser.add_argument("--max-answer", type=int, default=320)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()

    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    kinds = sorted(CHAINED) if args.kinds == ["chained"] else args.kinds
    tasks = load_heldout(args.heldout, args.count, kinds)
    prompts = [
        tokenizer.encode(tok.render([{"role": "user", "content": t.prompt}])).ids for t in tasks
    ]
    model = DemoModel(ModelConfig(**(TINY if args.tiny else {})))
    model.load_state_dict(load_weights(args.weights))
    model.to(args.device, torch.bfloat16).eval()
    report = {}
    for arm in arms(args.thresholds, args.recommended):
        start = time.perf_counter()
        results = decode_all(model, prompts, arm, args.max_answer, args.batch)
        report[arm[0]] = found = summarize(tasks, results, tokenizer)
        found["seconds"] = round(time.perf_counter() - start, 1)
        long = ("kinds", "commit_at_rank", "wrong", "tokens_per_forward_of")
        line = {k: v for k, v in found.items() if k not in long}
        print(arm[0], json.dumps(line), flush=True)
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "eval.json").write_text(json.dumps(report, indent=1) + "\n")
    for name in ("ar", f"block t={args.recommended}"):
        found = report[name]
        speed = found["tokens_per_forward_of"]
        print(name, {k: (v, speed[k]) for k, v in found["kinds"].items()})
        print(name, found["commit_at_rank"])


if __name__ == "__main__":
    main()
