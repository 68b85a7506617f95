"""Values of a config as people write them: read from YAML or a command line, and brought to the type of their key."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from enum import Enum
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from fourbit.errors import InputError, MissingExtra

__all__ = ["coerce", "one_of", "parse_pairs", "read_yaml", "sft_default", "sft_fields", "write_yaml"]

NOT_INSTALLED = "Training needs trl and datasets; install them with `pip install 'fourbit[train]'`."

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "a mapping",
    type(None): "null",
}


def coerce(value: Any, hint: Any, key: str) -> Any:
    """`value` as the type that `hint` names; YAML and command lines leave some numbers as text ("2e-4").

    Raises:
        InputError: it is of another type.
    """
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is False and any(isinstance(option, type) and issubclass(option, Enum) for option in options):
        value = "no"  # as it stands in the file: `save_strategy: no`, which YAML takes for false
    for exact in (True, False):
        for option in options:
            found, result = _convert(value, option, exact)
            if found:
                return result
    allowed = " or ".join(dict.fromkeys(_WORDS.get(get_origin(option) or option, "") for option in options))
    raise InputError(f"`{key}` is {value!r}; it must be {allowed}.")


def _convert(value: Any, option: Any, exact: bool) -> tuple[bool, Any]:
    """Whether `value` is, or where not `exact` can be read as, of the type `option`; and as what."""
    kind = get_origin(option) or option
    if kind not in _WORDS:  # an enum or a class of transformers, which checks for itself
        return not exact or value is None, value
    if kind is list and isinstance(value, (list, tuple)):
        inner = (get_args(option) or (Any,))[0]
        return inner is not str or all(isinstance(item, str) for item in value), list(value)
    if kind is float and type(value) in (int, float):
        return math.isfinite(value), value
    if kind is int and type(value) is float and value.is_integer():
        return not exact, int(value)
    if type(value) is kind or (kind is dict and isinstance(value, Mapping)):
        return True, value
    if exact or not isinstance(value, str):
        return False, None
    return _read(value, kind)


def _read(text: str, kind: type) -> tuple[bool, Any]:
    text = text.strip()
    try:
        if kind is bool and text.lower() in ("true", "false"):
            return True, text.lower() == "true"
        if kind is int:
            return True, int(text)
        if kind is float and math.isfinite(float(text)):
            return True, float(text)
    except ValueError:
        pass
    return False, None


def one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    """Refuse a word that is none of those allowed.

    Raises:
        InputError.
    """
    if value not in allowed:
        raise InputError(f"`{key}` is {value!r}; it must be one of {', '.join(allowed)}.")


def parse_pairs(pairs: Sequence[str]) -> dict[str, Any]:
    """`key=value` arguments; a value is read as YAML, so that lists, numbers, true and null can be given.

    Raises:
        InputError: one is no such pair, or a key is given twice.
    """
    given: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip()
        if not equals or not key.isidentifier():
            raise InputError(f"{pair!r} is no key=value; write learning_rate=1e-4, say.")
        if key in given:
            raise InputError(f"`{key}` is given twice; keep one.")
        given[key] = _parse(text, where=f"the value of `{key}`")
    return given


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Raises:
        InputError: it is missing, no YAML, or no mapping; names the line where it can.
    """
    if not path.is_file():
        raise InputError(f"There is no file {path}; give a YAML file, or --model, --data and --output.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text file; give a YAML file with the keys of a training run.") from error
    found = _parse(text, where=str(path))
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise InputError(f"{path} holds no keys and values; write `model: …`, `data: …` and `output: …` on lines.")
    return found


def _parse(text: str, *, where: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f" in line {mark.line + 1}"
        problem = getattr(error, "problem", None) or "it cannot be read"
        raise InputError(f"There is broken YAML{line} of {where}: {problem}.") from error


def write_yaml(given: Mapping[str, Any]) -> str:
    """The text of a YAML file."""
    import yaml

    return str(yaml.safe_dump(dict(given), sort_keys=False, allow_unicode=True))


def sft_fields() -> dict[str, Any]:
    """The fields of trl's `SFTConfig` and their types.

    Raises:
        MissingExtra: trl is not installed.
    """
    try:
        from trl import SFTConfig
    except ModuleNotFoundError as error:
        raise MissingExtra(NOT_INSTALLED) from error
    try:
        hints = get_type_hints(SFTConfig)
    except (NameError, TypeError):  # an annotation that only a type checker can follow
        hints = {}
    return {name: hints.get(name, Any) for name, item in SFTConfig.__dataclass_fields__.items() if item.init}


def sft_default(key: str) -> Any:
    """What a field of `SFTConfig` is where nothing is said; None for one that it has no longer."""
    from trl import SFTConfig

    item = SFTConfig.__dataclass_fields__.get(key)
    if item is None:
        return None
    if item.default_factory is not MISSING:
        return item.default_factory()
    return None if item.default is MISSING else item.default
