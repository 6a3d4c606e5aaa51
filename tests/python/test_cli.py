"""The `optimus` command, in this process where possible."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from checkpoints import make_checkpoint
from optimus import LLM, SamplingParams, __version__
from optimus.bench import bench_offline
from optimus.cli import main
from optimus.display import format_bytes
from optimus.evaluate import load_tasks, wilson_interval
from optimus.options import parse_bytes, parse_mode


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    return make_checkpoint(path, tokenizer=True, max_position_embeddings=128)


@pytest.fixture(scope="module")
def answers(checkpoint: Path) -> dict[str, str | None]:
    """What block mode answers to two questions."""
    llm = LLM(checkpoint, decode_mode="block")
    params = SamplingParams(max_tokens=12)
    return {
        p: llm.chat([{"role": "user", "content": p}], params)[0].outputs[0].text
        for p in ("one", "two")
    }


@pytest.fixture
def tasks(tmp_path: Path, answers: dict[str, str | None]) -> Path:
    """Two families: the first is always right, the second half the time."""
    lines = [
        {"id": "0", "task": "good", "prompt": "one", "answer": answers["one"]},
        {"id": "1", "task": "half", "prompt": "two", "answer": answers["two"]},
        {"id": "2", "task": "half", "prompt": "two", "answer": "something else"},
    ]
    file = tmp_path / "tasks.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    return file


class Cli:
    """Runs `optimus ARGS...`; returns (exit code, stdout, stderr)."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        code: Any = 0
        try:
            main([str(a) for a in arguments])
        except SystemExit as error:
            code = error.code
        out, err = self.capsys.readouterr()
        return code or 0, out, err

    def json(self, *arguments: object) -> Any:
        code, out, err = self(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capsys)


def test_help_and_version(cli: Cli) -> None:
    code, out, _ = cli("--help")
    assert code == 0
    for command in ("generate", "chat", "inspect", "eval", "bench"):
        assert command in out
        assert cli(command, "--help")[0] == 0
    assert cli("--version")[:2] == (0, f"optimus {__version__}\n")


def test_generate_one_prompt(cli: Cli, checkpoint: Path, answers: dict[str, str | None]) -> None:
    code, out, err = cli(
        "generate", "one", "--model", checkpoint, "--mode", "block", "--max-tokens", 12
    )
    assert (code, out) == (0, f"{answers['one']}\n")
    assert "forwards" in err


def test_generate_raw_and_json(cli: Cli, checkpoint: Path) -> None:
    raw = cli.json(
        "generate", "one", "--raw", "--model", checkpoint, "--mode", "chunk:2",
        "--kv-policy", "freeze", "--threshold", 0.5, "--max-tokens", 6, "--temperature", 0.8,
        "--seed", 3,
    )  # fmt: skip
    assert raw["prompt"] == "one"
    assert len(raw["outputs"][0]["token_ids"]) == 6
    assert set(raw["metrics"]["chunk_histogram"]) <= {"1", "2"}


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_generate_a_file(
    cli: Cli, checkpoint: Path, tmp_path: Path, answers: dict[str, str | None], suffix: str
) -> None:
    file = tmp_path / f"prompts.{suffix}"
    lines = ["one", "two"] if suffix == "txt" else ['{"prompt": "one"}', '{"prompt": "two"}']
    file.write_text("\n\n".join(lines) + "\n")
    arguments = ["generate", "--file", file, "--model", checkpoint, "--mode", "block",
                 "--max-tokens", 12]  # fmt: skip
    code, out, _ = cli(*arguments)
    assert (code, out) == (0, f"> one\n{answers['one']}\n> two\n{answers['two']}\n")
    code, out, _ = cli(*arguments, "--json")
    texts = [json.loads(line)["outputs"][0]["text"] for line in out.splitlines()]
    assert texts == [answers["one"], answers["two"]]


def test_generate_standard_input(
    cli: Cli,
    checkpoint: Path,
    answers: dict[str, str | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n"))
    code, out, _ = cli("generate", "--model", checkpoint, "--mode", "block", "--max-tokens", 12)
    assert (code, out) == (0, f"{answers['one']}\n")


def test_watch_animates_in_a_terminal(checkpoint: Path, answers: dict[str, str | None]) -> None:
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "optimus", "generate", "one", "--watch", "--model",
               str(checkpoint), "--mode", "block", "--max-tokens", "12"]  # fmt: skip
    package = str(Path(__file__).parents[2] / "python")
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "80", "PYTHONPATH": path}
    process = subprocess.Popen(
        command, stdin=follower, stdout=follower, stderr=subprocess.PIPE, env=environment
    )
    os.close(follower)
    shown = b""
    try:
        while chunk := os.read(leader, 65536):
            shown += chunk
    except OSError:  # the other side is closed
        pass
    os.close(leader)
    assert process.stderr is not None
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 0, err
    frames = shown.decode(errors="replace").split("forward ")
    assert "\u2591" in frames[0] and "\u2591" not in frames[-2]
    assert len(frames) > 4 and b"12 tokens in" in err


def test_chat_keeps_and_resets_the_conversation(
    cli: Cli,
    checkpoint: Path,
    answers: dict[str, str | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\nthree\n/reset\n\ntwo\n/exit\nnever\n"))
    code, out, err = cli("chat", "--model", checkpoint, "--mode", "block", "--max-tokens", 12)
    assert code == 0 and err.count("12 tokens in") == 3
    assert out.startswith(f"{answers['one']}\n") and out.endswith(f"{answers['two']}\n")


def test_chat_survives_a_question_that_does_not_fit(
    cli: Cli, checkpoint: Path, answers: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("x" * 200 + "\none\n"))
    code, out, err = cli("chat", "--model", checkpoint, "--mode", "block", "--max-tokens", 12)
    assert (code, out) == (0, f"{answers['one']}\n")
    assert "leaves no room" in err


def test_inspect(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    code, out, _ = cli("inspect", checkpoint)
    assert code == 0 and "8 (from config.json (block_size))" in out and "problem" not in out
    bare = make_checkpoint(tmp_path, block_size=None)
    code, out, _ = cli("inspect", bare)
    assert code == 1 and "pass block_length=" in out
    assert cli.json("inspect", bare, "--block-length", 4)["problems"] == []


def test_eval_scores_families(cli: Cli, checkpoint: Path, tasks: Path) -> None:
    arguments = ["eval", "--tasks", tasks, "--model", checkpoint, "--mode", "block",
                 "--max-tokens", 12, "--concurrency", 2]  # fmt: skip
    report = cli.json(*arguments)
    families = report["families"]
    assert (families["good"]["correct"], families["good"]["total"]) == (1, 1)
    assert (families["half"]["correct"], families["half"]["total"]) == (1, 2)
    assert report["overall"]["accuracy"] == 2 / 3
    assert report["num_tokens"] == 36 and report["tokens_per_forward"] > 0
    code, out, _ = cli(*arguments, "--num-prompts", 2)
    assert code == 0 and "100.0" in out and "tokens per forward" in out


def test_bench_offline(cli: Cli, checkpoint: Path, tasks: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    code, out, err = cli(
        "bench", "offline", "--tasks", tasks, "--model", checkpoint, "--num-prompts", 3,
        "--max-tokens", 12, "--concurrency", "1,2", "--modes", "ar,block,chunk:4,elastic",
        "--output", file,
    )  # fmt: skip
    assert code == 0, err
    assert "chunk:4" in out and all(len(line) <= 80 for line in out.splitlines())
    report = json.loads(file.read_text())
    assert [(r["mode"], r["concurrency"]) for r in report["rows"]] == [
        (mode, n) for n in (1, 2) for mode in ("ar", "block", "chunk:4", "elastic")
    ]
    for row in report["rows"]:
        assert 3 <= row["num_tokens"] <= 36 and row["num_steps"] > 0
        assert row["tokens_per_second"] > 0 and row["ms_per_step"] >= row["forward_ms"] > 0
    ar, block = report["rows"][:2]
    assert ar["rows_per_token"] == ar["tokens_per_forward"] == 1
    assert block["accuracy"]["correct"] == 2
    assert report["machine"]["cores"] >= 1 and report["arguments"]["concurrency"] == [1, 2]
    assert "commit" in report and report["latency_profile"]


def test_bench_checks_modes_first(checkpoint: Path, tasks: Path) -> None:
    llm = LLM(checkpoint, decode_mode="block")
    for modes, loads in ((["ar", "warp"], [1]), (["ar"], [1, 0])):
        with pytest.raises(ValueError, match=r"'warp'|must be at least 1, got 0"):
            bench_offline(llm, load_tasks(tasks), modes, loads, SamplingParams(max_tokens=1))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["generate", "x", "--mode", "warp"], "mode must be one of .*, got 'warp'"),
        (["generate", "x", "--mode", "chunk:x"], "mode must look like 'chunk:4'"),
        (["generate", "x", "--mode", "chunk:9"], r"chunk_length must be .* 8\], got 9"),
        (["generate", "x", "--max-tokens", 0], "max_tokens must be >= 1, got 0"),
        (["generate", "x", "--threshold", "nan"], r"confidence_threshold must .* got nan"),
        (["generate", ""], "prompt 0 is empty|leaves no room"),
        (["generate", "x", "--file", "y"], "either a PROMPT or --file"),
        (["generate", "--file", "missing.txt"], "missing.txt does not exist"),
        (["generate", "x", "--watch", "--json"], "--watch shows one prompt"),
        (["generate", "x", "--max-tokens", 2**40], "max_tokens must be < 2147483648"),
        (["generate", "--file", "/dev/null"], "/dev/null holds no prompts"),
        (["eval", "--num-prompts", "-990"], "num_prompts must be at least 1, got -990"),
        (["bench", "offline", "--concurrency", ""], "--concurrency takes a comma-separated list"),
        (["bench", "offline", "--output", "/no/such/x.json"], "no folder /no/such"),
        (["eval", "--tasks", "missing.jsonl"], "missing.jsonl does not exist"),
        (["bench", "offline", "--concurrency", "0"], "ints >= 1, got '0'"),
    ],
)
def test_errors_are_one_line(
    cli: Cli, checkpoint: Path, arguments: list[object], message: str
) -> None:
    code, out, err = cli(*arguments, "--model", checkpoint, *(["--raw"] if "" in arguments else []))
    assert (code, out) == (2, "")
    assert err.startswith("error: [") and err.count("\n") == 1
    assert re.search(message, err)


def test_debug_shows_the_traceback(cli: Cli, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a directory"):
        cli("--debug", "inspect", tmp_path / "missing")
    assert cli("inspect", tmp_path / "missing")[0] == 2
    assert cli("generate", "x", "--no-such-option")[0] == 2


@pytest.mark.parametrize("line", ["{", "[]", '{"prompt": "x"}', "3"])
def test_broken_task_files(tmp_path: Path, line: str) -> None:
    file = tmp_path / "tasks.jsonl"
    file.write_text('{"prompt": "a", "answer": "b"}\n' + line)
    with pytest.raises(ValueError, match=r"tasks\.jsonl, line 2"):
        load_tasks(file)


def test_too_few_tasks(tasks: Path) -> None:
    assert len(load_tasks(tasks, 2)) == 2
    with pytest.raises(ValueError, match="holds 3 tasks, 4 were asked for"):
        load_tasks(tasks, 4)


def test_wilson_interval() -> None:
    """Values of the closed form, from its definition in Wilson (1927)."""
    assert wilson_interval(0, 0) == (0.0, 1.0)
    low, high = wilson_interval(5, 10)
    assert (round(low, 4), round(high, 4)) == (0.2366, 0.7634)
    low, high = wilson_interval(10, 10)
    assert (round(low, 4), round(high, 4)) == (0.7225, 1.0)


def test_small_helpers() -> None:
    assert parse_mode("chunk:16") == ("chunk", 16) and parse_mode("ar") == ("ar", None)
    assert format_bytes(512) == "512 B" and format_bytes(3 << 19) == "1.5 MiB"
    assert parse_bytes("1.5GiB") == 3 << 29 and parse_bytes(7) == 7 and parse_bytes("2 kb") == 2000
    assert format_bytes(5 << 40) == "5120.0 GiB"
