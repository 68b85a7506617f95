"""The paged optimizer on a real GPU: pinned memory, streams and events, which a CPU has no like of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fourbit.kernels import dispatch, ops
from fourbit.optim import PagedAdamW

pytestmark = pytest.mark.gpu

SHAPES = ((512, 300), (7,), (64, 4096), (1,), (1000,))
PAGE = {"page_elements": 16384}
PAGE_BYTES = 8 * 16384


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator("cuda").manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator, device="cuda").to(dtype)) for s in SHAPES]


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator("cuda").manual_seed(step)
        for place, param in enumerate(params):
            grad = torch.randn(param.shape, generator=generator, device="cuda").to(param.dtype)
            param.grad = grad if (step + place) % 4 else None
        optimizer.step()


def budgets(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        "everything": {},
        "half": {**PAGE, "device_budget_bytes": 13 * PAGE_BYTES},
        "three pages": {**PAGE, "device_budget_bytes": 3 * PAGE_BYTES},
        "one page": {**PAGE, "device_budget_bytes": PAGE_BYTES},
        "three tiers": {
            **PAGE, "device_budget_bytes": 3 * PAGE_BYTES, "host_budget_bytes": 5 * PAGE_BYTES, "folder": folder
        },
    }  # fmt: skip


@pytest.mark.parametrize("budget", list(budgets(Path())))
def test_it_is_torchs_to_the_bit(budget: str, tmp_path: Path) -> None:
    """A copy that began too early or a page that was overwritten too soon shows in some bit of 300 steps."""
    expected, params = parameters(), parameters()
    reference = torch.optim.AdamW(expected, lr=3e-3, weight_decay=0.1, fused=True)
    optimizer = PagedAdamW(params, lr=3e-3, weight_decay=0.1, **budgets(tmp_path)[budget])
    train(reference, expected, range(300))
    train(optimizer, params, range(300))
    assert [place for place, pair in enumerate(zip(params, expected, strict=True)) if not torch.equal(*pair)] == []
    theirs, ours = reference.state_dict()["state"], optimizer.state_dict()["state"]
    for index, entry in theirs.items():
        assert [key for key in entry if not torch.equal(entry[key].cpu(), ours[index][key])] == []
    assert (optimizer.moved_bytes > 0) == (budget != "everything")


@pytest.mark.parametrize("bits", [32, 8])
def test_the_processor_waits_for_nothing(bits: int) -> None:
    """A step between the device and pinned memory is queued whole: whoever synchronizes in between is an error."""
    params = parameters(torch.bfloat16)
    optimizer = PagedAdamW(
        params, state_bits=bits, master_weights=True, page_elements=16384, device_budget_bytes=4 * 12 * 16384
    )
    train(optimizer, params, range(3))
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(bool(param.isfinite().all()) for param in params)


def test_the_budget_is_what_the_device_holds() -> None:
    param = nn.Parameter(torch.zeros(64 << 20, device="cuda"))
    param.grad = torch.ones_like(param)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer = PagedAdamW([param], device_budget_bytes=64 << 20)
    for _ in range(3):
        optimizer.step()
    torch.cuda.synchronize()
    assert optimizer.size_bytes == 512 << 20
    assert torch.cuda.max_memory_allocated() - before <= (64 << 20) + (
        1 << 20
    )  # and the step's count, in its own block


def test_parameters_that_move_take_their_states_along() -> None:
    there, here = nn.Parameter(torch.ones(5000)), nn.Parameter(torch.ones(5000))
    moved, stayed = PagedAdamW([there], lr=0.1), PagedAdamW([here], lr=0.1)
    for optimizer, param in ((moved, there), (stayed, here)):
        param.grad = torch.linspace(-1, 1, 5000)
        optimizer.step()
    there.grad = None
    there.data = there.data.cuda()
    there.grad, here.grad = torch.ones(5000, device="cuda"), torch.ones(5000)
    moved.step()
    stayed.step()
    torch.testing.assert_close(there.detach().cpu(), here.detach(), rtol=1e-6, atol=1e-6)
    assert moved.state_dict()["state"][0]["step"] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_compiled_kernel_of_8_bit_moments_gives_the_references_bits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(100_000, generator=generator).to(dtype)
    results = []
    for device in ("cpu", "cuda"):
        drawn = torch.Generator().manual_seed(1)
        param = start.clone().to(device)
        state = [torch.zeros(100_096, dtype=torch.uint8), torch.zeros(391)] * 2
        state = [part.clone().to(device) for part in state]
        for step in range(1, 5):
            grad = (torch.randn(100_000, generator=drawn) * torch.rand(100_000, generator=drawn) ** 9).to(dtype)
            with dispatch.use("reference" if device == "cpu" else "triton"):
                ops.adamw_blockwise(
                    *state, [param], [grad.to(device)], [0], lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1,
                    step=step,
                )  # fmt: skip
        results.append([part.cpu() for part in (param, *state)])
    assert [place for place, pair in enumerate(zip(*results, strict=True)) if not torch.equal(*pair)] == []
