"""The native library itself: what is built, what is loaded, and what is said where that fails."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from fourbit.errors import InputError
from fourbit.kernels.native import describe, library, unavailable

built = pytest.mark.skipif(unavailable() is not None, reason=f"the native kernels are {unavailable()}")
compiles = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
SHARED_LIBRARY = Path(library.__file__).with_name("libfourbit.so")


def in_a_new_process(code: str, **environment: str) -> str:
    """Run a line that knows `library`, the bare shared library, and return what it prints."""
    load = f"import ctypes; library = ctypes.CDLL({str(SHARED_LIBRARY)!r});"
    strings = "\n".join(
        f"library.{name}.restype = ctypes.c_char_p"
        for name in ("fb_level_name", "fb_level_error", "fb_supported_levels")
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{load}\n{strings}\n{code}"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | environment,
    )
    return done.stdout.strip()


@built
def test_the_highest_level_is_taken() -> None:
    assert library.levels()[0] == "scalar"
    assert in_a_new_process("print(library.fb_level_name().decode())", FOURBIT_CPU="") == library.levels()[-1]


@built
@pytest.mark.parametrize("name", library.levels() if unavailable() is None else [])
def test_a_level_can_be_forced(name: str) -> None:
    assert in_a_new_process("print(library.fb_level_name().decode())", FOURBIT_CPU=name) == name


@built
def test_a_level_that_is_not_here() -> None:
    said = in_a_new_process("print(library.fb_level_error().decode())", FOURBIT_CPU="mmx")
    assert said == f"FOURBIT_CPU is mmx; this machine has {' '.join(library.levels())}."
    before = library.level()
    with pytest.raises(InputError, match="mmx"):
        library.set_level("mmx")
    assert library.level() == before


@built
def test_a_refused_level_reaches_the_user() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from fourbit.kernels import native; native.unavailable()"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"FOURBIT_CPU": "mmx"},
    )
    assert done.returncode != 0
    assert "InputError: FOURBIT_CPU is mmx" in done.stderr


@built
def test_description() -> None:
    assert describe() == f"{library.level()}, {library.threads()} threads"


@built
def test_keeping_freed_memory() -> None:
    """In a process of its own, as there is no way back."""
    expected = "1" if platform.libc_ver()[0] == "glibc" else "0"
    assert in_a_new_process("print(library.fb_keep_freed_memory())") == expected


@built
def test_kernels_are_private_to_their_level() -> None:
    """A function shared between levels could be the AVX-512 one on a machine without it: see csrc/level.h."""
    objects = SHARED_LIBRARY.parents[4] / "build" / "native"
    files = sorted(path for path in objects.glob("*/*.o")) if shutil.which("nm") else []
    if not files:
        pytest.skip("needs nm and the object files of a build in place")
    listing = subprocess.run(["nm", "-C", "-A", *map(str, files)], capture_output=True, text=True, check=True).stdout
    defined = re.findall(r"/([^/]+)/[^/]+\.o:[0-9a-f]+ [TWVu] (.+)", listing)
    assert len(defined) > 10 * len(library.levels())
    assert {symbol for level, symbol in defined if not re.search(rf"\bfb::{level}::", symbol)} == set()


def test_a_missing_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    load = library.load.__wrapped__
    assert load() == "not built; run `python setup.py build_native`"
    (tmp_path / "build.txt").write_text("not built: no C++ compiler was found\n")
    assert load() == "not built: no C++ compiler was found"
    (tmp_path / "libfourbit.so").write_bytes(b"\x7fELF and nothing else")
    assert "libfourbit.so cannot be loaded" in load()


@pytest.fixture
def setup(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup", repository / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@compiles
def test_only_what_changed_is_compiled(setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "csrc"
    sources.mkdir()
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    (sources / "one.h").write_text("#define ONE 1\n")
    (sources / "one.cpp").write_text('#include "one.h"\nint one() { return ONE; }\n')
    tools = setup.Toolchain(tmp_path / "objects")

    def compiled(*flags: str) -> int:
        return int(tools.compile(sources / "one.cpp", "one", flags).stat().st_mtime_ns)

    first = compiled()
    assert compiled() == first
    time.sleep(0.01)
    (sources / "one.h").write_text("#define ONE 2\n")
    second = compiled()
    assert second > first
    assert compiled("-DFLAG") > second


@compiles
def test_a_broken_source_is_named(setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    (tmp_path / "broken.cpp").write_text("int broken( { }\n")
    with pytest.raises(setup.CannotBuild, match=r"g\+\+ failed on broken\.cpp: .*error"):
        setup.Toolchain(tmp_path / "objects").compile(tmp_path / "broken.cpp", "broken")


@compiles
def test_a_compiler_that_was_asked_for_is_not_replaced(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "g++-of-nobody")
    with pytest.raises(setup.CannotBuild, match=r"'g\+\+-of-nobody' was not found \(from CXX\)"):
        setup.Toolchain(tmp_path)
    assert setup.Toolchain(tmp_path, compiler="g++").compiler == ["g++"]
    monkeypatch.setenv("CXX", "")
    assert setup.Toolchain(tmp_path).compiler == ["g++"]


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("", "no C++ compiler was found"),
        ("false", "false cannot compile C++17"),
        ("g++-of-nobody -O1", "the C++ compiler 'g++-of-nobody -O1' was not found (from CXX)"),
    ],
)
def test_installing_without_a_compiler(repository: Path, tmp_path: Path, compiler: str, reason: str) -> None:
    """`build`, which an installation runs, succeeds and leaves the reason; `build_native`, asked for by name, fails."""
    shutil.copy(repository / "setup.py", tmp_path)
    shutil.copytree(repository / "csrc", tmp_path / "csrc")
    tools = tmp_path / "bin"
    tools.mkdir()
    if compiler:
        (tools / compiler).symlink_to(str(shutil.which(compiler)))
    environment = {"PATH": str(tools), "CXX": compiler}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "setup.py", *command],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    installed = run("build", "--build-lib", "installed")
    assert installed.returncode == 0, installed.stderr
    assert f"native kernels not built: {reason}" in installed.stdout
    note = tmp_path / "installed" / "fourbit" / "kernels" / "native" / "build.txt"
    assert note.read_text().startswith(f"not built: {reason}")
    shutil.rmtree(tmp_path / "installed")  # setuptools would take it for a second package of a flat layout
    asked_for = run("build_native")
    assert asked_for.returncode != 0
    assert reason in asked_for.stderr
