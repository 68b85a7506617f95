"""`python -m fourbit`."""

from __future__ import annotations

import sys

from fourbit.cli import main

if __name__ == "__main__":
    sys.exit(main())
