"""AdamW whose state may be larger than the memory that it is given."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from fourbit.errors import InputError
from fourbit.optim.layout import Kind
from fourbit.optim.paging import Budget, PagedStates
from fourbit.optim.state import put_states, take_states
from fourbit.optim.update import Stepping, update_page

__all__ = ["PagedAdamW"]

_TORCH_DEFAULTS = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": True,
    "decoupled_weight_decay": True,
}
"""Keys of a parameter group of torch's AdamW, so that each can load the other's state."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class PagedAdamW(torch.optim.Optimizer):
    """AdamW with its state in pages, which are on the parameters' device, in host memory or in a file.

        m = b1 m + (1 - b1) g;   v = b2 v + (1 - b2) g^2
        p = (1 - lr wd) p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    Without a budget all pages are where the parameters are. Under one, the pages that were used last stay, and the
    others are fetched ahead of their turn, by explicit copies. What is computed does not depend on it: with fp32
    parameters and 32-bit states it is `torch.optim.AdamW(fused=True)` to the bit.

    Args:
        params: parameters, or groups of them, of fp32, bf16 or fp16; each dense.
        lr, betas, eps, weight_decay: as in torch's AdamW, of which `lr` cannot be a tensor.
        state_bits: 32, or 8 for codes in blocks of 256, as in bitsandbytes' AdamW8bit.
        device_budget_bytes: for the pages on each device; the others are in host memory. None for all.
        host_budget_bytes: for the pages in host memory, the others are in a file. None for all. On a CPU this is the
            budget that counts; a `device_budget_bytes` would keep some pages in memory twice.
        folder: where that file is made. It has no name, and is gone with the process.
        page_elements: of a page, a multiple of 64, or of 256 with 8-bit states. None for 2^20, or what is a quarter of
            a budget, or 2^26 where no page ever moves and no parameter has 16 bits.
        master_weights: keep fp32 copies of 16-bit parameters among the pages, and round the parameters from them.
        min_8bit_size: parameters of fewer elements keep 32-bit states.
        amsgrad, maximize: not supported; here because torch's AdamW has them.

    Attributes:
        size_bytes: of all pages, wherever they are.
        moved_bytes: what went to and from the devices so far.

    Raises:
        InputError: a value that makes no sense, a budget that is smaller than a page, a folder that cannot be written
            to, a disk without room for the pages.

    Cost: 8 bytes of state for each element, 2.03 with 8 bits, and 4 more for an fp32 copy. A step of N pages of which S
    fit moves N - S in and as many out. 16-bit parameters without fp32 copies take 8 bytes of scratch per element of a
    page.

    Source: paged optimizers are QLoRA's, arXiv:2305.14314, section 3, there by managed memory; 8-bit states are from
    arXiv:2110.02861.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_bits: int = 32,
        device_budget_bytes: int | None = None,
        host_budget_bytes: int | None = None,
        folder: str | os.PathLike[str] | None = None,
        page_elements: int | None = None,
        master_weights: bool = False,
        min_8bit_size: int = 4096,
        amsgrad: bool = False,
        maximize: bool = False,
    ) -> None:
        if state_bits not in (8, 32):
            raise InputError(f"`state_bits` is {state_bits!r}; it must be 32 or 8.")
        self.state_bits, self.master_weights, self.min_8bit_size = state_bits, master_weights, min_8bit_size
        self.budget = Budget(device_budget_bytes, host_budget_bytes, folder, page_elements)
        self._states: list[PagedStates] | None = None
        self._scratch: dict[tuple[str, torch.device], Tensor] = {}
        numbers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**numbers, **_TORCH_DEFAULTS, "amsgrad": amsgrad, "maximize": maximize})
        self._steps = [0] * len(self._parameters())
        self._unfilled = set(range(len(self._steps)))
        self._states = self._placed()

    @property
    def size_bytes(self) -> int:
        """The bytes of all pages, wherever they are."""
        return sum(states.size_bytes for states in self._states or ())

    @property
    def moved_bytes(self) -> int:
        """What went to and from the devices so far."""
        return sum(states.moved_bytes for states in self._states or ())

    # Parameters and where their states are

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, as torch's optimizers do; the pages are laid out anew.

        Raises:
            InputError: see `PagedAdamW`.
        """
        super().add_param_group(param_group)
        _check_group(self.param_groups[-1])
        for param in self.param_groups[-1]["params"]:
            _check_param(param)
        if self._states is not None:
            self._lay_out_again(len(self.param_groups[-1]["params"]))

    def _parameters(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _kind(self, param: Tensor) -> Kind:
        bits = 32 if param.numel() < self.min_8bit_size else self.state_bits
        return Kind(bits, master=self.master_weights and param.dtype != torch.float32)

    def _placed(self) -> list[PagedStates]:
        """Pages for all parameters, those of a device together."""
        by_device: dict[torch.device, list[tuple[int, int, Kind]]] = {}
        scratch = False
        for index, param in enumerate(self._parameters()):
            kind = self._kind(param)
            by_device.setdefault(param.device, []).append((index, param.numel(), kind))
            scratch |= param.dtype != torch.float32 and (kind.bits == 32 or kind.master) and param.numel() > 0
        return [PagedStates(device, found, self.budget, scratch=scratch) for device, found in by_device.items()]

    def _lay_out_again(self, added: int = 0) -> None:
        """Make new pages, as parameters came or went to another device, and take along what is in the old ones."""
        kept = self._taken()
        self._steps += [0] * added
        self._unfilled |= set(range(len(self._steps) - added, len(self._steps)))
        self._states = []  # the old pages' memory is free before new pages take theirs
        self._states = self._placed()
        self._put(kept)

    # A step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss anew, and the gradients.

        Returns:
            what the closure gave.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = self._parameters()
        grads = [None if param.grad is None else _dense(param, param.grad) for param in params]
        assert self._states is not None
        if any(params[next(iter(states.kinds))].device != states.device for states in self._states):
            self._lay_out_again()
        groups = [group for group in self.param_groups for _ in group["params"]]
        stepping = Stepping(params, grads, self._steps, groups, self._unfilled, self._scratch)
        for states in self._states:  # all memory that is needed, or it may end in the middle of a step
            states.reserve()
            for name, elements in states.scratch_elements.items():
                stepping.part(name, elements, states.device)
        for index, grad in enumerate(grads):
            self._steps[index] += grad is not None
        for states in self._states:
            wanted = [page for page in states.pages if any(grads[part.parameter] is not None for part in page.segments)]
            with closing(states.visit(wanted, changes=True)) as visited:
                for page, memory in visited:
                    update_page(states.views(page, memory, params), stepping)
        self._unfilled = {index for index in self._unfilled if grads[index] is None}
        return loss

    # Saving and loading

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with every tensor on the CPU.

        32-bit states are `step`, `exp_avg` and `exp_avg_sq`, which torch's AdamW can load. 8-bit ones stay as they are:
        `exp_avg_codes` [n] uint8, `exp_avg_absmax` [ceil(n/256)] fp32, and the same of `exp_avg_sq`. fp32 copies are
        `master`. Where pages are in a file, the tensors are mapped from another one in the same folder.
        """
        params = self._parameters()
        self.state.update({params[index]: entry for index, entry in self._taken().items()})
        try:
            return super().state_dict()
        finally:
            self.state.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state of this class, of either width, or of torch's AdamW.

        Raises:
            InputError: it is of other parameters, or asks for what is not supported.
        """
        numbers = [index for group in state_dict["param_groups"] for index in group["params"]]
        entries = {place: state_dict["state"][n] for place, n in enumerate(numbers) if n in state_dict["state"]}
        super().load_state_dict({**state_dict, "state": {}})  # torch would cast all of it to the parameters' dtype
        for group in self.param_groups:
            _check_group(group)
        self._steps = [0] * len(self._steps)
        self._unfilled = set(range(len(self._steps)))
        self._put(entries)

    def _taken(self) -> dict[int, dict[str, Tensor]]:
        """The states of all parameters that have taken a step, by index."""
        return take_states(self._states or [], self._parameters(), self._steps, self._unfilled, self.budget.folder)

    def _put(self, entries: dict[int, dict[str, Tensor]]) -> None:
        put_states(self._states or [], self._parameters(), entries)
        for index, entry in entries.items():
            self._steps[index] = int(entry["step"])
            if "master" in entry:
                self._unfilled.discard(index)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("A PagedAdamW cannot be pickled or copied, as its pages cannot; save its state_dict().")


def _check_group(group: dict[str, Any]) -> None:
    """Refuse what torch's AdamW would refuse, and what only it can do.

    Raises:
        InputError.
    """
    for name in ("lr", "eps", "weight_decay"):
        value = group[name]
        if isinstance(value, Tensor):
            raise InputError(f"`{name}` is a tensor; PagedAdamW takes a number.")
        if not 0 <= value < float("inf"):
            raise InputError(f"`{name}` is {value}; it must be 0 or more.")
    if len(group["betas"]) != 2 or any(isinstance(b, Tensor) or not 0 <= b < 1 for b in group["betas"]):
        raise InputError(f"`betas` is {group['betas']}; it must be two numbers from 0 to below 1.")
    for name in ("amsgrad", "maximize", "differentiable"):
        if group.get(name):
            raise InputError(f"PagedAdamW has no `{name}`; leave it out, or take torch.optim.AdamW.")


def _check_param(param: Tensor) -> None:
    """Refuse what cannot be paged.

    Raises:
        InputError.
    """
    if param.dtype not in _FLOATS:
        raise InputError(f"PagedAdamW takes parameters of fp32, bf16 and fp16, not {param.dtype}.")
    if type(param.data) is not Tensor or param.layout != torch.strided:
        raise InputError(f"PagedAdamW takes plain tensors, not {type(param.data).__name__} of layout {param.layout}.")
    if not param.is_contiguous() and not torch.ops.aten.is_non_overlapping_and_dense(param):
        raise InputError(f"A parameter of {list(param.shape)} is part of a larger tensor; give PagedAdamW a copy.")


def _dense(param: Tensor, grad: Tensor) -> Tensor:
    """A gradient whose elements lie as its parameter's do.

    Raises:
        InputError: it is sparse.
    """
    if grad.layout != torch.strided:
        raise InputError("PagedAdamW takes no sparse gradients; take torch.optim.SparseAdam.")
    if (grad.is_contiguous() and param.is_contiguous()) or grad.stride() == param.stride():
        return grad
    return torch.empty_like(param, dtype=grad.dtype).copy_(grad)
