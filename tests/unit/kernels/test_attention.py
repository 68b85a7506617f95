"""Attention: what holds exactly. How close the numbers are is tests/property/test_attention_property.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fourbit.kernels import dispatch, ops
from fourbit.kernels.native import unavailable

native = pytest.mark.skipif(unavailable() is not None, reason=f"native: {unavailable()}")


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """[B, H, T, D] as a projection lays it out."""
    batch, heads, tokens, size = shape
    x = torch.randn(batch, tokens, heads, size, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype).transpose(1, 2)


def inputs(
    queries: int = 37, keys: int = 37, *, heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.bfloat16
) -> list[Tensor]:
    q = random(2, heads, queries, 16, dtype=dtype, seed=1)
    k, v = random(2, kv_heads, keys, 16, dtype=dtype, seed=2), random(2, kv_heads, keys, 24, dtype=dtype, seed=3)
    return [x.requires_grad_() for x in (q, k, v)]


def run(tensors: list[Tensor], **options: object) -> tuple[Tensor, ...]:
    """out, dq, dk, dv for a fixed gradient."""
    out = ops.attention(*tensors, **options)  # type: ignore[arg-type]
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, tensors, grad)


def masks(queries: int, keys: int) -> dict[str, Tensor | None]:
    visible = torch.rand(2, 1, queries, keys, generator=torch.Generator().manual_seed(5)) < 0.6
    visible[:, :, 3] = False
    return {"none": None, "bool": visible, "added": torch.where(visible, 0.5, -math.inf)}


@pytest.mark.parametrize("mask", ["none", "bool", "added"])
@pytest.mark.parametrize("causal", [True, False])
def test_reference_gradients_are_those_of_the_forward_pass(causal: bool, mask: str) -> None:
    q, k, v = (x.detach().double().requires_grad_() for x in inputs(7, 9))
    chosen = masks(7, 9)[mask]
    assert torch.autograd.gradcheck(
        lambda *tensors: ops.attention(*tensors, mask=chosen, causal=causal, scale=0.3), (q, k, v)
    )


@pytest.mark.parametrize("mask", ["none", "bool", "added"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(dtype: torch.dtype, mask: str) -> None:
    tensors, chosen = inputs(5, 7, dtype=dtype), masks(5, 7)[mask]
    torch.library.opcheck(torch.ops.fourbit.attention.default, (*tensors, chosen, True, 0.3))
    with torch.no_grad():
        out, lse = torch.ops.fourbit.attention(*tensors, chosen, True, 0.3)
        arguments = (torch.ones_like(out), *tensors, chosen, out, lse, True, 0.3)
        torch.library.opcheck(torch.ops.fourbit.attention_backward.default, arguments)


def test_compiles_without_a_graph_break() -> None:
    compiled = torch.compile(lambda *tensors: ops.attention(*tensors, causal=True), fullgraph=True, backend="aot_eager")
    tensors = inputs()
    out, plain = compiled(*tensors), ops.attention(*tensors, causal=True)
    assert torch.equal(out, plain)
    grads = zip(torch.autograd.grad(out.sum(), tensors), torch.autograd.grad(plain.sum(), tensors), strict=True)
    assert all(torch.equal(mine, expected) for mine, expected in grads)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("queries", [1, 37, 130])
def test_a_query_that_sees_nothing_gets_zeros(queries: int) -> None:
    tensors = inputs(queries, 150)
    visible = torch.ones(2, 1, queries, 150, dtype=torch.bool)
    visible[1, :, queries // 2] = False
    out, grad_q, *others = run(tensors, mask=visible)
    assert torch.count_nonzero(out[1, queries // 2]) == 0
    assert torch.count_nonzero(grad_q[1, :, queries // 2]) == 0
    assert torch.count_nonzero(out[0]) == out[0].numel()
    assert all(torch.isfinite(x).all() for x in (out, grad_q, *others))
    _, lse = torch.ops.fourbit.attention(*tensors, visible, False, 0.25)
    assert torch.equal(lse == -math.inf, ~visible.any(-1).expand_as(lse))


@pytest.mark.usefixtures("backend")
def test_a_sequence_longer_than_its_keys_starts_unseeing() -> None:
    out, grad_q, *_ = run(inputs(50, 20), causal=True)
    assert torch.count_nonzero(out[:, :30]) == torch.count_nonzero(grad_q[:, :, :30]) == 0
    assert torch.count_nonzero(out[:, 30:]) == out[:, 30:].numel()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("lowest", [-math.inf, torch.finfo(torch.bfloat16).min, -1e30])
def test_every_way_to_hide_a_key_is_the_same(lowest: float) -> None:
    visible = masks(37, 37)["bool"]
    added = torch.zeros(visible.shape, dtype=torch.bfloat16).masked_fill(~visible, lowest)
    for by_bool, by_number in zip(run(inputs(), mask=visible), run(inputs(), mask=added), strict=True):
        assert torch.equal(by_bool, by_number)


@pytest.mark.usefixtures("backend")
def test_hidden_keys_do_not_matter() -> None:
    """What a mask hides may hold anything finite: the end of a static cache, another document."""
    visible = torch.ones(37, dtype=torch.bool)
    visible[20:] = False
    q, k, v = (x.detach() for x in inputs())
    with torch.no_grad():
        before = ops.attention(q, k, v, mask=visible)
        k[:, :, 20:], v[:, :, 20:] = 1e4, -1e4
        assert torch.equal(ops.attention(q, k, v, mask=visible), before)
        assert torch.equal(ops.attention(q, k[:, :, :20], v[:, :, :20], mask=visible[:20]), before)


@native
@pytest.mark.parametrize("heads", [(8, 4), (6, 1), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_threads(dtype: torch.dtype, heads: tuple[int, int]) -> None:
    """With few key heads the backward pass is split in another way: the sums must still run in one order."""
    tensors = [
        x.detach()[:1].requires_grad_() for x in inputs(600, 700, heads=heads[0], kv_heads=heads[1], dtype=dtype)
    ]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(run(tensors, causal=True))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], result, strict=True))


@pytest.mark.usefixtures("backend")
def test_layout_of_inputs_does_not_matter() -> None:
    plain = run(inputs())
    fused = [torch.cat([x.detach(), x.detach()], dim=-1)[..., : x.shape[-1]].requires_grad_() for x in inputs()]
    spread = [x.detach().mT.contiguous().mT.requires_grad_() for x in inputs()]
    packed = [x.detach().contiguous().requires_grad_() for x in inputs()]
    for tensors in (fused, spread, packed):
        for mine, expected in zip(run(tensors), plain, strict=True):
            assert torch.equal(mine, expected)


@pytest.mark.usefixtures("backend")
def test_layout_of_outputs_suits_the_projections() -> None:
    tensors = inputs()
    out, *grads = run(tensors)
    assert out.shape == (2, 37, 4, 24)
    assert out.is_contiguous()
    assert [x.stride() for x in grads] == [x.stride() for x in tensors]
    assert all(x.transpose(1, 2).is_contiguous() for x in grads)


@pytest.mark.usefixtures("backend")
def test_a_gradient_may_be_expanded() -> None:
    tensors = inputs()
    sums = torch.autograd.grad(ops.attention(*tensors, causal=True).sum(), tensors)
    out = ops.attention(*tensors, causal=True)
    ones = torch.autograd.grad(out, tensors, torch.ones_like(out))
    assert all(torch.equal(x, y) for x, y in zip(sums, ones, strict=True))


def test_nothing_quadratic_is_kept_for_the_backward_pass() -> None:
    kept = []
    tensors = inputs(256, 256)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        out = ops.attention(*tensors, causal=True)
    assert sum(kept) == sum(x.numel() for x in tensors) + out.numel() + out.numel() // out.shape[-1]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("keys", [1, 64, 301])
def test_decoding_is_the_last_row_of_the_whole(keys: int) -> None:
    """One query with a cache gives what it gives within its sequence, but for the rounding of another order of sums."""
    q, k, v = (x.detach() for x in inputs(keys, keys, dtype=torch.float32))
    last = ops.attention(q[:, :, -1:], k, v, causal=True)
    torch.testing.assert_close(last, ops.attention(q, k, v, causal=True)[:, -1:], rtol=1e-5, atol=1e-6)


def test_native_leaves_what_it_cannot_take_to_the_reference() -> None:
    tensors = inputs(dtype=torch.float64)
    assert ops.attention(*tensors).dtype == torch.float64
    if unavailable() is None:
        with dispatch.use("native"), pytest.raises(RuntimeError, match="float64"):
            ops.attention(*tensors)


@pytest.mark.parametrize("shape", [(2, 4, 0, 16), (0, 4, 5, 16)])
def test_nothing_to_attend_from(shape: tuple[int, ...]) -> None:
    q, k = torch.empty(shape), torch.empty(shape[0], 2, 5, 16)
    assert ops.attention(q, k, k).shape == (shape[0], shape[2], 4, 16)


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = inputs()
    with pytest.raises(ValueError, match="do not fit together"):
        ops.attention(q, k[:, :, :-1], v)
    with pytest.raises(ValueError, match="do not fit together"):
        ops.attention(q[:, :3], k, v)
    with pytest.raises(ValueError, match="do not fit together"):
        ops.attention(q, k.float(), v)
    with pytest.raises(ValueError, match="cannot be broadcast"):
        ops.attention(q, k, v, mask=torch.ones(36, 37, dtype=torch.bool))
    with pytest.raises(ValueError, match="bool or floating point"):
        ops.attention(q, k, v, mask=torch.ones(37, 37, dtype=torch.int64))
    with pytest.raises(ValueError, match="gets no gradient"):
        ops.attention(q, k, v, mask=torch.zeros(37, 37, requires_grad=True))
