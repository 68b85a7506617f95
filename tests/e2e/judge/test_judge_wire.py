"""`fourbit judge` against a real server that fails in every way: the run ends whole, and nothing is paid for twice."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

Run = Callable[..., Any]

SERVER = Path(__file__).with_name("judge_server.py")


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def everything_once(server: Any, count: int) -> None:
    assert len(server.paid) == count
    assert set(server.paid.values()) == {1}


def test_ratings_of_both_orders(server: Any, answers: Run, judge: Run, tmp_path: Path) -> None:
    # a judge that knows what it wants: the answer of b, unless a stands first on an even prompt
    def answer(prompt: str) -> str:
        first_is_a = prompt.index("says a.") < prompt.index("says b.")
        even = int(prompt.split("What is ")[1].split(maxsplit=1)[0]) % 2 == 0
        return f"Verdict: {(1 if even else 2) if first_is_a else 1}"

    server.answer = answer
    done = judge(*answers("a", "b", prompts=10))
    assert done.code == 0, done.err
    found = records(tmp_path / "ratings.jsonl")
    assert [(each["id"], each["first"], each["order"]) for each in found[:4]] == [
        (0, "a", 1), (0, "b", 2), (1, "a", 1), (1, "b", 2)
    ]  # fmt: skip
    assert [each["label"] for each in found[:4]] == [1, 1, 2, 1]
    assert found[0]["reply"] == "Verdict: 1"
    assert (found[0]["judge"], found[0]["mode"], found[0]["finish_reason"]) == ("toy", "verdict", "stop")
    assert found[0]["characters"] == [len("It is 0, says a.")] * 2
    keys = json.loads(done.out)
    (pair,) = keys["pairs"]
    assert (pair["wins"], pair["ties"], pair["losses"]) == (5, 0, 15)
    assert [order["wins"] for order in pair["orders"]] == [5, 0]
    assert pair["share"] == 0.25
    assert keys["order_bias"] == {
        "compared": 10, "flipped": 0.5, "reversed": 0.5, "first_share": 0.75,
        "low": pytest.approx(0.6, abs=0.11), "high": pytest.approx(0.9, abs=0.11),
    }  # fmt: skip
    everything_once(server, 20)

    before = (tmp_path / "ratings.jsonl").read_bytes()
    again = judge(*answers("a", "b", prompts=10))
    assert again.code == 0
    assert json.loads(again.out)["asked"] == 0
    assert (tmp_path / "ratings.jsonl").read_bytes() == before
    everything_once(server, 20)


def test_every_fault_at_once(server: Any, wire: ModuleType, answers: Run, judge: Run, tmp_path: Path) -> None:
    paths = answers("a", "b", "c")
    clean = judge(*paths, "--output", tmp_path / "clean.jsonl")
    assert clean.code == 0, clean.err
    everything_once(server, 72)
    server.paid = Counter()
    server.seen = 0
    server.behave = wire.faulty(0.5)
    done = judge(*paths)
    assert done.code == 0, done.err
    assert json.loads(done.out)["retries"] > 40
    everything_once(server, 72)
    assert (tmp_path / "ratings.jsonl").read_bytes() == (tmp_path / "clean.jsonl").read_bytes()


@pytest.mark.parametrize("fault", ["limit", "wait", "date", "error", "html", "no choices", "half", "drop", "slow"])
def test_each_fault_alone(server: Any, answers: Run, judge: Run, fault: str) -> None:
    server.behave = lambda number, prompt: fault if number < 3 else "ok"
    done = judge(*answers("a", "b", prompts=2))
    assert done.code == 0, done.err
    assert server.seen == (4 if fault == "slow" else 7)
    everything_once(server, 4)


def test_a_server_that_hangs_is_asked_again(server: Any, answers: Run, judge: Run) -> None:
    server.behave = lambda number, prompt: "hang" if number < 2 else "ok"
    done = judge(*answers("a", "b", prompts=3), "--timeout", "0.2")
    assert done.code == 0, done.err
    everything_once(server, 6)


def test_no_more_at_once_than_allowed(server: Any, answers: Run, judge: Run) -> None:
    server.behave = lambda number, prompt: "slow"
    assert judge(*answers("a", "b", prompts=6), "--concurrency", "3").code == 0
    assert server.most_at_once == 3


def test_a_pause_that_the_server_asks_for_is_kept_by_all(server: Any, answers: Run, judge: Run) -> None:
    times: list[float] = []

    def behave(number: int, prompt: str) -> Any:
        times.append(time.monotonic())
        return (429, {"error": {"message": "no"}}, {"Retry-After": "0.4"}) if number == 0 else "slow"

    server.behave = behave
    assert judge(*answers("a", "b", prompts=4), "--concurrency", "2").code == 0
    # those that were sent before the pause was asked for may come; then nothing for its length
    pauses = [later - sooner for sooner, later in pairwise(times)]
    assert max(pauses) > 0.25
    everything_once(server, 8)


def test_what_cannot_be_read_is_kept_and_marked(server: Any, answers: Run, judge: Run, tmp_path: Path) -> None:
    odd = ["Verdict: 7", "", "I like both.", "\ud800\x00 Verdict", "Verdict: 1 or 2", "x" * 100_000]
    replies = iter(odd * 4)
    server.answer = lambda prompt: next(replies)
    done = judge(*answers("a", "b", prompts=6))
    assert done.code == 0, done.err
    found = records(tmp_path / "ratings.jsonl")
    assert {each["label"] for each in found} == {-1}
    assert sorted(each["reply"].replace("?", "\ud800") for each in found) == sorted(odd * 2)
    keys = json.loads(done.out)
    assert keys["unparsed"] == 1.0
    assert keys["order_bias"] is None
    assert keys["pairs"][0]["share"] is None
    everything_once(server, 12)
    assert judge(*answers("a", "b", prompts=6)).code == 0
    everything_once(server, 12)


def test_a_server_that_dies_and_comes_back(server: Any, answers: Run, judge: Run) -> None:
    def fall_and_rise() -> None:
        while sum(server.paid.values()) < 8:
            time.sleep(0.005)
        server.stop()
        time.sleep(0.4)
        server.start()

    server.behave = lambda number, prompt: "slow"
    accident = threading.Thread(target=fall_and_rise)
    accident.start()
    done = judge(*answers("a", "b"), "--concurrency", "4")
    accident.join()
    assert done.code == 0, done.err
    assert json.loads(done.out)["retries"] > 0
    everything_once(server, 24)


def test_a_server_that_stays_dead(server: Any, answers: Run, judge: Run, tmp_path: Path) -> None:
    server.behave = lambda number, prompt: "error" if len(server.paid) > 6 else "ok"
    paths = answers("a", "b")
    done = judge(*paths, "--patience", "0.2", "--concurrency", "2")
    assert done.code == 2
    assert "500" in done.err
    assert "of 24 judgements are kept" in done.err
    assert not (tmp_path / "ratings.jsonl").exists()
    server.behave = lambda number, prompt: "ok"
    assert judge(*paths).code == 0
    everything_once(server, 24)


def test_a_third_system_costs_only_its_own_pairs(server: Any, answers: Run, judge: Run, tmp_path: Path) -> None:
    paths = answers("a", "b", "c", prompts=4)
    assert judge(*paths[:2]).code == 0
    done = judge(*paths)
    assert done.code == 0, done.err
    assert json.loads(done.out)["asked"] == 16
    everything_once(server, 24)
    assert len(records(tmp_path / "ratings.jsonl")) == 24
    refused = judge(*paths[:2])  # which would lose the others
    assert refused.code == 2
    assert "--overwrite" in refused.complaint
    assert judge(*paths[:2], "--overwrite").code == 0
    assert len(records(tmp_path / "ratings.jsonl")) == 8
    everything_once(server, 24)


def test_equal_answers_are_one_question(server: Any, answers: Run, judge: Run, tmp_path: Path) -> None:
    (path,) = answers("a", prompts=3)
    server.answer = lambda prompt: "Verdict: 1"
    assert judge(f"one={path}", f"other={path}").code == 0
    everything_once(server, 3)
    found = records(tmp_path / "ratings.jsonl")
    assert [(each["first"], each["label"]) for each in found[:2]] == [("one", 1), ("other", 1)]


def test_scores_against_a_reference(server: Any, answers: Run, judge: Run, tmp_path: Path) -> None:
    server.answer = lambda prompt: "Scores: 8 6" if prompt.index("says a.") < prompt.index("says b.") else "Scores: 8 5"
    done = judge(*answers("a", "b", prompts=4), "--mode", "scores", "--reference", "b")
    assert done.code == 0, done.err
    found = records(tmp_path / "ratings.jsonl")
    assert [each["scores"] for each in found[:2]] == [[8.0, 6.0], [8.0, 5.0]]
    assert [each["label"] for each in found[:2]] == [1, 1]
    (pair,) = json.loads(done.out)["pairs"]
    assert (pair["first"], pair["second"]) == ("a", "b")
    scores = pair["scores"]
    assert (scores["first_mean"], scores["second_mean"]) == (6.5, 7.0)
    assert scores["share_of_second"] == pytest.approx(13 / 14)
    assert scores["shown_first"] == pytest.approx(8 / 6)
    assert scores["shown_second"] == pytest.approx(5 / 8)


def money(server: Any) -> Counter[str]:
    """A counter of what the server charges, at 1 and 10 for a million tokens."""
    total: Counter[str] = Counter()

    def usage(prompt: str, reply: str) -> dict[str, int]:
        found = {"prompt_tokens": len(prompt) // 3, "completion_tokens": len(prompt) % 50}
        total["money"] += found["prompt_tokens"] + 10 * found["completion_tokens"]
        return found

    server.usage = usage
    return total


@pytest.mark.parametrize("concurrency", ["1", "5"])
def test_the_cap_is_never_passed(server: Any, answers: Run, judge: Run, tmp_path: Path, concurrency: str) -> None:
    charged = money(server)
    paths = answers("a", "b")
    prices = ("--price-in", "1", "--price-out", "10", "--max-tokens", "50", "--concurrency", concurrency)
    done = judge(*paths, *prices, "--max-cost", "0.01")
    assert done.code == 2
    assert "--max-cost" in done.err
    assert 5 < len(server.paid) < 24
    assert 0.006 < charged["money"] / 1e6 <= 0.01
    assert not (tmp_path / "ratings.jsonl").exists()
    paid = len(server.paid)
    assert judge(*paths, *prices, "--max-cost", "0.01").code == 2  # the cap is of all runs together
    assert len(server.paid) <= paid + 1
    assert charged["money"] / 1e6 <= 0.01
    part = judge(*paths, *prices, "--max-cost", "0.01", "--partial")
    assert part.code == 0
    assert json.loads(part.out)["missing"] == 24 - len(records(tmp_path / "ratings.jsonl")) > 0
    rest = judge(*paths, *prices, "--max-cost", "1")
    assert rest.code == 0
    assert json.loads(rest.out)["cost"] == pytest.approx(charged["money"] / 1e6)
    everything_once(server, 24)


def test_the_cap_counts_what_may_have_been_charged(server: Any, answers: Run, judge: Run) -> None:
    server.behave = lambda number, prompt: "drop"
    prices = ("--price-in", "1", "--price-out", "10", "--max-tokens", "50", "--concurrency", "1")
    done = judge(*answers("a", "b"), *prices, "--max-cost", "0.01")
    assert done.code == 2
    assert "--max-cost" in done.err
    assert 2 < server.seen < 6  # each of them may have cost 50 tokens of reply and as many of prompt as it has bytes


def test_a_limit_by_its_new_name(server: Any, answers: Run, judge: Run) -> None:
    def behave(number: int, prompt: str) -> Any:
        message = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
        old = "max_tokens" in server.bodies[number]
        return (400, {"error": {"message": message, "code": "unsupported_parameter"}}) if old else "ok"

    server.behave = behave
    done = judge(*answers("a", "b", prompts=3), "--concurrency", "1")
    assert done.code == 0, done.err
    assert server.seen == 7
    assert server.bodies[-1]["max_completion_tokens"] == 1024


def test_one_refused_question(server: Any, answers: Run, judge: Run, tmp_path: Path) -> None:
    too_long = {
        "error": {"message": "This model's maximum context length is 9 tokens.", "code": "context_length_exceeded"}
    }
    server.behave = lambda number, prompt: (400, too_long) if "What is 3 and" in prompt else "ok"
    paths = answers("a", "b")
    done = judge(*paths, "--concurrency", "2")
    assert done.code == 2
    assert "prompt 3 " in done.err
    assert "too long for the judge" in done.err
    assert not (tmp_path / "ratings.jsonl").exists()
    part = judge(*paths, "--partial")
    assert part.code == 0, part.err
    assert json.loads(part.out)["missing"] == 2
    assert len(records(tmp_path / "ratings.jsonl")) == 22
    everything_once(server, 22)


def test_a_key_goes_only_where_it_is_meant_to(
    server: Any, answers: Run, judge: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "OPENAI_API_KEY", "sk-of-openai")
    monkeypatch.setitem(os.environ, "MY_KEY", "sk-mine")
    paths = answers("a", "b", prompts=2)
    assert judge(*paths).code == 0
    assert not any("sk-" in str(headers) for headers in server.headers)
    server.behave = lambda number, prompt: (401, {"error": {"message": "Incorrect API key provided: sk-mine."}})
    done = judge(*paths, "--api-key-env", "MY_KEY", "--cache", "other.sqlite", "--temperature", "0")
    assert server.headers[-1]["authorization"] == "Bearer sk-mine"
    assert "MY_KEY" in done.err
    assert "sk-mine" not in done.err


def test_only_one_at_a_time_on_a_cache(server: Any, answers: Run, judge: Run, tmp_path: Path) -> None:
    from fourbit.evaluate.judge.store import Store

    with Store(tmp_path / "ratings.jsonl.cache.sqlite"):
        done = judge(*answers("a", "b"))
    assert "another fourbit judge" in done.complaint
    assert not server.seen


def command(paths: list[Path], port: int, output: Path) -> list[str]:
    return [
        sys.executable, "-m", "fourbit", "judge", *map(str, paths), "--model", "toy",
        "--base-url", f"http://127.0.0.1:{port}/v1", "--output", str(output),
        "--backoff", "0.002", "--concurrency", "4",
    ]  # fmt: skip


def test_ctrl_c_waits_for_what_is_paid(server: Any, answers: Run, tmp_path: Path) -> None:
    server.behave = lambda number, prompt: "slow"
    output = tmp_path / "ratings.jsonl"
    with subprocess.Popen(
        command(answers("a", "b"), server.port, output), stderr=subprocess.PIPE, text=True
    ) as process:
        while server.seen < 9:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        said = process.stderr.read()
        assert process.wait(timeout=30) == 130
    assert not output.exists()
    kept, going_on = said.splitlines()[-1].split(" To go on: ")
    paid = sum(server.paid.values())
    assert f"{paid} of 24 judgements are kept" in kept
    assert "Waiting for the 4 replies under way" in said
    assert going_on.startswith("fourbit judge ")
    done = subprocess.run(
        f"{sys.executable} -m {going_on}", shell=True, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(records(output)) == 24
    everything_once(server, 24)


def test_killed_together_with_the_server(answers: Run, tmp_path: Path) -> None:
    log, output = tmp_path / "paid.log", tmp_path / "ratings.jsonl"
    cache = tmp_path / "ratings.jsonl.cache.sqlite"
    paths = answers("a", "b", prompts=16)
    asked_again: set[str] = set()
    for attempt in range(3):
        log.touch()
        already = log.read_text().split()
        serving = [sys.executable, str(SERVER), "0", str(log), "0.3"]
        with subprocess.Popen(serving, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            with subprocess.Popen(command(paths, port, output), stderr=subprocess.PIPE, text=True) as process:
                if attempt < 2:
                    while process.poll() is None and len(log.read_text().split()) < len(already) + 9:
                        time.sleep(0.01)
                    process.kill()
                else:
                    assert process.stderr is not None
                    said = process.stderr.read()
                    assert process.wait(timeout=60) == 0, said
            server.kill()
        with sqlite3.connect(cache) as connection:  # what was kept
            kept = connection.execute("SELECT count(*) FROM replies").fetchone()[0]
        connection.close()
        paid = log.read_text().split()
        # at most the four that were under way at each kill were charged for and never seen
        assert 0 <= len(set(paid)) - kept <= 4
        asked_again |= set(paid[len(already) :]) & set(already)
    assert len(records(output)) == 32
    counts = Counter(log.read_text().split())
    assert len(counts) == 32
    assert set(counts.values()) <= {1, 2}
    assert sum(counts.values()) - 32 == len(asked_again) <= 2 * 4
