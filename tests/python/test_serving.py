"""Open-loop serving: SLO arithmetic, capacity search, both backends, the command."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench_testing import make_trace, sampling_params, simulator_config
from checkpoints import make_checkpoint
from optimus import LLM, SamplingParams
from optimus.bench_serving import ServingSetup, Timeline, bench_serving, serving_capacity
from optimus.cli import main
from optimus.load import Arrival, Pattern, arrival_times
from optimus.serving import (
    Backend,
    EngineBackend,
    FinishedRequest,
    OnStep,
    SimulatorBackend,
    Stop,
)
from optimus.slo import MissCounter, Percentiles, Slo, find_capacity, summarise_serving

NEVER = FinishedRequest(Arrival(2.0, None, 8, 8), 8)


def request(arrival_s: float, ttft_ms: float, tpot_ms: float, num_tokens: int) -> FinishedRequest:
    first = arrival_s + ttft_ms / 1e3
    finish = first + tpot_ms / 1e3 * (num_tokens - 1)
    return FinishedRequest(
        Arrival(arrival_s, None, 8, num_tokens), 8, num_tokens, nfe=num_tokens // 2,
        decode_rows=3 * num_tokens, first_token_s=first, finish_s=finish,
    )  # fmt: skip


def test_times_count_from_the_scheduled_arrival() -> None:
    done = request(1.5, 200, 10, 11)
    assert done.ttft_s == pytest.approx(0.2) and done.tpot_s == pytest.approx(0.01)
    assert done.latency_s == pytest.approx(0.3)
    assert request(0, 5, 10, 1).tpot_s is None
    assert NEVER.ttft_s == NEVER.latency_s == NEVER.tpot_s == math.inf and not NEVER.is_finished


def test_slo_by_hand() -> None:
    slo = Slo(ttft_ms=100, tpot_ms=20)
    assert slo.meets(request(0, 99, 19, 5)) and slo.meets(request(0, 99, 500, 1))
    assert not slo.meets(request(0, 101, 19, 5)) and not slo.meets(request(0, 99, 21, 5))
    assert not slo.meets(NEVER) and not Slo().meets(NEVER)
    assert Slo().meets(request(0, 1e6, 1e6, 5)) and not Slo().is_set
    with pytest.raises(ValueError, match="slo_ttft_ms must be a number > 0, got 0"):
        Slo(ttft_ms=0)


def test_summary_by_hand() -> None:
    requests = [request(0, 50, 10, 11), request(1, 150, 10, 21), request(2, 50, 30, 2), NEVER]
    found = summarise_serving(requests, Slo(100, 20), duration_s=4.0)
    assert (found.num_requests, found.num_finished, found.offered_rate) == (4, 3, 1.0)
    assert found.seconds == pytest.approx(2.08)  # the third request's last token
    assert found.tokens_per_second == pytest.approx(34 / 2.08)
    assert found.goodput == pytest.approx(1 / 2.08)
    assert (found.attainment, found.ttft_attainment, found.tpot_attainment) == (0.25, 0.5, 0.5)
    assert found.ttft_ms.p50 == pytest.approx(50) and found.ttft_ms.p90 is None
    assert found.ttft_ms.mean is None  # one never came
    assert found.tokens_per_forward == 34 / (5 + 10 + 1) and found.rows_per_token == 3
    assert json.dumps(found.to_dict(), allow_nan=False)
    assert Percentiles.of([0.001 * i for i in range(1, 101)]).p99 == pytest.approx(99)
    with pytest.raises(ValueError, match="no request arrived"):
        summarise_serving([], Slo(), 1.0)


def test_miss_counter_ends_a_lost_run() -> None:
    stop = MissCounter(Slo(ttft_ms=100), num_requests=20, share=0.9)  # two may miss
    late, fine = request(0, 500, 1, 2), request(0, 50, 1, 2)
    assert [stop(r) for r in (late, fine, late, fine, late)] == [False] * 4 + [True]


@pytest.mark.parametrize("start", [0.01, 1.0, 7.0, 1000.0])
def test_capacity_is_bracketed(start: float) -> None:
    """Everything is met up to 7.3 requests per second, nothing above."""
    found = find_capacity(lambda rate: float(rate <= 7.3), start, max_runs=40)
    assert found.is_converged and found.limit is not None
    assert found.rate <= 7.3 < found.limit <= found.rate * 1.05
    assert len(found.probes) <= 20


def test_capacity_with_too_few_runs() -> None:
    found = find_capacity(lambda rate: float(rate <= 7.3), 1.0, max_runs=3)
    assert (found.rate, found.limit, found.is_converged) == (4.0, None, False)
    none = find_capacity(lambda rate: 0.5, 1.0, max_runs=4)
    assert (none.rate, none.limit) == (0.0, 0.125)
    edge = find_capacity(lambda rate: 0.9 if rate <= 2 else 0.89, 2.0, share=0.9, max_runs=20)
    assert 2.0 <= edge.rate < 2.1
    for arguments in ({"start_rate": 0.0}, {"start_rate": 1.0, "max_runs": 0}):
        with pytest.raises(ValueError):
            find_capacity(lambda rate: 1.0, **arguments)  # type: ignore[arg-type]


class QueueBackend:
    """One server, 100 ms a request, first come first served."""

    def run(
        self,
        arrivals: Sequence[Arrival],
        *,
        on_step: OnStep | None = None,
        drain_s: float = math.inf,
        stop: Stop | None = None,
    ) -> list[FinishedRequest]:
        free_s, done = 0.0, []
        for arrival in arrivals:
            start = max(free_s, arrival.arrival_s)
            free_s = start + 0.1
            done.append(FinishedRequest(arrival, 1, 2, 1, 2, start + 0.05, free_s))
        return done


def setup(slo: Slo = Slo(), duration: float = 20.0) -> ServingSetup:  # noqa: B008
    pattern = Pattern(burstiness=1e9)  # evenly spaced

    def arrivals_at(rate: float) -> list[Arrival]:
        times = arrival_times(pattern, rate, duration, seed=0)
        return [Arrival(t, None, 16, 32, i) for i, t in enumerate(times)]

    return ServingSetup(arrivals_at, lambda rate: duration, slo)


def test_capacity_of_a_queue() -> None:
    """Up to 10 requests per second none waits; above, the queue grows by (rate - 10) x 20 s."""
    found = serving_capacity(setup(Slo(ttft_ms=60)), QueueBackend(), 1.0, tolerance=0.02,
                             max_runs=30)  # fmt: skip
    assert found.is_converged and 9.7 <= found.rate <= 10.3
    with pytest.raises(ValueError, match="needs an SLO"):
        serving_capacity(setup(), QueueBackend(), 1.0)


def test_arms_see_the_same_arrivals() -> None:
    backends: dict[str, Backend] = {"a": QueueBackend(), "b": QueueBackend()}
    rows = bench_serving(setup(Slo(ttft_ms=60)), backends, [2.0, 20.0])
    assert [(r.rate, r.mode) for r in rows] == [(2, "a"), (2, "b"), (20, "a"), (20, "b")]
    assert rows[0].summary == rows[1].summary and rows[0].summary.attainment == 1
    assert rows[2].summary.attainment < 0.1
    with pytest.raises(ValueError, match=r"no request arrives at a rate of 0.001"):
        bench_serving(setup(), backends, [0.001])


def test_simulator_backend_is_exact() -> None:
    """Blocks of 8, two commits a step: a lone request of 32 tokens takes prefill and 16 steps."""
    config = simulator_config(decode_mode="chunk", chunk_length=4, kv_policy="freeze")
    backend = SimulatorBackend(config, [make_trace()], sampling_params(1))
    timeline = Timeline(0.02)
    [lone] = backend.run([Arrival(1.0, None, 16, 32)], on_step=timeline.add)
    assert (lone.num_tokens, lone.nfe, lone.prompt_len) == (32, 16, 16)
    assert timeline.num_steps == 17
    step_s = 4e-3  # and a little per row
    assert 2 * step_s < lone.ttft_s < 3 * step_s < 17 * step_s < lone.latency_s < 18 * 1.1 * step_s
    assert timeline.chunk_histogram == {4: 12, 2: 4}
    columns = timeline.to_dict([lone.arrival])
    assert columns["arrivals"][50] == 50 and sum(columns["arrivals"]) == 50
    assert sum(columns["tokens"]) * 0.02 == pytest.approx(32)
    assert columns["chunk_mean"][0] is None and columns["chunk_p90"][51] == 4


def test_simulator_backend_gives_up() -> None:
    backend = SimulatorBackend(simulator_config(), [make_trace()], sampling_params(1))
    arrivals = [Arrival(0.001 * i, None, 19, 32, i) for i in range(50)]
    everything = backend.run(arrivals)
    assert all(r.is_finished and r.prompt_len == 16 for r in everything)
    assert [r.arrival for r in everything] == arrivals
    some = backend.run(arrivals, drain_s=0.1)
    assert 0 < sum(r.is_finished for r in some) < 50 and some[-1].prompt_len == 16
    assert backend.reliability is not None and backend.reliability["by_rank"]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    path = make_checkpoint(
        tmp_path_factory.mktemp("checkpoint"), tokenizer=True, max_position_embeddings=256
    )
    return LLM(path, decode_mode="block", num_threads=1)


def test_engine_backend(llm: LLM) -> None:
    backend = EngineBackend(llm, SamplingParams(max_tokens=8, ignore_eos=True))
    arrivals = [Arrival(0.02 * i, p, None, None, i) for i, p in enumerate(("one", [1, 2, 3], "x"))]
    arrivals.append(Arrival(0.06, "four", None, 16, 3))
    steps: list[float] = []
    done = backend.run(arrivals, on_step=lambda end_s, record: steps.append(end_s))
    assert [r.num_tokens for r in done] == [8, 8, 8, 16] and done[1].prompt_len == 3
    for result, arrival in zip(done, arrivals, strict=True):
        assert result.arrival is arrival and len(result.token_ids) == result.num_tokens
        assert 0 < result.ttft_s <= result.latency_s and result.finish_s is not None
        assert arrival.arrival_s < result.finish_s <= steps[-1] + 1e-3
    assert steps == sorted(steps) and not llm.engine.has_unfinished()
    assert not backend.run([])


def test_a_late_driver_does_not_flatter_latency(llm: LLM) -> None:
    """The second request arrives while the driver is held up after its first step: the engine hears
    of it later, its clock has been running."""
    backend = EngineBackend(llm, SamplingParams(max_tokens=8, ignore_eos=True))
    held_up: list[float] = []

    def on_step(end_s: float, record: object) -> None:
        if not held_up:
            held_up.append(end_s)
            time.sleep(0.1)

    arrivals = [Arrival(0.0, "one", None, None), Arrival(0.05, "two", None, None)]
    first, second = backend.run(arrivals, on_step=on_step)
    resumed_s = held_up[0] + 0.1
    assert second.first_token_s is not None and second.first_token_s > resumed_s
    assert second.ttft_s == pytest.approx(second.first_token_s - 0.05)
    assert second.latency_s > resumed_s - 0.05 and first.latency_s > 0.1


def test_engine_backend_gives_up_and_stays_usable(llm: LLM) -> None:
    backend = EngineBackend(llm, SamplingParams(max_tokens=200, ignore_eos=True))
    arrivals = [Arrival(0.0, "one", None, None, i) for i in range(4)]
    late = Arrival(30.0, "never", None, None, 4)
    short = Arrival(0.0, "short", None, 4, 5)
    done = backend.run([*arrivals, short, late], stop=lambda request: request.num_tokens == 4)
    assert [r.is_finished for r in done] == [False] * 4 + [True, False]
    assert done[0].latency_s == math.inf and done[-1].ttft_s == math.inf
    assert not llm.engine.has_unfinished()
    assert not any(r.is_finished for r in backend.run(arrivals, drain_s=0.0))
    assert llm.generate("one", SamplingParams(max_tokens=4, ignore_eos=True))


@pytest.mark.parametrize(
    "arrival, message",
    [
        (Arrival(0.0, None, 8, 8), "request 0 has a length but no prompt"),
        (Arrival(0.0, [1] * 256, 256, 8), "a prompt of 256 tokens; max_model_len is 256"),
        (Arrival(0.0, [], 0, 8), "a prompt of 0 tokens"),
    ],
)
def test_engine_backend_checks_first(llm: LLM, arrival: Arrival, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineBackend(llm, SamplingParams()).run([arrival])
    assert not llm.engine.has_unfinished()


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as done:
        main([str(a) for a in arguments])
    return int(done.value.code or 0)


def test_command_drives_the_engine(
    llm: LLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, trace = tmp_path / "report.json", tmp_path / "trace.json"
    code = run(
        "bench", "serving", "--model", llm.checkpoint.path, "--modes", "block,elastic",
        "--rate", "20,40", "--duration", 0.3, "--prompt-len", "4-12", "--output-len", 8,
        "--slo-ttft-ms", 1000, "--trace", trace, "--explain", 3, "--output", report,
        "--threads", 1, "--seed", 1,
    )  # fmt: skip
    out, err = capsys.readouterr()
    assert code == 0, err
    assert [line for line in out.splitlines() if len(line) > 80] == []
    written = json.loads(report.read_text())
    assert written["kind"] == "serving" and written["arguments"]["rate"] == "20,40"
    assert [(r["rate"], r["mode"]) for r in written["rows"]] == [
        (rate, mode) for rate in (20, 40) for mode in ("block", "elastic")
    ]
    for row in written["rows"]:
        assert row["summary"]["num_finished"] == row["summary"]["num_requests"] > 0
        assert row["accuracy"] is None and row["timeline"]["chunk_mean"]
    assert "elastic at 40/s, step" in out and json.loads(trace.read_text())["traceEvents"]


def test_command_simulates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The demo model's recorded answers, on a named curve and on that of a report."""
    report = tmp_path / "report.json"
    arguments = (
        "bench", "serving", "--modes", "block,elastic", "--rate", 30, "--duration", 2,
        "--max-num-seqs", 64, "--slo-tpot-ms", 20, "--output", report,
    )  # fmt: skip
    code = run(*arguments, "--simulate", "h200-dense-8b", "--find-capacity", "--max-runs", 2)
    out, err = capsys.readouterr()
    assert code == 0, err
    assert "capacity, requests per second" in out
    first = json.loads(report.read_text())
    assert first["capacities"]["elastic"]["probes"][0]["rate"] == 30
    assert first["latency_profile"]["decode"][0] == [1, 4.06]
    report.replace(tmp_path / "first.json")
    assert run(*arguments, "--simulate", tmp_path / "first.json") == 0
    second = json.loads(report.read_text())
    assert second["rows"] == first["rows"]  # virtual time repeats exactly


def test_command_replays_a_trace(
    llm: LLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "arrivals.jsonl"
    lines = [{"arrival_s": 0.01 * i, "prompt_len": 5 + i, "output_len": 4} for i in range(5)]
    file.write_text("\n".join(map(json.dumps, lines)))
    code = run(
        "bench", "serving", "--model", llm.checkpoint.path, "--modes", "block", "--arrivals", file,
        "--json",
    )  # fmt: skip
    out, err = capsys.readouterr()
    assert code == 0, err
    [row] = json.loads(out)["rows"]
    assert row["rate"] == pytest.approx(100) and row["summary"]["num_finished"] == 5


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rate", "0"], "--rate takes numbers > 0, got '0'"),
        (["--pattern", "waves"], "pattern must be one of"),
        (["--prompt-len", "4"], "prompt_len and output_len go together"),
        (["--find-capacity"], "needs an SLO"),
        (["--simulate", "missing.json"], "or a JSON file, got 'missing.json'"),
        (["--arrivals", "missing.jsonl"], "missing.jsonl does not exist"),
    ],
)
def test_command_errors(
    llm: LLM, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run("bench", "serving", "--model", llm.checkpoint.path, *arguments) == 2
    assert message in capsys.readouterr().err
