"""What a plan depends on besides the model; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from fourbit.errors import InputError
from fourbit.quant.config import COMPUTE_DTYPES, chosen_config

__all__ = ["DEVICES", "OPTIMIZERS", "Knobs"]

DEVICES = ("cpu", "cuda")
OPTIMIZERS = ("adamw", "paged_adamw_32bit", "paged_adamw_8bit", "none")
"""`adamw` keeps two numbers per parameter in the adapter's dtype, the paged ones in 32 or 8 bits under a budget."""


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """How a model is to be trained.

    Attributes:
        batch_size: sequences that go through the model together.
        sequence_length: tokens of each.
        packed: whether sequences are of several examples that do not see each other, which takes a mask.
        accumulation: batches whose gradients are summed for one update; from 2 on a forward pass begins beside them.
        rank, target_modules, dropout: of the adapter; see peft's `LoraConfig`.
        adapter_dtype: what its parameters and gradients are kept in.
        format, block_size, double_quant: how the model is quantized; None for NF4, 64 and yes, or for what a folder in
            4 bits is in; format "none" leaves the model in 16 bits.
        dtype: what is computed in, and what all that is not in 4 bits is kept in.
        checkpointing: True, False or "offload"; see `fourbit.prepare`.
        optimizer: one of `OPTIMIZERS`.
        optimizer_budget_bytes: what a paged optimizer may keep on the device; None for all of its states.
        master_weights: whether a paged optimizer keeps a 32-bit copy of each parameter among its states.
        vocabulary: tokens; None for what the model's configuration says.
        device: "cpu" or "cuda".

    Raises:
        InputError: a value that makes no sense; names it.
    """

    batch_size: int = 1
    sequence_length: int = 512
    packed: bool = False
    accumulation: int = 1
    rank: int = 64
    target_modules: str | Sequence[str] = "all-linear"
    dropout: float = 0.0
    adapter_dtype: str = "float32"
    format: str | None = None
    block_size: int | None = None
    double_quant: bool | None = None
    dtype: str = "bfloat16"
    checkpointing: bool | Literal["offload"] = True
    optimizer: str = "adamw"
    optimizer_budget_bytes: int | None = None
    master_weights: bool = False
    vocabulary: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("batch_size", "sequence_length", "accumulation", "rank", "vocabulary"):
            value = getattr(self, name)
            if value is None and name == "vocabulary":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"`{name}` is {value!r}; it must be a whole number, 1 or more.")
        if self.optimizer_budget_bytes is not None and not self.optimizer_budget_bytes >= 0:
            raise InputError(f"`optimizer_budget_bytes` is {self.optimizer_budget_bytes}; it must be 0 or more.")
        if not 0 <= self.dropout < 1:
            raise InputError(f"`dropout` is {self.dropout}; it must be from 0 to below 1.")
        for name, allowed in _ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"`{name}` is {getattr(self, name)!r}; it must be one of {', '.join(map(str, allowed))}."
                )
        chosen_config(self.format, self.block_size, self.double_quant)

    @property
    def tokens(self) -> int:
        """Of one pass through the model."""
        return self.batch_size * self.sequence_length

    def with_(self, **changes: Any) -> Knobs:
        """The same with some changed."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """By name."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


_ALLOWED: dict[str, tuple[Any, ...]] = {
    "adapter_dtype": COMPUTE_DTYPES,
    "dtype": COMPUTE_DTYPES,
    "checkpointing": (True, False, "offload"),
    "optimizer": OPTIMIZERS,
    "device": DEVICES,
}
