"""A step of AdamW on one page: every parameter that has elements in it, in as few calls as can be.

With fp32 parameters it is torch's own fused kernel on views of the page, so that paging changes no bit. Parameters in 16
bits are updated in fp32 as well: in their fp32 copies among the pages (`master`), which stay exact from step to step, or
in a scratch copy that is rounded back. 8-bit moments have a kernel of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fourbit.kernels.ops import adamw_blockwise
from fourbit.optim.layout import Page, Segment

__all__ = ["Stepping", "flat", "update_page"]


@dataclass
class Stepping:
    """What one step is told.

    Attributes:
        params: all parameters, by index.
        grads: those there are, by index; dense, with the strides of their parameters.
        steps: how many each parameter has taken, this one included.
        groups: the parameter group of each.
        unfilled: the parameters whose fp32 copies are yet to be made.
        scratch: fp32 memory of the device, by name; kept from step to step.
    """

    params: list[Tensor]
    grads: Mapping[int, Tensor]
    steps: list[int]
    groups: list[dict[str, Any]]
    unfilled: set[int]
    scratch: dict[str, Tensor]
    counters: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict)

    def counter(self, step: int, device: torch.device) -> Tensor:
        """[] fp32 on the device, as torch's kernel wants it."""
        key = step, device
        if key not in self.counters:
            self.counters[key] = torch.full((), float(step), device=device)
        return self.counters[key]

    def part(self, name: str, page: Page, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """[elements] of scratch memory, as long as a page."""
        kept = self.scratch.get(name)
        if kept is None or kept.numel() < page.elements or kept.device != device or kept.dtype != dtype:
            kept = self.scratch[name] = torch.empty(page.elements, dtype=dtype, device=device)
        return kept


def flat(tensor: Tensor) -> Tensor:
    """All elements of a dense tensor in the order in which they lie in memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def update_page(page: Page, memory: Tensor, stepping: Stepping) -> None:
    """Take a step with all elements of a page whose parameters have gradients.

    Args:
        memory: [page.size_bytes] uint8 on the device of the parameters.
    """
    batches: dict[tuple[int, int], list[Segment]] = {}
    for segment in page.segments:
        index = segment.parameter
        if index in stepping.grads:
            batches.setdefault((id(stepping.groups[index]), stepping.steps[index]), []).append(segment)
    sections = page.kind.sections(memory, page.elements)
    for segments in batches.values():
        _fill_masters(segments, sections, stepping)
        if page.kind.bits == 8:
            _update_8bit(page, segments, sections, stepping)
        else:
            _update_32bit(page, segments, sections, stepping)


def _fill_masters(segments: list[Segment], sections: dict[str, Tensor], stepping: Stepping) -> None:
    new = [segment for segment in segments if segment.parameter in stepping.unfilled] if "master" in sections else []
    if new:
        params = [_stretch(stepping.params[segment.parameter], segment) for segment in new]
        torch._foreach_copy_([_place(sections["master"], segment) for segment in new], params)


def _update_32bit(page: Page, segments: list[Segment], sections: dict[str, Tensor], stepping: Stepping) -> None:
    params = [_stretch(stepping.params[segment.parameter], segment) for segment in segments]
    grads = [_stretch(stepping.grads[segment.parameter], segment) for segment in segments]
    exp_avg = [_place(sections["exp_avg"], segment) for segment in segments]
    exp_avg_sq = [_place(sections["exp_avg_sq"], segment) for segment in segments]
    group, step, _ = _settings(segments, stepping)

    def update(params: list[Tensor], grads: list[Tensor]) -> None:
        counters = [stepping.counter(step, params[0].device)] * len(params)
        torch._fused_adamw_(
            params, grads, exp_avg, exp_avg_sq, [], counters, amsgrad=False, maximize=False, **group
        )  # fmt: skip

    _in_fp32(page, segments, sections, stepping, params, grads, update)


def _update_8bit(page: Page, segments: list[Segment], sections: dict[str, Tensor], stepping: Stepping) -> None:
    params = [_stretch(stepping.params[segment.parameter], segment) for segment in segments]
    grads = [_stretch(stepping.grads[segment.parameter], segment) for segment in segments]
    group, step, betas = _settings(segments, stepping)
    states = [sections[name] for name in ("exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax")]
    offsets = [segment.offset for segment in segments]

    def update(params: list[Tensor], grads: list[Tensor]) -> None:
        adamw_blockwise(
            states[0], states[1], states[2], states[3], params, grads, offsets, lr=group["lr"], betas=betas,
            eps=group["eps"], weight_decay=group["weight_decay"], step=step,
        )  # fmt: skip

    alike = all(param.dtype == grad.dtype == params[0].dtype for param, grad in zip(params, grads, strict=True))
    if page.kind.master or not alike:
        _in_fp32(page, segments, sections, stepping, params, grads, update)
    else:
        update(params, grads)


def _in_fp32(
    page: Page,
    segments: list[Segment],
    sections: dict[str, Tensor],
    stepping: Stepping,
    params: list[Tensor],
    grads: list[Tensor],
    update: Callable[[list[Tensor], list[Tensor]], None],
) -> None:
    """Update parameters that are fp32, or fp32 copies of them that are then rounded back."""
    device, fp32 = params[0].device, torch.float32
    if any(grad.dtype != fp32 for grad in grads):
        scratch = stepping.part("grads", page, device)
        widened = [_place(scratch, segment) for segment in segments]
        torch._foreach_copy_(widened, grads)
        grads = widened
    if page.kind.master:
        copies = [_place(sections["master"], segment) for segment in segments]
    elif any(param.dtype != fp32 for param in params):
        scratch = stepping.part("params", page, device)
        copies = [_place(scratch, segment) for segment in segments]
        torch._foreach_copy_(copies, params)
    else:
        update(params, grads)
        return
    update(copies, grads)
    torch._foreach_copy_(params, copies)


def _settings(segments: list[Segment], stepping: Stepping) -> tuple[dict[str, float], int, tuple[float, float]]:
    """The numbers that torch's kernel takes, the step, and the betas once more as a pair."""
    index = segments[0].parameter
    group = stepping.groups[index]
    beta1, beta2 = float(group["betas"][0]), float(group["betas"][1])
    numbers = {name: float(group[name]) for name in ("lr", "weight_decay", "eps")}
    return {**numbers, "beta1": beta1, "beta2": beta2}, stepping.steps[index], (beta1, beta2)


def _stretch(tensor: Tensor, segment: Segment) -> Tensor:
    """The elements of a parameter, or of its gradient, that a segment stands for."""
    whole = flat(tensor)
    return whole if segment.count == whole.numel() else whole[segment.start : segment.stop]


def _place(section: Tensor, segment: Segment) -> Tensor:
    """The elements of a section of a page that belong to a segment."""
    return section[segment.offset : segment.offset + segment.count]
