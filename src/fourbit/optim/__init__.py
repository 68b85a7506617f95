"""Optimizers whose state may be larger than the memory it is given."""

from fourbit.optim.adamw import PagedAdamW

__all__ = ["PagedAdamW"]
