"""peft over 4-bit layers: the hook, when the fused path is taken, and that every other path stays right.

Results are compared with stock peft over dense layers that hold the decoded weights: quantization plays no part.
"""

from __future__ import annotations

import copy
import importlib
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora.layer import Linear as StockLayer
from torch import Tensor, nn

from fourbit.errors import InputError, NonFiniteWeight
from fourbit.kernels import ops
from fourbit.nn import QuantLinear, adapters, quantize_module
from fourbit.nn.lora import LoraQuantLinear
from fourbit.quant import quantize

# peft takes the bias of an adapter for a shard of a matrix
pytestmark = pytest.mark.filterwarnings(r"ignore:.*LoRA tensor\(s\) have invalid shape.*lora_B.bias")

WIDTH, LAYERS = 64, 2
ROUNDING = 2**-24


class Net(nn.Module):
    """Two linear layers with a bias and one without, and a head that stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 172)
        self.down = nn.Linear(172, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(nn.functional.gelu(self.up(x))))  # type: ignore[no-any-return]


def quantized(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return quantize_module(Net(), skip=["head"], **settings)


def decoded(net: nn.Module) -> nn.Module:
    """The same network with dense layers that hold the decoded weights."""
    dense = Net()
    dense.head.load_state_dict(net.head.state_dict())  # type: ignore[union-attr]
    for name in ("up", "down"):
        source, target = net.get_submodule(name), dense.get_submodule(name)
        assert isinstance(source, QuantLinear)
        target.weight.data = source.dequantize()  # type: ignore[operator,union-attr]
        if source.bias is not None:
            target.bias.data = source.bias.data.clone()  # type: ignore[operator,union-attr]
    return dense


def settings(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["up", "down"], **changes})


def randomized(model: PeftModel, seed: int = 1) -> PeftModel:
    """Adapters as after some training: fresh ones have B = 0, which would hide a wrong product."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def pair(**changes: Any) -> tuple[PeftModel, PeftModel]:
    """Ours and stock peft, with the same weights and adapter."""
    torch.manual_seed(2)
    net = quantized()
    dense = decoded(net)
    ours = randomized(get_peft_model(net, settings(**changes)))
    stock = get_peft_model(dense, settings(**changes))
    result = set_peft_model_state_dict(stock, get_peft_model_state_dict(ours))
    assert not result.unexpected_keys
    assert all(isinstance(layer, LoraQuantLinear) for layer in lora_layers(ours))
    assert not any(isinstance(layer, LoraQuantLinear) for layer in lora_layers(stock))
    return ours, stock


def lora_layers(model: nn.Module) -> list[StockLayer]:
    return [layer for layer in model.modules() if isinstance(layer, StockLayer)]


def inputs() -> Tensor:
    return torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(3))


def close(a: Tensor, b: Tensor, *, scale: float = 16.0) -> bool:
    """Sums of at most 172 products, twice over, each rounded; `scale` covers the magnitudes that enter them."""
    return torch.allclose(a, b, rtol=0, atol=4 * 172 * ROUNDING * scale)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Grows by one with each call of the fused operation."""
    made: list[int] = []
    original = ops.lora_linear

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        made.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(ops, "lora_linear", counted)
    return made


# The hook


def test_models_without_adapters_never_import_peft() -> None:
    code = """
import sys, torch, fourbit
from fourbit.nn.adapters import hook_state
before = hook_state()
fourbit.nn.QuantLinear.from_linear(torch.nn.Linear(8, 8))
assert "peft" not in sys.modules, "peft was imported"
assert before == hook_state() == "waiting: peft is not imported yet", hook_state()
import peft
assert hook_state() == "in place", hook_state()
assert "fourbit.nn.lora" not in sys.modules, "our layer is imported with the first adapter"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_the_hook_is_in_place_and_stays_one() -> None:
    from peft.tuners.lora import model

    adapters.install()
    wrapper = model.dispatch_default
    adapters.install()
    QuantLinear(8, 8)
    assert model.dispatch_default is wrapper
    assert adapters.hook_state() == "in place"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package in peft's place, whose import the hook watches."""
    package = tmp_path / "fakepeft"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(adapters, "_MODULE", "fakepeft.model")
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if finder is not adapters._WATCHER])
    for name in ("fakepeft", "fakepeft.model"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return package / "model.py"


@pytest.mark.parametrize("early", [True, False])
def test_the_wrapper_passes_on_what_is_not_ours(fake: Path, early: bool) -> None:
    fake.write_text(
        "def dispatch_default(target, name, config, **kwargs):\n    'Doc.'\n    return target, name, config, kwargs\n"
    )
    if early:
        adapters.install()
        assert adapters.hook_state().startswith("waiting")
    model = importlib.import_module("fakepeft.model")
    adapters.install()
    assert adapters.hook_state() == "in place"
    linear = nn.Linear(2, 2)
    assert model.dispatch_default(linear, "a", 1, more=2) == (linear, "a", 1, {"more": 2})
    assert model.dispatch_default.__doc__ == "Doc."


def test_the_source_is_still_found(fake: Path) -> None:
    import inspect

    fake.write_text("def dispatch_default():\n    return 1\n\n\ndef other():\n    return 2\n")
    adapters.install()
    model = importlib.import_module("fakepeft.model")
    assert inspect.getsource(model.other) == "def other():\n    return 2\n"
    assert model.__file__ == str(fake)
    assert importlib.reload(model) is model
    assert adapters.hook_state() == "in place"


def test_a_peft_that_has_changed(fake: Path) -> None:
    fake.write_text("")
    adapters.install()
    with pytest.warns(
        RuntimeWarning, match=r"has no fakepeft\.model\.dispatch_default.*results are right.*cannot merge"
    ):
        importlib.import_module("fakepeft.model")
    adapters.install()  # complains once
    assert adapters.hook_state().startswith(f"missing: peft {peft.__version__} has no fakepeft.model")


def test_a_peft_that_cannot_be_imported(fake: Path) -> None:
    fake.write_text("raise ImportError('broken')")
    adapters.install()
    with pytest.raises(ImportError, match="broken"):
        importlib.import_module("fakepeft.model")
    fake.write_text("def dispatch_default():\n    return 1\n")
    importlib.invalidate_caches()
    importlib.import_module("fakepeft.model")
    assert adapters.hook_state() == "in place"


def test_without_the_hook_peft_own_layer_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import model

    ours, _ = pair()
    monkeypatch.setattr(model, "dispatch_default", model.dispatch_default.__wrapped__)
    unfused = get_peft_model(quantized(), settings())
    assert {type(layer) for layer in lora_layers(unfused)} == {StockLayer}
    set_peft_model_state_dict(unfused, get_peft_model_state_dict(ours))
    assert close(unfused(inputs()), ours(inputs()))
    with pytest.raises(RuntimeError):
        unfused.merge_adapter()


# Who takes the fused path, and what comes out

FUSED: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"lora_dropout": 0.3},
    "rslora": {"use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "bias": {"bias": "all"},
    "own rank": {"rank_pattern": {"up": 2}, "alpha_pattern": {"down": 3}},
    "saved module": {"modules_to_save": ["head"]},
    "one layer": {"target_modules": ["down"]},
}
UNFUSED: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "dora and dropout": {"use_dora": True, "lora_dropout": 0.3},
    "dora and rslora": {"use_dora": True, "use_rslora": True},
    "adapter bias": {"lora_bias": True, "target_modules": ["up"]},
}


@pytest.mark.usefixtures("same_dropout")
@pytest.mark.parametrize("case", [*FUSED, *UNFUSED])
def test_results_and_gradients_are_stock_peft(case: str, calls: list[int]) -> None:
    """With the same seed the dropout mask is the same, so that one bound holds for all."""
    changes = {**FUSED, **UNFUSED}[case]
    ours, stock = pair(**changes)
    ours.eval()
    stock.eval()
    assert close(ours(inputs()), stock(inputs()))
    ours.train()
    stock.train()
    torch.manual_seed(4)
    loss = ours(inputs()).square().mean()
    torch.manual_seed(4)
    expected = stock(inputs()).square().mean()
    loss.backward()
    expected.backward()
    assert close(loss, expected)
    trained = 0
    theirs = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        other = theirs.get(name.replace("base_layer.base_layer", "base_layer"))
        if parameter.requires_grad:
            assert other is not None
            assert parameter.grad is not None, name
            assert other.grad is not None
            assert parameter.dtype == other.dtype
            assert close(parameter.grad, other.grad), name
            trained += 1
    assert trained >= 2
    targets = len(changes.get("target_modules", ["up", "down"]))
    assert len(calls) == (2 * targets if case in FUSED else 0)


def test_all_linear_finds_the_layers() -> None:
    model = get_peft_model(quantized(), settings(target_modules="all-linear", task_type=None))
    assert {name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, LoraQuantLinear)} == {
        "up",
        "down",
    }


def test_the_mask_follows_the_mode() -> None:
    model, _ = pair(lora_dropout=0.5)
    model.train()
    torch.manual_seed(0)
    first, second = model(inputs()), model(inputs())
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(inputs()), model(inputs()))


def test_a_dropout_of_one_leaves_the_base() -> None:
    model, stock = pair(lora_dropout=0.5)
    for layer in (*lora_layers(model), *lora_layers(stock)):
        layer.lora_dropout["default"].p = 1.0  # type: ignore[assignment]
    model.train()
    assert close(model(inputs()), stock.train()(inputs()))
    with model.disable_adapter():
        base = model(inputs())
    assert close(model(inputs()), base)


def test_several_adapters(calls: list[int]) -> None:
    ours, stock = pair()
    for model in (ours, stock):
        model.add_adapter("second", settings(r=2, lora_alpha=3))
    randomized(ours, seed=7)
    for name in ("default", "second"):
        set_peft_model_state_dict(stock, get_peft_model_state_dict(ours, adapter_name=name), adapter_name=name)
    seen = {}
    for active in ("default", "second", ["default", "second"]):
        for model in (ours, stock):
            model.base_model.set_adapter(active)
        calls.clear()
        assert close(ours(inputs()), stock(inputs()))
        assert len(calls) == (LAYERS if isinstance(active, str) else 0)
        seen[str(active)] = ours(inputs())
    assert not torch.equal(seen["default"], seen["second"])
    names = ["default", "second", "__base__"]
    ours.eval()
    stock.eval()
    calls.clear()
    mixed = ours(inputs(), adapter_names=names)
    assert close(mixed, stock(inputs(), adapter_names=names))
    assert close(mixed[1], seen["second"][1])
    assert not calls
    with ours.disable_adapter(), stock.disable_adapter():
        assert close(ours(inputs()), stock(inputs()))
        assert close(mixed[2], ours(inputs())[2])
    ours.delete_adapter("second")
    stock.delete_adapter("second")
    ours.set_adapter("default")
    stock.set_adapter("default")
    assert close(ours(inputs()), stock(inputs()))


def test_scaling_an_adapter_at_run_time() -> None:
    ours, stock = pair()
    for layer in (*lora_layers(ours), *lora_layers(stock)):
        layer.scale_layer(0.5)
    assert close(ours(inputs()), stock(inputs()))
    for layer in lora_layers(ours):
        layer.unscale_layer()
    assert not close(ours(inputs()), stock(inputs()))


@pytest.mark.parametrize("watched", ["base_layer", "lora_A.default", "lora_B.default", "lora_dropout.default"])
def test_hooks_on_a_part_are_called(watched: str, calls: list[int]) -> None:
    ours, stock = pair(lora_dropout=0.0)
    seen = []
    module = lora_layers(ours)[0].get_submodule(watched)
    handle = module.register_forward_hook(lambda *_: seen.append(1))
    assert close(ours(inputs()), stock(inputs()))
    assert (len(seen), len(calls)) == (1, LAYERS - 1)
    handle.remove()
    ours(inputs())
    assert (len(seen), len(calls)) == (1, 2 * LAYERS - 1)


def test_a_forward_that_was_replaced_is_called(calls: list[int]) -> None:
    """As accelerate does to bring weights to a device."""
    ours, _ = pair()
    base, seen = lora_layers(ours)[0].base_layer, []
    original = base.forward
    base.forward = lambda x: seen.append(1) or original(x)  # type: ignore[func-returns-value,method-assign]
    ours(inputs())
    assert (len(seen), len(calls)) == (1, LAYERS - 1)


# Dtypes


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, adapter_dtype: torch.dtype, calls: list[int]) -> None:
    """Against stock peft in fp64, within a bf16 rounding (2^-8) of each of the products on the way."""
    ours, stock = pair()
    stock.double()
    for layer in lora_layers(ours):
        layer.lora_A.to(adapter_dtype)
        layer.lora_B.to(adapter_dtype)
    ours.get_submodule("base_model.model.head").to(dtype)
    x = inputs().to(dtype).requires_grad_()
    y = ours(x)
    y.float().square().mean().backward()
    assert y.dtype == dtype
    assert len(calls) == LAYERS
    expected = stock(inputs().double())
    tolerance = 2**-8 if torch.bfloat16 in (dtype, adapter_dtype) else 2**-20
    assert (y.double() - expected).abs().max() <= 16 * tolerance * expected.abs().max()
    for layer in lora_layers(ours):
        grad = layer.lora_B["default"].weight.grad  # type: ignore[union-attr]
        assert isinstance(grad, Tensor)
        assert grad.dtype == adapter_dtype
    assert x.grad is not None


def test_autocast(calls: list[int]) -> None:
    ours, stock = pair()
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = ours(inputs()), stock(inputs())
    assert y.dtype == expected.dtype == torch.bfloat16
    assert len(calls) == LAYERS
    # both round every product to bf16, in another order
    assert (y - expected).abs().max() <= 16 * 2**-8 * expected.abs().max()


def test_a_compute_dtype(calls: list[int]) -> None:
    ours, stock = pair()
    for layer in lora_layers(ours):
        base = layer.base_layer
        assert isinstance(base, QuantLinear)
        base.config = replace(base.config, compute_dtype="bfloat16")
    y = ours(inputs())
    assert y.dtype == torch.float32
    assert len(calls) == LAYERS
    assert not close(y, stock(inputs()))
    assert (y - stock(inputs())).abs().max() <= 16 * 2**-8 * y.abs().max()


# Merging


def codes(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name, layer in model.named_modules()
        if isinstance(layer, QuantLinear)
        for key, value in layer.state_dict().items()
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_back(safe: bool, calls: list[int]) -> None:
    ours, _ = pair()
    before, y = codes(ours), ours(inputs())
    expected = {}
    for layer in lora_layers(ours):
        base = layer.base_layer
        assert isinstance(base, QuantLinear)
        delta = layer.get_delta_weight("default")
        expected[id(layer)] = quantize(base.dequantize() + delta, base.config)
    with pytest.warns(UserWarning, match="4-bit weights rounds them again"):
        ours.merge_adapter(safe_merge=safe)
    for layer in lora_layers(ours):
        base = layer.base_layer
        assert isinstance(base, QuantLinear)
        assert torch.equal(base.quantized.packed, expected[id(layer)].packed)
        assert torch.equal(base.quantized.absmax, expected[id(layer)].absmax)
        assert base.weight_dtype == torch.float32
    calls.clear()
    merged = ours(inputs())
    assert not calls
    assert not torch.equal(merged, y)
    # rounding to 4 bits costs some percent of an output; a forgotten or doubled adapter would cost all of its share
    with ours.disable_adapter():
        share = (ours(inputs()) - y).norm()
    assert (merged - y).norm() < share / 2
    assert same(codes(ours), before), "disable_adapter unmerges"
    with pytest.warns(UserWarning, match="rounds them again|Already unmerged"):
        ours.merge_adapter()
    ours.unmerge_adapter()
    assert same(codes(ours), before)
    assert torch.equal(ours(inputs()), y)
    with pytest.warns(UserWarning, match="Already unmerged"):
        ours.unmerge_adapter()


def test_the_warning_comes_once() -> None:
    ours, _ = pair()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        ours.merge_adapter()
    assert len(caught) == 1


def test_merging_two_adapters_rounds_once() -> None:
    ours, _ = pair()
    ours.add_adapter("second", settings())
    randomized(ours, seed=7)
    before = codes(ours)
    sums = {}
    for layer in lora_layers(ours):
        base = layer.base_layer
        assert isinstance(base, QuantLinear)
        deltas = layer.get_delta_weight("default") + layer.get_delta_weight("second")
        sums[id(layer)] = quantize(base.dequantize() + deltas, base.config)
    with pytest.warns(UserWarning, match="rounds them again|Already unmerged"):
        ours.merge_adapter(["default", "second"])
    for layer in lora_layers(ours):
        base = layer.base_layer
        assert isinstance(base, QuantLinear)
        # the sum is taken in another order, which may move a value across a threshold, and few are that near to one
        assert (base.quantized.packed != sums[id(layer)].packed).float().mean() < 1e-3
        assert layer.merged_adapters == ["default", "second"]
    together = codes(ours)
    ours.unmerge_adapter()
    assert same(codes(ours), before)
    with pytest.warns(UserWarning, match="rounds them again|Already unmerged"):
        ours.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="rounds them again"), pytest.warns(UserWarning, match="Already following"):
        ours.merge_adapter(["second"])
    assert same(codes(ours), together)
    ours.unmerge_adapter()
    assert same(codes(ours), before)


def test_merge_and_unload_gives_plain_layers() -> None:
    ours, _ = pair()
    with pytest.warns(UserWarning, match="rounds them again|Already unmerged"):
        merged = ours.merge_and_unload()
    assert {type(merged.up), type(merged.down)} == {QuantLinear}
    assert not any("lora" in name for name, _ in merged.named_modules())
    assert merged(inputs()).shape == (3, 7, 5)
    reloaded = quantized()
    reloaded.load_state_dict(merged.state_dict())
    assert torch.equal(reloaded(inputs()), merged(inputs()))


def test_unload_gives_the_base_back() -> None:
    expected = quantized()
    ours, _ = pair()
    base = ours.unload()
    assert type(base.up) is QuantLinear
    assert torch.equal(base(inputs()), expected(inputs()))


def test_merging_in_bf16_keeps_the_dtype_and_rounds_only_to_four_bits() -> None:
    net = quantize_module(Net().bfloat16(), skip=["head"])
    ours = randomized(get_peft_model(net, settings()))
    layer = lora_layers(ours)[0]
    base = layer.base_layer
    assert isinstance(base, QuantLinear)
    exact = base.quantized.dequantize(torch.float32) + layer.get_delta_weight("default").float()
    with pytest.warns(UserWarning, match="rounds them again|Already unmerged"):
        ours.merge_adapter()
    assert base.weight_dtype == base.dequantize().dtype == torch.bfloat16
    assert torch.equal(base.quantized.packed, quantize(exact, base.config).packed)


def test_a_broken_adapter_is_not_merged() -> None:
    ours, _ = pair()
    before = codes(ours)
    lora_layers(ours)[0].lora_B["default"].weight.data[0, 0] = torch.nan  # type: ignore[operator,union-attr]
    for safe in (False, True):
        with pytest.warns(UserWarning, match="rounds"), pytest.raises(NonFiniteWeight, match="'default' holds NaN"):
            ours.merge_adapter(safe_merge=safe)
        assert not lora_layers(ours)[0].merged
        assert same(codes(ours), before)


def test_merging_a_bias_of_the_adapter() -> None:
    ours, stock = pair(lora_bias=True, target_modules=["up"])
    layer = lora_layers(ours)[0]
    base = layer.base_layer
    assert isinstance(base, QuantLinear)
    assert base.bias is not None
    before = base.bias.detach().clone()
    stock.merge_adapter()
    with pytest.warns(UserWarning, match="rounds them again|Already unmerged"):
        ours.merge_adapter()
    assert torch.equal(base.bias, lora_layers(stock)[0].base_layer.bias)  # type: ignore[arg-type]
    assert not torch.equal(base.bias, before)
    ours.unmerge_adapter()
    assert torch.equal(base.bias, before)
    with pytest.warns(UserWarning, match="has no bias"):
        unable = get_peft_model(quantized(), settings(lora_bias=True, target_modules=["down"]))
    with pytest.warns(UserWarning, match="rounds them again"), pytest.raises(RuntimeError, match="Impossible to merge"):
        unable.merge_adapter()


def test_merging_dora() -> None:
    ours, stock = pair(use_dora=True)
    before, y = codes(ours), ours.eval()(inputs())
    with ours.disable_adapter():
        share = (ours(inputs()) - y).norm()
    stock.merge_adapter()
    with pytest.warns(UserWarning, match="rounds them again|Already unmerged"):
        ours.merge_adapter()
    for layer, other in zip(lora_layers(ours), lora_layers(stock), strict=True):
        base = layer.base_layer
        assert isinstance(base, QuantLinear)
        expected = quantize(other.base_layer.weight.data, base.config)  # type: ignore[arg-type,union-attr]
        assert (base.quantized.packed != expected.packed).float().mean() < 1e-3
    assert (ours(inputs()) - y).norm() < share
    ours.unmerge_adapter()
    assert same(codes(ours), before)
    ours.add_adapter("second", settings())
    with pytest.warns(UserWarning, match="rounds them again|Already unmerged"):
        ours.merge_adapter(["second", "default"])
    ours.unmerge_adapter()
    assert same(codes(ours), before)


# Initialisations and variants


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_initialisations_that_leave_a_residual(init: str) -> None:
    """The residual W - s B A is quantized anew, so W comes back up to one more rounding to 4 bits."""
    net = quantized()
    originals = {name: net.get_submodule(name).dequantize() for name in ("up", "down")}  # type: ignore[operator]
    torch.manual_seed(5)
    model = get_peft_model(net, settings(init_lora_weights=init))
    for name, original in originals.items():
        layer = model.get_submodule(f"base_model.model.{name}")
        assert isinstance(layer, LoraQuantLinear)
        base = layer.base_layer
        assert isinstance(base, QuantLinear)
        residual = original - layer.get_delta_weight("default")
        assert base.weight.dtype == torch.uint8
        expected = quantize(residual, base.config)
        assert (base.quantized.packed != expected.packed).float().mean() < 1e-3
        assert layer.get_delta_weight("default").norm() > 0.1 * original.norm()
        assert layer.lora_A["default"].weight.dtype == torch.float32  # type: ignore[union-attr]
    assert model(inputs()).isfinite().all()


def test_mica_reads_the_weight_and_leaves_it() -> None:
    net = quantized()
    before = codes(net)
    weight = net.get_submodule("up").dequantize()  # type: ignore[operator]
    model = get_peft_model(net, settings(init_lora_weights="mica"))
    layer = model.get_submodule("base_model.model.up")
    assert isinstance(layer, LoraQuantLinear)
    b = layer.lora_B["default"].weight
    left, _, _ = torch.linalg.svd(weight, full_matrices=False)
    assert torch.allclose(b @ b.t(), left[:, -4:] @ left[:, -4:].t(), atol=1e-4)  # type: ignore[operator]
    assert {k.removeprefix("base_model.model.").replace("base_layer.", ""): 1 for k in codes(model)} == dict.fromkeys(
        before, 1
    )
    assert all(torch.equal(a, b) for a, b in zip(codes(model).values(), before.values(), strict=True))


def test_an_initialisation_that_fails_leaves_the_weight() -> None:
    net = quantized()
    before = codes(net)
    with pytest.raises(ValueError, match="should be 'pissa'"):
        get_peft_model(net, settings(init_lora_weights="pissa_niter"))
    assert same({k.replace("base_layer.", ""): v for k, v in codes(net).items()}, before)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "LoftQ .* needs the 16-bit weight"),
        ({"target_parameters": ["up.weight"], "target_modules": ["down"]}, "up.weight, which is in 4 bits"),
    ],
)
def test_what_needs_the_dense_weight_says_so(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        get_peft_model(quantized(), settings(**changes))


@pytest.mark.parametrize(("name", "field"), [("VeloraConfig", "velora_config"), ("KasaConfig", "kasa_config")])
def test_variants_that_take_the_packed_weight_for_numbers_are_refused(name: str, field: str) -> None:
    if not hasattr(peft, name):
        pytest.skip(f"peft {peft.__version__} has no {name}")
    with pytest.raises(ValueError, match=f"unsupported variant combination.*{field}"):
        get_peft_model(quantized(), settings(**{field: getattr(peft, name)()}))


def test_low_memory_loading_leaves_the_base_alone() -> None:
    """Parameters made inside go to the meta device; the base must not."""
    net = quantized()
    model = get_peft_model(net, settings(), low_cpu_mem_usage=True)
    layer = lora_layers(model)[0]
    assert layer.lora_A["default"].weight.device.type == "meta"  # type: ignore[union-attr]
    assert layer.base_layer.weight.device.type == "cpu"  # type: ignore[union-attr]


def test_gpt2_layers_keep_fan_in_fan_out_in_the_file(calls: list[int]) -> None:
    """It is right for the Conv1D that the layer was, and where the adapter may be loaded; W is [N, K] here."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    original = nn.Sequential(Conv1D(nf=24, nx=16))
    net = quantize_module(copy.deepcopy(original))
    config = settings(target_modules=["0"], fan_in_fan_out=True)
    ours = randomized(get_peft_model(net, config))
    stock = get_peft_model(original, settings(target_modules=["0"], fan_in_fan_out=True))
    original[0].weight.data = ours.get_submodule("base_model.model.0.base_layer").dequantize().t()  # type: ignore[operator]
    stock.base_model.model[0].base_layer.weight.data = original[0].weight.data
    set_peft_model_state_dict(stock, get_peft_model_state_dict(ours))
    x = torch.randn(5, 16)
    assert close(ours(x), stock(x))
    assert calls == [1]
    assert ours.peft_config["default"].fan_in_fan_out
    delta = lora_layers(ours)[0].get_delta_weight("default")
    assert delta.shape == (24, 16)


# Torch's machinery, and other tuners


@pytest.mark.parametrize("case", ["plain", "dropout", "rslora"])
def test_compile(case: str) -> None:
    ours, _ = pair(**FUSED[case])
    ours.eval()  # torch.compile draws its own dropout
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    grads = []
    for model in (ours, compiled):
        ours.zero_grad()
        model(inputs()).square().mean().backward()
        grads.append([p.grad.clone() for p in ours.parameters() if p.grad is not None])
    assert len(grads[0]) == 2 * LAYERS
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_compile_with_dropout_in_training() -> None:
    ours, _ = pair(lora_dropout=0.3)
    compiled = torch.compile(ours.train(), fullgraph=True, backend="aot_eager")
    compiled(inputs()).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in ours.parameters() if p.requires_grad)


def test_copies() -> None:
    ours, _ = pair()
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert all(isinstance(layer, LoraQuantLinear) for layer in lora_layers(other))
        assert torch.equal(other(inputs()), ours(inputs()))
        lora_layers(other)[0].lora_B["default"].weight.data.zero_()  # type: ignore[operator,union-attr]
        assert not torch.equal(other(inputs()), ours(inputs()))


def test_a_copy_of_a_merged_model_can_be_unmerged() -> None:
    ours, _ = pair()
    before = codes(ours)
    with pytest.warns(UserWarning, match="rounds them again|Already unmerged"):
        ours.merge_adapter()
    other = pickle.loads(pickle.dumps(ours))
    other.unmerge_adapter()
    assert same(codes(other), before)


def test_inference_mode(calls: list[int]) -> None:
    ours, _ = pair()
    with torch.inference_mode():
        y = ours(inputs())
    assert torch.equal(y, ours(inputs()))
    assert len(calls) == 2 * LAYERS


def test_only_the_adapter_is_trained() -> None:
    ours, _ = pair()
    ours(inputs()).sum().backward()
    assert all(("lora_" in name) == (p.grad is not None) for name, p in ours.named_parameters())


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(target_modules=["up", "down"], feedforward_modules=["down"]),
        peft.VeraConfig(r=4, target_modules=["down"], projection_prng_key=0),
        peft.OFTConfig(oft_block_size=4, target_modules=["down"]),
        peft.AdaLoraConfig(target_r=2, init_r=4, total_step=10, tinit=1, tfinal=1, target_modules=["up", "down"]),
    ],
    ids=lambda config: type(config).__name__,
)
def test_other_tuners_train_over_a_four_bit_layer(config: peft.PeftConfig) -> None:
    """On peft's own layers. Merging needs to know the codes; it must fail, then or at the next use, not mislead."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(quantized(), config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(10):
        loss = (model(inputs()) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with pytest.raises((RuntimeError, ValueError)):
        model.merge_and_unload()(inputs())


def test_tuners_that_need_the_dense_weight_fail_by_themselves() -> None:
    model = get_peft_model(quantized(), peft.LoHaConfig(r=4, target_modules=["down"]))
    with pytest.raises(RuntimeError, match="shape"):
        model(inputs())


def test_a_four_bit_layer_cannot_be_trained_whole() -> None:
    with pytest.raises(RuntimeError, match="floating point dtype can require gradients"):
        get_peft_model(quantized(), settings(target_modules=["up"], modules_to_save=["down"]))
