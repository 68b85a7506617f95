"""What is compared: the models, adapters and files of answers that lie in a folder."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from fourbit.errors import InputError
from fourbit.generate import find_base

__all__ = ["Contender", "find_contenders"]


@dataclass(frozen=True)
class Contender:
    """One system.

    Attributes:
        name: that of its folder or file.
        model: a folder, or a name on the hub; None for answers that are there already.
        adapter: to put on the model.
        answers: the file of a system that is not here itself; None for a model.
    """

    name: str
    model: str | None = None
    adapter: Path | None = None
    answers: Path | None = None

    @property
    def what(self) -> str:
        """For people."""
        if self.answers is not None:
            return f"answers of {self.answers}"
        return f"model {self.model}" if self.adapter is None else f"adapter {self.adapter} on {self.model}"


def find_contenders(
    folder: Path, *, with_base: bool = False, leave: Collection[Path] = ()
) -> tuple[list[Contender], list[str]]:
    """Look through a folder, in the order of the names.

    Args:
        with_base: let the models compete, too, that the adapters were made for.
        leave: files and folders that are something else.

    Returns:
        the contenders, and what a person should know.

    Raises:
        InputError: there are none, two have one name, or an adapter does not say which model it belongs to.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} {'is a file, not a folder of models' if folder.exists() else 'does not exist'}.")
    if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise InputError(f"{folder} is itself a model; give the folder that holds the models to compare.")
    found: list[Contender] = []
    ignored: list[str] = []
    left = {path.resolve() for path in leave}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.resolve() in left:
            continue
        contender = _contender(path)
        if contender is not None:
            found.append(contender)
        elif path.is_dir():
            ignored.append(path.name)
    if with_base:
        bases = dict.fromkeys(one.model for one in found if one.adapter is not None and one.model is not None)
        here = {Path(one.model).resolve() for one in found if one.model is not None and one.adapter is None}
        found += [Contender(Path(base).name, base) for base in bases if Path(base).resolve() not in here]
    for number, one in enumerate(found):
        if other := next((other for other in found[:number] if other.name == one.name), None):
            raise InputError(f"Two systems are called {one.name!r}: {other.what}, and {one.what}; rename one of them.")
    if not found:
        raise InputError(
            f"{folder} holds nothing to compare; put models, adapters or files of answers into it, each model in a"
            " folder of its own."
        )
    said = [f"Neither a model nor an adapter, and left out: {', '.join(ignored)}."] if ignored else []
    return found, said


def _contender(path: Path) -> Contender | None:
    if path.is_file():
        return Contender(path.stem, answers=path) if path.suffix == ".jsonl" else None
    base = find_base(path)
    if base is not None:
        return Contender(path.name, base, adapter=path)
    return Contender(path.name, str(path)) if (path / "config.json").is_file() else None
