"""What a run is taken up from, and what is refused: another recipe, other data, another model, a second run."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fourbit.errors import InputError, OutputExists, RunExists
from fourbit.train import TrainConfig, TrainResult, train
from fourbit.train.events import Event, Said, Saved, Stepped
from fourbit.train.lock import LOCK_FILE, FolderLock
from fourbit.train.outline import outline_run
from fourbit.train.trainer import FourbitTrainer

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks

ConfigFor = Callable[..., TrainConfig]
RECIPE = {"lora_dropout": 0.3, "save_steps": 2, "eval_size": 8, "extra": {"adam_beta1": 0.8}}


def interrupt(event: Event) -> None:
    if isinstance(event, Stepped) and event.step == 3:
        os.kill(os.getpid(), signal.SIGINT)


def adapter_of(result: TrainResult) -> dict[str, torch.Tensor]:
    return load_file(result.output / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def whole(config_for: ConfigFor, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """The run that nothing disturbed."""
    return train(config_for(tmp_path_factory.mktemp("whole") / "out", **RECIPE))


@pytest.fixture(scope="module")
def stopped(config_for: ConfigFor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder when it was stopped after step 3, with the checkpoints 2 and 3."""
    config = config_for(tmp_path_factory.mktemp("stopped") / "out", **RECIPE)
    assert not train(config, on_event=interrupt).finished
    return Path(config.output)


@pytest.fixture
def config(config_for: ConfigFor, stopped: Path, tmp_path: Path) -> TrainConfig:
    """To take up a copy of it."""
    shutil.copytree(stopped, tmp_path / "out")
    return config_for(tmp_path / "out", **RECIPE)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("what", ["model", "data", "both"])
def test_what_only_lies_elsewhere_is_the_same(
    what: str, config: TrainConfig, whole: TrainResult, tmp_path: Path
) -> None:
    if what != "data":
        config = config.with_(model=str(shutil.copytree(config.model, tmp_path / "moved")))
    if what != "model":
        config = config.with_(data=str(shutil.copy(config.data, tmp_path / "renamed.jsonl")))
    assert same(adapter_of(whole), adapter_of(train(config, resume=True)))


def test_other_data_are_refused(config: TrainConfig, tmp_path: Path) -> None:
    lines = Path(config.data).read_text().splitlines(keepends=True)
    other = tmp_path / "other.jsonl"
    other.write_text("".join([*lines[1:], lines[0]]))
    before = contents(Path(config.output))
    for attempt in (lambda told: train(told, resume=True), _outline):
        with pytest.raises(InputError, match=r"the examples to train on .*changed since it began; put back what"):
            attempt(config.with_(data=str(other)))
    assert contents(Path(config.output)) == before


def _outline(config: TrainConfig) -> dict[str, Any]:
    return outline_run(config, resume=True, overwrite=False, on_event=lambda event: None)


def test_another_model_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    model = Path(shutil.copytree(config.model, tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="cannot go on: the files of the model changed since it began"):
        train(config.with_(model=str(model)), resume=True)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"extra": {}}, r"`adam_beta1` 0\.8 \(now 0\.9\)"),
        ({"extra": {"adam_beta1": 0.8, "neftune_noise_alpha": 5}}, r"`neftune_noise_alpha` None \(now 5\)"),
        ({"lora_r": 4, "max_length": 32}, r"`lora_r` 8 \(now 4\), `max_length` 64 \(now 32\)"),
    ],
)
def test_every_difference_is_told(changes: dict[str, Any], told: str, config: TrainConfig) -> None:
    with pytest.raises(InputError, match=f"began with {told}; give what it began with, or start anew with --overwrite"):
        train(config.with_(**changes), resume=True)


def test_a_key_that_says_what_is_the_default_is_no_difference(config: TrainConfig, whole: TrainResult) -> None:
    extra = {"adam_beta1": 0.8, "adam_epsilon": 1e-8}
    assert same(adapter_of(whole), adapter_of(train(config.with_(extra=extra), resume=True)))


@pytest.mark.parametrize("fault", ["flipped", "cut", "gone"])
def test_a_damaged_checkpoint_is_named(fault: str, config: TrainConfig, whole: TrainResult) -> None:
    file = Path(config.output) / "checkpoint-3" / "optimizer.pt"
    held = bytearray(file.read_bytes())
    if fault == "flipped":
        held[len(held) // 2] ^= 1
    file.write_bytes(held[:-10] if fault == "cut" else held)
    if fault == "gone":
        file.unlink()
    events: list[Event] = []
    result = train(config, resume=True, on_event=events.append)
    why = {"flipped": "has changed since it was written", "cut": "bytes in place of", "gone": "is missing"}[fault]
    (said,) = [event.sentence for event in events if isinstance(event, Said) and "goes on from" in event.sentence]
    assert said.startswith("checkpoint-3 is damaged (optimizer.pt ")
    assert why in said
    assert said.endswith("it is passed over. The run goes on from its checkpoint after step 2.")
    assert same(adapter_of(whole), adapter_of(result))


def test_a_clock_that_was_set_back_changes_nothing(config: TrainConfig, whole: TrainResult) -> None:
    """The newest is the one of the latest step, whatever the times of the files say."""
    for path in (Path(config.output) / "checkpoint-3").rglob("*"):
        os.utime(path, (0, 0))
    os.utime(Path(config.output) / "checkpoint-3", (0, 0))
    result = train(config, resume=True)
    assert result.resumed_from == 3
    assert same(adapter_of(whole), adapter_of(result))
    assert sorted(path.name for path in result.output.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


def test_a_run_in_the_folder_is_offered(config: TrainConfig) -> None:
    with pytest.raises(RunExists, match="--resume goes on with it, --overwrite starts anew"):
        train(config)


# Two runs in one folder


def test_a_second_run_is_refused_while_the_first_goes_on(config: TrainConfig) -> None:
    refused = []

    def try_too(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == 4:
            for choice in ({"resume": True}, {"overwrite": True}):
                with pytest.raises(OutputExists) as caught:
                    train(config, **choice)
                refused.append(str(caught.value))

    train(config, resume=True, on_event=try_too)
    assert len(refused) == 2
    assert all(f"Another run (process {os.getpid()}) is writing into {config.output}" in line for line in refused)
    assert not (Path(config.output) / LOCK_FILE).exists()


def test_a_run_that_began_meanwhile_is_not_touched(config: TrainConfig, config_for: ConfigFor, tmp_path: Path) -> None:
    """Two that both found an empty folder: the slower one gives way."""

    def be_faster(event: Event) -> None:
        if isinstance(event, Said) and event.sentence.startswith("Training "):
            shutil.copytree(config.output, tmp_path / "new")

    with pytest.raises(OutputExists, match="Another run wrote into"):
        train(config_for(tmp_path / "new", **RECIPE), on_event=be_faster)
    assert contents(tmp_path / "new") == contents(Path(config.output))


def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from fourbit.train.lock import FolderLock;"
        "lock = FolderLock(Path(sys.argv[1])); lock.acquire(); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        lock = FolderLock(tmp_path)
        for attempt in (lock.check, lock.acquire):
            with pytest.raises(OutputExists, match=f"process {other.pid}"):
                attempt()
        other.kill()
        other.wait()
    lock.check()
    lock.acquire()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_one_of_several_processes_is_refused(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="one process and one GPU, and this is one of 2"):
        train(config, resume=True)


# A disk that takes no more


@pytest.mark.parametrize("report", ["system", "torch"])
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    report: str, config: TrainConfig, whole: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = FourbitTrainer._write_checkpoint

    def fail_once(self: FourbitTrainer, model: Any, trial: Any, unfinished: Path, final: Path) -> None:
        write(self, model, trial, unfinished, final)
        if self.state.global_step == 4:
            if report == "system":
                raise OSError(errno.ENOSPC, "No space left on device", str(unfinished))
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 704 vs 598")

    monkeypatch.setattr(FourbitTrainer, "_write_checkpoint", fail_once)
    events: list[Event] = []
    result = train(config, resume=True, on_event=events.append)
    said = [event.sentence for event in events if isinstance(event, Said)]
    sentence = "The checkpoint after step 4 could not be written: the disk is full. The run goes on"
    assert any(line.startswith(sentence) for line in said)
    assert [event.step for event in events if isinstance(event, Saved)] == [6]
    assert same(adapter_of(whole), adapter_of(result))


def test_a_disk_that_is_full_at_the_end(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fourbit.train.run._Run._save_adapter", fail)
    with pytest.raises(InputError, match=r"the disk is full\. checkpoint-6 remains, and --resume goes on from it"):
        train(config, resume=True)
    monkeypatch.undo()
    assert train(config, resume=True).resumed_from == 6


def test_a_model_whose_packed_examples_see_each_other_is_taken_up(
    config_for: ConfigFor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It trains unpacked, and that is no difference to what was asked for."""
    monkeypatch.setattr("fourbit.train.packing.keeps_apart", lambda model: False)
    config = config_for(tmp_path / "out", **RECIPE, packing=True)
    train(config, on_event=interrupt)
    assert json.loads((tmp_path / "out" / "fourbit.json").read_text())["config"]["packing"] is True
    assert train(config, resume=True).finished
