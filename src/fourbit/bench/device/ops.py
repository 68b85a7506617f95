"""Sections of single operations: the device's limits, quantize, dequantize, products of 1 to 8192 tokens."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fourbit
from fourbit.bench.case import OURS, Case
from fourbit.bench.device import cases
from fourbit.bench.device.clock import Calls, copies_beyond, take_turns
from fourbit.bench.device.settings import Ledger, Settings
from fourbit.bench.machine import COPY, GEMM_BF16, READ
from fourbit.bench.peers import BITSANDBYTES, TORCHAO, torchao_nf4
from fourbit.kernels import dispatch, ops
from fourbit.kernels.ops.quantize import _tables
from fourbit.quant import QuantConfig, QuantizedTensor

__all__ = [
    "dequantize",
    "large",
    "machine",
    "matrix_vector",
    "quantize",
    "read_calls",
    "small_batches",
    "variants",
]

Contenders = dict[str, Callable[[], Calls]]


def machine(settings: Settings, ledger: Ledger) -> None:
    """Copy and read bandwidth, and the rate of products."""
    size = _buffer_bytes(settings)
    found = {name: _limit(name, settings) for name in (COPY, READ, GEMM_BF16)}
    _measure(cases.machine_case(size, cases.gemm_side(size)), found, settings, ledger)


def quantize(settings: Settings, ledger: Ledger) -> None:
    """bf16 to NF4."""
    for rows, columns in _matrices(settings):
        weights = [_weight(rows, columns, settings, seed) for seed in range(_copies(2 * rows * columns, settings))]
        contenders: Contenders = {
            OURS: partial(_our_quantize, weights),
            BITSANDBYTES: partial(_each, weights, lambda w: _bitsandbytes().quantize_4bit(w, **_BNB_PLAIN)),
            TORCHAO: partial(_each, weights, lambda w: torchao_nf4().to_nf4(w)),
            COPY: _limit(COPY, settings),
        }
        _measure(cases.quantize_case(rows, columns, _buffer_bytes(settings)), contenders, settings, ledger)


def dequantize(settings: Settings, ledger: Ledger) -> None:
    """NF4 to bf16, with plain and with double-quantized scales."""
    ways = variants("dequantize_blocks")
    for rows, columns in _matrices(settings):
        for nested in (False, True):
            count = _copies(rows * columns // 2, settings)
            weights = [_quantized(rows, columns, settings, seed, nested) for seed in range(count)]
            out = torch.empty(rows, columns, dtype=torch.bfloat16, device=settings.device)
            contenders: Contenders = {
                OURS: partial(_each, weights, partial(_our_dequantize, out)),
                **{
                    cases.variant(name): partial(_each, weights, partial(_dequantize_by, way, out))
                    for name, way in ways.items()
                },
                BITSANDBYTES: partial(_bnb_calls, weights, _dequantized),
                COPY: _limit(COPY, settings),
            }
            if nested:  # its scales always are
                contenders[TORCHAO] = partial(_torchao_calls, weights, lambda w: w.get_original_weight())
            case = cases.dequantize_case(rows, columns, _buffer_bytes(settings), nested=nested, variants=list(ways))
            _measure(case, contenders, settings, ledger, check=_norm)


def matrix_vector(settings: Settings, ledger: Ledger) -> None:
    """One token, every matrix."""
    for rows, columns in _matrices(settings):
        _linear(rows, columns, 1, settings, ledger)


def small_batches(settings: Settings, ledger: Ledger) -> None:
    """2 to 64 tokens."""
    rows, columns = _matrices(settings)[1 % len(_matrices(settings))]
    for tokens in (3,) if settings.quick else (count for count in cases.TOKENS if 1 < count <= 64):
        _linear(rows, columns, tokens, settings, ledger)


def large(settings: Settings, ledger: Ledger) -> None:
    """So many tokens that multiplying is all that counts."""
    rows, columns = _matrices(settings)[1 % len(_matrices(settings))]
    for tokens in (66,) if settings.quick else (count for count in cases.TOKENS if count > 64):
        _linear(rows, columns, tokens, settings, ledger)


def variants(operation: str) -> dict[str, Callable[..., Any]]:
    """Every way that our GPU kernels have of running an operation; none where there are no such kernels."""
    try:
        found: dict[str, dict[str, Callable[..., Any]]] = importlib.import_module("fourbit.kernels.triton").variants()
    except (ModuleNotFoundError, AttributeError):
        return {}
    return found.get(operation, {})


def read_calls(settings: Settings) -> Calls:
    """What reads a buffer far larger than the cache."""
    size = _buffer_bytes(settings)
    source = torch.ones(size // 4, dtype=torch.float32, device=settings.device)
    return [source.sum]


def _linear(rows: int, columns: int, tokens: int, settings: Settings, ledger: Ledger) -> None:
    count = _copies(rows * columns // 2, settings)
    x = torch.randn(tokens, columns, generator=_generator(settings, 99), device=settings.device).bfloat16()
    nested = [_quantized(rows, columns, settings, seed, True) for seed in range(count)]
    plain = [_quantized(rows, columns, settings, seed, False) for seed in range(count)]
    # Interpreted, a matrix-vector kernel takes a second a token.
    ways = {} if settings.quick and tokens > 16 else variants("linear")
    limit = READ if tokens <= 16 else GEMM_BF16
    contenders: Contenders = {
        OURS: partial(_each, nested, partial(_our_linear, x)),
        cases.PLAIN_SCALES: partial(_each, plain, partial(_our_linear, x)),
        **{cases.variant(name): partial(_each, nested, partial(_linear_by, way, x)) for name, way in ways.items()},
        cases.BNB_KERNEL: partial(_bnb_calls, plain, partial(_bnb_matmul, x)),
        cases.BNB_EAGER: partial(_bnb_calls, plain, lambda codes, state: F.linear(x, _dequantized(codes, state))),
        TORCHAO: partial(_torchao_calls, nested, lambda w: torchao_nf4().linear_nf4(x, w)),
        cases.TORCH_BF16: partial(_dense_calls, plain, x, settings),
        limit: _limit(limit, settings),
    }
    case = cases.linear_case(rows, columns, tokens, _buffer_bytes(settings), variants=list(ways))
    _measure(case, contenders, settings, ledger, check=_norm)


def _measure(
    case: Case,
    contenders: Contenders,
    settings: Settings,
    ledger: Ledger,
    *,
    check: Callable[[Any], float] | None = None,
) -> None:
    """Time those contenders that were asked for, in turns, and keep the rows."""
    wanted = {
        name: prepare for name, prepare in contenders.items() if case.contender(name).needs in (None, *settings.peers)
    }
    if TORCHAO in settings.peers and TORCHAO in wanted and check is not None:
        check = partial(_checked, check)

    def note(sentence: str) -> None:
        ledger.note(f"{case.name}: {sentence}")

    with torch.no_grad(), dispatch.use(settings.backend):
        taken = take_turns(wanted, device=settings.device, samples=settings.samples, note=note, check=check)
    ledger.add(case, taken)


def _checked(check: Callable[[Any], float], result: Any) -> float:
    return check(result) if isinstance(result, Tensor) else 0.0


def _matrices(settings: Settings) -> tuple[tuple[int, int], ...]:
    return ((32, 64), (48, 128)) if settings.quick else cases.MATRICES


def _buffer_bytes(settings: Settings) -> int:
    return 1 << 20 if settings.quick else 1 << 30


def _copies(size_bytes: int, settings: Settings) -> int:
    return copies_beyond(settings.device, size_bytes)


def _generator(settings: Settings, seed: int) -> torch.Generator:
    return torch.Generator(settings.device).manual_seed(seed)


def _weight(rows: int, columns: int, settings: Settings, seed: int) -> Tensor:
    drawn = torch.randn(rows, columns, generator=_generator(settings, seed), device=settings.device)
    return drawn.mul_(0.02).bfloat16()


def _quantized(rows: int, columns: int, settings: Settings, seed: int, nested: bool) -> QuantizedTensor:
    return fourbit.quantize(_weight(rows, columns, settings, seed), QuantConfig(double_quant=nested))


def _each(items: list[Any], work: Callable[[Any], Any]) -> Calls:
    return [partial(work, item) for item in items]


def _our_quantize(weights: list[Tensor]) -> Calls:
    """The operation without the look for NaN after it, which waits for the device."""
    config = QuantConfig()
    thresholds, codes = _tables(config.codebook, weights[0].device)
    return [partial(torch.ops.fourbit.quantize_blocks, one, thresholds, codes, config.block_size) for one in weights]


def _our_dequantize(out: Tensor, w: QuantizedTensor) -> Tensor:
    return w.dequantize(out=out)


def _dequantize_by(way: Callable[..., Any], out: Tensor, w: QuantizedTensor) -> Tensor:
    way(w.packed, w.absmax, w.nested_absmax, w.nested_offset, w.levels, w.block_size, out)
    return out


def _our_linear(x: Tensor, w: QuantizedTensor) -> Tensor:
    return ops.linear(
        x,
        w.packed,
        w.absmax,
        levels=w.levels,
        block_size=w.block_size,
        out_features=w.shape[0],
        nested_absmax=w.nested_absmax,
        nested_offset=w.nested_offset,
    )


def _linear_by(way: Callable[..., Any], x: Tensor, w: QuantizedTensor) -> Any:
    return way(x, w.packed, w.absmax, w.nested_absmax, w.nested_offset, w.levels, w.block_size, w.shape[0], None)


_BNB_PLAIN = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": False}


def _bitsandbytes() -> Any:
    return importlib.import_module("bitsandbytes.functional")


def _bnb_calls(weights: list[QuantizedTensor], work: Callable[[Tensor, Any], Any]) -> Calls:
    """The same codes and scales as ours, as its own functions hold them."""
    functional = _bitsandbytes()
    calls: list[Callable[[], Any]] = []
    for one in weights:
        tensors = one.state_dict("weight")
        packed = tensors.pop("weight")
        state = functional.QuantState.from_dict(tensors, device=packed.device)
        calls.append(partial(work, packed, state))
    return calls


def _bnb_matmul(x: Tensor, codes: Tensor, state: Any) -> Any:
    return importlib.import_module("bitsandbytes").matmul_4bit(x, codes.t(), quant_state=state)


def _dequantized(codes: Tensor, state: Any) -> Any:
    return _bitsandbytes().dequantize_4bit(codes, state)


def _torchao_calls(weights: list[QuantizedTensor], work: Callable[[Any], Any]) -> Calls:
    to_nf4 = torchao_nf4().to_nf4
    return _each([to_nf4(one.dequantize(torch.bfloat16)) for one in weights], work)


def _dense_calls(weights: list[QuantizedTensor], x: Tensor, settings: Settings) -> Calls:
    first = weights[: _copies(2 * weights[0].numel(), settings)]
    return _each([one.dequantize(torch.bfloat16) for one in first], lambda w: F.linear(x, w))


def _limit(name: str, settings: Settings) -> Callable[[], Calls]:
    size, device = _buffer_bytes(settings), settings.device

    def copy() -> Calls:
        source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
        return [lambda: target.copy_(source)]

    def multiply() -> Calls:
        side = cases.gemm_side(size)
        a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
        out = torch.empty_like(a)
        return [lambda: torch.mm(a, b.t(), out=out)]

    return {COPY: copy, READ: lambda: read_calls(settings), GEMM_BF16: multiply}[name]


def _norm(result: Any) -> float:
    return float(result.float().norm())
