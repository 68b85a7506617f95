"""Rotary embedding: every backend and level gives the same bits, which are those of the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fourbit.kernels import dispatch, ops

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(
    dtype: torch.dtype, *, tables: int = 1, heads: int = 4, tokens: int = 5, head: int = 16, rotated: int = 16
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q and k as an attention layer makes them: views [B, H, T, D] of projections [B, T, H D]."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    q, k = random(2, tokens, heads, head).transpose(1, 2), random(2, tokens, 2, head).transpose(1, 2)
    return q, k, random(tables, tokens, rotated), random(tables, tokens, rotated)


def unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"tables": 2},
        {"head": 64, "rotated": 64, "tokens": 37},
        {"head": 20, "rotated": 6},
        {"head": 80, "rotated": 0},
        {"head": 1100, "rotated": 1024},
        {"tokens": 0},
    ],
)
def test_native_has_the_bits_of_the_reference(
    level: str, dtype: torch.dtype, inverse: bool, sizes: dict[str, int]
) -> None:
    arguments = inputs(dtype, **sizes)
    ours = torch.ops.fourbit.rotary(*arguments, inverse)
    with dispatch.use("reference"):
        reference = torch.ops.fourbit.rotary(*arguments, inverse)
    for a, b in zip(ours, reference, strict=True):
        assert a.stride() == b.stride()
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_definition(backend: str, dtype: torch.dtype) -> None:
    q, k, cos, sin = inputs(dtype, tables=2, head=12, rotated=8)
    for x, y in zip((q, k), ops.rotary(q, k, cos, sin), strict=True):
        a, b, rest = x.double().split((4, 4, 4), dim=-1)
        (cos_a, cos_b), (sin_a, sin_b) = (table.double().unsqueeze(1).split(4, dim=-1) for table in (cos, sin))
        exact = torch.cat((a * cos_a - b * sin_a, b * cos_b + a * sin_b, rest), dim=-1)
        size = torch.cat(((a * cos_a).abs() + (b * sin_a).abs(), (b * cos_b).abs() + (a * sin_b).abs(), 0 * rest), -1)
        # two products and their sum, each rounded once
        assert ((y.double() - exact).abs() <= 2.1 * unit(dtype) * size).all()


def test_layout_is_that_of_a_projection(backend: str) -> None:
    q, k, cos, sin = inputs(torch.float32)
    for y in (*ops.rotary(q, k, cos, sin), *ops.rotary(q.contiguous(), k.contiguous(), cos, sin)):
        assert y.transpose(1, 2).is_contiguous()


def test_inverse_undoes_a_rotation(backend: str) -> None:
    q, k, angle, _ = inputs(torch.float32)
    angle = torch.cat((angle[..., :8], angle[..., :8]), dim=-1)
    cos, sin = angle.cos(), angle.sin()
    back = torch.ops.fourbit.rotary(*ops.rotary(q, k, cos, sin), cos, sin, True)
    # one pass errs by 2.1 roundings of at most sqrt(2) |(a, b)|, and so does the way back; cos and sin by one each
    for x, y in zip((q, k), back, strict=True):
        assert (x - y).abs().max() <= 10 * unit(torch.float32) * x.abs().max() * 2


def test_rows_that_are_not_contiguous(backend: str) -> None:
    q, k, cos, sin = inputs(torch.float32)
    wide = torch.repeat_interleave(q, 2, dim=-1)
    assert torch.equal(ops.rotary(wide[..., ::2], k, cos, sin)[0], ops.rotary(q, k, cos, sin)[0])


def test_gradcheck() -> None:
    q, k, cos, sin = (x.double() for x in inputs(torch.float32, tables=2, tokens=2, heads=2, head=6, rotated=4))
    q.requires_grad_()
    k.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: ops.rotary(q, k, cos, sin), (q, k))


def test_opcheck() -> None:
    q, k, cos, sin = inputs(torch.float32)
    torch.library.opcheck(
        torch.ops.fourbit.rotary.default, (q.clone().requires_grad_(), k.clone().requires_grad_(), cos, sin, False)
    )


@pytest.mark.parametrize("wrong", ["tables", "tokens", "odd", "wider", "dtype", "dimensions"])
def test_what_does_not_fit(wrong: str) -> None:
    q, k, cos, sin = inputs(torch.float32)
    arguments = {
        "tables": (q, k, cos.expand(3, -1, -1), sin.expand(3, -1, -1)),
        "tokens": (q, k, cos[:, 1:], sin[:, 1:]),
        "odd": (q, k, cos[..., :5], sin[..., :5]),
        "wider": (q[..., :8], k[..., :8], cos, sin),
        "dtype": (q, k, cos.bfloat16(), sin.bfloat16()),
        "dimensions": (q[0], k[0], cos, sin),
    }[wrong]
    with pytest.raises(ValueError, match="do not fit together"):
        ops.rotary(*arguments)
