"""What each kind of exception becomes at the terminal."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from fourbit.cli import errors
from fourbit.errors import InputError, OutputExists, UnknownFormat


@pytest.fixture(autouse=True)
def no_debugging(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FOURBIT_DEBUG", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.mark.parametrize("kind", [InputError, OutputExists, UnknownFormat])
def test_input_errors_are_the_users(kind: type[InputError]) -> None:
    assert errors.explain(kind("There is no format 'nf5'.")) == (2, "There is no format 'nf5'.")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "The disk is full"),
        (errno.EACCES, "Permission denied"),
        (errno.EROFS, "read-only"),
        (errno.ENOENT, "No such file"),
    ],
)
def test_what_the_user_can_mend_on_the_machine(number: int, words: str) -> None:
    code, sentence = errors.explain(OSError(number, "as the system says it", "out/model.safetensors"))
    assert code == 2
    assert words in sentence
    assert sentence.endswith(": out/model.safetensors.")


def test_a_full_disk_without_a_file_name() -> None:
    assert errors.explain(OSError(errno.ENOSPC, "No space left on device"))[1].endswith("another place.")


def test_other_system_errors_are_ours() -> None:
    assert errors.explain(OSError(errno.EBADF, "Bad file descriptor"))[0] == 1


def test_interrupted() -> None:
    assert errors.explain(KeyboardInterrupt()) == (130, "Interrupted.")


def test_our_fault_is_one_line_and_saves_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise KeyError("first line\nsecond line")
    except KeyError as error:
        code, sentence = errors.explain(error)
    (saved,) = tmp_path.glob("fourbit-traceback-*.txt")
    assert code == 1
    assert "\n" not in sentence
    assert "KeyError" in sentence
    assert str(saved) in sentence
    assert saved.read_text().startswith("Traceback")
    assert capsys.readouterr().err == ""


def test_our_fault_where_nothing_can_be_saved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    assert "FOURBIT_DEBUG=1" in errors.explain(RuntimeError("broken"))[1]


def test_debugging_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FOURBIT_DEBUG", "1")
    assert errors.explain(InputError("wrong")) == (2, "wrong")
    assert capsys.readouterr().err == "fourbit.errors.InputError: wrong\n"
