"""How hypothesis runs here."""

from __future__ import annotations

from hypothesis import settings

# A loaded machine is no reason to fail.
settings.register_profile("fourbit", deadline=None)
settings.load_profile("fourbit")
