"""A section: what paging the optimizer's states costs a training step.

One model is trained by two optimizers in turns: one has all states on the device, the other a few pages of them, and
the rest in the host's pinned memory. Both do the same work on the device, so the difference is what the copies cost
that did not run beside it.
"""

from __future__ import annotations

import torch

from fourbit.bench.case import OURS
from fourbit.bench.device import cases
from fourbit.bench.device.clock import peak_bytes, reset_peak, stopwatch
from fourbit.bench.device.models import contender_model, left_out, token_ids, train_step
from fourbit.bench.device.settings import Ledger, Settings
from fourbit.bench.run import Samples
from fourbit.models.process import peak_resident_bytes
from fourbit.optim import PagedAdamW

__all__ = ["BUDGET_BYTES", "paging"]

BUDGET_BYTES = 256 << 20
"""For pages on the device: what `fourbit train` takes for `paged_adamw_32bit`."""

STEPS_BEFORE = 2
"""In the second step of each optimizer, pages move for the first time in both directions."""


def paging(settings: Settings, ledger: Ledger, shape: str) -> None:
    """Training steps with gradient checkpointing, by two optimizers in turns."""
    device = settings.device
    case = cases.paging_case(
        shape, batch=settings.batch, length=settings.length, rank=settings.rank, layers=settings.layers
    )
    with left_out(case, OURS, ledger):
        reset_peak(device)
        model = contender_model(OURS, shape, True, settings)
        trained = [one for one in model.parameters() if one.requires_grad]
        ids = token_ids(model, settings.batch, settings)
        resident = PagedAdamW(trained, lr=1e-5)
        budget = min(BUDGET_BYTES, resident.size_bytes // 4)
        optimizers: dict[str, torch.optim.Optimizer] = {
            OURS: PagedAdamW(trained, lr=1e-5, device_budget_bytes=budget),
            cases.ON_THE_DEVICE: resident,
        }
        taken = {name: Samples() for name in optimizers}
        for number in range(STEPS_BEFORE + min(5, settings.samples)):
            for name, optimizer in optimizers.items():
                seconds = stopwatch(device, lambda by=optimizer: train_step(model, by, ids))  # type: ignore[misc]
                if number >= STEPS_BEFORE:
                    taken[name].seconds.append(seconds)
        for samples in taken.values():
            samples.peaks.append(peak_resident_bytes())
            samples.device_peaks.append(peak_bytes(device))  # of both optimizers together
        ledger.add(case, taken)
        paged = optimizers[OURS]
        assert isinstance(paged, PagedAdamW)
        ledger.note(
            f"{case.name}: {resident.size_bytes / 1e9:.2f} GB of states, {budget / 1e9:.2f} GB of them on the device;"
            f" {paged.moved_bytes / (STEPS_BEFORE + min(5, settings.samples)) / 1e9:.2f} GB moved in a step."
        )
