"""`optimus bench serving`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .cli_options import (
    AsJson,
    Dtype,
    KvPolicy,
    MaxTokens,
    Model,
    Raw,
    Seed,
    Tasks,
    Temperature,
    Threads,
    Threshold,
    load_llm,
    sampling_params,
)
from .cli_report import (
    Explain,
    KvMemory,
    MaxRows,
    Modes,
    Output,
    QualityFloor,
    RunLog,
    Schedule,
    StepLog,
    TargetTpot,
    Trace,
    check_output,
    parse_floor,
    parse_positive_float,
    split_list,
    write_report,
)

if TYPE_CHECKING:
    from . import _C
    from .bench_serving import Grader, ServingRow
    from .load import Pattern
    from .sampling_params import SamplingParams
    from .serving import Backend
    from .serving_setup import Workload
    from .slo import Capacity

_out = Console(highlight=False, soft_wrap=True)
_err = Console(stderr=True, highlight=False, soft_wrap=True)


def serving(
    model: Model = None,
    modes: Modes = "block,chunk:4,elastic",
    rate: Annotated[
        str | None,
        typer.Option(
            help="Requests per second, comma-separated; of a ramp, at its peak; where a capacity "
            "search starts. Default: 2, or a recorded trace's own."
        ),
    ] = None,
    duration: Annotated[float, typer.Option(help="Seconds over which requests arrive.")] = 30.0,
    pattern: Annotated[str, typer.Option(help="poisson, burst or ramp.")] = "poisson",
    burstiness: Annotated[
        float, typer.Option(help="Shape of Gamma gaps: 1 Poisson, below 1 burstier.")
    ] = 1.0,
    burst_factor: Annotated[float, typer.Option(help="Rate in a burst by the mean rate.")] = 4.0,
    burst_share: Annotated[float, typer.Option(help="Of a period that is a burst.")] = 0.2,
    burst_period: Annotated[float, typer.Option(help="Seconds from burst to burst.")] = 10.0,
    ramp_from: Annotated[float, typer.Option(help="Rate at both ends, by the peak.")] = 0.05,
    arrivals: Annotated[
        Path | None,
        typer.Option(help="Recorded trace: JSONL of arrival_s, prompt_len or prompt, output_len."),
    ] = None,
    tasks: Tasks = None,
    prompt_len: Annotated[
        str | None, typer.Option(help="Random token ids, 128 or 64-512 of them, in place of tasks.")
    ] = None,
    output_len: Annotated[
        str | None, typer.Option(help="Tokens to generate, 128 or 64-512; with --prompt-len.")
    ] = None,
    slo_ttft_ms: Annotated[float | None, typer.Option(help="Limit of time to first token.")] = None,
    slo_tpot_ms: Annotated[
        float | None, typer.Option(help="Limit of time per output token after the first.")
    ] = None,
    find_capacity: Annotated[
        bool, typer.Option("--find-capacity", help="Search the highest rate that meets the SLO.")
    ] = False,
    slo_share: Annotated[float, typer.Option(help="Of requests that must meet the SLO.")] = 0.9,
    max_runs: Annotated[int, typer.Option(help="Of a capacity search, per arm.")] = 12,
    drain: Annotated[float, typer.Option(help="Seconds to go on after the last arrival.")] = 60.0,
    simulate: Annotated[
        str | None,
        typer.Option(
            help="In virtual time, on a curve: h200-dense-8b, h200-moe-mini, a100-dense-8b, a JSON "
            "file of one, or a report with a latency profile."
        ),
    ] = None,
    traces: Annotated[
        Path | None, typer.Option(help="Commit traces to simulate. Default: the demo model's.")
    ] = None,
    host_ms: Annotated[float, typer.Option(help="Simulated host time between steps.")] = 0.0,
    max_num_seqs: Annotated[int, typer.Option(help="Requests decoding at once.")] = 32,
    schedule: Schedule = None,
    quality_floor: QualityFloor = "block",
    target_tpot_ms: TargetTpot = None,
    target_ttft_ms: Annotated[float | None, typer.Option(help="For elastic arms.")] = None,
    max_num_batched_rows: MaxRows = 512,
    kv_cache_memory: KvMemory = None,
    kv_policy: KvPolicy = None,
    threshold: Threshold = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    threads: Threads = None,
    raw: Raw = False,
    step_log: StepLog = None,
    trace: Trace = None,
    explain: Explain = None,
    output: Output = None,
    json_output: AsJson = False,
) -> None:
    """Compare decode modes under arrivals that do not wait: latency, SLO attainment, capacity."""
    given = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in locals().items()
        if name not in ("output", "json_output")  # where the report goes is not in it
    }
    from . import display
    from .arms import parse_arm, parse_schedule_text
    from .bench_serving import ServingSetup, bench_serving, serving_capacity, warm_up
    from .load import Pattern
    from .machine import git_commit, machine
    from .profiles import profile_to_dict
    from .slo import Slo

    check_output(output, step_log, trace)
    names = split_list(modes, "--modes")
    if not drain >= 0:
        raise ValueError(f"[cli] --drain must not be negative, got {drain}")
    slo = Slo(slo_ttft_ms, slo_tpot_ms)
    if find_capacity and not slo.is_set:
        raise ValueError("[cli] --find-capacity needs an SLO: --slo-ttft-ms or --slo-tpot-ms")
    shape = Pattern(pattern, burstiness, burst_factor, burst_share, burst_period, ramp_from)
    table = parse_schedule_text(schedule)
    options: dict[str, Any] = {
        "quality_floor": parse_floor(quality_floor), "target_tpot_ms": target_tpot_ms,
        "target_ttft_ms": target_ttft_ms, "max_num_seqs": max_num_seqs,
        "max_num_batched_rows": max_num_batched_rows, "kv_cache_memory": kv_cache_memory,
        "seed": seed,
    } | ({} if kv_policy is None else {"kv_policy": kv_policy})  # fmt: skip
    params = sampling_params(threshold, max_tokens, temperature)
    load = {
        "arrivals": arrivals, "tasks": tasks, "prompt_len": prompt_len, "output_len": output_len,
    }  # fmt: skip
    if simulate is None:
        parts = _engine_parts(
            model, names, table, params, raw, shape, duration, load, dtype=dtype,
            num_threads=threads, **options,
        )  # fmt: skip
    else:
        parts = _simulator_parts(
            model, names, table, params, simulate, traces, host_ms, shape, duration,
            load, **options,
        )  # fmt: skip
    own_rate = parts.workload.own_rate()
    rates = [parse_positive_float(r, "--rate") for r in split_list(rate, "--rate")] if rate else []
    rates = rates or [2.0 if own_rate is None else own_rate]
    log = RunLog(step_log, trace, explain)
    records: list[_C.StepRecord] = []

    def on_row(row: ServingRow) -> None:
        name = f"{row.mode} at {row.rate:g}/s"
        _err.print(f"[dim]{name}: {row.summary.tokens_per_second:.0f} tok/s[/dim]")
        is_elastic = parse_arm(row.mode).is_elastic
        log.add(name, {"mode": row.mode, "rate": row.rate}, records, is_elastic=is_elastic)
        records.clear()

    setup = ServingSetup(
        parts.workload.arrivals_at, parts.workload.duration_at, slo, drain, parts.grader,
        (lambda _name, _rate, record: records.append(record)) if log.is_wanted else None,
    )  # fmt: skip
    capacities: dict[str, Capacity] = {}
    for name, backend in parts.backends.items() if find_capacity else ():
        warm_up(backend, parts.workload.arrivals_at(rates[0]))
        capacities[name] = serving_capacity(
            setup, backend, rates[0], share=slo_share, max_runs=max_runs
        )
        _err.print(f"[dim]{name}: capacity {capacities[name].rate:.3g}/s[/dim]")
    rows = bench_serving(setup, parts.backends, rates, on_row=on_row)
    report = {
        "kind": "serving",
        "machine": machine(),
        "commit": git_commit(),
        "arguments": given,
        "slo": dataclasses.asdict(slo),
        "latency_profile": parts.latency and profile_to_dict(parts.latency),
        "rows": [row.to_dict() for row in rows],
        "capacities": {name: found.to_dict() for name, found in capacities.items()},
    }
    log.finish()
    write_report(report, output, json_output)
    if not json_output:
        _out.print(display.serving_table(rows, slo.is_set))
        if capacities:
            _out.print(display.capacity_table(capacities))
        for text in log.explanations:
            _out.print(text, markup=False)


@dataclass(frozen=True)
class _Parts:
    """What runs: requests, backends by arm, who scores answers, the curve the engines know."""

    workload: Workload
    backends: Mapping[str, Backend]
    grader: Grader | None
    latency: _C.LatencyProfile | None


def _workload(
    shape: Pattern, duration: float, seed: int, load: Mapping[str, Any], **prompts: Any
) -> Workload:
    """load: the options that say what requests are."""
    from .load import Lengths, load_trace
    from .serving_setup import Workload

    prompt_len, output_len = (
        None if load[name] is None else Lengths.parse(load[name], name)
        for name in ("prompt_len", "output_len")
    )
    recorded = None if load["arrivals"] is None else load_trace(load["arrivals"])
    return Workload(shape, duration, seed, recorded, prompt_len, output_len, **prompts)


def _engine_parts(
    model: Path | None,
    modes: list[str],
    schedule: dict[str, int] | None,
    params: SamplingParams,
    raw: bool,
    shape: Pattern,
    duration: float,
    load: Mapping[str, Any],
    **options: Any,
) -> _Parts:
    from .arms import parse_arms
    from .bench_serving import Grader
    from .evaluate import load_tasks
    from .serving_setup import engine_backends

    llm = load_llm(model, "elastic", None, options.pop("kv_policy", None), **options)
    arms = parse_arms(modes, llm.checkpoint.block_length, schedule)
    tasks = load_tasks(load["tasks"])
    workload = _workload(
        shape, duration, options["seed"], load, tasks=tasks, vocab_size=llm.checkpoint.vocab_size
    )
    asks_tasks = workload.recorded is None and workload.prompt_len is None
    grader = Grader(tasks, llm.tokenizer) if asks_tasks and llm.tokenizer is not None else None
    backends = engine_backends(llm, arms, params, schedule=schedule, raw=raw)
    return _Parts(workload, backends, grader, llm.latency_profile)


def _simulator_parts(
    model: Path | None,
    modes: list[str],
    schedule: dict[str, int] | None,
    params: SamplingParams,
    curve: str,
    traces: Path | None,
    host_ms: float,
    shape: Pattern,
    duration: float,
    load: Mapping[str, Any],
    **options: Any,
) -> _Parts:
    from .arms import parse_arms
    from .calibration import CalibrationSource
    from .config import DEMO_MODEL, load_checkpoint
    from .options import EngineOptions
    from .serving_setup import load_latency, simulator_backends
    from .traces import load_traces as load_commit_traces

    checkpoint = load_checkpoint(DEMO_MODEL if model is None else model)
    arms = parse_arms(modes, checkpoint.block_length, schedule)
    latency = load_latency(curve)
    recorded = [trace.to_native() for trace in load_commit_traces(traces)]
    source = CalibrationSource(checkpoint, "auto")
    backends = simulator_backends(
        checkpoint, arms, params, latency, recorded, EngineOptions(**options), schedule=schedule,
        host_ms=host_ms, measured_arms=source.measured_arms(options["quality_floor"]),
        seed=options["seed"],
    )  # fmt: skip
    workload = _workload(shape, duration, options["seed"], load, num_traces=len(recorded))
    return _Parts(workload, backends, None, latency)
