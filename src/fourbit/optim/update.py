"""A step of AdamW on one page: every parameter that has elements in it, in as few calls as can be.

With fp32 parameters it is torch's own fused kernel on views of the page, so that paging changes no bit. Parameters in
16 bits are updated in fp32 as well: in their fp32 copies among the pages (`master`), which stay exact from step to
step, or in a scratch copy that is rounded back. 8-bit moments have a kernel of ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fourbit.kernels.ops import adamw_blockwise
from fourbit.optim.layout import Page

__all__ = ["PageViews", "Stepping", "flat", "update_page"]


@dataclass
class Stepping:
    """What one step is told.

    Attributes:
        params: all parameters, by index.
        grads: those there are, by index, else None; dense, with the strides of their parameters.
        steps: how many each parameter has taken, this one included.
        groups: the parameter group of each.
        unfilled: the parameters whose fp32 copies are yet to be made.
        scratch: fp32 memory, by name and device; kept from step to step.
    """

    params: list[Tensor]
    grads: list[Tensor | None]
    steps: list[int]
    groups: list[dict[str, Any]]
    unfilled: set[int]
    scratch: dict[tuple[str, torch.device], Tensor]
    counters: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict)

    def counter(self, step: int, device: torch.device) -> Tensor:
        """[] fp32 on the device, as torch's kernel wants it."""
        key = step, device
        if key not in self.counters:
            self.counters[key] = torch.full((), float(step), device=device)
        return self.counters[key]

    def part(self, name: str, elements: int, device: torch.device) -> Tensor:
        """[elements] fp32 of scratch memory."""
        kept = self.scratch.get((name, device))
        if kept is None or kept.numel() < elements:
            kept = self.scratch[name, device] = torch.empty(elements, dtype=torch.float32, device=device)
        return kept


def flat(tensor: Tensor) -> Tensor:
    """All elements of a dense tensor in the order in which they lie in memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


class PageViews:
    """The sections of a page in memory, cut by segments. Views cost more to make than to update with.

    Args:
        memory: [page.size_bytes] uint8.
        params: all parameters, by index.

    Attributes:
        memory, page: as given.
        sections: [elements] each, by name; see `Kind.sections`.
        cut: for each section of one entry per element, its part for each segment. The part of a parameter that lies in
            this page as a whole has the shape and the strides of that parameter.
        whole: whether each segment is a whole parameter.
    """

    def __init__(self, page: Page, memory: Tensor, params: list[Tensor]) -> None:
        self.memory, self.page = memory, page
        self.sections = page.kind.sections(memory, page.elements)
        self.whole = [part.count == params[part.parameter].numel() for part in page.segments]
        names = [name for name in ("exp_avg", "exp_avg_sq", "master") if name in self.sections]
        self.cut: dict[str, list[Tensor]] = {name: self.places(self.sections[name], params) for name in names}

    def places(self, section: Tensor, params: list[Tensor]) -> list[Tensor]:
        """[elements] cut by segments."""
        found = []
        for part, whole in zip(self.page.segments, self.whole, strict=True):
            place, param = section[part.offset : part.offset + part.count], params[part.parameter]
            found.append(place.as_strided(param.shape, param.stride()) if whole else place)
        return found


def update_page(views: PageViews, stepping: Stepping) -> None:
    """Take a step with all elements of a page whose parameters have gradients."""
    batches: dict[tuple[int, int], list[int]] = {}
    segments, grads, steps, groups = views.page.segments, stepping.grads, stepping.steps, stepping.groups
    for number, segment in enumerate(segments):
        index = segment.parameter
        if grads[index] is not None:
            batches.setdefault((id(groups[index]), steps[index]), []).append(number)
    for numbers in batches.values():
        _Batch(views, stepping, numbers).update()


class _Batch:
    """The segments of a page that are in one parameter group and at one step.

    Attributes:
        params, grads: what is updated, and by what: the whole tensor or a stretch of it, for each segment.
    """

    def __init__(self, views: PageViews, stepping: Stepping, numbers: list[int]) -> None:
        self._views, self._stepping, self._numbers = views, stepping, numbers
        self.params: list[Tensor] = []
        self.grads: list[Tensor] = []
        for number in numbers:
            segment = views.page.segments[number]
            param, grad = stepping.params[segment.parameter], stepping.grads[segment.parameter]
            assert grad is not None
            if not views.whole[number]:
                stretch = slice(segment.start, segment.stop)
                param, grad = flat(param)[stretch], flat(grad)[stretch]
            self.params.append(param)
            self.grads.append(grad)
        first = views.page.segments[numbers[0]].parameter
        self._group, self._step = stepping.groups[first], stepping.steps[first]

    def update(self) -> None:
        """Update the parameters, or fp32 copies of them that are then rounded back."""
        views, params, grads = self._views, self.params, self.grads
        bits, master = views.page.kind.bits, views.page.kind.master
        fp32 = torch.float32
        alike = all(grad.dtype == param.dtype for param, grad in zip(params, grads, strict=True))
        if not master and alike and (params[0].dtype == fp32 if bits == 32 else True) and self._of_one_dtype():
            self._run(params, grads)
            return
        if any(grad.dtype != fp32 for grad in grads):
            widened = self._scratch("grads")
            torch._foreach_copy_(widened, grads)
            grads = widened
        if master:
            copies = self._cut("master")
            self._fill_masters(copies)
        else:
            copies = self._scratch("params")
            torch._foreach_copy_(copies, params)
        self._run(copies, grads)
        torch._foreach_copy_(params, copies)

    def _of_one_dtype(self) -> bool:
        return len({param.dtype for param in self.params}) == 1

    def _run(self, params: list[Tensor], grads: list[Tensor]) -> None:
        """AdamW, for parameters and gradients of one dtype."""
        group, sections = self._group, self._views.sections
        lr, eps, weight_decay = float(group["lr"]), float(group["eps"]), float(group["weight_decay"])
        beta1, beta2 = (float(beta) for beta in group["betas"])
        if self._views.page.kind.bits == 8:
            adamw_blockwise(
                sections["exp_avg"], sections["exp_avg_absmax"], sections["exp_avg_sq"], sections["exp_avg_sq_absmax"],
                params, grads, [self._views.page.segments[number].offset for number in self._numbers],
                lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, step=self._step,
            )  # fmt: skip
            return
        torch._fused_adamw_(
            params, grads, self._cut("exp_avg"), self._cut("exp_avg_sq"), [],
            [self._stepping.counter(self._step, params[0].device)] * len(params),
            lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, amsgrad=False, maximize=False,
        )  # fmt: skip

    def _cut(self, name: str) -> list[Tensor]:
        return self._chosen(self._views.cut[name])

    def _scratch(self, name: str) -> list[Tensor]:
        elements, device = self._views.page.elements, self.params[0].device
        return self._chosen(self._views.places(self._stepping.part(name, elements, device), self._stepping.params))

    def _chosen(self, parts: list[Tensor]) -> list[Tensor]:
        return parts if len(self._numbers) == len(parts) else [parts[number] for number in self._numbers]

    def _fill_masters(self, copies: list[Tensor]) -> None:
        indices = [self._views.page.segments[number].parameter for number in self._numbers]
        new = [place for place, index in enumerate(indices) if index in self._stepping.unfilled]
        if new:
            torch._foreach_copy_([copies[place] for place in new], [self.params[place] for place in new])
