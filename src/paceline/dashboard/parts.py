"""What do the sections of the page have in common?"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Literal
from urllib.parse import urlencode

import msgspec

from paceline.dashboard.source import Missing
from paceline.markup import Markup, tag

SPANS = {"1min": 60, "": 600, "1h": 3600}


class View(msgspec.Struct, frozen=True):
    """What somebody looks at: the query of the page's address."""

    model: str = ""
    """Only its workers; empty: all."""
    worker: str = ""
    """The one that is looked at closely; empty: none."""
    show: str = ""
    """Kind of decisions; empty: all."""
    span: str = ""
    """Of the charts over time, a word of `SPANS`; empty: ten minutes."""

    @property
    def seconds(self) -> int:
        """That the charts look back."""
        return SPANS.get(self.span, SPANS[""])

    def link(self, anchor: str = "", **changes: str) -> str:
        """The address of the page after these changes."""
        given = {**msgspec.structs.asdict(self), **changes}
        query = urlencode({key: value for key, value in given.items() if value})
        return f"?{query}" + (f"#{anchor}" if anchor else "")


def section(name: str, title: str, *content: str, note: str = "") -> Markup:
    """A part of the page that can be jumped to. The note stands beside the title."""
    head = [tag("h2", title, id=f"{name}-title")]
    if note:
        head.append(tag("p", note, class_="note"))
    return tag(
        "section",
        tag("div", *head, class_="head"),
        *content,
        id=name,
        aria_labelledby=f"{name}-title",
    )


def empty(says: str, what_to_do: str = "") -> Markup:
    """There is nothing to show, and why."""
    return tag("p", tag("strong", says), " ", what_to_do, class_="empty")


def missing(answer: Missing, what: str) -> Markup:
    """The gateway gave no answer to what would stand here."""
    return empty(f"No {what}.", answer.because)


def table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], look: str = "", caption: str = ""
) -> Markup:
    """The first cell of a row names it. A head that ends with a space is aligned to the left."""
    left = [head.endswith(" ") for head in heads]
    named = zip(heads, left, strict=True)
    top = tag("tr", *(_cell("th", head.strip(), text, scope="col") for head, text in named))
    body = []
    for row in rows:
        cells = [tag("th", row[0], scope="row")]
        cells += [_cell("td", cell, text) for cell, text in zip(row[1:], left[1:], strict=True)]
        body.append(tag("tr", *cells))
    said = [tag("caption", caption)] if caption else []
    inner = tag("table", *said, tag("thead", top), tag("tbody", *body), class_=look or "plain")
    return tag(
        "div", inner, class_="scroll", tabindex=0, role="region", aria_label=caption or "table"
    )


def _cell(name: Literal["th", "td"], content: str, text: bool, **given: str) -> Markup:
    return tag(name, content, **given, **({"class_": "text"} if text else {}))


def bar(share: float | None, look: str = "") -> Markup:
    """How full something is. What it says stands beside it in words."""
    width = min(max(share or 0.0, 0.0), 1.0)
    fill = tag("i", style=f"width:{width:.1%}")
    return tag("span", fill, class_=f"bar {look}".strip(), aria_hidden="true")


def chips(name: str, choices: Iterable[tuple[str, str, bool]]) -> Markup:
    """Links of which one is chosen: text, address, whether it is this one."""
    links = [
        tag("a", text, href=href, **({"aria_current": "true"} if chosen else {}))
        for text, href, chosen in choices
    ]
    return tag("nav", *links, class_="chips", aria_label=name)


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Names without what all have in common, before and after, cut where a part of a name ends."""
    if len(names) < 2:
        return {name: name for name in names}
    before = _common([[*re.split(r"(?<=[.:/-])", name)][:-1] for name in names])
    after = _common([re.split(r"(?=[.:/-])", name)[:0:-1] for name in names])
    start, end = sum(map(len, before)), sum(map(len, after))
    if any(len(name) <= start + end for name in names):
        return {name: name for name in names}
    return {name: name[start : len(name) - end] for name in names}


def _common(lists: Sequence[Sequence[str]]) -> list[str]:
    """The pieces that all lists begin with."""
    alike = takewhile(lambda pieces: len(set(pieces)) == 1, zip(*lists, strict=False))
    return [pieces[0] for pieces in alike]
