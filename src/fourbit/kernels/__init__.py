"""One contract per operation and the backends that run it; see `dispatch`."""

from __future__ import annotations

__all__ = ["backends"]


def backends(device: str = "cpu") -> dict[str, dict[str, str]]:
    """What each operation runs on here, and why.

    Args:
        device: a device type: "cpu", "cuda", ...

    Returns:
        operation name -> {"backend": ..., "why": ...}.
    """
    from fourbit.kernels import dispatch

    return dispatch.explain(device)
