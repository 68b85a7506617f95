"""What `fourbit judge` says of input that it cannot use: one sentence, exit code 2, nothing left behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


def refused(done: Any, folder: Path, *words: str) -> None:
    for word in words:
        assert word in done.complaint, done.err
    left = {path.name for path in folder.iterdir()}
    assert not {name for name in left if "ratings" in name or "cache" in name}, left


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a.jsonl"], ["two systems"]),
        (["a.jsonl", "a.jsonl"], ["called 'a'", "other=a.jsonl"]),
        (["a.jsonl", "none.jsonl"], ["none.jsonl", "does not exist"]),
        (["a.jsonl", "."], ["is a folder"]),
        (["a.jsonl", "=b.jsonl"], ["NAME=FILE"]),
        (["a.jsonl", "b.jsonl", "--reference", "z"], ["'z'", "a, b"]),
        (["a.jsonl", "b.jsonl", "--mode", "scores"], ["--reference"]),
        (["a.jsonl", "b.jsonl", "--mode", "taste"], ["'taste'", "verdict, scores"]),
        (["a.jsonl", "b.jsonl", "--price-in", "3"], ["--price-out"]),
        (["a.jsonl", "b.jsonl", "--max-cost", "3"], ["--price-in"]),
        (["a.jsonl", "b.jsonl", "--max-cost", "nan", "--price-in", "1", "--price-out", "1"], ["--max-cost", "nan"]),
        (["a.jsonl", "b.jsonl", "--price-in", "-1", "--price-out", "1"], ["--price-in", "-1"]),
        (["a.jsonl", "b.jsonl", "--concurrency", "0"], ["concurrency is 0"]),
        (["a.jsonl", "b.jsonl", "--timeout", "0"], ["time-out"]),
        (["a.jsonl", "b.jsonl", "--patience", "-1"], ["patience"]),
        (["a.jsonl", "b.jsonl", "--temperature", "3"], ["temperature is 3"]),
        (["a.jsonl", "b.jsonl", "--max-tokens", "0"], ["0 tokens"]),
        (["a.jsonl", "b.jsonl", "--prompt", "none.txt"], ["none.txt", "does not exist"]),
        (["a.jsonl", "b.jsonl", "--prompt", "bare.txt"], ["bare.txt", "{question} and {second}"]),
        (["a.jsonl", "b.jsonl", "--prompt", "parts.txt"], ["parts.txt", "user, system"]),
        (["a.jsonl", "b.jsonl", "--questions", "none.jsonl"], ["none.jsonl", "does not exist"]),
        (["a.jsonl", "b.jsonl", "--cache", "bare.txt"], ["bare.txt", "no cache"]),
        (["a.jsonl", "b.jsonl", "--output", "a.jsonl"], ["a.jsonl", "no ratings"]),
        (["a.jsonl", "b.jsonl", "--api-key-env", "NO_SUCH_KEY"], ["NO_SUCH_KEY"]),
        (["a.jsonl", "few.jsonl"], ["few.jsonl", "prompts 1, 2, 3, 4, 5 and 2 more", "a.jsonl", "--common"]),
        (["few.jsonl", "a.jsonl"], ["few.jsonl", "prompts 1, 2, 3, 4, 5 and 2 more"]),
        (["a.jsonl", "strangers.jsonl", "--common"], ["no prompt that all"]),
        (["a.jsonl", "other.jsonl", "--common"], ["other.jsonl, line 1", "id 0", "a.jsonl, line 1"]),
        (["a.jsonl", "twice.jsonl"], ["twice.jsonl, line 2", "id 0"]),
        (["a.jsonl", "broken.jsonl"], ["broken.jsonl, line 2", "not valid JSON"]),
        (["a.jsonl", "wordless.jsonl"], ["wordless.jsonl, line 1", "'answer'"]),
        (["a.jsonl", "empty.jsonl"], ["empty.jsonl holds no records"]),
        (["mute.jsonl", "silent.jsonl"], ["mute.jsonl, line 1", "--questions"]),
    ],
    ids=lambda value: " ".join(value) if value and "jsonl" in value[0] else "",
)
def test_input_that_is_refused(
    server: Any, answers: Run, judge: Run, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    answers("a", "b", prompts=8)
    whole = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text(whole[0])
    (tmp_path / "strangers.jsonl").write_text('{"id": "x", "prompt": "?", "text": "!"}\n')
    (tmp_path / "other.jsonl").write_text('{"id": 0, "prompt": "Who?", "text": "!"}\n')
    (tmp_path / "twice.jsonl").write_text(whole[0] * 2)
    (tmp_path / "broken.jsonl").write_text(whole[0] + whole[1][:30])
    (tmp_path / "wordless.jsonl").write_text('{"id": 0, "prompt": "?", "answer": "!"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "mute.jsonl").write_text('{"id": 0, "text": "!"}\n')
    (tmp_path / "silent.jsonl").write_text('{"id": 0, "text": "?"}\n')
    (tmp_path / "bare.txt").write_text("Which is better, {first} or the other? " * 50)
    (tmp_path / "parts.txt").write_text("=== user ===\n{question}{first}{second}\n=== system ===\nhm\n")
    refused(judge(*arguments), tmp_path, *words)
    assert server.seen == 0


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (401, {"message": "no key"}, ["does not accept the key", "--api-key-env"]),
        (403, {"message": "not you"}, ["does not allow", "not you", "toy"]),
        (404, {"message": "The model `toy` does not exist"}, ["no model 'toy'", "--base-url"]),
        (402, {"message": "pay first"}, ["no money left"]),
        (429, {"message": "quota", "code": "insufficient_quota"}, ["no money left"]),
        (400, {"message": "the prompt is too long"}, ["too long for the judge", "prompt 0"]),
        (422, {"message": "temperature: extra\n\nfields"}, ["refuses it", "temperature: extra fields"]),
    ],
)
def test_a_server_that_refuses(
    server: Any, answers: Run, judge: Run, tmp_path: Path, status: int, error: dict[str, str], words: list[str]
) -> None:
    server.behave = lambda number, prompt: (status, {"error": error})
    done = judge(*answers("a", "b"), "--concurrency", "2")
    assert done.code == 2
    *_, complaint = done.err.splitlines()
    assert complaint.startswith("Error: ")
    assert all(word in complaint for word in words), complaint
    assert "kept" not in complaint
    assert server.seen <= 3
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "b.jsonl"}


def test_a_server_that_is_not_there(answers: Run, fourbit_here: Run, tmp_path: Path) -> None:
    paths = answers("a", "b")
    common = ("--output", "ratings.jsonl", "--model", "toy", "--backoff", "0.01", "--base-url")
    done = fourbit_here("judge", *paths, *common, "http://127.0.0.1:9/v1")
    assert done.code == 2
    assert "http://127.0.0.1:9/v1 cannot be reached" in done.err.splitlines()[-1]
    refused(fourbit_here("judge", *paths, *common, "localhost:9"), tmp_path, "base URL", "http://localhost:8000/v1")
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "b.jsonl"}


def test_without_a_key_openai_is_not_asked(answers: Run, fourbit_here: Run, tmp_path: Path) -> None:
    os.environ.pop("OPENAI_API_KEY", None)
    os.environ.pop("OPENAI_BASE_URL", None)
    done = fourbit_here("judge", *answers("a", "b"), "--output", "ratings.jsonl", "--model", "toy")
    refused(done, tmp_path, "OPENAI_API_KEY", "api.openai.com")


def test_without_openai_installed(answers: Run, judge: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "openai", None)
    done = judge(*answers("a", "b"))
    assert done.code == 2
    assert done.err.splitlines()[-1] == "Error: Asking needs openai; install it with `pip install 'fourbit[eval]'`."
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "b.jsonl"}


def test_a_dry_run_asks_and_writes_nothing(server: Any, answers: Run, judge: Run, tmp_path: Path) -> None:
    paths = answers("a", "b", "c", prompts=5)
    arguments = ("--dry-run", "--price-in", "2", "--price-out", "10", "--max-tokens", "100")
    done = judge(*paths, *arguments)
    assert done.code == 0, done.err
    keys = json.loads(done.out)
    assert keys["judgements"] == keys["to_ask"] == 30
    assert keys["estimate"]["most_completion_tokens"] == 3000
    tokens = keys["estimate"]["prompt_tokens"], keys["estimate"]["completion_tokens"]
    assert keys["estimate"]["cost"] == pytest.approx((2 * tokens[0] + 10 * tokens[1]) / 1e6)
    assert server.seen == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "b.jsonl", "c.jsonl"}
    assert judge(*paths[:2], *arguments[1:]).code == 0
    # four bytes a token, and the server of this test counts so, too: the estimate of the ten that were asked was right
    sent = sum(sum(len(message["content"].encode()) for message in body["messages"]) for body in server.bodies)
    assert sent / 4 == pytest.approx(tokens[0] / 3, rel=0.01)
    keys = json.loads(judge(*paths, *arguments, "--overwrite").out)
    assert (keys["to_ask"], keys["already"]) == (20, 10)


def test_a_prompt_of_ones_own(server: Any, answers: Run, judge: Run, tmp_path: Path) -> None:
    paths = answers("a", "b", prompts=1)
    own = tmp_path / "own.txt"
    own.write_text('Q: {question}\nA: {first}\nB: {second}\nReply {"verdict": 1}, 2 or 3, and {nothing} else.\n')
    server.answer = lambda prompt: '{"verdict": 2}'
    done = judge(*paths, "--prompt", own, "--concurrency", "1")
    assert done.code == 0, done.err
    assert server.bodies[0]["messages"] == [
        {
            "role": "user",
            "content": "Q: What is 0 and 0?\nA: It is 0, says a.\nB: It is 0, says b.\n"
            'Reply {"verdict": 1}, 2 or 3, and {nothing} else.',
        }
    ]
    (pair,) = json.loads(done.out)["pairs"]
    assert (pair["wins"], pair["losses"]) == (1, 1)
    assert judge(*paths, "--overwrite").code == 0  # another prompt is another question
    assert len(server.paid) == 4


def test_released_answers_and_transcripts(server: Any, judge: Run, tmp_path: Path) -> None:
    released = {"question_id": 7, "text": "Who?", "prompt": "### Human: Who? ### Assistant:", "generation": "She."}
    ours = {"id": 7, "prompt": "Be brief. ### Human: Who? ### Assistant:", "text": "He."}
    talk = {
        "id": 7,
        "prompt": [{"role": "system", "content": "Hm."}, {"role": "user", "content": "Who?"}],
        "text": "It.",
    }
    for name, record in (("released", released), ("ours", ours), ("talk", talk)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
    done = judge("released.jsonl", "ours.jsonl", "talk.jsonl")
    assert done.code == 0, done.err
    assert all("request ----\nWho?\n----" in body["messages"][1]["content"] for body in server.bodies)
    assert len(server.paid) == 6


def test_the_table(server: Any, answers: Run, fourbit_here: Run) -> None:
    done = fourbit_here(
        "judge", *answers("a", "b"), "--model", "toy", "--base-url", server.url, "--output", "ratings.jsonl",
        "--price-in", "1", "--price-out", "2",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "To ask: 24 of 24 judgements, about" in done.err
    for words in ("wins  ties  losses", "a against b", "at equal length", "shown first", "order flips", "tokens in"):
        assert words in done.out, done.out
    assert max(map(len, done.out.splitlines())) <= 80


def test_judging_needs_no_torch(fourbit_command: Run, answers: Run, tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys\nfrom fourbit.cli import main\n"
        f"main(['judge', *{[str(path) for path in answers('a', 'b')]!r}, '--output', 'r.jsonl', '--model', 'x',"
        " '--dry-run', '--json'])\nassert not {'torch', 'transformers', 'openai'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=tmp_path, capture_output=True)
