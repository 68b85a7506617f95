"""Whole runs: what they leave behind, how they end, and how they are taken up."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import fourbit
from fourbit.errors import InputError, OutputExists
from fourbit.train import TrainConfig, TrainResult, train
from fourbit.train.events import Began, Evaluated, Event, Said, Saved, Stepped
from fourbit.train.outline import outline_run

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks

MakeConfig = Callable[..., TrainConfig]

DESIGN_KEYS = {
    "output",
    "steps",
    "tokens",
    "train_loss",
    "eval_loss",
    "tokens_per_second",
    "peak_bytes",
    "planned_bytes",
    "resumed_from",
}


def adapter_of(result: TrainResult) -> dict[str, torch.Tensor]:
    return load_file(result.output / "adapter_model.safetensors")


def losses_of(result: TrainResult) -> list[float]:
    rows = map(json.loads, (result.output / "history.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def interrupted_at(step: int) -> Callable[[Event], None]:
    """Presses Ctrl-C while a step is done."""

    def press(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return press


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_what_a_run_leaves_behind(make_config: MakeConfig, records: Path) -> None:
    config = make_config(samples=2, sample_tokens=4, eval_on_start=True, max_steps=4)
    events: list[Event] = []
    result = train(config, on_event=events.append)
    assert {path.name for path in result.output.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.yaml",
        "fourbit.json",
        "history.jsonl",
        "metrics.json",
        "report.html",
        "samples.json",
        "tokenizer.json",
    }
    assert not [path for path in result.output.rglob("*") if "unfinished" in path.name]
    metrics = json.loads((result.output / "metrics.json").read_text())
    assert metrics == result.metrics
    assert metrics.keys() >= DESIGN_KEYS
    assert (result.finished, result.steps, result.resumed_from) == (True, 4, None)
    losses = [event.loss for event in events if isinstance(event, Stepped)]
    assert result.train_loss == pytest.approx(sum(losses) / 4)
    rows = [json.loads(line) for line in (result.output / "history.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows if "loss" in row] == losses
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 4]
    assert rows[-1]["eval_loss"] == result.eval_loss
    samples = json.loads((result.output / "samples.json").read_text())
    assert len(samples) == 2
    assert all(isinstance(sample[when], str) for sample in samples for when in ("before", "after", "expected"))
    assert TrainConfig.load(result.output / "config.yaml") == config
    assert [type(event) for event in events if not isinstance(event, (Said, Evaluated))] == [
        Began,
        *[Stepped] * 4,
        Saved,
    ]


def test_a_tracker_is_told_the_same_numbers(make_config: MakeConfig) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config(max_steps=4, report_to="tensorboard", logging_steps=1)
    result = train(config)
    (written,) = result.output.rglob("*tfevents*")
    events = EventAccumulator(str(written.parent)).Reload()
    told = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert told == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in enumerate(losses_of(result), 1)]
    assert events.Scalars("eval/loss")[-1].value == pytest.approx(result.eval_loss, rel=1e-6)


def test_tokens_are_counted_without_padding(make_config: MakeConfig) -> None:
    from fourbit.train.material import open_material

    config = make_config(max_steps=-1, num_train_epochs=2, eval_size=4)
    material = open_material(config, on_event=lambda event: None)
    result = train(config)
    assert result.tokens == 2 * sum(len(ids) for ids in material.train["input_ids"])
    assert result.steps == material.steps(config)
    packed = train(config.with_(packing=True), overwrite=True)
    assert packed.tokens == result.tokens


def test_the_adapter_loads_in_stock_peft(make_config: MakeConfig) -> None:
    """peft and transformers alone, on the model in 16 bits, see what fourbit trained."""
    config = make_config(dtype="float32", format="none", lora_dropout=0.0)
    result = train(config)
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(config.model), result.output).eval()
    ids = torch.arange(3, 40).view(1, -1)
    with torch.no_grad():
        expected, base = stock(input_ids=ids).logits, stock.get_base_model()
        with stock.disable_adapter():
            plain = base(input_ids=ids).logits
        assert result.model is not None
        found = result.model(input_ids=ids).logits
    assert (found - expected).abs().max() < 1e-4  # fp32, other kernels
    assert (found - plain).abs().max() > 0.1  # the adapter does something
    tokenizer = AutoTokenizer.from_pretrained(result.output)
    assert tokenizer.chat_template


def test_fourbit_loads_the_adapter_on_the_model_in_4_bits(make_config: MakeConfig) -> None:
    config = make_config(dtype="float32")
    result = train(config)
    loaded = fourbit.load(config.model, adapter=result.output, dtype=torch.float32)
    ids = torch.arange(3, 40).view(1, -1)
    assert result.model is not None
    with torch.no_grad():
        assert (loaded(input_ids=ids).logits - result.model(input_ids=ids).logits).abs().max() < 1e-4


@pytest.fixture(scope="module")
def two_epochs(
    tmp_path_factory: pytest.TempPathFactory, config_for: Callable[..., TrainConfig]
) -> tuple[TrainConfig, TrainResult]:
    """An uninterrupted run with dropout: 44 examples make 11 steps an epoch."""
    config = config_for(tmp_path_factory.mktemp("whole") / "out", max_steps=-1, num_train_epochs=2, eval_size=4)
    config = config.with_(eval_steps=4, lora_dropout=0.3)
    return config, train(config)


@pytest.mark.parametrize("step", [3, 11, 14])
def test_an_interrupted_run_ends_with_the_same_bits(
    two_epochs: tuple[TrainConfig, TrainResult], tmp_path: Path, step: int
) -> None:
    """In the first epoch, at its end, and in the second."""
    config, whole = two_epochs
    assert whole.steps == 22
    config = config.with_(output=str(tmp_path / "interrupted"))
    stopped = train(config, on_event=interrupted_at(step))
    assert (stopped.finished, stopped.steps) == (False, step)
    assert not (stopped.output / "adapter_model.safetensors").exists()
    resumed = train(config, resume=True)
    assert (resumed.finished, resumed.steps, resumed.resumed_from) == (True, 22, step)
    assert same(adapter_of(whole), adapter_of(resumed))
    assert resumed.tokens == whole.tokens
    assert resumed.train_loss == pytest.approx(whole.train_loss)
    assert losses_of(whole) == losses_of(resumed)


def test_a_packed_run_is_taken_up_likewise(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(packing=True, lora_dropout=0.3)
    whole = train(config)
    config = config.with_(output=str(tmp_path / "interrupted"))
    train(config, on_event=interrupted_at(2))
    assert same(adapter_of(whole), adapter_of(train(config, resume=True)))


def test_a_broken_checkpoint_is_passed_over(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(save_steps=2)
    whole = train(config)
    config = config.with_(output=str(tmp_path / "interrupted"))
    train(config, on_event=interrupted_at(5))
    assert {path.name for path in Path(config.output).glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-5"}
    optimizer = Path(config.output) / "checkpoint-5" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-100])
    resumed = train(config, resume=True)
    assert resumed.resumed_from == 4
    assert same(adapter_of(whole), adapter_of(resumed))


def test_a_second_interrupt_ends_at_once(make_config: MakeConfig) -> None:
    def press_twice(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(make_config(), on_event=press_twice)
    assert signal.getsignal(signal.SIGINT) is before


def test_resume_without_a_checkpoint_starts_anew_and_says_so(make_config: MakeConfig) -> None:
    events: list[Event] = []
    result = train(make_config(max_steps=1), resume=True, on_event=events.append)
    assert result.resumed_from is None
    assert any(isinstance(event, Said) and "starts anew" in event.sentence for event in events)


def test_resume_of_a_finished_run_does_nothing(make_config: MakeConfig) -> None:
    config = make_config(max_steps=2)
    first = train(config)
    written = {path: path.stat().st_mtime_ns for path in first.output.rglob("*")}
    again = train(config, resume=True)
    assert again.finished
    assert again.metrics == first.metrics
    assert {path: path.stat().st_mtime_ns for path in first.output.rglob("*")} == written


def test_a_finished_run_can_be_made_longer(make_config: MakeConfig) -> None:
    config = make_config(max_steps=2, warmup_steps=0)
    train(config)
    longer = train(config.with_(max_steps=4), resume=True)
    assert (longer.steps, longer.resumed_from) == (4, 2)


def test_a_run_killed_before_its_report_is_finished_by_resume(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(save_total_limit=1)
    whole = train(config)
    config = config.with_(output=str(tmp_path / "killed"))

    def kill(event: Event) -> None:
        if isinstance(event, Saved) and event.step == 6:
            raise SystemExit

    with pytest.raises(SystemExit):
        train(config, on_event=kill)
    output = Path(config.output)
    kept = sorted(output.glob("checkpoint-*"))
    for step in (1, 2):  # as if it had been killed a moment sooner, before the old ones were deleted
        shutil.copytree(output / "checkpoint-6", output / f"checkpoint-{step}")
    resumed = train(config, resume=True)
    assert sorted(output.glob("checkpoint-*")) == kept
    assert (resumed.finished, resumed.steps) == (True, 6)
    assert same(adapter_of(whole), adapter_of(resumed))
    assert resumed.train_loss == pytest.approx(whole.train_loss)


def test_a_run_is_not_resumed_with_another_recipe(make_config: MakeConfig) -> None:
    config = make_config()
    train(config, on_event=interrupted_at(2))
    with pytest.raises(InputError, match=r"`learning_rate` 0\.01 \(now 0\.02\), `seed` 0 \(now 1\); give what"):
        train(config.with_(learning_rate=0.02, seed=1), resume=True)


def test_an_output_that_exists_is_not_touched(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputExists, match="no training run of fourbit wrote"):
            train(make_config(), overwrite=overwrite)
    (tmp_path / "out" / "thesis.tex").rename(tmp_path / "thesis.tex")
    train(make_config(max_steps=1))
    with pytest.raises(OutputExists, match="--resume goes on with it, --overwrite starts anew"):
        train(make_config())
    (tmp_path / "thesis.tex").rename(tmp_path / "out" / "thesis.tex")
    with pytest.raises(OutputExists, match=r"holds thesis\.tex, which fourbit did not write"):
        train(make_config(), overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"
    assert (tmp_path / "out" / "report.html").exists()


def test_training_goes_on_with_an_adapter(make_config: MakeConfig, tmp_path: Path) -> None:
    first = train(make_config())
    with pytest.raises(InputError, match=r"`lora_r` is 5, and the adapter .* has 8; leave `lora_r` out"):
        train(make_config(adapter=str(first.output), lora_r=5).with_(output=str(tmp_path / "second")))
    config = make_config(adapter=str(first.output), max_steps=1, learning_rate=1e-12).with_(
        output=str(tmp_path / "second")
    )
    second = train(config)
    before, after = adapter_of(first), adapter_of(second)
    assert all(torch.allclose(before[name], after[name]) for name in before)
    assert second.metrics["trainable_parameters"] == first.metrics["trainable_parameters"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 129}, r"`max_length` is 129, and .* was made for 128 tokens; give 128 or less"),
        ({"target_modules": ["q_prj"]}, r"No module of this .* is named as `target_modules` \['q_prj'\] asks"),
        ({"target_modules": []}, "`target_modules` is empty; give `all-linear`"),
        ({"target_modules": ["lm_head"]}, "The adapter is on the output layer, lm_head, which cannot be trained here"),
        ({"revision": "v1"}, "is a folder, which has no revision 'v1'"),
        ({"split": "test"}, "is one file, which has no split 'test'"),
        ({"model": "no/such/model/here"}, "There is no folder no/such/model/here"),
        ({"optim": "adamw_torch_fussed"}, "The training cannot be set up so: .*adamw_torch_fussed"),
        ({"report_to": "tensorbord"}, "`report_to` cannot be used: .*tensorbord"),
        ({"lr_scheduler_type": "constat"}, "The training cannot be set up so: .*constat"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    make_config: MakeConfig, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train(make_config(**changes))
    with pytest.raises(InputError, match=message):
        outline_run(make_config(**changes), resume=False, overwrite=False, on_event=lambda event: None)
    assert not (tmp_path / "out").exists()


def test_the_adapter_of_another_model_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    first = train(make_config(max_steps=1, target_modules=["q_proj"]))
    weights = first.output / "adapter_model.safetensors"
    from safetensors.torch import save_file

    save_file({name: tensor[:, :5].contiguous() for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(InputError, match="is for another model"):
        train(make_config(adapter=str(first.output)).with_(output=str(tmp_path / "second")))
    assert not (tmp_path / "second").exists()


def test_a_run_of_one_step_learns_and_keeps_no_checkpoint_on_request(make_config: MakeConfig) -> None:
    """A warm-up of a share would be that one step, at the rate 0."""
    result = train(make_config(max_steps=1, extra={"save_strategy": "no"}))
    assert not list(result.output.glob("checkpoint-*"))
    assert any(tensor.abs().max() > 0 for name, tensor in adapter_of(result).items() if "lora_B" in name)


def test_a_persons_own_files_beside_a_run_without_a_checkpoint(make_config: MakeConfig) -> None:
    config = make_config(max_steps=2)
    output = train(config).output
    for checkpoint in output.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    marker = json.loads((output / "fourbit.json").read_text())
    (output / "fourbit.json").write_text(json.dumps({**marker, "finished": False}))
    (output / "thesis.md").write_text("mine")
    (output / "notes").mkdir()
    (output / "notes" / "more.txt").write_text("mine")
    assert train(config, resume=True).steps == 2
    assert (output / "thesis.md").read_text() == (output / "notes" / "more.txt").read_text() == "mine"
    with pytest.raises(OutputExists, match=r"holds notes, which fourbit did not write"):
        train(config, overwrite=True)


@pytest.mark.parametrize("held", ["{}", "[]", "{", None])
def test_a_finished_run_whose_metrics_are_damaged(held: str | None, make_config: MakeConfig) -> None:
    config = make_config(max_steps=2)
    path = train(config).output / "metrics.json"
    path.unlink()
    if held is not None:
        path.write_text(held)
    with pytest.raises(InputError, match=r"metrics\.json is missing or damaged; start anew with --overwrite"):
        train(config, resume=True)


def test_mmlu_beside_every_evaluation(make_config: MakeConfig, tmp_path: Path) -> None:
    """It changes nothing of the training."""
    for name in ("dev", "val"):
        (tmp_path / "mmlu" / name).mkdir(parents=True)
        rows = [f"What is {j} + 1?,{j + 1},{j + 2},{j + 3},{j},A\n" for j in range(3)]
        (tmp_path / "mmlu" / name / f"sums_{name}.csv").write_text("".join(rows))
    config = make_config(eval_steps=3, eval_on_start=True, max_length=128)
    plain = train(config.with_(output=str(tmp_path / "plain")))
    asked = train(config.with_(mmlu=str(tmp_path / "mmlu"), mmlu_shots=1, mmlu_limit=2))
    rows = list(map(json.loads, (asked.output / "history.jsonl").read_text().splitlines()))
    assert [row["step"] for row in rows if "eval_mmlu" in row] == [0, 3, 6]
    assert asked.metrics["eval_mmlu"] in (0, 0.5, 1)
    assert same(adapter_of(plain), adapter_of(asked))
    for changes, message in (({"mmlu_shots": 4}, "has 3 worked examples of sums"), ({"eval_size": 0}, "there is none")):
        with pytest.raises(InputError, match=message):
            train(config.with_(output=str(tmp_path / "no"), mmlu=str(tmp_path / "mmlu"), **changes))
    assert not (tmp_path / "no").exists()
