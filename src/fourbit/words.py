"""Quantities as people read them."""

from __future__ import annotations

import re

from fourbit.errors import InputError

__all__ = ["duration", "parse_size", "size"]

_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(?:e(\d+))?\s*(?:([kmgtp]?)(i?)b?|bytes?)", re.IGNORECASE)


def size(count: float) -> str:
    """A number of bytes in powers of ten: 12.3 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:,.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:,.1f} {unit}"


def parse_size(text: str | float, what: str = "The size") -> int:
    """The bytes that a text means: 24GB, 24 GB and 24G in powers of ten, 24GiB in powers of two, or a plain number.

    Args:
        what: what it is the size of, for the message.

    Raises:
        InputError: it is no size, or not above 0.
    """
    found = _SIZE.fullmatch(str(text).strip())
    number, power, unit, binary = found.groups() if found else ("", "", "", "")
    if found is None or isinstance(text, bool) or (binary and not unit) or len(power or "") > 2 or len(number) > 30:
        raise InputError(f"{what} is {text!r}, which is no size; write 24GB, 24GiB or 0.5T, say.")
    exponent = "kmgtp".index(unit.lower()) + 1 if unit else 0
    count = round(float(number) * 10.0 ** int(power or 0) * (1024.0 if binary else 1000.0) ** exponent)
    if count <= 0:
        raise InputError(f"{what} is {text!r}; it must be above 0 bytes.")
    return count


def duration(seconds: float) -> str:
    """A time: 4.2 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
