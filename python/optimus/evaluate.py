"""Accuracy on tasks with one right answer, with the cost of getting it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .config import DEMO_MODEL
from .llm import LLM
from .outputs import RequestOutput
from .sampling_params import SamplingParams

DEMO_TASKS = DEMO_MODEL / "heldout.jsonl"


@dataclass(frozen=True)
class Task:
    """A prompt and the whole text that counts as right. family groups the report."""

    id: str
    family: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Score:
    """correct of total outputs equal the answer; low and high bound the share at 95%."""

    correct: int
    total: int
    accuracy: float
    low: float
    high: float

    @classmethod
    def of(cls, results: Sequence[bool]) -> Score:
        correct, total = sum(results), len(results)
        low, high = wilson_interval(correct, total)
        return cls(correct, total, correct / total if total else 0.0, low, high)


@dataclass(frozen=True)
class EvalResult:
    """Scores per family and over all, and the cost of all prompts together.

    tokens_per_forward, rows_per_token: as in RequestMetrics, over the sum of all requests.
    """

    families: dict[str, Score]
    overall: Score
    num_tokens: int
    seconds: float
    tokens_per_second: float
    tokens_per_forward: float
    rows_per_token: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def load_tasks(path: str | Path | None = None, num_prompts: int | None = None) -> list[Task]:
    """The first `num_prompts` tasks of a JSONL file of {"id", "task", "prompt", "answer"}.

    path: None is the demo model's held-out file. Raises ValueError naming file and line.
    """
    file = DEMO_TASKS if path is None else Path(path)
    if not file.exists():
        raise ValueError(f"[evaluate] {file} does not exist")
    if num_prompts is not None and num_prompts < 1:
        raise ValueError(f"[evaluate] num_prompts must be at least 1, got {num_prompts}")
    tasks = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            prompt, answer = entry["prompt"], entry["answer"]
            task_id, family = entry.get("id", number), entry.get("task", "all")
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"[evaluate] {file}, line {number}: {error!r}") from None
        tasks.append(Task(str(task_id), str(family), str(prompt), str(answer)))
    if num_prompts is not None and num_prompts > len(tasks):
        raise ValueError(
            f"[evaluate] {file} holds {len(tasks)} tasks, {num_prompts} were asked for"
        )
    if not tasks:
        raise ValueError(f"[evaluate] {file} holds no tasks")
    return tasks[:num_prompts]


def wilson_interval(correct: float, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a share; z standard deviations (default 95%)."""
    if total == 0:
        return 0.0, 1.0
    share, z2 = correct / total, z * z / total
    middle = share + z2 / 2
    half = z * math.sqrt(share * (1 - share) / total + z2 / (4 * total))
    return max(0.0, (middle - half) / (1 + z2)), min(1.0, (middle + half) / (1 + z2))


def is_correct(output: RequestOutput, task: Task) -> bool:
    """Exact match of the whole output, outer white space aside."""
    return (output.outputs[0].text or "").strip() == task.answer.strip()


def generate_answers(
    llm: LLM, tasks: Sequence[Task], params: SamplingParams, *, raw: bool = False
) -> list[RequestOutput]:
    """One output per task, through the chat template if there is one (and not `raw`)."""
    prompts = [task.prompt for task in tasks]
    if raw or llm.tokenizer is None or llm.tokenizer.chat_template is None:
        return llm.generate(prompts, params)
    return llm.chat([[{"role": "user", "content": p}] for p in prompts], params)


def evaluate(
    llm: LLM, tasks: Sequence[Task], params: SamplingParams, *, raw: bool = False
) -> EvalResult:
    """Runs all tasks at once (the LLM's max_num_seqs bounds the concurrency) and scores them."""
    start = time.perf_counter()
    outputs = generate_answers(llm, tasks, params, raw=raw)
    return summarise(tasks, outputs, time.perf_counter() - start)


def summarise(
    tasks: Sequence[Task], outputs: Sequence[RequestOutput], seconds: float
) -> EvalResult:
    """Scores outputs against their tasks, in the same order."""
    results = [is_correct(output, task) for output, task in zip(outputs, tasks, strict=True)]
    families: dict[str, list[bool]] = {}
    for task, result in zip(tasks, results, strict=True):
        families.setdefault(task.family, []).append(result)
    num_tokens = sum(o.metrics.num_output_tokens for o in outputs)
    return EvalResult(
        families={name: Score.of(r) for name, r in sorted(families.items())},
        overall=Score.of(results),
        num_tokens=num_tokens,
        seconds=seconds,
        tokens_per_second=num_tokens / seconds,
        tokens_per_forward=num_tokens / max(1, sum(o.metrics.nfe for o in outputs)),
        rows_per_token=sum(o.metrics.decode_rows for o in outputs) / max(1, num_tokens),
    )
