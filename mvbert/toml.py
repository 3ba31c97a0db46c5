"""Settings as plain data: read from TOML or JSON into dataclasses by their types, and back.

Types are those that mvbert.config uses: int, float, str, bool, Literal, tuples, tables and nested
dataclasses. What does not fit is refused by its place in the file.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import types
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from mvbert.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

C = TypeVar("C")


def to_dict(config: Any) -> dict[str, Any]:
    """Converts a config to plain data for JSON."""
    return dataclasses.asdict(config)


def to_report(report: Any) -> dict[str, Any]:
    """Converts a report to plain data for JSON, without what was not measured (None)."""
    return {name: value for name, value in to_dict(report).items() if value is not None}


def from_dict(cls: type[C], data: dict[str, Any], place: str) -> C:
    """Builds a config from plain data; errors locate unknown keys and wrong types by `place`."""
    hints = typing.get_type_hints(cls)
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in known:
            raise InputError(
                f"{place}: unknown key {key!r}; expected one of {', '.join(sorted(known))}"
            )
    values = {key: _convert(hints[key], value, f"{place}.{key}") for key, value in data.items()}
    try:
        return cls(**values)
    except InputError as error:
        raise InputError(f"{place}: {error}") from None
    except TypeError as error:
        raise InputError(f"{place}: {error}") from None


def load_toml(cls: type[C], path: Path | str) -> C:
    """Reads a config from a TOML file."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected a TOML file with settings") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path} as UTF-8 text: {error}") from None
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not valid TOML: {error}") from None
    return from_dict(cls, data, str(path))


def _convert(hint: Any, value: Any, place: str) -> Any:
    origin = typing.get_origin(hint)
    if origin is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise InputError(
                f"{place}: must be one of {', '.join(map(str, choices))}, got {value!r}"
            )
        return value
    if origin in (typing.Union, types.UnionType):
        raise TypeError(f"{place}: unions are not used in configs")
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{place}: must be a list, got {value!r}")
        (item, _) = typing.get_args(hint)
        return tuple(_convert(item, v, f"{place}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise InputError(f"{place}: must be a table, got {value!r}")
        return dict(value)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if not isinstance(value, dict):
            raise InputError(f"{place}: must be a table, got {value!r}")
        return from_dict(hint, value, place)
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if (hint is int and isinstance(value, bool)) or not isinstance(value, hint):
        raise InputError(f"{place}: must be {hint.__name__}, got {value!r}")
    if hint is float and not math.isfinite(value):
        raise InputError(f"{place}: must be finite, got {value}")
    return value
