"""The contract of AdamW with moments in 8 bits. Against the peer: tests/parity/test_adamw8.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fourbit.formats import STATE_BLOCK_SIZE, dynamic_map
from fourbit.kernels import dispatch, ops
from fourbit.kernels.reference.adamw import decode_moment, encode_moment

SIZES = (1000, 256, 1, 0, 20_000, 255)
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


class Run:
    """Parameters and their moments, and steps with gradients of many sizes."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        blocks = [-(-size // STATE_BLOCK_SIZE) for size in SIZES]
        self.offsets = [STATE_BLOCK_SIZE * sum(blocks[:place]) for place in range(len(SIZES))]
        self.params = [torch.randn(size, generator=generator).to(dtype) for size in SIZES]
        codes, scales = (torch.zeros(STATE_BLOCK_SIZE * sum(blocks), dtype=torch.uint8), torch.zeros(sum(blocks)))
        self.state = [codes, scales, codes.clone(), scales.clone()]

    def step(self, number: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(number)
        grads = [
            torch.randn(p.shape, generator=generator) * torch.rand(p.shape, generator=generator) ** 9
            for p in self.params
        ]
        grads = [grad.to(param.dtype) for grad, param in zip(grads, self.params, strict=True)]
        ops.adamw_blockwise(*self.state, self.params, grads, self.offsets, **SETTINGS, step=number)  # type: ignore[arg-type]
        return grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_backend_gives_the_same_bits(backend: str, dtype: torch.dtype) -> None:
    run, truth = Run(dtype), Run(dtype)
    for number in range(1, 4):
        run.step(number)
        with dispatch.use("reference"):
            truth.step(number)
    assert [
        place for place, pair in enumerate(zip(run.params, truth.params, strict=True)) if not torch.equal(*pair)
    ] == []
    assert [
        place for place, pair in enumerate(zip(run.state, truth.state, strict=True)) if not torch.equal(*pair)
    ] == []


def test_a_first_step_is_adams(choice: str) -> None:
    """Moments begin at zero, exactly, so that one step is that of torch's AdamW within the roundings of fp32.

    Each is 2^-24 of what is rounded, at most. In the step: two for m, three for v of which the root leaves half, and
    with the root, the correction, eps, the quotient, the rate and their numbers' own eight more, so 12; 2^-24 squared
    and v below the smallest fp32 number are in the 4 to spare and the 1e-7. In the sum: the rate of the decay, its
    product, the sum.
    """
    run = Run()
    before = [param.clone() for param in run.params]
    with dispatch.use(choice):
        grads = run.step(1)
    for start, param, grad in zip(before, run.params, grads, strict=True):
        twin = torch.nn.Parameter(start.double())
        twin.grad = grad.double()
        torch.optim.AdamW([twin], **SETTINGS).step()  # type: ignore[arg-type]
        moved = (twin.detach() - start).abs()
        assert bool(((param.double() - twin.detach()).abs() <= 2**-24 * (16 * moved + 3 * start.abs() + 1e-7)).all())


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_those_of_the_nearest_level(signed: bool) -> None:
    levels = dynamic_map(signed=signed)
    drawn = np.random.default_rng(0).random(5000).astype(np.float32) ** 12
    values = np.concatenate([drawn, -drawn if signed else drawn, levels, [0.0]]).astype(np.float32)
    codes, absmax = encode_moment(torch.from_numpy(values), signed=signed)
    scales = np.repeat(absmax.numpy(), STATE_BLOCK_SIZE)[: len(values)]
    shares = values / scales
    away = np.abs(shares.astype(np.float64)[:, None] - levels.astype(np.float64))
    chosen = np.take_along_axis(away, codes.numpy().astype(np.int64)[:, None], axis=1)[:, 0]
    assert bool((chosen <= away.min(axis=1) + 2**-25).all())  # a middle is rounded to fp32
    assert torch.equal(decode_moment(codes, absmax, signed=signed), torch.from_numpy(levels[codes.numpy()] * scales))


def test_a_block_of_zeros_stays_zeros_and_nan_shows(backend: str) -> None:
    param, grad = torch.ones(768), torch.zeros(768)
    grad[300], grad[600] = float("nan"), float("inf")
    state = [torch.zeros(768, dtype=torch.uint8), torch.zeros(3), torch.zeros(768, dtype=torch.uint8), torch.zeros(3)]
    for number in (1, 2):
        ops.adamw_blockwise(*state, [param], [grad], [0], **{**SETTINGS, "weight_decay": 0.0}, step=number)  # type: ignore[arg-type]
    assert torch.equal(param[:256], torch.ones(256))
    assert [scales[0].item() for scales in (state[1], state[3])] == [0.0, 0.0]
    assert all(bool(scales[1:].isnan().all()) for scales in (state[1], state[3]))
    assert bool(param[300].isnan())


def test_nothing_to_do(choice: str) -> None:
    empty = torch.zeros(0)
    with dispatch.use(choice):
        ops.adamw_blockwise(empty.byte(), empty, empty.byte(), empty, [], [], [], **SETTINGS, step=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"offsets": [128]}, "do not begin at 128"),
        ({"offsets": [256]}, "do not begin at 256"),
        ({"offsets": []}, "0 offsets"),
        ({"grads": [torch.zeros(300, dtype=torch.float16)]}, "its gradient"),
        ({"grads": [torch.zeros(600)[::2]]}, "contiguous"),
        ({"absmax": torch.zeros(1)}, "2 contiguous fp32"),
        ({"codes": torch.zeros(512)}, "512 contiguous bytes"),
    ],
)
def test_what_does_not_fit_together_is_refused(choice: str, change: dict[str, object], sentence: str) -> None:
    given = {
        "codes": torch.zeros(512, dtype=torch.uint8),
        "absmax": torch.zeros(2),
        "grads": [torch.zeros(300)],
        "offsets": [0],
    } | change
    with dispatch.use(choice), pytest.raises(ValueError, match=sentence):
        ops.adamw_blockwise(
            given["codes"], given["absmax"], torch.zeros(512, dtype=torch.uint8), torch.zeros(2),  # type: ignore[arg-type]
            [torch.zeros(300)], given["grads"], given["offsets"], **SETTINGS, step=1,  # type: ignore[arg-type]
        )  # fmt: skip


def test_opcheck() -> None:
    run = Run()
    grads = [torch.randn_like(param) for param in run.params]
    torch.library.opcheck(
        torch.ops.fourbit.adamw_blockwise,
        (*run.state, run.params, grads, run.offsets, 1e-2, 0.9, 0.999, 1e-8, 0.1, 1),
    )
