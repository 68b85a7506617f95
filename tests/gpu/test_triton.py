"""The Triton kernels on a real GPU, at the sizes of real layers: what the interpreter cannot show.

Bits and bounds over drawn shapes: tests/parity/test_triton_levels.py, which runs compiled where torch sees a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import fourbit
from fourbit.kernels import dispatch, ops
from fourbit.kernels.triton import linear as triton_linear
from fourbit.kernels.triton import unavailable
from fourbit.nn import QuantLinear
from fourbit.quant import QuantConfig, QuantizedTensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.is_available() and unavailable() is not None, reason=str(unavailable())),
]

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (1024, 4096)]
TOKENS = [1, 2, 7, 16, 64, 65, 300]


def half() -> torch.dtype:
    """The 16-bit type that this GPU computes in."""
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def weight(shape: tuple[int, int], seed: int = 0, **settings: Any) -> QuantizedTensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return fourbit.quantize(torch.randn(shape, device="cuda", generator=generator) / 50, QuantConfig(**settings))


def product(x: Tensor, q: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    return ops.linear(
        x, q.packed, q.absmax, levels=q.levels, block_size=q.block_size, out_features=q.shape[0],
        nested_absmax=q.nested_absmax, nested_offset=q.nested_offset, bias=bias,
    )  # fmt: skip


def random(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.randn(*shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).to(dtype or half())


def assert_product(y: Tensor, x: Tensor, w: Tensor, bias: Tensor | None = None) -> None:
    """y = x W^T + bias within the bound of `ops.linear`: two roundings of a weight, K + 2 of sums, the result's."""
    w, added = w.double(), torch.zeros((), device="cuda") if bias is None else bias
    exact, magnitude = x.double() @ w.t() + added.double(), x.double().abs() @ w.abs().t() + added.double().abs()
    unit = torch.finfo(x.dtype).eps / 2
    factor = 2 * unit + (x.shape[-1] + 2) * 2**-24
    assert ((y.double() - exact).abs() <= factor * magnitude + 3 * unit * (exact.abs() + added.double().abs())).all()


@contextmanager
def without_waiting() -> Iterator[None]:
    """Make it an error to wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_triton_is_what_runs() -> None:
    backends = fourbit.backends("cuda")
    for name in ("quantize_blocks", "dequantize_blocks", "linear", "linear_grad_input", "lora_linear"):
        assert backends[name]["backend"] == "triton", backends[name]
    assert "matvec" in backends["linear"]["why"]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantized_to_the_bits_of_the_reference(shape: tuple[int, int], double_quant: bool) -> None:
    """On the GPU and on the CPU; the second-level codes on the GPU alone, as the mean depends on the device."""
    matrix = random(*shape)
    packed, absmax = ops.quantize_blocks(matrix)
    for device in ("cuda", "cpu"):
        with dispatch.use("reference"):
            expected = ops.quantize_blocks(matrix.to(device))
        assert torch.equal(packed.to(device), expected[0])
        assert torch.equal(absmax.to(device), expected[1])
    if double_quant:
        with dispatch.use("reference"):
            theirs = ops.quantize_absmax(absmax)
        assert all(torch.equal(a, b) for a, b in zip(ops.quantize_absmax(absmax), theirs, strict=True))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_products(shape: tuple[int, int], double_quant: bool, tokens: int) -> None:
    """Within the bound of `ops.linear`; the same bits each time."""
    q, x, bias = weight(shape, double_quant=double_quant), random(tokens, shape[1]), random(shape[0])
    y = product(x, q, bias)
    assert_product(y, x, q.dequantize(torch.float32), bias)
    assert all(torch.equal(product(x, q, bias), y) for _ in range(5))


@pytest.mark.parametrize("tokens", TOKENS)
def test_a_captured_graph_gives_the_same(tokens: int) -> None:
    """The same bits from our kernels; cuBLAS may choose another for a graph."""
    q, x = weight((4096, 4096)), random(tokens, 4096)
    expected = product(x * 2, q)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            product(x, q)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = product(x, q)
    x.mul_(2)
    graph.replay()
    assert_product(y, x, q.dequantize(torch.float32))
    assert tokens > triton_linear.SKINNY_TOKENS or torch.equal(y, expected)


@pytest.mark.parametrize("tokens", TOKENS)
def test_no_operation_waits_for_the_gpu(tokens: int) -> None:
    """Quantizing does, once a weight, to refuse NaN; nothing that a model runs may."""
    layer = QuantLinear.from_linear(torch.nn.Linear(4096, 1024, device="cuda", dtype=half()))
    x = random(tokens, 4096).requires_grad_()
    layer(x).sum().backward()  # compiled, tables on the device
    with without_waiting():
        layer(x).sum().backward()
        layer.dequantize()
    assert x.grad is not None


def test_streams_do_not_meet_in_a_buffer() -> None:
    """Two streams decode at once, each into a buffer of its own."""
    first, second, x = weight((4096, 4096)), weight((4096, 4096), seed=1), random(300, 4096)
    matrices = first.dequantize(torch.float32), second.dequantize(torch.float32)
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(10):
        results = []
        for stream, q in zip(streams, (first, second), strict=True):
            with torch.cuda.stream(stream):
                results.append(product(x, q))
        torch.cuda.synchronize()
        for y, matrix in zip(results, matrices, strict=True):
            assert_product(y, x, matrix)


def test_the_decoded_weight_is_given_back() -> None:
    q, x = weight((11008, 4096)), random(300, 4096)
    product(x, q)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(4):
        y = product(x, q)
        del y
    assert torch.cuda.memory_allocated() == before
    decoded_and_result = 2 * (11008 * 4096 + 300 * 11008)
    assert torch.cuda.max_memory_allocated() - before <= decoded_and_result + (32 << 20)  # cuBLAS's own workspace


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_gpu_that_is_not_the_current_one() -> None:
    q = weight((1024, 4096))
    for tokens in TOKENS:
        x = random(tokens, 4096)
        assert torch.equal(product(x.to("cuda:1"), q.to("cuda:1")).cpu(), product(x, q).cpu())


def test_more_elements_than_32_bits_count() -> None:
    rows, columns, block_size = 2**19 + 64, 4096, 64  # 2^31 elements and some rows
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    generator = torch.Generator("cuda").manual_seed(0)
    packed = torch.randint(256, (rows * columns // 2,), dtype=torch.uint8, device="cuda", generator=generator)
    absmax = torch.rand(rows * columns // block_size, device="cuda", generator=generator)
    levels = weight((1, 64)).levels
    tail = 64 * columns  # the rows beyond 2^31
    end = (packed[-tail // 2 :].clone(), absmax[-tail // block_size :].clone())
    settings = {"levels": levels, "block_size": block_size, "dtype": torch.bfloat16}
    whole = ops.dequantize_blocks(packed, absmax, shape=(rows, columns), **settings)
    assert torch.equal(whole[-64:], ops.dequantize_blocks(*end, shape=(64, columns), **settings))
    again, scales = ops.quantize_blocks(whole)
    with dispatch.use("reference"):
        expected = ops.quantize_blocks(whole[-64:])
    assert torch.equal(again[-tail // 2 :], expected[0])
    assert torch.equal(scales[-tail // block_size :], expected[1])
    del whole, again, scales
    matrix = ops.dequantize_blocks(*end, shape=(64, columns), **(settings | {"dtype": torch.float32}))
    for tokens in (1, 16):
        x = random(tokens, columns)
        y = triton_linear.multiply(x, (packed, absmax, None, None, levels, block_size), rows, None)
        assert_product(y[:, -64:], x, matrix)


@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_the_adapter_forward_and_backward(tokens: int) -> None:
    """Against fp64, with the bound of tests/unit/kernels/test_lora.py: chains of up to three products."""
    q, x, grad = weight((1024, 4096)), random(tokens, 4096).requires_grad_(), random(tokens, 1024)
    a, b = random(16, 4096).requires_grad_(), random(1024, 16).requires_grad_()
    y = ops.lora_linear(
        x, q.packed, q.absmax, a, b, scaling=0.5, levels=q.levels, block_size=q.block_size,
        nested_absmax=q.nested_absmax, nested_offset=q.nested_offset,
    )  # fmt: skip
    y.backward(grad)
    w = q.dequantize(torch.float32).double()
    xd, ad, bd, gd = x.detach().double(), a.detach().double(), b.detach().double(), grad.double()

    def chains(f: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """y, dX, dA, dB from the factors, or from their magnitudes."""
        xs, as_, bs, gs, ws = f(xd), f(ad), f(bd), f(gd), f(w)
        return [
            xs @ ws.t() + 0.5 * (xs @ as_.t()) @ bs.t(),
            gs @ ws + 0.5 * (gs @ bs) @ as_,
            0.5 * (gs @ bs).t() @ xs,
            0.5 * gs.t() @ (xs @ as_.t()),
        ]

    assert x.grad is not None
    assert a.grad is not None
    assert b.grad is not None
    factor = 4 * (3 * torch.finfo(x.dtype).eps / 2 + (4096 + 8) * 2**-24)
    got = [y.detach(), x.grad, a.grad, b.grad]
    for one, exact, magnitude in zip(got, chains(lambda t: t), chains(torch.abs), strict=True):
        assert ((one.double() - exact).abs() <= factor * magnitude).all()


def test_under_compile() -> None:
    layer = QuantLinear.from_linear(torch.nn.Linear(4096, 1024, device="cuda", dtype=half()))
    compiled = torch.compile(layer, fullgraph=True)
    for tokens in (1, 16, 64):
        x = random(tokens, 4096)
        assert torch.equal(compiled(x), layer(x))
