"""AdamW with moments in 8 bits against bitsandbytes' AdamW8bit, step by step from the same moments."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fourbit.formats import STATE_BLOCK_SIZE, dynamic_map
from fourbit.kernels.reference.adamw import decode_moment
from fourbit.optim import PagedAdamW

bitsandbytes = pytest.importorskip("bitsandbytes")

BETAS, EPS, LR, DECAY = (0.9, 0.999), 1e-8, 1e-2, 0.1
BINS = 65535


def gap_around(value: Tensor, signed: bool) -> Tensor:
    """Half the distance between the two levels around each value of [-1, 1], the error of the nearest one at most."""
    levels = torch.from_numpy(dynamic_map(signed=signed).copy()).double()
    above = torch.searchsorted(levels, value).clamp(1, 255)
    return (levels[above] - levels[above - 1]) / 2


def moments(state: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """The codes and scales of both moments, of either optimizer."""
    if "state1" in state:
        return [(state["state1"], state["absmax1"]), (state["state2"], state["absmax2"])]
    return [(state[f"{name}_codes"], state[f"{name}_absmax"]) for name in ("exp_avg", "exp_avg_sq")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [4096, 5000, 100_000])
def test_a_step_from_the_same_moments_is_bitsandbytes(size: int, dtype: torch.dtype) -> None:
    """Before each step our moments are set to theirs, so that what is compared is one step.

    - The parameters: both compute in fp32 from the same decoded moments; the 12 roundings of the step on either side
      and 3 of the sum (tests/unit/kernels/test_adamw.py), and that of the result to 16 bits.
    - The scales: a largest magnitude, of moments that differ by 4 roundings on either side.
    - The decoded moments: ours is the nearest level to the moment; theirs is the nearest to the centre of its bin, half
      a bin away. A level's error is half the gap that the value is in, or that the value half a bin further is in.
    """
    generator = torch.Generator().manual_seed(size)
    start = torch.randn(size, generator=generator).to(dtype)
    theirs, ours = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    peer = bitsandbytes.optim.AdamW8bit([theirs], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    mine = PagedAdamW([ours], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, state_bits=8, page_elements=1024)
    exact: list[Tensor] = [torch.zeros(size, dtype=torch.float64)] * 2
    for step in range(1, 7):
        grad = (torch.randn(size, generator=generator) * torch.rand(size, generator=generator) ** 4).to(dtype)
        before = ours.detach().double()
        theirs.grad, ours.grad = grad.clone(), grad.clone()
        peer.step()
        mine.step()
        g = grad.double()
        exact = [exact[0] * BETAS[0] + g * (1 - BETAS[0]), exact[1] * BETAS[1] + g * g * (1 - BETAS[1])]
        moved = (ours.detach().double() - before).abs()
        bound = 2**-24 * (2 * 16 * moved + 6 * before.abs()) + 1e-9
        if dtype == torch.bfloat16:
            bound = bound + 2**-7 * torch.maximum(before.abs(), theirs.detach().double().abs())  # one ulp
        assert bool(((ours.detach().double() - theirs.detach().double()).abs() <= bound).all())
        state = peer.state[theirs]
        pairs = zip(moments(mine.state_dict()["state"][0]), moments(state), exact, (True, False), strict=True)
        for (our_codes, our_scales), (codes, scales), moment, signed in pairs:
            torch.testing.assert_close(our_scales, scales, rtol=8 * 2**-24, atol=1e-38)
            scale = scales.double().repeat_interleave(STATE_BLOCK_SIZE)[:size]
            share = moment / torch.where(scale == 0, 1.0, scale)
            rounding = 16 * 2**-24
            away = (decode_moment(our_codes, our_scales, signed=signed).double() - moment).abs()
            assert bool((away <= scale * (gap_around(share, signed) + rounding)).all())
            peers = decode_moment(codes, scales, signed=signed).double()
            half_bin = 1 / BINS
            widest = torch.stack([gap_around(share + shift, signed) for shift in (-half_bin, 0, half_bin)]).amax(0)
            assert bool(((peers - moment).abs() <= scale * (widest + half_bin + rounding)).all())
        exact = [
            decode_moment(*pair, signed=signed).double()
            for pair, signed in zip(moments(state), (True, False), strict=True)
        ]
        given = dict(zip(("exp_avg", "exp_avg_sq"), moments(state), strict=True))
        entry = {
            f"{name}_{part}": pair[place]
            for name, pair in given.items()
            for place, part in enumerate(("codes", "absmax"))
        }
        saved = mine.state_dict()
        saved["state"][0] = {"step": torch.tensor(float(step)), **entry}
        mine.load_state_dict(saved)
        ours.data.copy_(theirs.data)


def test_parameters_of_few_elements_keep_32_bits() -> None:
    params = [nn.Parameter(torch.ones(4095)), nn.Parameter(torch.ones(4096))]
    peer, mine = bitsandbytes.optim.AdamW8bit(params), PagedAdamW(params, state_bits=8)
    for param in params:
        param.grad = torch.ones_like(param)
    peer.step()
    mine.step()
    dtypes = [peer.state[param]["state1"].dtype for param in params]
    assert dtypes == [torch.float32, torch.uint8]
    assert ["exp_avg_codes" in entry for entry in mine.state_dict()["state"].values()] == [False, True]


@pytest.mark.parametrize("signed", [True, False])
def test_the_maps_are_bitsandbytes(signed: bool) -> None:
    theirs = bitsandbytes.functional.create_dynamic_map(signed=signed).numpy()
    np.testing.assert_array_equal(dynamic_map(signed=signed), theirs)


def test_the_loss_falls_as_with_32_bits() -> None:
    """A least-squares problem of 64 x 64: 8-bit moments lose less than a tenth of the way."""

    def trained(**settings: Any) -> float:
        generator = torch.Generator().manual_seed(0)
        target, param = torch.randn(64, 64, generator=generator), nn.Parameter(torch.zeros(64, 64))
        optimizer = PagedAdamW([param], lr=1e-2, weight_decay=0.0, **settings)
        for _ in range(100):
            x = torch.randn(32, 64, generator=generator)
            loss = (x @ (param - target)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float((param.detach() - target).square().mean())

    wide, narrow = trained(), trained(state_bits=8)
    assert wide < 0.5
    assert abs(narrow - wide) < 0.1 * (1 - wide)
