"""Typed reads of the objects in `model.json` and in signature files.

Rule: a field that can't be right raises `SignatureError`, one line with the field, what was found and wanted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from batch_handler.oip import DATATYPES

__all__ = [
    "NAME",
    "VERSION",
    "WANTED_NAME",
    "SignatureError",
    "as_object",
    "count",
    "dtype_of",
    "file_name",
    "flag",
    "list_of",
    "number",
    "numbers",
    "part",
    "shape_of",
    "text",
]

# What TorchServe takes in a URL path and a file name; also keeps names harmless in logs and JSON.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}")
WANTED_NAME = "wanted letters, digits, '.', '_' and '-'"


class SignatureError(ValueError):
    """A description that can't be right; the message is one line."""


def as_object(value: Any, where: str, known: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SignatureError(f"{where} is {value!r}, wanted an object")
    for name in value:
        if name not in known:
            raise SignatureError(f"{where} has an unknown field {name!r}, wanted {', '.join(known)}")
    return value


def list_of(fields: Mapping[str, Any], name: str, default: list[Any] | None = None) -> list[Any]:
    value = fields.get(name, default)
    if not isinstance(value, list):
        raise SignatureError(f"{name} is {value!r}, wanted an array")
    return value


def text(fields: Mapping[str, Any], name: str, where: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value:
        raise SignatureError(f"{name} of {where} is {value!r}, wanted a string")
    return value


def file_name(fields: Mapping[str, Any], where: str) -> str:
    name = text(fields, "file", where)
    if not NAME.fullmatch(name):
        raise SignatureError(f"file of {where} is {name!r}, {WANTED_NAME}")
    return name


def flag(fields: Mapping[str, Any], name: str, where: str, *, default: bool) -> bool:
    """A boolean field."""
    value = fields.get(name, default)
    if not isinstance(value, bool):
        raise SignatureError(f"{name} of {where} is {value!r}, wanted true or false")
    return value


def dtype_of(value: Any, where: str) -> np.dtype[Any]:
    names = [dtype.name for dtype in DATATYPES.values()]
    if value not in names:
        raise SignatureError(f"dtype of {where} is {value!r}, wanted one of {', '.join(names)}")
    found: np.dtype[Any] = np.dtype(value)
    return found


def shape_of(value: Any, field: str, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(size) is int and size >= 1 for size in value):
        raise SignatureError(f"{field} of {where} is {value!r}, wanted an array of sizes of at least 1")
    return tuple(value)


def count(value: Any, field: str, least: int = 0) -> int:
    if type(value) is not int or value < least:
        raise SignatureError(f"{field} is {value!r}, wanted an integer of at least {least}")
    return value


_NUMBER = re.compile(r"([+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)\s*(?:/\s*([0-9.]+))?")


def number(value: Any, field: str, where: str) -> float:
    """A finite number, or the text of one or of a fraction such as "1/255" (which says what it means)."""
    found: float | None = None
    try:
        if isinstance(value, int | float) and not isinstance(value, bool):
            found = float(value)
        elif isinstance(value, str) and (match := _NUMBER.fullmatch(value.strip())):
            found = float(match[1]) / float(match[2] or 1)
    except (ValueError, ZeroDivisionError, OverflowError):  # of these an integer of over 308 digits
        found = None
    if found is None or not math.isfinite(found):
        raise SignatureError(f'{field} of {where} is {value!r}, wanted a number or a fraction as "1/255"')
    return found


def part(value: Any, field: str, where: str) -> float:
    """A number from 0 to below 1, as `number` takes it."""
    found = number(value, field, where)
    if not 0 <= found < 1:
        raise SignatureError(f"{field} of {where} is {found:g}, wanted a number from 0 to below 1, such as 1e-4")
    return found


def numbers(value: Any, field: str, where: str) -> tuple[float, ...] | None:
    if value is None:
        return None
    items = value if isinstance(value, list) else [value]
    return tuple(number(item, field, where) for item in items)
