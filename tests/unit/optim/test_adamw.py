"""The paged optimizer against torch's, at budgets from everything to one page, and as others use an optimizer."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fourbit.errors import InputError
from fourbit.optim import PagedAdamW

SHAPES = ((64, 33), (7,), (300, 50), (1,), (1000,), (0,), (3, 4, 5))
STATE_BYTES = sum(-(-math.prod(shape) // 64) * 64 * 8 for shape in SHAPES)
Make = Callable[[list[Any]], torch.optim.Optimizer]


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range, *, gaps: bool = False) -> None:
    """Steps with gradients that depend on the number of the step alone; with gaps, some parameters have none."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for place, param in enumerate(params):
            grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            param.grad = grad if not gaps or (step + place) % 4 else None
        optimizer.step()


def differing(one: list[Any], other: list[Any]) -> list[int]:
    return [place for place, pair in enumerate(zip(one, other, strict=True)) if not torch.equal(*pair)]


def assert_states_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["param_groups"] == other["param_groups"]
    assert one["state"].keys() == other["state"].keys()
    for index, entry in one["state"].items():
        assert entry.keys() == other["state"][index].keys()
        assert [key for key in entry if not torch.equal(entry[key], other["state"][index][key])] == []
        assert [entry[key].shape for key in entry] == [other["state"][index][key].shape for key in entry]


def budgets(folder: Path) -> dict[str, dict[str, Any]]:
    page = {"page_elements": 1024}
    return {
        "no budget": {},
        "everything": {**page, "host_budget_bytes": 1 << 20, "folder": folder},
        "half, in a file": {**page, "host_budget_bytes": STATE_BYTES // 2, "folder": folder},
        "three pages, in a file": {**page, "host_budget_bytes": 3 * 8192, "folder": folder},
        "one page, in a file": {**page, "host_budget_bytes": 8192, "folder": folder},
        "three pages, in memory": {**page, "device_budget_bytes": 3 * 8192},
        "one page, in memory": {**page, "device_budget_bytes": 8192},
        "three tiers": {**page, "device_budget_bytes": 2 * 8192, "host_budget_bytes": 3 * 8192, "folder": folder},
        "three tiers of a page": {**page, "device_budget_bytes": 8192, "host_budget_bytes": 8192, "folder": folder},
        "a page left to us": {"host_budget_bytes": STATE_BYTES // 2, "folder": folder},
    }


@pytest.fixture(scope="module")
def after_1000_steps() -> tuple[list[nn.Parameter], dict[str, Any]]:
    params = parameters()
    optimizer = torch.optim.AdamW(params, lr=3e-3, betas=(0.85, 0.99), eps=1e-7, weight_decay=0.1, fused=True)
    train(optimizer, params, range(1000), gaps=True)
    return params, optimizer.state_dict()


@pytest.mark.parametrize("budget", list(budgets(Path())))
def test_it_is_torchs_to_the_bit_over_1000_steps(
    budget: str, after_1000_steps: tuple[list[nn.Parameter], dict[str, Any]], tmp_path: Path
) -> None:
    params = parameters()
    settings = budgets(tmp_path)[budget]
    optimizer = PagedAdamW(params, lr=3e-3, betas=(0.85, 0.99), eps=1e-7, weight_decay=0.1, **settings)
    train(optimizer, params, range(1000), gaps=True)
    assert differing(params, after_1000_steps[0]) == []
    assert_states_equal(optimizer.state_dict(), after_1000_steps[1])
    assert (optimizer.moved_bytes > 0) == (budget not in ("no budget", "everything"))


def test_each_step_moves_only_what_does_not_fit(tmp_path: Path) -> None:
    """8 pages of which 3 fit: 5 go in and 5 out. In one direction only, it would be 8 and 8."""
    param = nn.Parameter(torch.zeros(8 * 64))
    optimizer = PagedAdamW([param], page_elements=64, host_budget_bytes=3 * 512, folder=tmp_path)
    train(optimizer, [param], range(2))
    for step in range(2, 6):
        before = optimizer.moved_bytes
        train(optimizer, [param], range(step, step + 1))
        assert optimizer.moved_bytes - before == (5 + 5) * 512


@pytest.mark.parametrize("budget", ["no budget", "one page, in a file"])
def test_states_go_to_torch_and_back(budget: str, tmp_path: Path) -> None:
    """Half of a run by one, half by the other, in either order, is the run of either alone."""
    whole = parameters()
    reference = torch.optim.AdamW(whole, lr=1e-2, fused=True)
    train(reference, whole, range(20), gaps=True)
    ours: Make = lambda params: PagedAdamW(params, lr=1e-2, **budgets(tmp_path)[budget])  # noqa: E731
    torchs: Make = lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True)  # noqa: E731
    for first, second in ((ours, torchs), (torchs, ours)):
        params = parameters()
        optimizer = first(params)
        train(optimizer, params, range(11), gaps=True)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        optimizer = second(params)
        optimizer.load_state_dict(torch.load(file, weights_only=True))
        train(optimizer, params, range(11, 20), gaps=True)
        assert differing(params, whole) == []
        assert_states_equal(optimizer.state_dict(), reference.state_dict())


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_carry_what_16_bits_cannot(bits: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """The fp32 copies are what an fp32 run is, given the same gradients; the parameters are those rounded."""
    exact = [nn.Parameter(param.float()) for param in parameters(dtype)]
    optimizer = PagedAdamW(exact, lr=1e-4, state_bits=bits)
    params = parameters(dtype)
    page = {"page_elements": 1024, "host_budget_bytes": 12 * 1024, "folder": tmp_path}
    paged = PagedAdamW(params, lr=1e-4, state_bits=bits, master_weights=True, **page)
    for step in range(20):
        train(paged, params, range(step, step + 1))
        for param, twin in zip(params, exact, strict=True):
            twin.grad = None if param.grad is None else param.grad.float()
        optimizer.step()
    assert differing([param.to(dtype) for param in exact], params) == []
    masters = [entry["master"] for entry in paged.state_dict()["state"].values()]
    assert differing(masters, exact) == []
    assert [param.dtype for param in params] == [dtype] * len(params)


def test_16_bits_without_masters_are_updated_in_fp32_and_rounded() -> None:
    params = parameters(torch.bfloat16)
    wide = [nn.Parameter(param.float()) for param in params]
    optimizer, reference = PagedAdamW(params, lr=0.1), torch.optim.AdamW(wide, lr=0.1, fused=True)
    train(optimizer, params, range(1))
    for param, twin in zip(params, wide, strict=True):
        twin.grad = None if param.grad is None else param.grad.float()
    reference.step()
    assert differing(params, [param.bfloat16() for param in wide]) == []
    assert {entry["exp_avg"].dtype for entry in optimizer.state_dict()["state"].values()} == {torch.float32}


def test_groups_and_schedules_are_torchs() -> None:
    def make(build: Any, **more: Any) -> list[nn.Parameter]:
        params = parameters()
        groups = [{"params": params[:2], "weight_decay": 0.0}, {"params": params[2:], "lr": 0.5, "betas": (0.5, 0.7)}]
        optimizer = build(groups, lr=1e-2, **more)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10)
        for step in range(12):
            train(optimizer, params, range(step, step + 1))
            torch.nn.utils.clip_grad_norm_(params, 0.3)
            schedule.step()
            optimizer.zero_grad(set_to_none=step % 2 == 0)
        return params

    assert differing(make(PagedAdamW, page_elements=64), make(torch.optim.AdamW, fused=True)) == []


def test_parameters_can_be_added_in_the_middle(tmp_path: Path) -> None:
    def make(build: Any, **more: Any) -> list[nn.Parameter]:
        params = parameters()
        optimizer = build(params[:3], lr=1e-2, **more)
        train(optimizer, params[:3], range(5))
        optimizer.add_param_group({"params": params[3:], "lr": 1e-3})
        train(optimizer, params, range(5, 10))
        return params

    paged = make(PagedAdamW, page_elements=64, host_budget_bytes=512, folder=tmp_path)
    assert differing(paged, make(torch.optim.AdamW, fused=True)) == []


def test_a_closure_gives_its_loss_and_has_gradients() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = PagedAdamW([param], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(2)]
    assert losses[0] == 3.0 > losses[1]


def test_a_parameter_may_be_transposed_and_its_gradient_not() -> None:
    def make(build: Any, **more: Any) -> Tensor:
        param = nn.Parameter(torch.arange(70.0).view(7, 10).t())
        optimizer = build([param], lr=0.1, **more)
        for step in range(3):
            param.grad = torch.randn(10, 7, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        moments: Tensor = optimizer.state_dict()["state"][0]["exp_avg"]
        return torch.stack([param.detach(), moments])

    # torch would multiply elements that lie in the same place, so its gradient has to lie as the parameter does
    expected = make(torch.optim.AdamW, foreach=False)
    torch.testing.assert_close(make(PagedAdamW, page_elements=64), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bits", [32, 8])
def test_accelerate_takes_it(bits: int) -> None:
    from accelerate import Accelerator

    torch.manual_seed(0)
    plain = nn.Linear(100, 70)
    wrapped = copy.deepcopy(plain)
    optimizer = PagedAdamW(plain.parameters(), lr=0.1, state_bits=bits)
    accelerator = Accelerator(cpu=True)
    model, prepared = accelerator.prepare(wrapped, PagedAdamW(wrapped.parameters(), lr=0.1, state_bits=bits))
    for step in range(4):
        x = torch.randn(5, 100, generator=torch.Generator().manual_seed(step))
        plain(x).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.backward(model(x).square().mean())
        accelerator.clip_grad_norm_(model.parameters(), 0.1)
        prepared.step()
        prepared.zero_grad()
    assert differing(list(plain.parameters()), list(wrapped.parameters())) == []
    state = prepared.state_dict()
    prepared.load_state_dict(state)
    assert_states_equal(prepared.state_dict(), state)


def test_a_scaler_skips_a_step_of_infinite_gradients() -> None:
    """As fp16 training does it: neither the parameters nor the count of steps change."""
    param = nn.Parameter(torch.ones(100))
    optimizer, scaler = PagedAdamW([param], lr=0.1), torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor in (1.0, float("inf"), 2.0):
        before = param.detach().clone()
        scaler.scale((param * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(param, before) == math.isinf(factor)
    assert optimizer.state_dict()["state"][0]["step"] == 2


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"state_bits": 16}, "`state_bits` is 16; it must be 32 or 8"),
        ({"lr": -1.0}, "`lr` is -1.0; it must be 0 or more"),
        ({"lr": torch.tensor(0.1)}, "`lr` is a tensor"),
        ({"betas": (0.9, 1.0)}, "`betas` is .*; it must be two numbers from 0 to below 1"),
        ({"eps": math.nan}, "`eps` is nan"),
        ({"amsgrad": True}, "PagedAdamW has no `amsgrad`"),
        ({"maximize": True}, "PagedAdamW has no `maximize`"),
        ({"page_elements": 100}, "`page_elements` is 100; it must be a multiple of 64"),
        ({"page_elements": 64, "state_bits": 8}, "`page_elements` is 64; it must be a multiple of 256"),
        ({"device_budget_bytes": 0}, "`device_budget_bytes` is 0; it must be a whole"),
        ({"device_budget_bytes": 100}, "`device_budget_bytes` is 100, and one page takes 512 bytes"),
        ({"page_elements": 128, "device_budget_bytes": 1000}, "is 1000, and one page takes 1024 bytes"),
        ({"host_budget_bytes": 10000}, "`host_budget_bytes` needs a `folder`"),
        ({"folder": "somewhere"}, "`folder` is for the pages beyond `host_budget_bytes`"),
    ],
)
def test_settings_that_make_no_sense_are_one_sentence(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        PagedAdamW([nn.Parameter(torch.zeros(5000))], **settings)


def test_parameters_that_cannot_be_paged_are_refused() -> None:
    with pytest.raises(InputError, match=r"not torch\.float64"):
        PagedAdamW([nn.Parameter(torch.zeros(5, dtype=torch.float64))])
    with pytest.raises(InputError, match="part of a larger tensor"):
        PagedAdamW([nn.Parameter(torch.zeros(5, 6)[:, :3])])
    param = nn.Parameter(torch.zeros(5, 6))
    param.grad = torch.eye(5, 6).to_sparse()
    with pytest.raises(InputError, match="no sparse gradients"):
        PagedAdamW([param]).step()


def test_states_of_others_are_refused() -> None:
    param = nn.Parameter(torch.zeros(64))
    param.grad = torch.ones(64)
    for other, sentence in (
        (torch.optim.SGD([param], momentum=0.9), "has no"),
        (torch.optim.AdamW([nn.Parameter(torch.zeros(3))]), r"is \[3\] for a parameter of \[64\]"),
        (torch.optim.AdamW([param], amsgrad=True), "no `amsgrad`"),
    ):
        for group in other.param_groups:
            group["params"][0].grad = torch.ones_like(group["params"][0])
        other.step()
        state = other.state_dict()
        for name, value in PagedAdamW([param]).state_dict()["param_groups"][0].items():
            state["param_groups"][0].setdefault(name, value)
        with pytest.raises(InputError, match=sentence):
            PagedAdamW([param]).load_state_dict(state)


def test_a_step_that_fails_leaves_its_page_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    optimizer = PagedAdamW(params, page_elements=64, host_budget_bytes=512, folder=tmp_path)
    train(optimizer, params, range(2))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "_fused_adamw_", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError) as kept:
            optimizer.step()
    optimizer.step()
    assert kept.value.__traceback__ is not None


def test_memory_that_ends_does_so_before_a_step_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters(torch.bfloat16)
    optimizer = PagedAdamW(params)
    before = [param.detach().clone() for param in params]

    def refuse(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("none left")

    for name in ("zeros", "empty"):
        with monkeypatch.context() as patch:
            patch.setattr(torch, name, refuse)
            for param in params:
                param.grad = torch.ones_like(param)
            with pytest.raises(torch.OutOfMemoryError):
                optimizer.step()
    assert differing(params, before) == []
    assert optimizer.state_dict()["state"] == {}
    optimizer.step()
    assert {int(entry["step"]) for entry in optimizer.state_dict()["state"].values()} == {1}


def test_it_is_not_pickled_but_says_what_to_save() -> None:
    with pytest.raises(TypeError, match=r"save its state_dict\(\)"):
        copy.deepcopy(PagedAdamW([nn.Parameter(torch.zeros(3))]))
