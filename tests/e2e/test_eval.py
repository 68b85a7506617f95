"""`fourbit eval` on a real model, and on everything that can be wrong."""

from __future__ import annotations

import json
import math
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]

STORIES = [
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park.",
    "One day, a small dog named Max found a big red ball. Max was very happy.",
    "Tom and his mom went to the shop. They bought bread and milk, and then they went home.",
]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": story}) + "\n" for story in STORIES))
    return path


@pytest.fixture(scope="module")
def adapter(stories_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter far from zero, written by peft alone."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(stories_model)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(model, config).save_pretrained(folder)
    return folder


def score(done: Any) -> dict[str, Any]:
    assert done.code == 0, done.err
    assert done.err == ""
    keys: dict[str, Any] = json.loads(done.out)
    return keys


def test_the_keys(stories_model: Path, text: Path, fourbit_command: Run) -> None:
    found = score(fourbit_command("eval", "perplexity", stories_model, "--text", text, "--json"))
    size = sum(len(story.encode()) for story in STORIES)
    assert 1.5 < found["perplexity"] < 8
    assert found["bytes"] == size
    assert found["documents"] == 3
    assert found["bits_per_byte"] == pytest.approx(found["tokens"] * math.log2(found["perplexity"]) / size)
    assert (found["format"], found["block_size"], found["double_quant"]) == ("nf4", 64, True)
    assert (found["sequence_length"], found["stride"], found["dtype"]) == (512, 512, "bfloat16")
    assert found["peak_rss_bytes"] > 10**8
    assert found["tokens_per_second"] == pytest.approx(found["tokens"] / found["seconds"])


def test_formats_and_adapters_tell(stories_model: Path, text: Path, adapter: Path, fourbit_here: Run) -> None:
    """Four bits cost something, and an adapter of noise costs more: each flag reaches the model."""
    base = ("eval", "perplexity", stories_model, "--text", text, "--json", "--dtype", "float32")
    plain = score(fourbit_here(*base, "--format", "none"))
    nf4 = score(fourbit_here(*base, "--format", "nf4", "--block-size", "128", "--no-double-quant"))
    noisy = score(fourbit_here(*base, "--format", "none", "--adapter", adapter))
    noisy_nf4 = score(fourbit_here(*base, "--adapter", adapter))
    assert (plain["format"], plain["block_size"], plain["adapter"]) == ("none", None, None)
    assert (nf4["format"], nf4["block_size"], nf4["double_quant"]) == ("nf4", 128, False)
    assert plain["perplexity"] < nf4["perplexity"] < noisy["perplexity"]
    assert noisy_nf4["adapter"] == str(adapter)
    assert noisy_nf4["perplexity"] != noisy["perplexity"]
    assert noisy_nf4["perplexity"] > nf4["perplexity"]


def test_windows_and_limits_tell(stories_model: Path, text: Path, fourbit_here: Run) -> None:
    base = ("eval", "perplexity", stories_model, "--text", text, "--json", "--dtype", "float32")
    short = score(fourbit_here(*base, "--sequence-length", "16", "--stride", "16"))
    sliding = score(fourbit_here(*base, "--sequence-length", "16", "--stride", "4", "--batch-size", "8"))
    limited = score(fourbit_here(*base, "--limit-tokens", "20"))
    assert (sliding["sequence_length"], sliding["stride"], sliding["tokens"]) == (16, 4, short["tokens"])
    assert sliding["perplexity"] < short["perplexity"]  # more context
    assert (limited["tokens"], limited["documents"]) == (20, 1)
    assert limited["bytes"] < len(STORIES[0])


def test_a_table_for_people(
    stories_model: Path, tmp_path: Path, fourbit_here: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    path = tmp_path / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(STORIES))
    done = fourbit_here("eval", "perplexity", stories_model, "--text", path, "--separator", "<|endoftext|>")
    assert done.code == 0, done.err
    assert done.err == ""
    assert all(word in done.out for word in ("perplexity", "bits per byte", "NF4", "double quantization"))
    assert max(map(len, done.out.splitlines())) <= 80


def test_a_folder_in_four_bits(stories_model: Path, text: Path, tmp_path: Path, fourbit_here: Run) -> None:
    out = tmp_path / "int4"
    made = fourbit_here("quantize", stories_model, out, "--format", "int4", "--no-double-quant")
    assert made.code == 0, made.err
    base = ("--text", text, "--json", "--dtype", "float32")
    stored = score(fourbit_here("eval", "perplexity", out, *base))
    straight = score(fourbit_here("eval", "perplexity", stories_model, *base, "--format", "int4", "--no-double-quant"))
    assert (stored["format"], stored["double_quant"]) == ("int4", False)
    assert stored["perplexity"] == pytest.approx(straight["perplexity"], rel=1e-6)
    refused = fourbit_here("eval", "perplexity", out, *base, "--format", "none")
    assert "quantized already" in refused.complaint


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--text", "missing.txt"], "missing.txt does not exist"),
        (["--text", "."], "is a folder"),
        (["--text", "latin.txt"], "not UTF-8"),
        (["--text", "empty.txt"], "no tokens to score"),
        (["--text", "broken.jsonl"], "broken.jsonl, line 2"),
        (["--text", "stories.jsonl", "--field", "body"], "line 1: the record has no field 'body'"),
        (["--text", "stories.jsonl", "--sequence-length", "513"], "at most 512"),
        (["--text", "stories.jsonl", "--sequence-length", "-1"], "at least 2"),
        (["--text", "stories.jsonl", "--stride", "0"], "between 1 and"),
        (["--text", "stories.jsonl", "--limit-tokens", "-7"], "at least 2"),
        (["--text", "stories.jsonl", "--batch-size", "0"], "at least 1"),
        (["--text", "stories.jsonl", "--format", "nf5"], "nf5"),
        (["--text", "stories.jsonl", "--block-size", "48"], "48"),
        (["--text", "stories.jsonl", "--format", "none", "--block-size", "64"], "none quantizes nothing"),
        (["--text", "stories.jsonl", "--dtype", "float8"], "float8"),
        (["--text", "stories.jsonl", "--adapter", "nowhere"], "nowhere"),
        (["--text", "stories.jsonl", "--separator", "x"], "one document per record"),
        ([], "--text"),
    ],
)
def test_bad_input(
    arguments: list[str], says: str, stories_model: Path, text: Path, tmp_path: Path, fourbit_here: Run
) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"text": "Once"}\n{"text": \n')
    assert says in fourbit_here("eval", "perplexity", stories_model, *arguments).complaint


def test_an_adapter_of_another_model(stories_model: Path, text: Path, tmp_path: Path, fourbit_here: Run) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(stories_model, hidden_size=128, intermediate_size=344)
    other = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(r=4, target_modules="all-linear"))
    other.save_pretrained(tmp_path / "other")
    refused = fourbit_here("eval", "perplexity", stories_model, "--text", text, "--adapter", "other")
    assert "adapter" in refused.complaint


def test_a_model_without_a_tokenizer(stories_model: Path, text: Path, tmp_path: Path, fourbit_here: Run) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer_config.json"):
        shutil.copy(stories_model / name, tmp_path / name)
    assert "holds no tokenizer" in fourbit_here("eval", "perplexity", tmp_path, "--text", text).complaint
    (tmp_path / "tokenizer.json").write_text("{")
    assert "cannot be read" in fourbit_here("eval", "perplexity", tmp_path, "--text", text).complaint


def test_no_model(text: Path, tmp_path: Path, fourbit_here: Run) -> None:
    assert "nothing" in fourbit_here("eval", "perplexity", tmp_path / "nothing", "--text", text).complaint


# ---- mmlu


def test_mmlu_keys_for_programs(fourbit_here: Run, stories_model: Path, adapter: Path, shared_data: Path) -> None:
    asked = ("--data", shared_data / "mmlu", "--shots", "1", "--limit", "2", "--json")
    keys = score(fourbit_here("eval", "mmlu", stories_model, *asked))
    assert keys["questions"] == 2 * len(keys["subjects"]) == 114
    assert keys["accuracy"] == pytest.approx(sum(keys["subjects"].values()) / 57)
    other = score(fourbit_here("eval", "mmlu", stories_model, "--adapter", adapter, *asked))
    assert other["adapter"] == str(adapter)
    assert other["subjects"] != keys["subjects"]


def test_mmlu_for_a_person(fourbit_here: Run, stories_model: Path, shared_data: Path) -> None:
    subjects = ("--subject", "anatomy", "--subject", "virology", "--limit", "4")
    done = fourbit_here("eval", "mmlu", stories_model, "--data", shared_data / "mmlu", *subjects, "--shots", "0")
    assert done.code == 0, done.err
    assert "25% by chance" in done.out
    assert "8 of 2 subjects, 0 shots" in done.out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--data", "no/such/folder"], "no/such/folder does not exist"),
        (["--data", "."], "holds no test/*.csv or val/*.csv"),
        (["--data", "nobody/nothing"], "cannot be reached"),
    ],
)
def test_mmlu_of_what_is_none(fourbit_here: Run, stories_model: Path, arguments: list[str], complaint: str) -> None:
    assert complaint in fourbit_here("eval", "mmlu", stories_model, *arguments).complaint


def test_mmlu_of_the_hub(stories_model: Path, tmp_path: Path, fourbit_command: Run) -> None:
    """By the hub's protocol, from the splits that cais/mmlu has."""
    import pyarrow
    from pyarrow import parquet

    def table(count: int) -> bytes:
        rows = [
            {"question": f"Which {j}?", "subject": ("art", "law")[j % 2], "choices": list("wxyz"), "answer": j % 4}
            for j in range(count)
        ]
        sink = pyarrow.BufferOutputStream()
        parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
        return sink.getvalue().to_pybytes()

    splits = "".join(f"  - {{split: {name}, path: all/{name}-*}}\n" for name in ("test", "dev"))
    files = {
        "README.md": f"---\nconfigs:\n- config_name: all\n  data_files:\n{splits}---\n".encode(),
        "all/test-00000-of-00001.parquet": table(8),
        "all/dev-00000-of-00001.parquet": table(4),
    }
    hub = runpy.run_path(str(Path(__file__).with_name("hub_server.py")))["hub"]
    with hub("cais/mmlu", files) as (endpoint, seen):
        settings = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        asked = ("--data", "cais/mmlu", "--shots", "2", "--json")
        keys = score(fourbit_command("eval", "mmlu", stories_model, *asked, **settings))
    assert (keys["questions"], keys["shots"], list(keys["subjects"])) == (8, 2, ["art", "law"])
    assert sum("parquet" in request and request.startswith("GET") for request in seen) == 2


# ---- harness


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with one task over one file."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed; pip install 'fourbit[harness]'")
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"question": f"Tom had a {thing}. The {thing} was", "choices": ["very big", "zq"], "answer": number % 2}
        for number, thing in enumerate(["dog", "cat", "ball", "car"])
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "own.yaml").write_text(
        f"""task: own
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "rows.jsonl"}}}, cache_dir: {folder / "cache"}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
    )
    return folder


def test_tasks_of_the_harness(stories_model: Path, adapter: Path, tasks: Path, fourbit_here: Run) -> None:
    base = ("eval", "harness", stories_model, "--tasks", "own", "--include-path", tasks)
    keys = score(fourbit_here(*base, "--json"))
    # the real model prefers English, so that it is right where "very big" is
    assert keys["tasks"]["own"]["metrics"] == {"acc": 0.5}
    assert (keys["tasks"]["own"]["examples"], keys["tasks"]["own"]["shots"]) == (4, 0)
    assert (keys["format"], keys["dtype"], keys["adapter"]) == ("nf4", "bfloat16", None)
    limited = score(fourbit_here(*base, "--json", "--limit", "1", "--adapter", adapter))
    assert limited["tasks"]["own"]["metrics"] in ({"acc": 1.0}, {"acc": 0.0})
    assert limited["adapter"] == str(adapter)
    shown = fourbit_here(*base)
    assert shown.code == 0, shown.err
    assert shown.err == ""
    assert "own    acc      0.5000" in shown.out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tasks", ","], "No task is named"),
        (["--tasks", "own", "--limit", "0"], "The limit is 0"),
        (["--tasks", "own", "--shots", "-1"], "-1 shots"),
        (["--tasks", "own,own"], "asked for twice"),
        (["--tasks", "own", "--format", "nf5"], "nf5"),
        (["--tasks", "own", "--apply-chat-template"], "no chat template"),
        ([], "--tasks"),
    ],
)
def test_bad_input_of_the_harness(
    arguments: list[str], says: str, stories_model: Path, tasks: Path, fourbit_here: Run
) -> None:
    given = ("eval", "harness", stories_model, "--include-path", tasks, *arguments)
    assert says in fourbit_here(*given).complaint


def test_tasks_for_no_model(tasks: Path, fourbit_here: Run) -> None:
    assert "nowhere" in fourbit_here("eval", "harness", "nowhere/at/all", "--tasks", "own").complaint
