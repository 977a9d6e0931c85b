"""What a field of a frozen dataclass may hold, by its annotation: the value that it keeps, or what was wanted."""

from __future__ import annotations

import numbers
import operator
import os
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeAlias

from batch_client.errors import UsageError

__all__ = ["Place", "keep_kinds"]

# A URL or a path; a `pathlib.Path` is kept as its text.
Place: TypeAlias = str


def keep_kinds(made: Any, *classes: type) -> None:
    """Have each field of a frozen dataclass, whose annotations are texts, hold its kind: for `__post_init__`.
    `classes` are kinds beside the common ones. A field of any other kind, as a subclass may have, is left alone.

    Whole numbers of numpy become ints, lists tuples. Raises UsageError for what is no such value, such as "4".
    """
    kinds = _KINDS | {one.__name__: (_same(one), f"{one.__name__}(…)") for one in classes}
    for field in fields(made):
        value = getattr(made, field.name)
        kind = str(field.type).removesuffix(" | None")
        if kind in kinds and (value is not None or kind == field.type):
            object.__setattr__(made, field.name, _kept(field.name, value, *kinds[kind]))


def _kept(name: str, value: Any, keep: Callable[[Any], Any], wanted: str) -> Any:
    try:
        return keep(value)
    except (TypeError, ValueError, OverflowError):
        found = " ".join(repr(value).split())
        if "://" in found or name.startswith("token"):  # a URL may have a password, a command's words a secret
            found = f"is a {type(value).__name__}"
        raise UsageError(f"{name} {found[:100]}: wanted {wanted}") from None


def _same(kind: type) -> Callable[[Any], Any]:
    def keep(value: Any) -> Any:
        if not isinstance(value, kind):
            raise TypeError
        return value
    return keep


_text = _same(str)


def _whole(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError
    return float(value)


def _place(value: Any) -> str:
    place: str = _text(os.fspath(value))
    if "\0" in place:
        raise ValueError
    return place


def _several(keep: Callable[[Any], str]) -> Callable[[Any], tuple[str, ...]]:
    def kept(value: Any) -> tuple[str, ...]:
        if isinstance(value, str):  # of which each letter is one
            raise TypeError
        return tuple(keep(item) for item in value)
    return kept


def _pair(value: Any) -> tuple[int, int]:
    first, second = value
    return _whole(first), _whole(second)


# Annotation → what makes the value to keep of a value, and what people call the kind.
_KINDS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "Place": (_place, "a URL or a path"),
    "tuple[Place, ...]": (_several(_place), "a tuple of paths"),
    "str": (_text, "text"),
    "int": (_whole, "a whole number"),
    "float": (_number, "a number"),
    "bool": (_same(bool), "True or False"),
    "tuple[str, ...]": (_several(_text), "a tuple of texts"),
    "tuple[int, int]": (_pair, "two whole numbers, such as (1, 8)"),
}
