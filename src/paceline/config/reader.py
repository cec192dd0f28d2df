"""How does text become settings, and where exactly does it not?

The reader walks the YAML nodes along the types of the settings. It knows the place and line of
every node and goes on after a problem, so that one look at the complaints is enough to mend the
file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import repeat
from math import isfinite
from operator import itemgetter
from typing import Any, TypeVar

import msgspec
import yaml
from msgspec import UNSET, inspect

from paceline.config.settings import LATER
from paceline.config.wording import Number, advice, bare, expected, parser, unknown_key

T = TypeVar("T", bound=msgspec.Struct)

VARIABLE = re.compile(r"(\$?)\$\{(?:([A-Za-z_]\w*)(?::-([^}]*))?\})?")
"""`${NAME}`, `${NAME:-default}`, and `$${` for a plain `${`."""

NULL = "tag:yaml.org,2002:null"
BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
SHAPES = {yaml.ScalarNode: "a single value", yaml.SequenceNode: "a list", yaml.MappingNode: "a map"}
LAST_STEP = re.compile(r"(^|\.)[^.\[]*$|\[\d+\]$")


class Reader:
    """Reads one text and collects what is wrong with it."""

    def __init__(self, environ: Mapping[str, str], source: str) -> None:
        self._environ = environ
        self._source = source
        self._lines: dict[str, int] = {}
        self._elsewhere: dict[str, str] = {}
        self._complaints: list[tuple[str, str]] = []

    def read(
        self, text: str, root: type[T], change: Callable[[yaml.Node], None] = lambda node: None
    ) -> T | None:
        """The settings, as far as they could be read; see `problems`.

        `change` may edit what is written before it is looked at. None: what is needed is missing.
        """
        value = None
        try:
            self._loader = yaml.SafeLoader(text)
            node = self._loader.get_single_node()
            if node:
                change(node)
            value = self._value(node, inspect.type_info(root), "") if node else None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            self._lines[""] = mark.line + 1 if mark else 1
            why = getattr(error, "problem", None) or getattr(error, "reason", None)
            self.complain("", f"this is not YAML: {why or 'unreadable'}")
        return value if isinstance(value, root) else None

    def complain(self, place: str, what: str) -> None:
        """Note a problem at a place such as `models[0].workers[1].url`."""
        self._complaints.append((place, what))

    def comes_from(self, place: str, source: str) -> None:
        """What stands at this place and below it was not in the text, but came from this source."""
        self._elsewhere[place] = source

    def is_sound(self, place: str) -> bool:
        """Has nothing been wrong at this place or below it?"""
        return not any(_within(wrong, place) for wrong, _ in self._complaints)

    def problems(self) -> list[str]:
        """One sentence for each problem, in the order of the text."""
        placed = sorted(
            ((self._line(at), at, what) for at, what in self._complaints), key=itemgetter(0)
        )
        return [
            f"{self._from(at, line)}: {at}{': ' if at else ''}{what}" for line, at, what in placed
        ]

    def _from(self, place: str, line: int) -> str:
        """Where one finds it: the last that put something there, else the text."""
        others = [source for at, source in self._elsewhere.items() if _within(place, at)]
        return others[-1] if others else f"{self._source}:{line}"

    def _line(self, place: str) -> int:
        """The line of a place, or of the nearest one around it that the text has."""
        while place and place not in self._lines:
            place = LAST_STEP.sub("", place)
        return self._lines.get(place, 1)

    def _value(self, node: yaml.Node, kind: inspect.Type, at: str) -> Any:
        """What the node says; None where it says nothing, UNSET after a complaint."""
        self._lines[at] = node.start_mark.line + 1
        match bare(kind), node:
            case _, yaml.ScalarNode():
                return self._scalar(node, kind, at)
            case inspect.StructType() as struct, yaml.MappingNode() if not parser(struct):
                return self._struct(node, struct, at)
            case inspect.DictType(value_type=item), yaml.MappingNode():
                pairs = [
                    (key, self._item(v, item, _under(at, key))) for key, v in self._pairs(node, at)
                ]
                return {key: value for key, value in pairs if value is not UNSET}
            case inspect.VarTupleType(item_type=item), yaml.SequenceNode():
                return self._tuple(node, repeat(item), at)
            case inspect.TupleType(item_types=items), yaml.SequenceNode():
                if len(items) == len(node.value):
                    return self._tuple(node, items, at)
                self.complain(at, f"expected {expected(kind)}, got {len(node.value)}")
                return UNSET
        self.complain(at, f"expected {expected(kind)}, got {SHAPES[type(node)]}")
        return UNSET

    def _item(self, node: yaml.Node, kind: inspect.Type, at: str) -> Any:
        """A value that has no default to fall back to."""
        value = self._value(node, kind, at)
        if value is None:
            self.complain(at, f"expected {expected(kind)}, got nothing")
        return UNSET if value is None else value

    def _tuple(self, node: yaml.SequenceNode, kinds: Iterable[inspect.Type], at: str) -> Any:
        pairs = enumerate(zip(node.value, kinds, strict=False))
        values = [self._item(item, kind, f"{at}[{i}]") for i, (item, kind) in pairs]
        return UNSET if UNSET in values else tuple(values)

    def _struct(self, node: yaml.MappingNode, kind: inspect.StructType, at: str) -> Any:
        fields = {field.encode_name: field for field in kind.fields}
        values: dict[str, Any] = {}
        for key, item in self._pairs(node, at):
            place = _under(at, key)
            if key in fields:
                values[key] = self._value(item, fields[key].type, place)
                continue
            self._lines[place] = item.start_mark.line + 1
            if not at and key in LATER:
                self.complain(place, "comes with a later version of Paceline")
            else:
                types = {name: field.type for name, field in fields.items()}
                self.complain(place, unknown_key(key, types))
        for key, field in fields.items():
            if field.required and values.get(key) is None:
                self.complain(_under(at, key), f"missing: {expected(field.type)}")
                values[key] = UNSET
        known = {fields[k].name: v for k, v in values.items() if v is not None and v is not UNSET}
        if any(field.required and field.name not in known for field in kind.fields):
            return UNSET
        return kind.cls(**known)

    def _pairs(self, node: yaml.MappingNode, at: str) -> list[tuple[str, yaml.Node]]:
        """Keys and values, with YAML's merge key `<<` resolved."""
        written: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.complain(at, f"expected single words as keys, got {SHAPES[type(key)]}")
            elif key.value in written:
                self.complain(_under(at, key.value), "written twice")
            else:
                written.add(key.value)
        self._loader.flatten_mapping(node)
        pairs = {k.value: (k, v) for k, v in node.value if isinstance(k, yaml.ScalarNode)}
        node.value = list(pairs.values())  # an alias may lead here again
        return [(key.value, value) for key, value in node.value]

    def _scalar(self, node: yaml.ScalarNode, kind: inspect.Type, at: str) -> Any:
        filled = self._filled(node, at)
        if filled is None:
            return UNSET
        if filled.tag == NULL:
            return None
        text, quoted = filled.value, filled.style is not None
        read = parser(bare(kind))
        if read is not None:
            try:
                return read(text)
            except ValueError as error:  # what was written may be a secret and is not repeated
                self.complain(at, f"expected {error}")
                return UNSET
        value = _plain_value(text, quoted, bare(kind))
        if value is UNSET:
            shown = repr(text if len(text) <= 40 else f"{text[:40]}…")
            only_quotes = quoted and _plain_value(text, False, bare(kind)) is not UNSET
            hint = ": write it without quotes" if only_quotes else advice(text, kind)
            self.complain(at, f"expected {expected(kind)}, got {shown}{hint}")
        return value

    def _filled(self, node: yaml.ScalarNode, at: str) -> yaml.ScalarNode | None:
        """The node with the environment put in, which counts as written without quotes."""
        if "${" not in node.value:
            return node
        complaints = len(self._complaints)

        def fill(variable: re.Match[str]) -> str:
            escaped, name, default = variable.groups()
            if escaped:
                return variable[0][1:]
            if name is None:
                self.complain(at, "a broken ${…}: write ${NAME}, ${NAME:-default}, or $${ for ${")
                return ""
            value = self._environ.get(name)
            if value is None and default is None:
                self.complain(at, f"{name} is not set in the environment")
            return value or default or ""

        text = VARIABLE.sub(fill, node.value)
        if len(self._complaints) > complaints:
            return None
        tag = self._loader.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
        return yaml.ScalarNode(tag, text, node.start_mark, node.end_mark)


def _plain_value(text: str, quoted: bool, kind: inspect.Type) -> Any:
    """The text as a value of this type, UNSET if it is none."""
    match kind:
        case inspect.StrType(min_length=least, max_length=most):
            fits = len(text) >= (least or 0) and (most is None or len(text) <= most)
            return text if fits else UNSET
        case inspect.LiteralType(values=values):
            return text if text in values else UNSET
        case inspect.BoolType() if not quoted:
            return BOOLS.get(text.lower(), UNSET)
        case inspect.FloatType() | inspect.IntType() if not quoted:
            return _number(text, kind)
    return UNSET


def _number(text: str, kind: Number) -> Any:
    """The number if it is within the range. Whole numbers may be written as 2e5."""
    try:
        number = float(text)
    except ValueError:
        return UNSET
    fits = (
        isfinite(number)
        and (kind.gt is None or number > kind.gt)
        and (kind.ge is None or number >= kind.ge)
        and (kind.lt is None or number < kind.lt)
        and (kind.le is None or number <= kind.le)
    )
    if not fits:
        return UNSET
    if isinstance(kind, inspect.FloatType):
        return number
    return int(number) if number.is_integer() else UNSET


def _under(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key


def _within(place: str, around: str) -> bool:
    """Is it this place, or one below it?"""
    return place.startswith(around) and place[len(around) : len(around) + 1] in ("", ".", "[")
