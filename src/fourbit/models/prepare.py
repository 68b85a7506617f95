"""Make a language model ready to be finetuned: frozen, checkpointed, and with the parts of a training step run fast.

What bitsandbytes users know as `prepare_model_for_kbit_training`, without its fp32 copies. Everything here works on any
architecture of transformers, because nothing is decided by a model's name: a module that looks like one we have a
kernel for is tried on random input, and taken only if it gives the same bits as the kernel's reference.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING

from fourbit.errors import InputError
from fourbit.kernels import dispatch
from fourbit.kernels.native import library
from fourbit.nn.attention import FusedAttention, FusedRotaryAttention, uses_attention_functions, why_not_attention
from fourbit.nn.fused import DEVICES, Fused, fuse, is_fused
from fourbit.nn.linear import QuantLinear
from fourbit.nn.loss import FusedCausalLM, FusedHead, FusedLoss
from fourbit.nn.mlp import FusedMLP, gated_shape, prove_mlp
from fourbit.nn.norm import FusedNorm, prove_norm
from fourbit.nn.offload import OffloadedCheckpoint
from fourbit.nn.rotary import FusedRotary, prove_rotary, rotary_function

__all__ = ["Prepared", "assume_loss", "enable_checkpointing", "fuse_modules", "prepare"]

_LOG = logging.getLogger("fourbit")


@dataclass
class Prepared:
    """What `prepare` did to a model.

    Attributes:
        checkpointing: whether activations are computed again in the backward pass instead of being kept.
        offloading: whether what checkpointing keeps is moved to the host's memory.
        taken: class of module -> how many of it run on a kernel of ours, and "loss" where that is the chunked one.
        left: class of module, or "loss" or "attention" -> why it stays as it was.
    """

    checkpointing: bool
    offloading: bool = False
    taken: Counter[str] = field(default_factory=Counter)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        taken = ", ".join(f"{count} {name}" for name, count in self.taken.items()) or "nothing"
        left = "".join(f"; {name} left as it is: {reason}" for name, reason in self.left.items())
        checkpointing = "offloaded" if self.offloading else "on" if self.checkpointing else "off"
        return f"checkpointing {checkpointing}; on kernels of ours: {taken}{left}"


def prepare(
    model: nn.Module, *, gradient_checkpointing: bool | Literal["offload"] = True, fused: bool = True
) -> nn.Module:
    """Make a language model ready for adapters and for training, in place.

    The base parameters are frozen, in the dtype they have. The cache is turned off. In training mode and with labels
    given, the loss is computed without the logits ever existing whole, and `logits` comes back as None; evaluation and
    generation are as before. Norms, gated activations and rotary embeddings run on kernels of ours; on a CPU so does
    attention, and freed memory is kept for the next step. On a GPU attention stays torch's.

    Args:
        model: of transformers, 16-bit or quantized, before `get_peft_model` (as usual) or after it; then what is
            trainable is left to peft.
        gradient_checkpointing: keep only the input of every layer, and compute the rest again in the backward pass.
            "offload" keeps those inputs in pinned host memory, with the same result to the bit; on a CPU, where they
            are in the host's memory anyway, it is the same as True.
        fused: take the loss and the kernels above, and keep freed memory. Without it, only freezing, cache and
            checkpointing are done.

    Returns:
        `model`; `model.fourbit_prepared` says what was taken and what was left, and why.

    Raises:
        InputError: it is no model of transformers, or does not support checkpointing; or `gradient_checkpointing` is
            none of the three.
    """
    if gradient_checkpointing not in (True, False, "offload"):
        raise InputError(f"`gradient_checkpointing` is {gradient_checkpointing!r}; give True, False or 'offload'.")
    inner = _transformers_model(model)
    if gradient_checkpointing:
        _checkpoint(inner)
    if not _has_adapters(model):
        model.requires_grad_(False)
    _turn_off_cache(inner.config)
    report = Prepared(checkpointing=bool(gradient_checkpointing))
    if gradient_checkpointing == "offload":
        _offload(inner, report)
    if _emulates_bfloat16(inner):
        report.left["bfloat16"] = (
            "this GPU has none and emulates it slowly; load the model with dtype=torch.float16 and scale the loss"
        )
        _LOG.warning("bfloat16: %s", report.left["bfloat16"])
    if fused:
        _fuse_modules(inner, report)
        _fuse_loss(inner, report)
        if _device_of(inner) == "cpu":
            library.keep_freed_memory()
    model.fourbit_prepared = report  # type: ignore[assignment]
    _LOG.info("prepared %s: %s", type(inner).__name__, report)
    return model


def fuse_modules(model: nn.Module) -> Prepared:
    """Let norms, gated activations, rotary embeddings and attention run on kernels of ours, in place; nothing else.

    Args:
        model: see `prepare`.

    Returns:
        what was taken and what was left, and why.

    Raises:
        InputError: it is no model of transformers.
    """
    report = Prepared(checkpointing=False)
    _fuse_modules(_transformers_model(model), report)
    return report


def enable_checkpointing(model: nn.Module) -> None:
    """Keep only the input of every layer from now on, and compute the rest again in the backward pass; in place.

    Args:
        model: see `prepare`.

    Raises:
        InputError: it is no model of transformers, or does not support checkpointing.
    """
    _checkpoint(_transformers_model(model))


def _transformers_model(model: nn.Module) -> Any:
    """The model of transformers itself, without peft's wrapper."""
    inner: Any = model
    if hasattr(model, "get_base_model"):
        inner = inner.get_base_model()
    if not hasattr(inner, "config") or not hasattr(inner, "get_output_embeddings"):
        raise InputError(
            f"A {type(model).__name__} is no model of transformers, so it cannot be prepared for finetuning."
        )
    return inner


def _has_adapters(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False)


def _turn_off_cache(config: Any) -> None:
    for each in {id(config): config, id(text := config.get_text_config()): text}.values():
        each.use_cache = False


def _checkpoint(model: Any) -> None:
    """Non-reentrant, so that parameters inside of a layer get gradients whether or not its input wants one."""
    newer = getattr(model, "activation_checkpointing_enable", None)
    try:
        (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})
    except ValueError as error:
        raise InputError(
            f"{type(model).__name__} does not support checkpointing; pass gradient_checkpointing=False."
        ) from error
    model.disable_input_require_grads()


def _emulates_bfloat16(model: Any) -> bool:
    """Whether a model computes in bfloat16 on a GPU that has no such arithmetic."""
    in_bfloat16 = any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    return _device_of(model) == "cuda" and in_bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False)


def _offload(model: Any, report: Prepared) -> None:
    """Let the checkpoints of a model on GPUs keep their inputs in host memory."""
    if not any(parameter.device.type == "cuda" for parameter in model.parameters()):
        report.left["offloading"] = "without a GPU the activations are in the host's memory anyway"
        return
    report.offloading = True
    offloaded: dict[int, OffloadedCheckpoint] = {}
    for module in model.modules():
        own = module.__dict__.get("_gradient_checkpointing_func")
        if own is not None and not isinstance(own, OffloadedCheckpoint):
            module._gradient_checkpointing_func = offloaded.setdefault(id(own), OffloadedCheckpoint(own))


def _device_of(model: Any) -> str | None:
    """The type of device that a whole model lies on, if it is one that there are kernels for."""
    found = {parameter.device.type for parameter in model.parameters()}
    return found.pop() if len(found) == 1 and found <= set(DEVICES) else None


def _fuse_modules(model: Any, report: Prepared) -> None:
    """Norms, gated MLPs, rotary embeddings and attention, each proved first."""
    device = _device_of(model)
    if device is None:
        report.left["modules"] = "the model is not on a CPU or GPU"
        return
    runs = dispatch.OPERATIONS["rms_norm"].explain(device)
    if device != "cpu" and runs["backend"] == "reference":
        report.left["modules"] = runs["why"]
        return
    for module in list(model.modules()):
        name = type(module).__name__
        if isinstance(module, _KINDS):
            report.taken[name] += 1
        elif name.endswith("RMSNorm"):
            _fuse_proved(module, FusedNorm, prove_norm(module), report)
        elif (shape := gated_shape(module)) is not None:
            _fuse_proved(module, FusedMLP, prove_mlp(module, shape), report)
        elif rotary_function(module) is not None or uses_attention_functions(module):
            _fuse_attention(module, device, report)


_KINDS = (FusedNorm, FusedMLP, FusedAttention, FusedRotary, FusedRotaryAttention)


def _fuse_proved(module: nn.Module, kind: type[Fused], proved: object, report: Prepared) -> None:
    """Fuse a module with what was found out about it, or note the reason why nothing was."""
    name = type(module).__name__
    if isinstance(proved, str):
        report.left[name] = proved
    else:
        fuse(module, kind, proved)
        report.taken[name] += 1


def _fuse_attention(module: nn.Module, device: str, report: Prepared) -> None:
    """The rotary embedding and the attention of one layer, each where it can be taken."""
    name, function = type(module).__name__, rotary_function(module)
    rotary = "it calls no rotary embedding" if function is None else prove_rotary(function)
    attention = (
        why_not_attention(module, device) if uses_attention_functions(module) else "it attends in a way of its own"
    )
    if rotary is None or attention is None:
        kind = FusedRotary if attention is not None else FusedAttention if rotary is not None else FusedRotaryAttention
        fuse(module, kind, None)
        report.taken[name] += 1
    if function is not None and rotary is not None:
        report.left[name] = rotary
    if attention is not None:
        report.left["attention"] = attention


def _fuse_loss(model: Any, report: Prepared) -> None:
    """The chunked loss, if a short forward pass with it gives the model's own."""
    head, own = model.get_output_embeddings(), model.loss_function
    reason = _why_not_loss(head, own)
    if reason is None and not is_fused(model):
        expected = _loss_of(model)
        classes = type(model), type(head)
        ours = _take_loss(model, head)
        found = _loss_of(model)
        reason = _why_not_equal(expected, found, ours)
        if reason is not None:
            model.__class__, head.__class__ = classes
            model.loss_function = own
    if reason is None:
        report.taken["loss"] = 1
    else:
        report.left["loss"] = reason


def _take_loss(model: Any, head: nn.Module) -> FusedLoss:
    """Put the chunked loss into a model."""
    fuse(head, FusedHead, None)
    fuse(model, FusedCausalLM, None)
    model.loss_function = ours = FusedLoss(model.loss_function)
    return ours


def assume_loss(model: nn.Module) -> bool:
    """Take the chunked loss without trying it: for a model whose tensors hold no numbers, such as a plan's.

    Returns:
        whether it was taken; not where `prepare` would not have tried it.

    Raises:
        InputError: it is no model of transformers.
    """
    inner = _transformers_model(model)
    head = inner.get_output_embeddings()
    if _why_not_loss(head, inner.loss_function) is not None:
        return False
    _take_loss(inner, head)
    return True


def _why_not_loss(head: nn.Module | None, loss_function: object) -> str | None:
    if type(head) not in (nn.Linear, QuantLinear) and not isinstance(head, FusedHead):
        return "the model has no linear head over its vocabulary"
    if loss_function is not LOSS_MAPPING["ForCausalLM"] and not isinstance(loss_function, FusedLoss):
        return "its loss function is not that of a causal language model"
    return None


def _why_not_equal(expected: Tensor | str, found: Tensor | str, loss: FusedLoss) -> str | None:
    if isinstance(expected, str) or isinstance(found, str):
        return f"a forward pass of four tokens failed ({expected if isinstance(expected, str) else found})"
    if not loss.used:
        return "the model uses its logits for something else on their way to the loss"
    # Logits are rounded to their dtype, and capped ones four times; the loss moves by at most twice as much.
    tolerance = 8 * torch.finfo(loss.used).eps * (1 + expected.abs())
    if not (found - expected).abs() <= tolerance:
        return f"it is {found.item():.6g} where the model's own is {expected.item():.6g}"
    return None


@torch.no_grad()
def _loss_of(model: Any) -> Tensor | str:
    """The loss of four tokens in training mode, or what went wrong."""
    device = model.get_input_embeddings().weight.device
    tokens = torch.arange(4, device=device).unsqueeze(0) % model.get_output_embeddings().out_features
    training = [module for module in model.modules() if module.training]
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            loss = model.train()(input_ids=tokens, labels=tokens).loss
    except Exception as error:  # another library's code on an input it was not made for: any failure is an answer
        return f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        model.eval()
        for module in training:
            module.training = True
    return loss if isinstance(loss, Tensor) else "it gave no loss"
