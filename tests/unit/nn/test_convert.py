"""quantize_module: which layers it takes, what it leaves, and modules that are no language models."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import fourbit
from fourbit.errors import InputError, NonFiniteWeight, UnsupportedDtype
from fourbit.nn import QuantLinear, quantize_module
from fourbit.quant import QuantConfig


def stack() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "encoder": nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64)),
            "head": nn.Linear(64, 10),
            "norm": nn.LayerNorm(64),
        }
    )


def quantized_names(module: nn.Module) -> list[str]:
    return [name for name, layer in module.named_modules() if isinstance(layer, QuantLinear)]


def test_every_linear_layer_by_default() -> None:
    module = stack()
    assert quantize_module(module) is module
    assert quantized_names(module) == ["encoder.0", "encoder.2", "head"]


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (["head"], ["head"]),
        ("head", ["head"]),
        (["encoder"], ["encoder.0", "encoder.2"]),
        (["encoder.2"], ["encoder.2"]),
        (["2", "head"], ["encoder.2", "head"]),
        ([], []),
    ],
)
def test_what_is_skipped(skip: list[str] | str, left: list[str]) -> None:
    everything = ["encoder.0", "encoder.2", "head"]
    module = quantize_module(stack(), skip=skip)
    assert quantized_names(module) == [name for name in everything if name not in left]
    assert quantized_names(quantize_module(stack(), QuantConfig(skip=skip))) == quantized_names(module)


def test_a_name_is_matched_whole() -> None:
    with pytest.raises(InputError, match="No module is named 'ead', which `skip`"):
        quantize_module(stack(), skip=["ead"])


def test_what_is_skipped_overrides_the_config() -> None:
    module = quantize_module(stack(), QuantConfig(skip=["encoder"]), skip=["head"])
    assert quantized_names(module) == ["encoder.0", "encoder.2"]


def test_nothing_to_do() -> None:
    with pytest.raises(InputError, match="no linear layer to quantize in this ReLU"):
        quantize_module(nn.ReLU())
    with pytest.raises(InputError, match="no linear layer"):
        quantize_module(quantize_module(stack()))


def test_a_layer_by_itself() -> None:
    linear = nn.Linear(8, 8)
    quantized = quantize_module(linear)
    assert isinstance(quantized, QuantLinear)
    assert isinstance(linear, nn.Linear)


def test_the_config_reaches_every_layer() -> None:
    config = QuantConfig(format="fp4", block_size=128, double_quant=False, compute_dtype="bfloat16")
    for layer in quantize_module(stack(), config).modules():
        if isinstance(layer, QuantLinear):
            assert layer.config == config
            assert layer.quantized.config == QuantConfig(format="fp4", block_size=128, double_quant=False)


def test_a_layer_that_is_used_twice_stays_one() -> None:
    shared = nn.Linear(16, 16)
    module = nn.ModuleList([shared, nn.ReLU(), shared])
    quantize_module(module)
    assert module[0] is module[2]
    assert isinstance(module[0], QuantLinear)


def test_subclasses_and_parametrized_layers_are_left() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    pruned = nn.Linear(8, 8)
    prune.random_unstructured(pruned, "weight", 0.5)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    module = nn.ModuleList([Scaled(8, 8), pruned, normed, nn.MultiheadAttention(8, 2), nn.Linear(8, 8)])
    assert quantized_names(quantize_module(module)) == ["4"]


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda weight: weight.index_fill(0, torch.tensor([1]), torch.inf), NonFiniteWeight),
        (lambda weight: weight.double(), UnsupportedDtype),
    ],
)
def test_the_layer_at_fault_is_named(spoil: Callable[[Tensor], Tensor], error: type[InputError]) -> None:
    module = stack()
    faulty = module.get_submodule("encoder.2")
    faulty.weight = nn.Parameter(spoil(faulty.weight.data))  # type: ignore[operator,arg-type]
    with pytest.raises(error, match=r"^encoder\.2: "):
        quantize_module(module)


def test_gpt2_layers() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    layer = conv1d(nf=24, nx=16)
    quantized = quantize_module(nn.Sequential(layer))[0]  # type: ignore[index]
    assert (quantized.in_features, quantized.out_features) == (16, 24)
    x = torch.randn(5, 16)
    expected = x @ quantized.dequantize().t() + layer.bias
    # sums of 16 products of numbers below 4
    assert torch.allclose(quantized(x), expected, rtol=0, atol=18 * 2**-24 * 16 * 4)
    # nf4's widest gap is 0.304, so half of it times the largest weight bounds the error of a weight
    assert (quantized.dequantize() - layer.weight.t()).abs().max() <= 0.152 * layer.weight.abs().max() * 1.01


# Other than language


def train_a_little(module: nn.Module, x: Tensor, y: Tensor) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = nn.functional.mse_loss(module(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_vision() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 32), nn.Linear(32, 4))
    quantize_module(module, skip=["4"])
    losses = train_a_little(module, torch.randn(16, 3, 8, 8), torch.randn(16, 4))
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_torch_own_transformer_encoder(activation: str, padding: bool) -> None:
    """In eval() and without gradients it reads its layers' weights and calls none of them."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, activation=activation, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    quantized = quantize_module(copy.deepcopy(encoder))
    x = torch.randn(2, 5, 64)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padding else None
    kept = torch.ones(2, 5, dtype=torch.bool) if mask is None else ~mask
    with_gradients = quantized(x, src_key_padding_mask=mask)
    with torch.no_grad():
        y = quantized(x, src_key_padding_mask=mask)
    # outputs of LayerNorm, after sums of at most 128 products in each of two layers: 4 * 128 roundings of numbers of 4
    assert torch.allclose(y[kept], with_gradients[kept], rtol=0, atol=4 * 128 * 2**-24 * 4)
    # 0.15 of a weight's block maximum is a few percent of an output that LayerNorm holds at 1
    assert (y - encoder(x, src_key_padding_mask=mask))[kept].abs().mean() < 0.2


def test_names_of_the_package() -> None:
    assert fourbit.quantize_module is quantize_module
    assert fourbit.nn.QuantLinear is QuantLinear
