"""The paged optimizer by name, in runs that save, stop and are taken up."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fourbit.errors import InputError
from fourbit.optim import PagedAdamW
from fourbit.train import TrainConfig, TrainResult, train
from fourbit.train.events import Event, Stepped
from fourbit.train.optimizer import optimizer

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks

ConfigFor = Callable[..., TrainConfig]
ONE_PAGE: dict[str, Any] = {"optim_host_budget": 12 * 256, "optim_page_elements": 256}
RECIPE: dict[str, Any] = {
    "eval_size": 8,
    "lora_dropout": 0.3,
    "save_steps": 2,
    "max_steps": 5,
    "weight_decay": 0.01,
    "warmup_steps": 2,
    "target_modules": ["q_proj", "down_proj"],
}


def interrupt(event: Event) -> None:
    if isinstance(event, Stepped) and event.step == 3:
        os.kill(os.getpid(), signal.SIGINT)


def adapter_of(result: TrainResult) -> dict[str, torch.Tensor]:
    return load_file(result.output / "adapter_model.safetensors")


def state_of(result: TrainResult) -> dict[int, dict[str, torch.Tensor]]:
    saved = torch.load(result.output / "checkpoint-5" / "optimizer.pt", weights_only=True)
    state: dict[int, dict[str, torch.Tensor]] = saved["state"]
    return state


def assert_same(one: TrainResult, other: TrainResult) -> None:
    adapters, states = (adapter_of(one), adapter_of(other)), (state_of(one), state_of(other))
    assert adapters[0].keys() == adapters[1].keys()
    assert [name for name in adapters[0] if not torch.equal(adapters[0][name], adapters[1][name])] == []
    assert states[0].keys() == states[1].keys() != set()
    for index, entry in states[0].items():
        assert entry.keys() == states[1][index].keys()
        assert [key for key in entry if not torch.equal(entry[key], states[1][index][key])] == []


def test_one_page_at_a_time_changes_nothing(config_for: ConfigFor, tmp_path: Path) -> None:
    """`adamw_torch_fused`, clipped and scheduled by transformers, is what a paged run is, checkpoints included."""
    plain = train(config_for(tmp_path / "plain", **RECIPE))
    paged = train(config_for(tmp_path / "paged", **RECIPE, **ONE_PAGE, optim="paged_adamw"))
    assert_same(plain, paged)
    assert [path.name for path in paged.output.iterdir() if "tmp" in path.name] == []


@pytest.mark.parametrize(
    "settings",
    [
        {"optim": "paged_adamw_32bit"},
        {"optim": "paged_adamw_8bit"},
        {"optim": "paged_adamw_32bit", "adapter_dtype": "bfloat16", "optim_master_weights": True},
    ],
    ids=["32bit", "8bit", "masters"],
)
def test_a_run_that_is_taken_up_is_the_one_that_was_not_stopped(
    settings: dict[str, Any], config_for: ConfigFor, tmp_path: Path
) -> None:
    whole = train(config_for(tmp_path / "whole", **RECIPE, **ONE_PAGE, **settings))
    config = config_for(tmp_path / "parts", **RECIPE, **ONE_PAGE, **settings)
    assert not train(config, on_event=interrupt).finished
    elsewhere = {"optim_host_budget": "1MB", "optim_page_elements": 512, "optim_folder": str(tmp_path / "pages")}
    resumed = train(config.with_(**elsewhere), resume=True)  # a budget changes no number, so it may be another
    assert resumed.resumed_from == 3
    assert_same(whole, resumed)


def test_an_adapter_in_16_bits_stays_so_when_a_run_is_taken_up(config_for: ConfigFor, tmp_path: Path) -> None:
    """peft loads one in fp32, and the rest of the run would be another, whatever the optimizer."""
    whole = train(config_for(tmp_path / "whole", **RECIPE, adapter_dtype="bfloat16"))
    config = config_for(tmp_path / "parts", **RECIPE, adapter_dtype="bfloat16")
    train(config, on_event=interrupt)
    assert_same(whole, train(config, resume=True))


@pytest.mark.parametrize(("name", "bits"), [("adamw_8bit", 8), ("paged_adamw_8bit", 8), ("paged_adamw_32bit", 32)])
def test_names_and_numbers_arrive(name: str, bits: int, make_config: Callable[..., TrainConfig]) -> None:
    config = make_config(
        optim=name, learning_rate=3e-4, adam_beta2=0.95, extra={"adam_beta1": 0.8, "adam_epsilon": 1e-6}
    )
    found = optimizer(config)
    assert found is not None
    paged = found[0]([torch.nn.Parameter(torch.ones(5000))], **found[1])
    assert isinstance(paged, PagedAdamW)
    assert paged.state_bits == bits
    group = paged.param_groups[0]
    assert (group["lr"], tuple(group["betas"]), group["eps"]) == (3e-4, (0.8, 0.95), 1e-6)


def test_other_names_are_transformers(make_config: Callable[..., TrainConfig]) -> None:
    assert optimizer(make_config()) is None
    assert optimizer(make_config(optim="adamw_torch")) is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"optim_host_budget": "1GB"},
            "`optim_host_budget` is for an optimizer with pages, and `optim` is adamw_torch",
        ),
        ({"optim": "paged_adamw", "optim_host_budget": "much"}, "`optim_host_budget` is 'much', which is no size"),
        ({"optim": "paged_adamw", "optim_host_budget": -1}, "`optim_host_budget` is -1, which is no size"),
        ({"optim": "paged_adamw", "optim_folder": "x"}, "`optim_folder` is for the pages beyond `optim_host_budget`"),
        ({"optim": "paged_adamw", "optim_page_elements": 1}, "`optim_page_elements` is 1; it must be 64 or more"),
        ({"optim": "paged_adamw", "optim_master_weights": True}, "set `adapter_dtype` to bfloat16"),
        ({"optim": "adamw_8bit", "extra": {"optim_args": "a=1"}}, "`optim_args` means nothing to adamw_8bit"),
    ],
)
def test_what_makes_no_sense_is_refused(
    changes: dict[str, Any], sentence: str, make_config: Callable[..., TrainConfig]
) -> None:
    with pytest.raises(InputError, match=sentence):
        make_config(**changes)


def test_a_budget_below_a_page_ends_a_run_in_one_sentence(make_config: Callable[..., TrainConfig]) -> None:
    config = make_config(optim="paged_adamw", optim_host_budget="1kB", optim_page_elements=256)
    with pytest.raises(InputError, match="`host_budget_bytes` is 1000, and one page takes 2048 bytes"):
        train(config)
