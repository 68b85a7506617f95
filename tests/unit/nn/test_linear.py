"""QuantLinear as a module: results, dtypes, moving, copying, saving, loading, tracing, several processes."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fourbit
from fourbit.errors import BrokenCheckpoint, NonFiniteWeight, UnsupportedDtype
from fourbit.nn import QuantLinear
from fourbit.quant import QuantConfig, quantize

K, N = 96, 40


def dense(*, bias: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(K, N, bias=bias, dtype=dtype)


def layer(**settings: Any) -> QuantLinear:
    return QuantLinear.from_linear(dense(), QuantConfig(**settings))


def tokens(*leading: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*leading, K, generator=torch.Generator().manual_seed(1)).to(dtype)


def same_weight(a: QuantLinear, b: QuantLinear) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def close(y: Tensor, expected: Tensor, scale: float = 1.0) -> bool:
    """Within 4 K fp32 roundings of sums of K products of numbers of a few units."""
    return torch.allclose(y.float(), expected.float(), rtol=0, atol=4 * K * 2**-24 * 16 * scale)


# What it is


def test_it_is_a_linear_layer_to_whoever_asks() -> None:
    quantized = layer()
    assert isinstance(quantized, nn.Linear)
    assert (quantized.in_features, quantized.out_features) == (K, N)
    assert quantized.weight.shape == (K * N // 2, 1)
    assert not quantized.weight.requires_grad
    assert [name for name, p in quantized.named_parameters() if p.requires_grad] == ["bias"]
    assert dict(quantized.named_buffers()) == {}, "scales are no buffers: .to(dtype) and loaders would change them"
    assert repr(quantized) == (
        "QuantLinear(in_features=96, out_features=40, bias=True, nf4, block_size=64, double-quantized scales)"
    )


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("format", ["nf4", "fp4", "int4"])
def test_it_computes_with_the_decoded_weight(format: str, double_quant: bool) -> None:
    quantized, x = layer(format=format, double_quant=double_quant), tokens(2, 3)
    assert quantized.bias is not None
    assert close(quantized(x), nn.functional.linear(x, quantized.dequantize(), quantized.bias))


def test_without_a_bias() -> None:
    quantized = QuantLinear.from_linear(dense(bias=False))
    assert quantized.bias is None
    assert close(quantized(tokens(3)), tokens(3) @ quantized.dequantize().t())


def test_the_layer_it_came_from_is_left_as_it_is() -> None:
    linear = dense().eval()
    before = linear.weight.clone()
    quantized = QuantLinear.from_linear(linear)
    assert torch.equal(linear.weight, before)
    assert not quantized.training
    assert quantized.bias is not None
    assert quantized.bias.data_ptr() != linear.bias.data_ptr()
    linear.bias.requires_grad_(False)
    frozen = QuantLinear.from_linear(linear).bias
    assert frozen is not None
    assert not frozen.requires_grad


def test_what_cannot_become_one() -> None:
    with pytest.raises(TypeError, match="A Conv2d is not a linear layer"):
        QuantLinear.from_linear(nn.Conv2d(1, 1, 1))
    with pytest.raises(UnsupportedDtype, match="float64"):
        QuantLinear.from_linear(dense(dtype=torch.float64))
    broken = dense()
    broken.weight.data[3, 3] = torch.nan
    with pytest.raises(NonFiniteWeight):
        QuantLinear.from_linear(broken)


@pytest.mark.parametrize(("k", "n"), [(0, 4), (4, 0), (1, 1), (3, 5)])
def test_sizes_at_the_edge(k: int, n: int) -> None:
    linear = nn.Linear(k, n, bias=False) if k and n else nn.Linear(1, 1, bias=False)
    linear.weight = nn.Parameter(torch.randn(n, k))
    x = torch.randn(2, k, requires_grad=True)
    y = QuantLinear.from_linear(linear)(x)
    assert y.shape == (2, n)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (2, k)


# Dtypes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_result_has_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    assert layer()(tokens(2, dtype=dtype)).dtype == dtype


def test_a_compute_dtype_is_what_the_product_runs_in() -> None:
    x = tokens(4, dtype=torch.bfloat16)
    in_fp32 = layer(compute_dtype="float32")(x)
    assert in_fp32.dtype == torch.bfloat16
    assert torch.equal(in_fp32, layer()(x.float()).bfloat16())
    assert torch.equal(layer(compute_dtype="bfloat16")(x.float()), layer()(x).float())


def test_autocast() -> None:
    x = tokens(4)
    with torch.autocast("cpu", torch.bfloat16):
        y, explicit = layer()(x), layer(compute_dtype="float32")(x)
    assert y.dtype == explicit.dtype == torch.bfloat16
    assert torch.equal(y, layer()(x.bfloat16()))
    assert torch.equal(explicit, layer()(x).bfloat16()), "a compute dtype that was asked for wins over autocast's"


def test_autocast_and_gradients() -> None:
    x = tokens(4).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        layer()(x).float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert x.grad.any()


def test_integers_are_refused() -> None:
    """transformers' T5 casts its input to the dtype of `wo.weight`, which is uint8 here: not a silent zero."""
    for inside in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=inside), pytest.raises(UnsupportedDtype, match="uint8"):
            layer()(tokens(2).to(torch.uint8))


# Inputs


@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 0), (2, 3, 4)])
def test_leading_dimensions(leading: tuple[int, ...]) -> None:
    x = tokens(*leading).requires_grad_()
    y = layer()(x)
    assert y.shape == (*leading, N)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


def test_inputs_of_another_width_are_refused() -> None:
    """Fewer features than K would decode a part of the weight, row by row wrong, without a word."""
    for width in (K - 1, K + 1, K // 2):
        with pytest.raises(ValueError, match=rf"input of shape \[2, {width}\] does not fit"):
            layer()(torch.randn(2, width))
    with pytest.raises(ValueError, match="at least one dimension"):
        layer()(torch.tensor(1.0))


def test_strided_inputs() -> None:
    x = tokens(4, 2)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    assert close(layer()(strided), layer()(x))


def test_inference_mode() -> None:
    with torch.inference_mode():
        y = layer()(tokens(3))
    assert torch.equal(y, layer()(tokens(3)))


def test_gradients_reach_the_input_and_the_bias_only() -> None:
    quantized, x = layer(), tokens(3).requires_grad_()
    quantized(x).sum().backward()
    assert x.grad is not None
    assert close(x.grad, torch.ones(3, N) @ quantized.dequantize())
    assert quantized.bias is not None
    assert quantized.bias.grad is not None
    assert quantized.weight.grad is None


# Moving and copying


@pytest.mark.parametrize("change", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, nn.Module.float])
def test_a_cast_leaves_codes_and_scales_alone(change: Any) -> None:
    quantized = layer()
    before = quantized.quantized
    change(quantized)
    after = quantized.quantized
    assert torch.equal(after.packed, before.packed)
    assert after.nested_absmax is not None
    assert after.nested_absmax.dtype == torch.float32
    assert torch.equal(after.dequantize(torch.float32), before.dequantize(torch.float32))
    assert quantized.bias is not None
    assert quantized.bias.dtype == change(dense()).bias.dtype


def test_meta_and_back() -> None:
    quantized = layer()
    state = copy.deepcopy(quantized.state_dict())
    y = quantized(tokens(3))
    quantized.to("meta")
    assert quantized.absmax is not None
    assert quantized.absmax.device.type == quantized.levels.device.type == "meta"
    assert quantized(tokens(3).to("meta")).shape == (3, N)
    assert set(quantized.state_dict()) == {"weight", "bias"}
    quantized.to_empty(device="cpu")
    quantized.load_state_dict(state)
    assert torch.equal(quantized(tokens(3)), y)


def test_a_layer_made_on_meta_is_filled_by_loading() -> None:
    source = layer(format="fp4", block_size=128)
    empty = QuantLinear(K, N, device="meta")
    empty.load_state_dict(source.state_dict(), assign=True)
    assert empty.weight.device.type == "cpu"
    assert empty.config.format == "fp4"
    assert torch.equal(empty(tokens(3)), source(tokens(3)))


def test_copies_are_independent_and_equal() -> None:
    quantized = layer()
    through_pickle = pickle.loads(pickle.dumps(quantized))
    buffer = io.BytesIO()
    torch.save(quantized, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(quantized), through_pickle, saved):
        assert same_weight(other, quantized)
        assert torch.equal(other(tokens(3)), quantized(tokens(3)))
        assert other.weight.data_ptr() != quantized.weight.data_ptr()
        assert other.absmax.data_ptr() != quantized.absmax.data_ptr()


def test_a_new_weight_keeps_the_parameter() -> None:
    """Whoever holds the parameter, say an optimizer group or a tied layer, sees the new codes."""
    quantized = layer()
    parameter = quantized.weight
    other = quantize(torch.randn(N, K), QuantConfig(format="int4", double_quant=False))
    quantized.set_quantized(other)
    assert quantized.weight is parameter
    assert torch.equal(quantized.dequantize(), other.dequantize())
    assert (quantized.config.format, quantized.config.double_quant) == ("int4", False)
    with pytest.raises(BrokenCheckpoint, match=r"shape \[3, 3\] was given; \[40, 96\] fits"):
        quantized.set_quantized(quantize(torch.ones(3, 3)))


def test_an_empty_layer_says_so() -> None:
    with pytest.raises(BrokenCheckpoint, match="nothing was loaded into it"):
        QuantLinear(K, N)(tokens(3))
    with pytest.raises(BrokenCheckpoint, match="nothing was loaded into it"):
        QuantLinear(K, N).dequantize()
    assert set(QuantLinear(K, N).state_dict()) == {"weight", "bias"}


def test_codes_that_somebody_else_has_replaced_are_noticed() -> None:
    """What peft's IA3 does when it merges: it knows no 4-bit layer but its own."""
    quantized = layer()
    quantized.weight.data = torch.zeros(K * N // 2, K, dtype=torch.uint8)
    with pytest.raises(ValueError, match="1920 packed bytes"):
        quantized(tokens(3))


# State dicts


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(assign: bool, double_quant: bool) -> None:
    source = layer(double_quant=double_quant)
    target = QuantLinear.from_linear(dense(seed=7), QuantConfig(double_quant=not double_quant))
    incompatible = target.load_state_dict(source.state_dict(), assign=assign)
    assert incompatible == ([], [])
    assert same_weight(source, target)
    assert torch.equal(target(tokens(3)), source(tokens(3)))
    shared = target.weight.data_ptr() == source.weight.data_ptr()
    assert shared == assign, "torch copies unless told to assign"


def test_a_layer_inside_a_model() -> None:
    model = nn.Sequential(nn.Linear(8, K), nn.GELU(), nn.Linear(K, N))
    quantized = fourbit.quantize_module(copy.deepcopy(model), skip=["0"])
    other = fourbit.quantize_module(model, skip=["0"])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(quantized.state_dict())
    x = torch.randn(3, 8)
    assert torch.equal(other(x), quantized(x))


def loading(state: dict[str, Any], *, strict: bool = True) -> QuantLinear:
    target = layer(double_quant=False)
    target.load_state_dict(state, strict=strict)
    return target


def test_a_state_dict_that_lacks_something() -> None:
    state = layer().state_dict()
    codes_only = {key: state[key] for key in ("weight", "bias")}
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*weight.absmax"):
        loading(codes_only)
    assert same_weight(loading(codes_only, strict=False), layer(double_quant=False)), "codes without their scales"
    with pytest.raises(RuntimeError, match=r"weight.nested_absmax is missing"):
        loading({key: value for key, value in state.items() if key != "weight.nested_absmax"})
    with pytest.raises(RuntimeError, match=r'Missing key\(s\).*"bias"'):
        loading({key: value for key, value in state.items() if key != "bias"})


def test_a_state_dict_with_something_else() -> None:
    state = layer().state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*weight.extra"):
        loading({**state, "weight.extra": torch.ones(1)})
    with pytest.raises(RuntimeError, match=r"float32; load it before the layer is quantized"):
        loading(dict(dense().state_dict()))
    with pytest.raises(RuntimeError, match=r"shape \[10, 96\] was given; \[40, 96\] fits"):
        loading({**quantize(torch.randn(10, K)).state_dict(), "bias": torch.zeros(N)})
    with pytest.raises(RuntimeError, match=r"size mismatch for bias"):
        loading({**state, "bias": torch.zeros(3)})


def test_the_state_dict_hook_of_torch_sees_ordinary_tensors() -> None:
    buffer = io.BytesIO()
    torch.save(layer().state_dict(), buffer)
    buffer.seek(0)
    assert same_weight(loading(torch.load(buffer, weights_only=True)), layer())


# Under torch's machinery


@pytest.mark.parametrize("settings", [{}, {"compute_dtype": "bfloat16"}, {"double_quant": False}])
def test_compile(settings: dict[str, Any]) -> None:
    quantized = layer(**settings)
    compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")
    a, b = (tokens(3).requires_grad_() for _ in range(2))
    y = compiled(a)
    assert torch.equal(y, quantized(b))
    y.square().sum().backward()
    quantized(b).square().sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert torch.equal(a.grad, b.grad)


def test_compile_under_autocast() -> None:
    quantized = layer()
    compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(tokens(3)), quantized(tokens(3)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own
def test_compile_to_code() -> None:
    quantized = layer()
    compiled = torch.compile(nn.Sequential(quantized, nn.GELU()), fullgraph=True)
    a, b = (tokens(3).requires_grad_() for _ in range(2))
    y, expected = compiled(a), nn.functional.gelu(quantized(b))
    assert close(y, expected)
    y.sum().backward()
    expected.sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert close(a.grad, b.grad)


def test_export() -> None:
    program = torch.export.export(layer(), (tokens(3),))
    assert any("fourbit.linear" in str(node.target) for node in program.graph.nodes)


def test_checkpointing_gives_the_same_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    stack = nn.Sequential(layer(), nn.GELU(), nn.Linear(N, K), layer())
    grads = []
    for checkpointed in (False, True):
        x = tokens(3).requires_grad_()
        y = checkpoint(stack, x, use_reentrant=False) if checkpointed else stack(x)
        stack.zero_grad()
        y.square().sum().backward()
        grads.append([x.grad, *(p.grad for p in stack.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_data_parallel() -> None:
    """One process is enough to see that DDP can broadcast the packed weight and reduce the rest."""
    from torch import distributed

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Sequential(layer(), nn.Linear(N, 2))
        expected = copy.deepcopy(model)
        parallel = nn.parallel.DistributedDataParallel(model)
        parallel(tokens(3)).square().sum().backward()
        expected(tokens(3)).square().sum().backward()
        for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
            if ours.requires_grad:
                assert ours.grad is not None
                assert theirs.grad is not None
                assert torch.equal(ours.grad, theirs.grad)
        del parallel  # it must not outlive the group: gloo then waits for its threads for ever, once in a while
    finally:
        distributed.destroy_process_group()


def test_evaluating_changes_nothing() -> None:
    """bitsandbytes repacks a weight in place when a layer runs in eval(), and trains on wrong gradients after."""
    quantized = layer()
    before = copy.deepcopy(quantized.state_dict())
    quantized.eval()
    with torch.no_grad():
        quantized(tokens(1))
        quantized(tokens(5, dtype=torch.bfloat16))
    quantized.train()
    assert all(torch.equal(quantized.state_dict()[key], before[key]) for key in before)
