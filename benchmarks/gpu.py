"""Everything that is measured on a GPU, in one call of under ten minutes: `python benchmarks/gpu.py [--output DIR]`.

For a machine that may be bare: torch, Triton and transformers are there, and nothing can be fetched. What else is
needed travels as wheels:

    python benchmarks/gpu.py --wheels DIR --output DIR

installs them beside (with pip, without index and dependencies) before anything is measured. Or install them yourself
and set PYTHONPATH. In turn it prints the machine and versions; proves every operation against the reference; trains a
tiny model on both; times every kernel and its variants beside the peers' and beside bandwidth; a training step at the
shape of LLaMA 7B; decode at 7B, 33B and 65B; peak memory at 7B to 65B; a step at 33B with paged optimizer states and
without; and runs the suite's own tests of compiled kernels. Each part is a process with a budget of seconds: one that
fails costs the others nothing. Rows are in DIR/bench-device.csv as they come, notes and the log beside them; the bars
are printed last.

    --sections machine,ops      only these
    --shape llama-3.1-8b,…      other shapes for steps, decode, memory and paging
    --quick                     tiny shapes and few samples: does it run at all?
    --interpret                 the same on a CPU, kernels in Triton's interpreter: proves this script without a GPU
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[1] / "src"


def main(arguments: list[str] | None = None) -> int:
    """Measure; returns the exit code: 0 if all sections came to their end, 1 if one did not, 2 for bad input."""
    began = time.monotonic()
    given = _parser().parse_args(arguments)
    folder = given.output or Path(os.environ.get("OUT") or "build/gpu")
    environment = {"PYTHONPATH": os.pathsep.join([str(SOURCES), *filter(None, [os.environ.get("PYTHONPATH")])])}
    if given.wheels is not None:
        site = _install(given.wheels)
        environment["PYTHONPATH"] += os.pathsep + site
        sys.path.append(site)
    sys.path.insert(0, str(SOURCES))
    from fourbit.bench.device import driver
    from fourbit.errors import InputError

    if given.interpret:
        environment |= driver.INTERPRETED
    try:
        return _measure(given, folder, environment, began)
    except InputError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2


def _measure(given: argparse.Namespace, folder: Path, environment: dict[str, str], began: float) -> int:
    from fourbit.bench import environment as machine
    from fourbit.bench.device import driver, sections, summary
    from fourbit.bench.device.settings import Settings
    from fourbit.models.shapes import shape_of

    quick = given.quick or given.interpret
    shapes = _words(given.shape)
    for name in shapes or ():
        shape_of(name)
    chosen = sections.chosen(_words(given.sections), shapes, quick=quick)
    if given.interpret:
        chosen = [one.patient(driver.PATIENCE * one.budget_s) for one in chosen]
    device = "" if given.interpret else machine.usable_accelerator()
    facts = machine.facts() | {"device": device}
    print("; ".join(f"{name} {value}" for name, value in facts.items() if value), flush=True)
    settings = Settings(
        folder=str(folder),
        device="cpu" if given.interpret else "cuda",
        backend="triton" if given.interpret and sections.has_gpu_kernels() else "auto",
        quick=quick,
        samples=1 if given.interpret else 3 if quick else 7,
        peers=() if given.peers == "none" else tuple(machine.installed_peers(gpu=not given.interpret)),
        **({"batch": 1, "length": 16, "rank": 4} if quick else {}),
        layers=given.layers,
        facts=facts,
    )
    left = given.minutes - (time.monotonic() - began) / 60
    outcomes = driver.run(
        chosen, settings, minutes=left, environment=environment, tell=lambda line: print(line, flush=True)
    )
    for note in summary.notes(folder):
        print(f"- {note}")
    if quick:
        print("The sizes of this run are tiny, so its numbers mean nothing; bars are not shown.", flush=True)
    else:
        print("\n".join(summary.lines(folder)), flush=True)
    return int(any(end != "done" for *_, end in outcomes))


def _install(wheels: Path) -> str:
    """Unpack wheels where only this run finds them."""
    found = sorted(map(str, wheels.glob("*.whl")))
    if not found:
        sys.exit(f"There is no wheel in {wheels}; collect them first, or leave --wheels out.")
    site = tempfile.mkdtemp(prefix="fourbit-site-")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*pip, "--no-cache-dir", "--target", site, *found], check=True)
    return site


def _words(text: str | None) -> list[str] | None:
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for the results (default: $OUT, or build/gpu)")
    parser.add_argument("--wheels", type=Path, help="folder with wheels to install first")
    parser.add_argument("--sections", help="machine,checks,tests,ops,step,decode,memory,paging,parity")
    parser.add_argument("--shape", help="shapes of models, in place of those of the bars")
    parser.add_argument("--layers", type=int, help="keep only so many layers of them")
    parser.add_argument("--peers", choices=("installed", "none"), default="installed", help="whom to measure beside us")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all of it")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few samples")
    parser.add_argument("--interpret", action="store_true", help="on a CPU, in Triton's interpreter")
    return parser


if __name__ == "__main__":
    sys.exit(main())
