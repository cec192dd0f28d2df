"""How is HTML or SVG written, so that no text becomes markup by accident?"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape


class Markup(str):
    """Text that is HTML or SVG already, and is not escaped again."""

    __slots__ = ()


def tag(name: str, *children: str, **attributes: str | float) -> Markup:
    """An element. `_` stands for `-` in names of attributes, and `class_` for `class`."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(plain(value))}"'
        for key, value in attributes.items()
    )
    return Markup(f"<{name}{given}>{join(children)}</{name}>")


def join(children: Iterable[str]) -> Markup:
    return Markup("".join(c if isinstance(c, Markup) else escape(c) for c in children))


def plain(value: str | float) -> str:
    """As it stands in an attribute: pixels to a tenth."""
    return value if isinstance(value, str) else f"{round(value, 1):g}"
