"""A section that trains a tiny model on the fast path of this device and on the reference, and compares the losses.

What bf16 itself may change is measured: the same steps with the reference in bf16 and in fp32. The fast path rounds as
often as the reference does, only in another order, so its distance to fp32 may be as large: the bound is twice the
largest distance of the reference, for two ways of rounding that are apart from fp32 in opposite directions, and never
less than one unit in the last place of a bf16 loss.
"""

from __future__ import annotations

import torch

from fourbit.bench.device.models import adapted, train_step
from fourbit.bench.device.settings import Ledger, Settings
from fourbit.kernels import dispatch
from fourbit.models.prepare import prepare
from fourbit.models.shapes import random_model
from fourbit.quant import QuantConfig

__all__ = ["losses", "parity"]

STEPS = 12


def parity(settings: Settings, ledger: Ledger) -> None:
    """Print both curves' ends and the largest difference, and say if that is too much."""
    exact = losses(settings, "reference", torch.float32)
    plain = losses(settings, "reference", torch.bfloat16)
    fast = losses(settings, "auto", torch.bfloat16)
    allowed = 2 * max([abs(a - b) for a, b in zip(plain, exact, strict=True)] + [2.0**-8 * exact[0] / 2])
    apart = max(abs(a - b) for a, b in zip(fast, exact, strict=True))
    print(
        f"losses after {STEPS} steps: fp32 reference {exact[-1]:.5f}, bf16 reference {plain[-1]:.5f}, fast path"
        f" {fast[-1]:.5f}; largest distance to fp32 {apart:.5f}, allowed {allowed:.5f}",
        flush=True,
    )
    if not apart <= allowed:
        ledger.note(
            f"WRONG: the losses of the fast path are {apart:.5f} apart from the reference's, allowed {allowed:.5f}."
        )
    if not fast[-1] < fast[0]:
        ledger.note(f"WRONG: the loss did not fall in {STEPS} steps ({fast[0]:.4f} to {fast[-1]:.4f}).")


def losses(settings: Settings, backend: str, dtype: torch.dtype) -> list[float]:
    """The losses of a tiny model, trained on one batch."""
    with dispatch.use(backend):
        # made on the CPU, so that every device has the same weights
        model = random_model("tiny", QuantConfig(), dtype=dtype).to(settings.device)
        model = adapted(prepare(model), rank=4)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=5e-3)
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, 256, (2, 24), generator=generator).to(settings.device)
        return [float(train_step(model, optimizer, ids)) for _ in range(STEPS)]
