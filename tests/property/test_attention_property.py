"""Attention on anything: every backend and level stays within the error bound derived in `kernels/ops/attention.py`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fourbit.kernels import dispatch, ops
from fourbit.kernels.native import library, unavailable

NATIVE = unavailable() is None
BACKENDS = ["reference", *(library.levels() if NATIVE else ())]
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST = {torch.float32: 2.0**-126, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-126}
"""What rounding or flushing a tiny result can change, absolutely."""


@contextmanager
def running(backend: str) -> Iterator[None]:
    """The reference, or the native backend at one SIMD level."""
    if backend == "reference":
        with dispatch.use("reference"):
            yield
        return
    before = library.level()
    library.set_level(backend)
    try:
        with dispatch.use("native"):
            yield
    finally:
        library.set_level(before)


@dataclass(frozen=True)
class Case:
    """One call of attention; `mask` and `layout` name a kind, see `_mask` and `_random`."""

    batch: int = 1
    kv_heads: int = 1
    group: int = 1
    queries: int = 1
    keys: int = 1
    size: int = 2
    v_size: int = 2
    dtype: torch.dtype = torch.bfloat16
    causal: bool = True
    mask: str = "none"
    layout: str = "heads"
    scale: float | None = None
    seed: int = 0


CASES = st.builds(
    Case,
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    queries=st.one_of(st.just(1), st.integers(1, 150)),
    keys=st.integers(1, 200),
    size=st.integers(1, 68).map(lambda half: 2 * half),
    v_size=st.integers(1, 68).map(lambda half: 2 * half),
    dtype=st.sampled_from(list(UNIT_ROUNDOFF)),
    causal=st.booleans(),
    mask=st.sampled_from(["none", "random", "padding", "window", "packed", "added", "per head"]),
    layout=st.sampled_from(["heads", "tokens", "fused", "expanded", "spread"]),
    scale=st.one_of(st.none(), st.floats(-0.5, 1.0, width=32)),
    seed=st.integers(0, 2**32 - 1),
)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=100)
@given(case=CASES)
@example(case=Case(batch=2, kv_heads=2, queries=256, keys=256, size=64, v_size=64, layout="tokens"))
@example(case=Case(kv_heads=1, group=4, queries=300, keys=300, size=128, v_size=128, layout="tokens"))
@example(case=Case(kv_heads=1, group=2, queries=130, keys=700, size=96, v_size=96, causal=False, mask="packed"))
@example(case=Case(kv_heads=2, queries=257, keys=257, size=256, v_size=256, mask="window", dtype=torch.float32))
@example(case=Case(kv_heads=2, group=4, queries=1, keys=1030, size=32, v_size=32, mask="padding"))
@example(case=Case(queries=70, keys=33, size=64, v_size=64))
@example(case=Case(queries=8, keys=200, size=16, v_size=16, scale=0.0))
def test_error_is_within_the_bound(backend: str, case: Case) -> None:
    generator = torch.Generator().manual_seed(case.seed)
    heads = case.kv_heads * case.group
    q = _random(case, generator, heads, case.queries, case.size)
    k = _random(case, generator, case.kv_heads, case.keys, case.size)
    v = _random(case, generator, case.kv_heads, case.keys, case.v_size)
    grad = _random(case, generator, heads, case.queries, case.v_size)
    mask = _mask(case, generator)
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]

    with running(backend):
        out = ops.attention(*inputs, mask=mask, causal=case.causal, scale=case.scale)
        found = (out.transpose(1, 2), *torch.autograd.grad(out, inputs, grad.transpose(1, 2)))

    rounded = backend == "avx512bf16" and case.dtype == torch.bfloat16
    scale = case.size**-0.5 if case.scale is None else case.scale
    exact, bound = _exact_and_bound(q, k, v, grad, mask, case.causal, scale, rounded=rounded)
    for name, mine, truth, allowed in zip(("out", "dq", "dk", "dv"), found, exact, bound, strict=True):
        assert mine.dtype == case.dtype
        error = (mine.double() - truth).abs()
        # The bound is of first order; the other terms are at most (w + r + u) of it, below 2%.
        excess = error - (1.02 * allowed + 4 * SMALLEST[case.dtype] * case.size)
        assert excess.max() <= 0, f"{name} is off by {error.flatten()[excess.argmax()]:.3g}"


def _exact_and_bound(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, mask: Tensor | None, causal: bool, scale: float, *, rounded: bool
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """out, dq, dk, dv in fp64, and how far from them a result may be; names as in `kernels/ops/attention.py`."""
    eps, u = 2.0**-24, UNIT_ROUNDOFF[q.dtype]
    w = u if rounded else 0.0
    kv_heads, group, keys = k.shape[1], q.shape[1] // k.shape[1], k.shape[2]
    q, k, v, grad = (x.double() for x in (q, k, v, grad))
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)

    s = scale * (q @ k.mT)
    visible = torch.ones_like(s, dtype=torch.bool)
    if causal:
        visible &= torch.arange(keys) <= torch.arange(q.shape[2])[:, None] + keys - q.shape[2]
    if mask is not None and mask.dtype == torch.bool:
        visible = visible & mask
    elif mask is not None:
        visible = visible & (mask > -1e30)
        s = s + mask.double().clamp(min=-1e30)
    s = s.masked_fill(~visible, -math.inf)
    lse = s.logsumexp(-1, keepdim=True)
    lse = lse.masked_fill(lse == -math.inf, 0)
    p = (s - lse).exp()
    dp = grad @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))

    def shared(x: Tensor) -> Tensor:
        return x.unflatten(1, (kv_heads, group)).sum(2)

    exact = (p @ v, scale * (ds @ k), shared(scale * (ds.mT @ q)), shared(p.mT @ grad))

    size, q, k, v, grad = q.shape[3], q.abs(), k.abs(), v.abs(), grad.abs()
    e = (size + 8) * eps * abs(scale) * (q @ k.mT) + 8 * eps * (s.masked_fill(~visible, 0).abs() + lse.abs())
    r = 2 * (e * visible).amax(-1, keepdim=True) + (keys + v.shape[3] + 64) * eps
    e_out = (w + r) * (p @ v)
    e_delta = (grad * (e_out + u * (p @ v))).sum(-1, keepdim=True)
    e_ds = (w + r) * ds.abs() + p * (r * (grad @ v.mT) + e_delta)
    e_sum = e_ds + r * ds.abs()
    errors = (e_out, abs(scale) * (e_sum @ k), shared(abs(scale) * (e_sum.mT @ q)), shared(((w + r) * p).mT @ grad))
    return exact, tuple(error + u * x.abs() for error, x in zip(errors, exact, strict=True))


def _random(case: Case, generator: torch.Generator, heads: int, tokens: int, size: int) -> Tensor:
    """[B, heads, tokens, size], normal, laid out in memory as `case.layout` says."""
    batch = case.batch
    if case.layout == "tokens":  # what a projection gives
        x = torch.randn(batch, tokens, heads, size, generator=generator).transpose(1, 2)
    elif case.layout == "fused":  # one of three slices of a wider projection
        x = torch.randn(batch, tokens, heads, 3 * size, generator=generator)[..., size : 2 * size].transpose(1, 2)
    elif case.layout == "expanded":  # one head for all
        x = torch.randn(batch, 1, tokens, size, generator=generator)
        return x.to(case.dtype).expand(batch, heads, tokens, size)
    elif case.layout == "spread":  # elements of a row apart
        x = torch.randn(batch, heads, size, tokens, generator=generator).mT
    else:
        x = torch.randn(batch, heads, tokens, size, generator=generator)
    return x.to(case.dtype)


def _mask(case: Case, generator: torch.Generator) -> Tensor | None:
    shape = (case.batch, 1, case.queries, case.keys)
    query, key = torch.arange(case.queries)[:, None] + case.keys - case.queries, torch.arange(case.keys)
    if case.mask == "random":  # with some rows that see nothing
        visible = torch.rand(shape, generator=generator) < 0.7
        return visible & (torch.rand((case.batch, 1, case.queries, 1), generator=generator) < 0.9)
    if case.mask == "padding":
        return (key >= torch.randint(0, case.keys + 1, (case.batch, 1, 1, 1), generator=generator)).expand(shape)
    if case.mask == "window":
        return (key > query - 1 - case.keys // 3) & (key <= query)
    if case.mask == "packed":
        document = torch.randint(0, 2, (case.keys,), generator=generator).cumsum(0) // 16
        return document == document[query.clamp(0)]
    if case.mask in ("added", "per head"):
        heads = 1 if case.mask == "added" else case.kv_heads * case.group
        added = torch.randn((1, heads, case.queries, case.keys), generator=generator)
        added[torch.rand(added.shape, generator=generator) < 0.2] = -math.inf
        added = added.to(case.dtype)
        if case.dtype != torch.float16:
            added[torch.rand(added.shape, generator=generator) < 0.2] = torch.finfo(case.dtype).min
        return added
    return None
