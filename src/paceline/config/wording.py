"""In which words is a setting expected, and what is advised instead of a wrong one?"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from msgspec import inspect

Number = inspect.FloatType | inspect.IntType

WITH_UNIT = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-zµ]+)\s*")
SECONDS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400}
SYNONYMS = {"tpot_s": "itl_s", "tpot_ms": "itl_s", "base_url": "url"}
"""What others call a setting, where no likeness of letters leads to its name here."""


def present(kind: inspect.Type) -> inspect.Type:
    """`T` for `T | None`, the only union in the settings."""
    if isinstance(kind, inspect.UnionType):
        return next(t for t in kind.types if not isinstance(t, inspect.NoneType))
    return kind


def bare(kind: inspect.Type) -> inspect.Type:
    """The type without its description."""
    kind = present(kind)
    return kind.type if isinstance(kind, inspect.Metadata) else kind


def parser(kind: inspect.Type) -> Callable[[str], Any] | None:
    """How a type of `values` reads itself; None for all others."""
    return getattr(getattr(kind, "cls", None), "parse", None)


def expected(kind: inspect.Type) -> str:
    """The end of a sentence that begins with "expected"."""
    match bare(kind):
        case inspect.StructType() | inspect.CustomType() as parsed if read := parser(parsed):
            return _refusal_of_nothing(read)
        case inspect.StructType() | inspect.DictType():
            return "a map"
        case inspect.VarTupleType(item_type=item):
            return f"a list, each item {expected(item)}"
        case inspect.TupleType(item_types=items):
            return f"a list of {len(items)}: {', '.join(map(expected, items))}"
        case inspect.LiteralType(values=values):
            return f"one of {', '.join(map(str, values))}"
        case inspect.BoolType():
            return "true or false"
        case inspect.FloatType() | inspect.IntType() as number:
            return f"{_description(kind)} {_range(number)}"
        case inspect.StrType(max_length=most) if most is not None:
            return f"a text of 1 to {most} characters"
    return "a text"


def advice(text: str, kind: inspect.Type) -> str:
    """How to write what was probably meant."""
    inner = bare(kind)
    if isinstance(inner, inspect.LiteralType):
        near = nearest(text, map(str, inner.values))
        return f", did you mean {near}?" if near else ""
    with_unit = WITH_UNIT.fullmatch(text)
    if with_unit is None or not isinstance(inner, Number):
        return ""
    number, unit = with_unit.groups()
    if _description(kind).startswith("seconds") and unit.lower() in SECONDS:
        return f": write {float(number) * SECONDS[unit.lower()]:.12g}"
    return ": write the number alone"


def unknown_key(key: str, fields: Mapping[str, inspect.Type]) -> str:
    """What to say of a key that no setting has."""
    synonym = SYNONYMS.get(key, "")
    near = synonym if synonym in fields else nearest(key, fields)
    if not near:
        return f"unknown key, known are {', '.join(fields)}"
    kind = present(fields[near])
    takes = f" ({expected(kind)})" if isinstance(kind, inspect.Metadata) else ""
    return f"unknown key, did you mean {near}{takes}?"


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word that was probably meant, or an empty text."""
    return next(iter(get_close_matches(word, list(known), 1)), "")


def _description(kind: inspect.Type) -> str:
    kind = present(kind)
    schema = kind.extra_json_schema if isinstance(kind, inspect.Metadata) else None
    return str((schema or {}).get("description", "a number"))


def _range(kind: Number) -> str:
    bounds = (
        ("above", kind.gt),
        ("of at least", kind.ge),
        ("below", kind.lt),
        ("at most", kind.le),
    )
    return " and ".join(f"{word} {bound:,.15g}" for word, bound in bounds if bound is not None)


def _refusal_of_nothing(read: Callable[[str], Any]) -> str:
    """The types of `values` say in their refusals what they want."""
    try:
        read("")
    except ValueError as error:
        return str(error)
    return "a text"
