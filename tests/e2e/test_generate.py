"""`fourbit generate` on a real model: answers, interruptions, and everything that can be wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]

RECORDS: list[dict[str, Any]] = [
    {"question_id": 1, "text": "What did the dog find?", "category": "stories"},
    {"id": "b", "prompt": "Tell me a story about a cat."},
    {"id": "c", "text": "Once upon a time, there was a"},
    {"message_id": "d", "messages": [{"role": "user", "content": "Hello"}]},
]


def written(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return written(tmp_path / "prompts.jsonl", *RECORDS)


@pytest.fixture
def many(tmp_path: Path) -> Path:
    names = ["Lily", "Tom", "Max", "Sue", "Ben", "Mia", "Tim", "Anna"]
    texts = [f"{name} and {other} went to the" for name in names for other in names if name != other]
    return written(tmp_path / "many.jsonl", *({"id": index, "text": text} for index, text in enumerate(texts)))


def test_answers_and_keys(stories_model: Path, prompts: Path, tmp_path: Path, fourbit_command: Run) -> None:
    out = tmp_path / "answers.jsonl"
    arguments = ("--max-new-tokens", "30", "--stop", "mom")
    done = fourbit_command("generate", stories_model, "--prompts", prompts, "--output", out, *arguments, "--json")
    assert done.code == 0, done.err
    found = answers(out)
    assert [list(each) for each in found] == [["id", "prompt", "text", "tokens", "finish_reason"]] * 4
    assert [each["id"] for each in found] == [1, "b", "c", "d"]
    assert [each["prompt"] for each in found] == [
        RECORDS[0]["text"], RECORDS[1]["prompt"], RECORDS[2]["text"], RECORDS[3]["messages"]
    ]  # fmt: skip
    assert all(each["text"] and 0 < each["tokens"] <= 30 for each in found)
    assert {each["finish_reason"] for each in found} <= {"stop", "length"}
    assert found[2]["text"].startswith(" little girl")  # the text goes on, and the space belongs to it
    assert "Guanaco" in done.err
    keys = json.loads(done.out)
    assert (keys["prompts"], keys["answered"], keys["already"], keys["too_long"]) == (4, 4, 0, 0)
    assert (keys["output"], keys["model"], keys["adapter"]) == (str(out), str(stories_model), None)
    assert keys["tokens"] == sum(each["tokens"] for each in found)
    assert keys["tokens_per_second"] == pytest.approx(keys["tokens"] / keys["seconds"])
    assert keys["peak_rss_bytes"] > 10**8


def test_greedy_text_is_that_of_transformers(
    stories_model: Path, many: Path, tmp_path: Path, fourbit_here: Run
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "answers.jsonl"
    arguments = ("--format", "none", "--dtype", "float32", "--max-new-tokens", "20")
    done = fourbit_here("generate", stories_model, "--prompts", many, "--output", out, *arguments)
    assert done.code == 0, done.err
    model: Any = AutoModelForCausalLM.from_pretrained(stories_model)
    tokenizer = AutoTokenizer.from_pretrained(stories_model)
    for each in answers(out):
        ids = torch.tensor([tokenizer(each["prompt"])["input_ids"]])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)[0]
        assert tokenizer.decode(made, skip_special_tokens=True) == each["prompt"] + each["text"]


def test_a_killed_run_goes_on_and_ends_with_the_same_file(
    stories_model: Path, many: Path, tmp_path: Path, fourbit_here: Run
) -> None:
    def command(name: str) -> list[str | Path]:
        return [
            "generate", stories_model, "--prompts", many, "--output", tmp_path / name, "--max-new-tokens", "60",
            "--temperature", "0.8", "--top-p", "0.9", "--seed", "3", "--batch-size", "4", "--json",
        ]  # fmt: skip

    whole = fourbit_here(*command("whole.jsonl"))
    assert whole.code == 0, whole.err
    out = tmp_path / "killed.jsonl"
    for round_ in (1, 2):
        process = subprocess.Popen(
            [sys.executable, "-m", "fourbit", *map(str, command("killed.jsonl"))],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 120
        while (not out.exists() or len(out.read_bytes().splitlines()) < 16 * round_) and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    os.truncate(out, out.stat().st_size - 5)  # as if the last write had been cut off
    kept = out.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    assert 31 <= len(kept.splitlines()) < 56
    rest = fourbit_here(*command("killed.jsonl"))
    assert rest.code == 0, rest.err
    keys = json.loads(rest.out)
    assert (keys["already"], keys["answered"]) == (len(kept.splitlines()), 56 - len(kept.splitlines()))
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert set(kept.splitlines()) <= set(out.read_bytes().splitlines())
    again = fourbit_here(*command("killed.jsonl"))
    assert json.loads(again.out)["answered"] == 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_an_interrupt_says_how_to_go_on(stories_model: Path, many: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    arguments = ["generate", stories_model, "--prompts", many, "--output", out, "--batch-size", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fourbit", *map(str, arguments), "--max-new-tokens", "200"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not out.exists() or not out.read_bytes():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 130
    assert f"of 56 prompts are answered in {out}; the same command makes the rest." in said
    assert "Interrupted." in said


def test_the_batch_size_changes_nothing(stories_model: Path, many: Path, tmp_path: Path, fourbit_here: Run) -> None:
    base = ("generate", stories_model, "--prompts", many, "--max-new-tokens", "25", "--temperature", "1.0")
    for size in ("1", "7", "64"):
        assert fourbit_here(*base, "--output", tmp_path / size, "--batch-size", size).code == 0
    assert (tmp_path / "1").read_bytes() == (tmp_path / "7").read_bytes() == (tmp_path / "64").read_bytes()


def test_an_adapter_tells(stories_model: Path, prompts: Path, adapter: Path, tmp_path: Path, fourbit_here: Run) -> None:
    base = ("generate", stories_model, "--prompts", prompts, "--max-new-tokens", "20", "--json")
    plain = fourbit_here(*base, "--output", tmp_path / "plain")
    tuned = fourbit_here(*base, "--output", tmp_path / "tuned", "--adapter", adapter)
    assert (plain.code, tuned.code) == (0, 0), tuned.err
    assert json.loads(tuned.out)["adapter"] == str(adapter)
    assert [each["text"] for each in answers(tmp_path / "plain")] != [
        each["text"] for each in answers(tmp_path / "tuned")
    ]
    refused = fourbit_here(*base, "--output", tmp_path / "plain", "--adapter", adapter)
    assert "another state of the adapter" in refused.complaint


def test_a_dry_run_writes_nothing(stories_model: Path, prompts: Path, tmp_path: Path, fourbit_here: Run) -> None:
    done = fourbit_here("generate", stories_model, "--prompts", prompts, "--output", "new/answers.jsonl", "--dry-run")
    assert done.code == 0, done.err
    assert "### Human: What did the dog find?" in done.out
    assert list(tmp_path.iterdir()) == [prompts]


def test_turns_are_answered_one_after_the_other(stories_model: Path, tmp_path: Path, fourbit_here: Run) -> None:
    """Whatever the batch size; and a second turn is asked as the conversation that the first turn became."""
    turns = written(
        tmp_path / "turns.jsonl",
        {"question_id": 1, "turns": ["Where is the dog?", "And the cat?"]},
        {"question_id": 2, "turns": ["Who is there?"]},
        {"question_id": 3, "turns": ["Tell me of Tom.", "And Lily?", "Why?"]},
    )
    files = [tmp_path / f"{size}.jsonl" for size in (1, 3)]
    for size, out in zip((1, 3), files, strict=True):
        settings = ("--max-new-tokens", "8", "--batch-size", str(size), "--temperature", "0.7", "--top-p", "0.9")
        done = fourbit_here("generate", stories_model, "--prompts", turns, "--output", out, *settings)
        assert done.code == 0, done.err
    one, _, three = answers(files[0])
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [len(each.get("answers", "1")) for each in answers(files[0])] == [2, 1, 3]
    assert three["text"] == "\n\n".join(f"Answer {n}:\n{text}" for n, text in enumerate(three["answers"], start=1))

    messages = [
        {"role": "user", "content": "Where is the dog?"},
        {"role": "assistant", "content": one["answers"][0]},
        {"role": "user", "content": "And the cat?"},
    ]
    greedy = ("--max-new-tokens", "8", "--overwrite")
    whole = written(tmp_path / "whole.jsonl", {"question_id": 1, "messages": messages})
    fourbit_here("generate", stories_model, "--prompts", turns, "--output", files[0], *greedy)
    messages[1]["content"] = answers(files[0])[0]["answers"][0]
    written(whole, {"question_id": 1, "messages": messages})
    fourbit_here("generate", stories_model, "--prompts", whole, "--output", files[1], *greedy)
    assert answers(files[0])[0]["answers"][1] == answers(files[1])[0]["text"]


def test_a_prompt_beyond_the_context_is_marked(stories_model: Path, tmp_path: Path, fourbit_here: Run) -> None:
    prompts = written(tmp_path / "p.jsonl", {"text": "Tom had a dog. " * 200}, {"text": "Tom had"})
    done = fourbit_here("generate", stories_model, "--prompts", prompts, "--output", "o.jsonl", "--max-new-tokens", 5)
    assert done.code == 0, done.err
    assert "1 of 2 prompts are too long" in done.err
    assert "p.jsonl, line 1" in done.err
    long, short = answers(tmp_path / "o.jsonl")
    assert (long["text"], long["tokens"], long["finish_reason"]) == ("", 0, "prompt_too_long")
    assert (short["tokens"], short["finish_reason"]) == (5, "length")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"id": 1, "prompt": "a"}\n{"id": 2, "prompt"\n', "bad.jsonl, line 2 is not valid JSON"),
        ('{"id": 1, "prompt": "a"}\n{"id": 1, "prompt": "b"}\n', "line 2: the id 1 is that of"),
        ('{"instruction": "a", "output": "b"}\n', "line 1: the record holds no prompt, text, messages or turns"),
        ('{"messages": [{"role": "tool", "content": "a"}]}\n', "line 1: The chat template refuses this conversation"),
        ('{"prompt": "\\ud800"}\n', "line 1: The prompt holds half of a surrogate pair"),
        ("\n", "bad.jsonl holds no records"),
        (json.dumps({"text": "Tom had a dog. " * 200}), "line 1: the prompt has 1,"),
    ],
)
def test_bad_prompts(content: str, says: str, stories_model: Path, tmp_path: Path, fourbit_here: Run) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    refused = fourbit_here("generate", stories_model, "--prompts", "bad.jsonl", "--output", "new/out.jsonl")
    assert says in refused.complaint
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--prompts", "missing.jsonl"], "missing.jsonl does not exist"),
        (["--prompts", "."], "is a folder"),
        (["--max-new-tokens", "0"], "must be at least 1"),
        (["--temperature", "-1"], "must be 0"),
        (["--top-p", "0.9"], "need a temperature above 0"),
        (["--batch-size", "0"], "batch size is 0"),
        (["--mode", "talk"], "auto, chat, text"),
        (["--dtype", "float8"], "float8"),
        (["--format", "none", "--block-size", "64"], "none quantizes nothing"),
        (["--chat-template", "nonsense"], "nonsense"),
        (["--stop", ""], "stop string is empty"),
        (["--adapter", "nowhere"], "nowhere"),
        (["--output", "theirs.jsonl"], "theirs.jsonl exists and was not written by fourbit"),
        (["--output", "theirs.jsonl", "--overwrite"], "theirs.jsonl exists and was not written by fourbit"),
        (["--output", "."], "no ordinary file"),
    ],
)
def test_bad_arguments(
    arguments: list[str], says: str, stories_model: Path, prompts: Path, tmp_path: Path, fourbit_here: Run
) -> None:
    (tmp_path / "theirs.jsonl").write_text('{"id": 1}\n')
    base = ["generate", stories_model]
    base += ["--prompts", prompts] if "--prompts" not in arguments else []
    base += ["--output", "new/out.jsonl"] if "--output" not in arguments else []
    assert says in fourbit_here(*base, *arguments).complaint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl", "theirs.jsonl"]
    assert (tmp_path / "theirs.jsonl").read_text() == '{"id": 1}\n'


def test_other_settings_are_refused_unless_it_is_overwritten(
    stories_model: Path, prompts: Path, fourbit_here: Run
) -> None:
    base = ("generate", stories_model, "--prompts", prompts, "--output", "out.jsonl")
    assert fourbit_here(*base, "--max-new-tokens", "5").code == 0
    refused = fourbit_here(*base, "--max-new-tokens", "6")
    assert "written with max_new_tokens 5, and now it is 6" in refused.complaint
    assert fourbit_here(*base, "--max-new-tokens", "6", "--overwrite").code == 0


def test_models_that_will_not_do(
    stories_model: Path, adapter: Path, prompts: Path, tmp_path: Path, fourbit_here: Run
) -> None:
    from safetensors.torch import load_file, save_file

    bare, other = tmp_path / "bare", tmp_path / "other"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(stories_model / name, bare / name)
    shutil.copytree(adapter, other)
    tensors = load_file(other / "adapter_model.safetensors")
    save_file({k: v[:, :-1].contiguous() for k, v in tensors.items()}, other / "adapter_model.safetensors")
    end = ("--prompts", prompts, "--output", tmp_path / "out.jsonl")
    assert "holds no tokenizer" in fourbit_here("generate", bare, *end).complaint
    assert "for another model" in fourbit_here("generate", stories_model, *end, "--adapter", other).complaint
    assert "is an adapter" in fourbit_here("generate", adapter, *end).complaint
    assert not (tmp_path / "out.jsonl").exists()
