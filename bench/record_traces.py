"""Records what a model says about the masks of its answers, for the simulator to replay.

    python bench/record_traces.py --output python/optimus/assets/demo/commit_traces.npz

Greedy, at the threshold that the checkpoint recommends; one forward per output token.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import optimus
from optimus.evaluate import load_tasks
from optimus.traces import describe_traces, record_traces, save_traces


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path, required=True, help=".npz file to write")
    parser.add_argument("--model", default=None, help="checkpoint; default: the demo model")
    parser.add_argument("--tasks", default=None, help="JSONL of tasks; default: the held-out set")
    parser.add_argument("--num-prompts", type=int, default=300)
    parser.add_argument("--max-tokens", type=int, default=512)
    arguments = parser.parse_args()
    llm = optimus.LLM(arguments.model, decode_mode="block")
    params = optimus.SamplingParams(temperature=0.0, max_tokens=arguments.max_tokens)
    traces = record_traces(llm, load_tasks(arguments.tasks, arguments.num_prompts), params)
    save_traces(arguments.output, traces, describe_traces(llm, params))
    num_tokens = sum(trace.num_tokens for trace in traces)
    print(f"{len(traces)} traces of {num_tokens} tokens, {arguments.output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
