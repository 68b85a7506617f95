"""Builds csrc/ into one shared library, libfourbit.so; everything else about the package is in pyproject.toml.

Each csrc/kernels/*.cpp is compiled once per SIMD level and csrc/dispatch.cpp picks a level at run time, so one library
serves every CPU of an architecture and every Python: wheels are tagged py3-none-<platform>. Only a C++17 compiler is
needed ($CXX, g++, clang++ or c++). Without one the installation still succeeds: `build.txt`, beside where the library
would be, then says why, `fourbit doctor` repeats it, and the plain-torch backend runs.

`python setup.py build_native` builds in place, recompiling only what changed.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
PACKAGE = Path("fourbit/kernels/native")

# No contraction: codes and scales are equal at every level to the last bit.
FLAGS = (
    "-std=c++17 -O3 -fPIC -Wall -Wextra -fvisibility=hidden -ffp-contract=off -fno-math-errno -fno-exceptions -fno-rtti"
)
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
LEVELS = {
    "x86_64": {
        "scalar": "",
        "avx2": AVX2,
        "avx512": AVX512,
        "avx512bf16": f"{AVX512} -mavx512bf16 -mavx512vbmi",
    },
    "aarch64": {"scalar": "", "neon": ""},
}
ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}


class CannotBuild(Exception):
    """There will be no native library; the message is one line that says why."""


class Toolchain:
    """A C++ compiler, the flags it takes, and how to compile and link with it.

    Attributes:
        compiler: the command.
        flags: for every file.
        levels: SIMD level -> further flags, those the compiler knows.
        objects: folder of object files, each beside the command that made it.
    """

    def __init__(
        self, objects: Path, *, compiler: str | None = None, machine: str | None = None, flags: Sequence[str] = ()
    ) -> None:
        # A compiler that was asked for is taken or missed, never replaced: its machine code is not another's.
        wanted = compiler or os.environ.get("CXX", "").strip()
        candidates = [wanted] if wanted else ["g++", "clang++", "c++"]
        found = next((name for name in candidates if shutil.which(shlex.split(name)[0])), None)
        if found is None and wanted:
            raise CannotBuild(f"the C++ compiler {wanted!r} was not found{'' if compiler else ' (from CXX)'}")
        if found is None:
            raise CannotBuild("no C++ compiler was found (install g++ or clang++, or set CXX)")
        self.compiler = shlex.split(found)
        self.objects = objects
        machine = (machine or platform.machine()).lower()
        levels = LEVELS.get(ARCHITECTURES.get(machine, machine), {"scalar": ""})
        self.flags = [*FLAGS.split(), *flags]
        if self.takes("-fopenmp"):
            self.flags.append("-fopenmp")
        self.levels = {name: flags.split() for name, flags in levels.items() if self.takes(*flags.split())}
        if "scalar" not in self.levels:
            raise CannotBuild(f"{found} cannot compile C++17 for {machine}")

    def takes(self, *flags: str) -> bool:
        """Whether an empty library can be compiled and linked with these flags."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "empty.cpp")
            source.write_text("int answer() { return 42; }\n")
            return self._run([*self.flags, *flags, "-shared", str(source), "-o", f"{folder}/empty.so"]) is None

    def compile(self, source: Path, name: str, flags: Sequence[str] = ()) -> Path:
        """Compile one file, unless its object is newer than all it was made from, by the same command."""
        target = self.objects / f"{name}.o"
        command = [*self.flags, *flags, "-MMD", "-c", str(source), "-o", str(target)]
        record = target.with_suffix(".command")
        line = shlex.join([*self.compiler, *command])
        if target.exists() and record.exists() and record.read_text() == line and _is_newer(target):
            return target
        record.unlink(missing_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        started = time.time()
        if (error := self._run(command)) is not None:
            raise CannotBuild(f"{self.compiler[0]} failed on {source.relative_to(ROOT)}: {error}")
        os.utime(target, (started, started))  # so that an edit made meanwhile counts as newer
        record.write_text(line)
        return target

    def compile_all(self) -> list[Path]:
        """Compile the dispatcher, and every kernel once per level."""
        # A kernel that fourbit.h does not declare would not be exported.
        with_levels = ["-Werror=missing-declarations", *(f"-DFB_WITH_{level.upper()}" for level in self.levels)]
        jobs = [(CSRC / "dispatch.cpp", "dispatch", with_levels)]
        for level, flags in self.levels.items():
            for source in sorted((CSRC / "kernels").glob("*.cpp")):
                jobs.append((source, f"{level}/{source.stem}", [f"-DFB_LEVEL={level}", *flags]))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(lambda job: self.compile(*job), jobs))

    def link(self, objects: Sequence[Path], target: Path, flags: Sequence[str]) -> None:
        """Link; a process that runs keeps the file it has mapped."""
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_suffix(f".{os.getpid()}")
        try:
            if (error := self._run([*self.flags, *map(str, objects), *flags, "-o", str(fresh)])) is not None:
                raise CannotBuild(f"{self.compiler[0]} could not link: {error}")
            fresh.replace(target)
        finally:
            fresh.unlink(missing_ok=True)

    def build(self, library: Path) -> None:
        """Compile everything and link the library."""
        undefined = ["-Wl,-z,defs"] if platform.system() == "Linux" else []
        self.link(self.compile_all(), library, ["-shared", *undefined])

    def _run(self, arguments: list[str]) -> str | None:
        """Run the compiler. None, or what it complained about."""
        done = subprocess.run([*self.compiler, *arguments], capture_output=True, text=True, check=False)
        return None if done.returncode == 0 else done.stderr.strip() or f"exit status {done.returncode}"


def _is_newer(target: Path) -> bool:
    """Whether an object is newer than every file that the compiler read for it."""
    made = target.stat().st_mtime
    read = target.with_suffix(".d").read_text().replace("\\\n", " ").split()[1:]
    return all(Path(name).exists() and Path(name).stat().st_mtime < made for name in read)


class BuildNative(Command):
    """Compile csrc/: in place when called by name or for an editable install, else into the build folder."""

    description = "compile the C++ kernels into libfourbit.so"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = []

    build_lib: str
    editable_mode: bool

    def initialize_options(self) -> None:
        self.build_lib = None  # type: ignore[assignment]  # what set_undefined_options takes for "not set"
        self.editable_mode = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    @property
    def by_name(self) -> bool:
        return "build_native" in self.distribution.commands

    @property
    def package(self) -> Path:
        return (ROOT / "src" if self.by_name or self.editable_mode else Path(self.build_lib)) / PACKAGE

    def run(self) -> None:
        library, note = self.package / "libfourbit.so", self.package / "build.txt"
        try:
            tools = Toolchain(ROOT / "build" / "native")
            tools.build(library)
        except CannotBuild as error:
            if self.by_name:
                raise SystemExit(f"The native kernels were not built: {error}") from None
            library.unlink(missing_ok=True)
            text = f"not built: {str(error).splitlines()[0]}"
            print(f"fourbit: native kernels {text}. The plain-torch ones will run.")
        else:
            text = f"built by {' '.join(tools.compiler)} for {' '.join(tools.levels)}"
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(text + "\n")

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in sorted(CSRC.rglob("*")) if path.is_file()]

    def get_outputs(self) -> list[str]:
        return [str(self.package / name) for name in ("libfourbit.so", "build.txt")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    sub_commands: ClassVar = [*build.sub_commands, ("build_native", None)]


class PlatformWheel(bdist_wheel):
    """Holds machine code, but none that depends on the Python version."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class PlatformDistribution(Distribution):
    """Installed where machine code goes."""

    def has_ext_modules(self) -> bool:
        return True


if __name__ == "__main__":  # the tests of csrc/ import Toolchain
    setup(
        distclass=PlatformDistribution,
        cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": PlatformWheel},
    )
