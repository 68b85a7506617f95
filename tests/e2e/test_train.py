"""`fourbit train` as a user runs it, on a real model and real data."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks

Run = Callable[..., Any]


def short(**changes: object) -> list[str]:
    """Keys for a run of seconds."""
    plain = {
        "max_steps": 2,
        "max_length": 96,
        "samples": 0,
        "eval_size": 2,
        "per_device_train_batch_size": 2,
        "limit": 40,
    }
    return [f"{key}={value}" for key, value in {**plain, **changes}.items()]


DATASETS = {
    "alpaca/alpaca_100.json": {},
    "alpaca/alpaca_gpt4style_999.json": {},
    "hh-rlhf/harmless_400.jsonl": {},
    "self-instruct/seed_tasks.jsonl": {},
    "self-instruct/user_oriented_instructions.jsonl": {},
    "t0-p3": {"limit": "null"},  # a folder of files; many of the prompts are longer than the model's 512 tokens
}


@pytest.fixture
def alpaca(shared_data: Path) -> Path:
    return shared_data / "alpaca" / "alpaca_100.json"


def test_keys_for_programs(fourbit_here: Run, stories_model: Path, alpaca: Path, tmp_path: Path) -> None:
    flags = ("--model", stories_model, "--data", alpaca, "--output", "out", "--json")
    done = fourbit_here("train", *flags, *short(max_steps=4))
    assert done.code == 0, done.err
    keys = json.loads(done.out)
    assert keys == json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert keys["steps"] == 4
    assert keys["tokens"] > 0
    assert keys["tokens_per_second"] > 0
    assert keys["peak_bytes"] > 10_000_000
    assert 1 < keys["train_loss"] < 10
    assert 1 < keys["eval_loss"] < 10
    assert keys["planned_bytes"] > 10_000_000
    assert keys["resumed_from"] is None
    lines = done.err.splitlines()
    assert any("Alpaca" in line for line in lines)
    assert any(line.startswith("step 4/4  loss ") for line in lines)


@pytest.mark.parametrize("name", DATASETS)
def test_real_data_and_stock_peft(
    fourbit_here: Run, stories_model: Path, shared_data: Path, tmp_path: Path, name: str
) -> None:
    """Every dataset is recognised and trained on, and the adapter is one for peft alone."""
    flags = ("--model", stories_model, "--data", shared_data / name, "--output", "out")
    keys = short(**{"max_length": 512, "packing": "true", "learning_rate": 1e-3, **DATASETS[name]})
    done = fourbit_here("train", *flags, *keys)
    assert done.code == 0, done.err
    assert "Recognised" in done.err
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(stories_model), tmp_path / "out")
    ids = torch.arange(5, 25).view(1, -1)
    with torch.no_grad(), stock.disable_adapter():
        plain = stock(input_ids=ids).logits
    with torch.no_grad():
        assert not torch.allclose(stock(input_ids=ids).logits, plain)


def test_a_dry_run_writes_nothing(fourbit_here: Run, stories_model: Path, alpaca: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"model: {stories_model}\ndata: {alpaca}\noutput: out\n")
    done = fourbit_here("train", "run.yaml", "--dry-run", "--json", "max_length=128")
    assert done.code == 0, done.err
    keys = json.loads(done.out)
    assert keys["dry_run"] is True
    assert 0 < keys["labelled_tokens"] < keys["tokens"]
    assert keys["longest"] <= keys["max_length"] == 128
    assert 0 < keys["trainable_parameters"] < keys["parameters"]
    assert {path.name for path in tmp_path.iterdir()} == {"run.yaml"}


def start(tmp_path: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    """`fourbit train` as another process."""
    return subprocess.Popen(
        [sys.executable, "-m", "fourbit", "train", *map(str, arguments)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("how", ["ctrl-c", "ctrl-c twice", "terminate", "kill -9"])
def test_a_run_that_was_stopped_ends_with_the_same_bits(
    fourbit_here: Run, stories_model: Path, alpaca: Path, tmp_path: Path, how: str
) -> None:
    keys = short(max_steps=16, save_steps=2, lora_dropout=0.2, eval_size=0, gradient_accumulation_steps=1)
    recipe = ("--model", stories_model, "--data", alpaca, *keys)
    torch.set_num_threads(1)
    process = start(tmp_path, *recipe, "--output", "out")
    wait_for((tmp_path / "out" / "checkpoint-2" / "manifest.json").exists, process)
    process.send_signal(
        {"terminate": signal.SIGTERM, "kill -9": signal.SIGKILL}[how] if "ctrl-c" not in how else signal.SIGINT
    )
    if how == "ctrl-c twice":
        time.sleep(0.01)
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert out == ""
    if how == "ctrl-c twice":
        assert process.returncode == 130
        assert "Stopped at once; `fourbit train --output out --resume` goes on from" in err.splitlines()[-1]
    elif how != "kill -9":
        assert process.returncode == 130
        assert "Stopping after this step" in err
        assert "`fourbit train --output out --resume` goes on from there." in err.splitlines()[-1]
    else:
        assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out" / "report.html").exists()
    resumed = fourbit_here("train", "--output", "out", "--resume", "--json")
    assert resumed.code == 0, resumed.err
    assert json.loads(resumed.out)["resumed_from"] >= 2
    whole = fourbit_here("train", *recipe, "--output", "whole")
    assert whole.code == 0, whole.err
    adapters = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "whole")]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[1])
    again = fourbit_here("train", "--output", "out", "--resume")
    assert again.code == 0
    assert "finished already" in again.err


@pytest.mark.parametrize(("answer", "status"), [("", 0), ("n", 2)])
def test_a_run_in_the_folder_is_offered_at_a_terminal(
    fourbit_here: Run, stories_model: Path, alpaca: Path, tmp_path: Path, answer: str, status: int
) -> None:
    recipe = ("--model", stories_model, "--data", alpaca, "--output", "out")
    assert fourbit_here("train", *recipe, *short(max_steps=1)).code == 0
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "fourbit", "train", *map(str, recipe), *short(max_steps=2)]
    with subprocess.Popen(command, cwd=tmp_path, stdin=theirs, stderr=theirs, stdout=subprocess.PIPE) as process:
        os.close(theirs)
        shown = b""
        while b"Go on with it? [Y/n]" not in shown:
            shown += os.read(ours, 1024)
        os.write(ours, f"{answer}\n".encode())
        reader = threading.Thread(target=_drain, args=(ours,), daemon=True)
        reader.start()
        assert process.wait(timeout=120) == status
    os.close(ours)
    assert (json.loads((tmp_path / "out" / "metrics.json").read_text())["resumed_from"] == 1) is (status == 0)


def _drain(terminal: int) -> None:
    """Read what a terminal shows until nobody writes to it: a full buffer would stop the writer."""
    with contextlib.suppress(OSError):
        while os.read(terminal, 1024):
            pass


@pytest.mark.parametrize(("options", "named"), [("size=400k", "the disk is full"), ("ro", "the disk is read-only")])
def test_a_disk_that_takes_nothing(options: str, named: str, stories_model: Path, alpaca: Path, tmp_path: Path) -> None:
    """Where there is room for some of the checkpoints, they stay, and nothing else is left half-written."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o {options} tmpfs {disk}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, check=False).returncode != 0:
        pytest.skip("a disk cannot be mounted here")
    recipe = f"--model {stories_model} --data {alpaca} --output {disk}/out {' '.join(short(save_steps=1, lora_r=16))}"
    script = f"{mount} && {sys.executable} -m fourbit train {recipe}; echo $?; ls -A {disk}/out"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, timeout=300, check=False
    )
    status, *left = done.stdout.splitlines()
    assert status == "2"
    lines = [line for line in done.stderr.splitlines() if "cannot access" not in line]
    assert lines[-1].startswith(f"Error: {disk}/out could not be written: {named}.")
    assert "Traceback" not in done.stderr
    assert not [name for name in left if "unfinished" in name or name in ("report.html", "metrics.json")]


# ---- bad input: one sentence, exit code 2, nothing half-written


@pytest.fixture
def refused(fourbit_here: Run, stories_model: Path, alpaca: Path, tmp_path: Path) -> Callable[..., str]:
    """The complaint of a run with something wrong in it, after which the output must not exist."""

    def run(*arguments: str | Path, model: str | Path = stories_model, data: str | Path = alpaca) -> str:
        done = fourbit_here("train", "--model", model, "--data", data, "--output", "out", *arguments)
        assert not (tmp_path / "out").exists()
        assert done.code == 2, done.err
        assert done.out == ""
        assert "Traceback" not in done.err
        complaint: str = done.err.splitlines()[-1]
        assert complaint.startswith("Error: ")
        return complaint

    return run


def test_a_model_with_no_tokenizer(refused: Callable[..., str], stories_model: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(stories_model / name, tmp_path / "bare")
    assert "holds no tokenizer" in refused(model="bare")


def test_broken_jsonl(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instruction": \n')
    complaint = refused(data="broken.jsonl")
    assert "broken.jsonl" in complaint
    assert "line 2" in complaint


def test_records_with_no_known_fields(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "odd.jsonl").write_text('{"colour": "red", "weight": 3}\n')
    complaint = refused(data="odd.jsonl")
    assert "colour" in complaint
    assert "instruction" in complaint


def test_an_empty_dataset(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl" in refused(data="empty.jsonl")


def test_a_dataset_in_which_no_label_survives(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({"instruction": "word " * 200, "output": "b"}) + "\n")
    assert "max_length" in refused("max_length=32", data="long.jsonl")
    (tmp_path / "mute.jsonl").write_text(json.dumps({"instruction": "a", "output": ""}) + "\n")
    assert "empty" in refused(data="mute.jsonl")


def test_a_sequence_length_beyond_the_models(refused: Callable[..., str]) -> None:
    assert "made for 512 tokens; give 512 or less" in refused("max_length=513")


def test_a_negative_learning_rate(refused: Callable[..., str]) -> None:
    assert "`learning_rate` is -0.001; it must be above 0." in refused("learning_rate=-1e-3")


def test_an_adapter_for_another_model(refused: Callable[..., str], tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    get_peft_model(small, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "other")
    assert "is for another model" in refused(f"adapter={tmp_path / 'other'}")


def test_an_output_that_is_not_ours(fourbit_here: Run, stories_model: Path, alpaca: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    done = fourbit_here("train", "--model", stories_model, "--data", alpaca, "--output", "out", "--overwrite")
    assert "out holds files that no training run of fourbit wrote; choose another output." in done.complaint
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_yaml_with_an_unknown_key(fourbit_here: Run, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: m\ndata: d\noutput: out\nlearning_rat: 1e-4\n")
    complaint = fourbit_here("train", "run.yaml").complaint
    assert complaint == "Error: run.yaml has the unknown key `learning_rat`; did you mean `learning_rate`?"


@pytest.mark.parametrize("what", ["model", "data"])
def test_an_unreachable_hub_name(refused: Callable[..., str], what: str) -> None:
    complaint = refused(**{what: "nobody/nothing-of-that-name"})
    assert "nobody/nothing-of-that-name" in complaint
    assert "hub" in complaint


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "The command says nothing of `model`; give a model folder or a name on the hub."),
        (("a.yaml", "b.yaml"), "There are two configs, a.yaml and b.yaml; give one, and single keys as key=value."),
        (("none.yaml",), "There is no file none.yaml; give a YAML file, or --model, --data and --output."),
        (("--model", "a", "model=b"), "`model` is given twice, as --model a and model=b; keep one."),
    ],
)
def test_commands_that_make_no_sense(fourbit_here: Run, arguments: tuple[str, ...], complaint: str) -> None:
    assert fourbit_here("train", *arguments).complaint == f"Error: {complaint}"


def test_a_memory_limit_below_what_python_takes(
    fourbit_here: Run, stories_model: Path, alpaca: Path, tmp_path: Path
) -> None:
    """It is refused, and where it is forced, watched; what one row needs is told in one sentence."""
    flags = ("--model", stories_model, "--data", alpaca, "--output", "out")
    done = fourbit_here("train", *flags, *short(memory="100MB", eval_size=0))
    assert done.code == 2, done.err
    assert "of memory, and there are 100 MB: no setting makes it fit" in done.err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    done = fourbit_here("train", *flags, *short(memory="100MB", eval_size=0, force="true"))
    assert done.code == 2, done.err
    (line,) = [line for line in done.err.splitlines() if line.startswith("Error: ")]
    assert "alone does not fit into memory even with gradient checkpointing (the process holds" in line
    assert "and `memory` allows 100 MB); raise `memory`" in line
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_memory_limit_that_is_no_size(fourbit_here: Run, stories_model: Path, alpaca: Path) -> None:
    flags = ("--model", stories_model, "--data", alpaca, "--output", "out")
    assert "`memory` is 'much'" in fourbit_here("train", *flags, "memory=much").complaint
