"""The loss of a linear head: every backend and level against fp64 and against torch's own cross-entropy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fourbit.kernels import dispatch, ops
from fourbit.kernels.native import unavailable

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
IGNORE = -100
FORMS = [(1.0, 0.0), (0.5, 0.0), (1.0, 8.0), (0.25, 3.0)]


def inputs(
    dtype: torch.dtype, *, vocabulary: int = 1031, biased: bool = False
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Hidden states, weight, bias and labels whose logits are small integers, and so exact in every dtype."""
    generator = torch.Generator().manual_seed(vocabulary)
    hidden = torch.randint(-1, 2, (2, 9, 12), generator=generator)
    weight = torch.randint(-1, 2, (vocabulary, 12), generator=generator)
    bias = torch.randint(-3, 4, (vocabulary,), generator=generator).to(dtype) if biased else None
    labels = torch.randint(0, vocabulary, (2, 9), generator=generator)
    labels[0, 2:5] = labels[1, -1] = IGNORE
    return hidden.to(dtype), weight.to(dtype), bias, labels


def unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def exact_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scale: float, cap: float
) -> tuple[Tensor, Tensor]:
    """The loss and the logits in front of the softmax, by torch in fp64, differentiable."""
    z = scale * torch.nn.functional.linear(hidden, weight, bias)
    if cap:
        z = cap * torch.tanh(z / cap)
    loss = torch.nn.functional.cross_entropy(
        z.view(-1, weight.shape[0]), labels.view(-1), ignore_index=IGNORE, reduction="sum"
    )
    return loss, z


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("scale", "cap"), FORMS)
@pytest.mark.parametrize("vocabulary", [1, 7, 512, 1031])
def test_loss_and_gradients(
    backend: str, dtype: torch.dtype, biased: bool, scale: float, cap: float, vocabulary: int
) -> None:
    tensors = inputs(dtype, vocabulary=vocabulary, biased=biased)
    hidden, weight, bias, labels = (x if x is None else x.detach() for x in tensors)
    given = [hidden, weight, bias] if bias is not None else [hidden, weight]
    for x in given:
        x.requires_grad_()
    loss = ops.linear_cross_entropy(hidden, weight, labels, bias=bias, ignore_index=IGNORE, scale=scale, cap=cap)
    loss.backward()

    doubles = [x.detach().double().requires_grad_() for x in given]
    exact, z = exact_loss(doubles[0], doubles[1], doubles[2] if biased else None, labels, scale, cap)
    exact.backward()

    # With exact logits x: z carries the error of tanh, 3 roundings of its largest value and of 1; an exponential
    # 2 ulp and its argument's error; sums of 512 terms in fp32 go on in fp64 (torch adds pairwise).
    u = unit(torch.float32)
    z_error = u * (4 * z.detach().abs().max().item() + 8 * cap)
    p_error = 2 * z_error + (512 + 16) * u
    tokens = int((labels != IGNORE).sum())
    assert loss.dtype == torch.float32
    assert abs(loss.item() - exact.item()) <= tokens * p_error + (tokens + 1) * u * exact.abs().item()

    # dz = (p - 1[label]) * dz/dx, |dz/dx| <= scale, is rounded to the dtype before the products
    scored = labels != IGNORE
    p = torch.softmax(z.detach(), dim=-1)
    error = scale * p * (p_error + 4 * z_error + 16 * u) * scored.unsqueeze(-1)
    dz = torch.where(scored.unsqueeze(-1), p, 0.0)
    dz[scored] -= torch.nn.functional.one_hot(labels[scored], vocabulary).double()
    error += scale * dz.abs() * (unit(dtype) + 8 * u + z_error) + torch.finfo(dtype).smallest_normal * 2 * unit(dtype)
    length = vocabulary + tokens
    flat_error, flat_hidden = error.flatten(0, 1), doubles[0].detach().flatten(0, 1).abs()
    size = scale * dz.abs().flatten(0, 1)
    bounds = [
        error @ doubles[1].detach().abs() + (length * u) * (size @ doubles[1].detach().abs()).view(hidden.shape),
        flat_error.t() @ flat_hidden + (length * u) * (size.t() @ flat_hidden),
        flat_error.sum(0) + (length * u) * size.sum(0),
    ]
    for x, double, bound in zip(given, doubles, bounds, strict=False):
        assert x.grad.dtype == dtype
        tiny = torch.finfo(dtype).smallest_normal * 2 * unit(dtype)
        assert ((x.grad.double() - double.grad).abs() <= bound + double.grad.abs() * unit(dtype) + tiny).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_add_up(backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias, labels = inputs(dtype, biased=True)
    arguments = (hidden, weight, bias, labels, IGNORE, 1.0, 0.0, True, True, True)
    whole = torch.ops.fourbit.linear_cross_entropy(*arguments)
    module = "reference" if backend == "reference" else "native"
    row = weight.shape[0] * (4 if backend == "reference" else weight.element_size())
    monkeypatch.setattr(f"fourbit.kernels.{module}.cross_entropy.CHUNK_BYTES", 4 * row)
    pieces = torch.ops.fourbit.linear_cross_entropy(*arguments)
    u = unit(torch.float32)
    assert abs(whole[0] - pieces[0]) <= 20 * u * whole[0].abs()
    # A row of dH is the same product. The gradients of the head are sums over pieces, each rounded to the dtype.
    for a, b, terms in zip(whole[1:], pieces[1:], (1, 5, 5), strict=True):
        size = a.abs().max()
        assert (a.double() - b.double()).abs().max() <= (terms * unit(dtype) + weight.shape[0] * u) * 2 * size


def test_only_needed_gradients_are_made(backend: str) -> None:
    hidden, weight, _, labels = inputs(torch.float32)
    with torch.no_grad():
        plain = ops.linear_cross_entropy(hidden.requires_grad_(), weight, labels)
    assert not plain.requires_grad
    loss = ops.linear_cross_entropy(hidden, weight, labels)
    assert torch.equal(loss.detach(), plain)
    (2 * loss).backward()
    found = torch.ops.fourbit.linear_cross_entropy(
        hidden.detach(), weight, None, labels, IGNORE, 1.0, 0.0, True, False, False
    )
    assert torch.equal(hidden.grad, 2 * found[1])
    assert found[2].numel() == found[3].numel() == 0
    assert found[2] is not found[3]  # torch.compile takes no operation that returns one tensor twice
    assert (hidden.grad[labels == IGNORE] == 0).all()


def test_a_head_alone_can_be_trained(backend: str) -> None:
    hidden, weight, _, labels = inputs(torch.float32)
    ops.linear_cross_entropy(hidden, weight.requires_grad_(), labels).backward()
    exact = weight.detach().double().requires_grad_()
    exact_loss(hidden.double(), exact, None, labels, 1.0, 0.0)[0].backward()
    assert torch.allclose(weight.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)
    assert hidden.grad is None


def test_no_label_at_all(backend: str) -> None:
    hidden, weight, _, labels = inputs(torch.bfloat16)
    loss = ops.linear_cross_entropy(hidden.requires_grad_(), weight, torch.full_like(labels, IGNORE))
    loss.backward()
    assert loss.item() == 0
    assert (hidden.grad == 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(backend: str, value: float) -> None:
    hidden, weight, _, labels = inputs(torch.float32)
    hidden[0, 0, 0] = value
    assert not ops.linear_cross_entropy(hidden, weight, labels).isfinite()


def test_logits_of_minus_infinity_have_no_probability(backend: str) -> None:
    hidden, weight, _, labels = inputs(torch.float32)
    bias = torch.zeros(weight.shape[0])
    bias[5::2] = -torch.inf
    labels[labels != IGNORE] = 2
    loss, _, _, grad_bias = torch.ops.fourbit.linear_cross_entropy(
        hidden, weight, bias, labels, IGNORE, 1.0, 0.0, True, False, True
    )
    assert loss.isfinite()
    assert (grad_bias[5::2] == 0).all()


@pytest.mark.parametrize("label", [-1, 1031])
def test_a_label_outside_of_the_vocabulary(backend: str, label: int) -> None:
    hidden, weight, _, labels = inputs(torch.float32)
    labels[1, 0] = label
    with pytest.raises((IndexError, RuntimeError), match=r"out of|outside"):
        ops.linear_cross_entropy(hidden, weight, labels)


def test_inference_mode_leaves_no_trace(backend: str) -> None:
    hidden, weight, _, labels = inputs(torch.float16, vocabulary=1033)
    with torch.inference_mode():
        inside = ops.linear_cross_entropy(hidden, weight, labels).item()
    assert ops.linear_cross_entropy(hidden.clone().requires_grad_(), weight, labels).item() == inside


@pytest.mark.skipif(unavailable() is not None, reason=f"no native backend: {unavailable()}")
def test_logits_are_never_held_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    from fourbit.kernels.native import cross_entropy

    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * 1031 * 2)
    hidden, weight, _, labels = inputs(torch.bfloat16)
    with dispatch.use("native"), LargestTensor() as seen:
        ops.linear_cross_entropy(hidden.requires_grad_(), weight, labels).backward()
    assert seen.elements < hidden.shape[0] * hidden.shape[1] * 1031
    assert torch.float32 not in seen.dtypes_of_large


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Watches what operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.dtypes_of_large: set[torch.dtype] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage().nbytes() and tuple(x.shape[-1:]) == (1031,):
                self.elements = max(self.elements, x.numel())
                self.dtypes_of_large.add(x.dtype)
        return out


@pytest.mark.parametrize(("scale", "cap"), FORMS)
def test_gradcheck(scale: float, cap: float) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    labels = torch.tensor([[0, IGNORE, 4], [6, 2, 2]])
    assert torch.autograd.gradcheck(
        lambda hidden, weight, bias: ops.linear_cross_entropy(hidden, weight, labels, bias=bias, scale=scale, cap=cap),
        (random(2, 3, 4), random(7, 4), random(7)),
    )


def test_opcheck() -> None:
    hidden, weight, bias, labels = inputs(torch.float32, vocabulary=30, biased=True)
    for x in (hidden, weight, bias):
        x.requires_grad_()
    torch.library.opcheck(
        torch.ops.fourbit.linear_cross_entropy.default,
        (hidden, weight, bias, labels, IGNORE, 1.0, 0.0, True, True, True),
    )


def test_what_does_not_fit() -> None:
    hidden, weight, _, labels = inputs(torch.float32)
    with pytest.raises(ValueError, match="head's weight"):
        ops.linear_cross_entropy(hidden, weight.bfloat16(), labels)
    with pytest.raises(ValueError, match="head's weight"):
        ops.linear_cross_entropy(hidden[..., 1:], weight, labels)
    with pytest.raises(ValueError, match="labels are"):
        ops.linear_cross_entropy(hidden, weight, labels[:1])
    with pytest.raises(ValueError, match="labels are"):
        ops.linear_cross_entropy(hidden, weight, labels.int())
