"""Draws elastic decoding: which rows each decode mode computes, and the chunk length under load.

    python bench/figures/elastic_decoding.py --output-dir bench/figures

Decodes one held-out prompt of the demo model autoregressively, by whole blocks, and by chunks, and
draws every row of every forward step; then keeps 1 to 32 requests running and counts the chunk
lengths that "elastic" chose, from the step times of this machine: keep it idle. Rows are replayed
from the commits by the rules of the engine and checked, step by step, against the number of rows
the engine says it computed.

The prompt is one of a family (default: JSON out of a text, where tokens far apart depend on each
other; answers that follow from left to right take even fewer forwards). Of its candidates that all
three modes answer exactly, it is the one with the median number of forwards in block mode. Chunks
keep their KV (kv_policy "freeze").
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decoding_picture import ArmPicture, Cell, LoadPicture, draw

from optimus import LLM, DenoiseEvent, RequestOutput, SamplingParams
from optimus.evaluate import DEMO_TASKS, Task, is_correct, load_tasks

if TYPE_CHECKING:
    from optimus import _C

ANSWER_LEN = range(64, 97)  # tokens
MAX_PROMPT_TAIL = 4  # prompt tokens in the first decode block: they would take up picture
MAX_CANDIDATES = 24
LOADS = (1, 2, 4, 8, 16, 32)
PROFILE_REPEATS = 9  # steadier than the default
MIN_LOAD_REQUESTS = 24  # at each load
ENGINE: dict[str, Any] = {
    "max_num_seqs": 8,
    "max_num_batched_rows": 1024,
    "kv_cache_memory": "192MiB",
    "enable_prefix_cache": False,
}


@dataclass(frozen=True)
class Arm:
    """One way to decode, and its engine."""

    title: str
    caption: str
    llm: LLM


@dataclass(frozen=True)
class Trace:
    """One request, alone in the engine: the record and the committed output positions by step."""

    output: RequestOutput
    records: list[_C.StepRecord]
    commits: list[list[int]]


def block_length(llm: LLM) -> int:
    if llm.checkpoint.block_length is None:
        raise SystemExit("the model has no block_length: it decodes autoregressively only")
    return llm.checkpoint.block_length


def chat(task: Task) -> list[Any]:
    return [{"role": "user", "content": task.prompt}]


def sampling(llm: LLM, task: Task) -> SamplingParams:
    """Room for every answer, up to the end of a block: commits past max_tokens are not told."""
    assert llm.tokenizer is not None
    prompt_len = len(llm.tokenizer.encode(llm.render_chat(chat(task)), add_special_tokens=False))
    block = block_length(llm)
    end = -(-(prompt_len + ANSWER_LEN.stop) // block) * block
    return SamplingParams(max_tokens=end - prompt_len)


def candidates(llm: LLM, tasks: Sequence[Task]) -> list[Task]:
    """Tasks with an answer of the right length whose prompt ends about where a block begins."""
    assert llm.tokenizer is not None
    encode, found = llm.tokenizer.encode, []
    for task in tasks:
        tail = len(encode(llm.render_chat(chat(task)), add_special_tokens=False))
        tail %= block_length(llm)
        answer_len = len(encode(task.answer, add_special_tokens=False)) + 1
        if answer_len in ANSWER_LEN and tail <= MAX_PROMPT_TAIL:
            found.append(task)
    return found[:MAX_CANDIDATES]


def choose_task(arms: Sequence[Arm], tasks: Sequence[Task]) -> Task:
    """The task with the median number of forwards in block mode, of those all arms get right."""
    if not tasks:
        raise SystemExit("no held-out prompt of that family has an answer of the wanted length")
    params = [sampling(arms[0].llm, task) for task in tasks]
    outputs = [arm.llm.chat([chat(t) for t in tasks], params, use_tqdm=False) for arm in arms]
    right = [i for i, task in enumerate(tasks) if all(is_correct(out[i], task) for out in outputs)]
    print(f"{len(right)} of {len(tasks)} candidates are answered exactly by all modes")
    if not right:
        print("warning: is this model trained? The picture shows a wrong answer", file=sys.stderr)
    order = sorted(right or range(len(tasks)), key=lambda i: outputs[1][i].metrics.nfe)
    return tasks[order[len(order) // 2]]


def run_alone(llm: LLM, task: Task) -> Trace:
    """Decodes one prompt with nothing beside it."""
    records: list[_C.StepRecord] = []
    commits: dict[int, list[int]] = {}
    output = None
    llm.on_step = records.append
    for event in llm.stream(chat(task), sampling(llm, task), mode="denoise"):
        assert isinstance(event, DenoiseEvent)
        commits[event.step] = event.committed
        output = event.output
    llm.on_step = None
    assert output is not None
    decoding = [r for r in records if r.rows > r.prefill_rows]
    return Trace(output, decoding, [commits.get(i + 1, []) for i in range(len(decoding))])


def replay(trace: Trace, decode_mode: str, block: int) -> list[Cell]:
    """Every row of every step, by position in the answer; positions below 0 are the prompt's tail.

    A step feeds the known positions whose KV is not of their token yet (in block mode all of the
    current block), the whole previous block if it is refreshed, and the first masks of the block.
    """
    if decode_mode == "ar":  # the row of the last token commits the next one
        return [Cell(i, p[0], "committed") for i, p in enumerate(trace.commits)]
    prompt_len = len(trace.output.prompt_token_ids)
    num_tokens = trace.output.metrics.num_output_tokens
    start = prompt_len // block * block
    known = set(range(start, prompt_len))
    fresh, cells = set(known), []
    for i, (record, committed) in enumerate(zip(trace.records, trace.commits, strict=True)):
        masks = [p for p in range(start, start + block) if p not in known]
        masks = masks[: record.chunk_length]
        again = fresh | set(range(start - block, start) if record.refresh_rows else ())
        check_rows(record, len(masks) + len(again))
        new = {prompt_len + p for p in committed}
        for p in sorted(again):
            cells.append(Cell(i, p - prompt_len, "again"))
        for p in masks:  # what is committed past the end is no token of the answer
            gained = p in new and p - prompt_len < num_tokens
            cells.append(Cell(i, p - prompt_len, "committed" if gained else "no token"))
        fresh = new | {p for p in again if decode_mode == "block" and p >= start}
        known |= new
        if all(p in known for p in range(start, start + block)):
            start += block
    return cells


def check_rows(record: _C.StepRecord, num_rows: int) -> None:
    if num_rows != record.rows - record.prefill_rows:
        raise RuntimeError(
            f"step {record.step} computed {record.rows - record.prefill_rows} decode rows, the "
            f"replay has {num_rows}: the engine's rules and this script's differ"
        )


def trace_arm(arm: Arm, task: Task) -> ArmPicture:
    """Runs the task and turns its trace into a panel."""
    trace = run_alone(arm.llm, task)
    mode, metrics = arm.llm.options.decode_mode, trace.output.metrics
    cells = replay(trace, mode, block_length(arm.llm))
    if len(cells) != metrics.decode_rows or len(trace.records) != metrics.nfe:
        raise RuntimeError(
            f"{arm.title}: {len(cells)} rows in {len(trace.records)} steps were replayed, the "
            f"request says {metrics.decode_rows} in {metrics.nfe}"
        )
    print(f"{arm.title}: {metrics.num_output_tokens} tokens, {metrics.nfe} forwards, "
          f"{metrics.decode_rows} rows, exact match: {is_correct(trace.output, task)}")  # fmt: skip
    prompt_len = len(trace.output.prompt_token_ids)
    return ArmPicture(
        arm.title, arm.caption, cells, prompt_len, metrics.num_output_tokens, metrics.nfe
    )


def hold_load(llm: LLM, tasks: Sequence[Task], load: int) -> Counter[int]:
    """Chunk length -> steps with `load` requests running, over the settled half of the run.

    The queue keeps the load up to the end.
    """
    chosen: list[int] = []

    def on_step(record: _C.StepRecord) -> None:
        if record.num_seqs == load and record.chunk_length > 0:
            chosen.append(record.chunk_length)

    engine = llm.with_options(max_num_seqs=load)
    engine.on_step = on_step
    params = [sampling(engine, task) for task in tasks]
    engine.chat([chat(task) for task in tasks], params, use_tqdm=False)
    return Counter(chosen[len(chosen) // 2 :])


def trace_load(llm: LLM, tasks: Sequence[Task], rounds: int) -> LoadPicture:
    """`rounds` times the load in requests, at every load."""
    chosen: dict[int, Counter[int]] = {}
    for load in LOADS:
        count = load * max(rounds, MIN_LOAD_REQUESTS // load)
        chosen[load] = hold_load(llm, list(islice(cycle(tasks), count)), load)
        print(
            f"{load} requests running: chunk length -> steps {dict(sorted(chosen[load].items()))}"
        )
    million = llm.num_parameters / 1e6
    return LoadPicture(
        list(llm.options.chunk_arms), chosen, f"{million:.0f}M parameters, {llm.device.upper()}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="default: the demo model")
    parser.add_argument("--chunk-length", type=int, default=8, help="of the third panel")
    parser.add_argument("--family", default="json_extract", help="of the prompt in the panels")
    parser.add_argument("--rounds", type=int, default=6, help="requests per load and slot")
    parser.add_argument("--num-threads", type=int)
    args = parser.parse_args()

    base = LLM(args.model, decode_mode="ar", num_threads=args.num_threads, **ENGINE)
    block = block_length(base)
    chunk: dict[str, Any] = {
        "decode_mode": "chunk",
        "chunk_length": args.chunk_length,
        "kv_policy": "freeze",
    }
    arms = [
        Arm("Autoregressive", "the next token", base),
        Arm(f"Block of {block}", "the whole block", base.with_options(decode_mode="block")),
        Arm(
            f"Chunk of {args.chunk_length}",
            f"the next {args.chunk_length} masks",
            base.with_options(**chunk),
        ),
    ]
    tasks = load_tasks(DEMO_TASKS)
    wanted = candidates(base, [t for t in tasks if t.family == args.family])
    task = choose_task(arms, wanted)
    print(f"prompt {task.id}: {task.prompt}")
    panels = [trace_arm(arm, task) for arm in arms]

    lengths = [n for n in (2, 4, 8, 16, 32, 64, 128) if n <= block]
    elastic = base.with_options(decode_mode="elastic", chunk_arms=lengths)
    elastic.latency_profile = elastic.engine.profile(repeats=PROFILE_REPEATS)
    load = trace_load(elastic, tasks, args.rounds)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    draw(panels, load, block, args.output_dir / "elastic_decoding")


if __name__ == "__main__":
    main()
