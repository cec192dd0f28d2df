"""Does the repository keep the rules that it gives itself?"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import typer

from paceline.cli import app
from paceline.config import settings
from paceline.gateway.flavors import FLAVORS
from paceline.policy.route import POLICIES

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "paceline"
REFERENCE = ROOT / "docs" / "reference"

PURE = ("domain", "policy", "kernel", "enginemodel")
IMPURE = frozenset((
    "aiohttp", "asyncio", "datetime", "httptools", "logging", "os", "pathlib",
    "prometheus_client", "random", "requests", "secrets", "select", "selectors", "socket",
    "starlette", "structlog", "subprocess", "threading", "time", "uuid", "uvicorn", "uvloop",
))  # fmt: skip
CHANCE_ALLOWED = {"enginemodel": frozenset({"Random"})}
"""Names that may be imported from `random` for annotations: a generator that is passed in."""

MOST_LINES = 450
PRIVATE = ("/" + "work/", "shared" + "/")
"""Paths of no reader's machine. (Put together here, so that this file does not hold them.)"""


def source_files(*packages: str) -> list[Path]:
    folders = [SOURCE / package for package in packages] or [SOURCE]
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_imports_point_one_way() -> None:
    # In a process of its own: it disables the loggers that there are.
    lint = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()"]
    found = subprocess.run(lint, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("path", source_files(*PURE), ids=name_of)
def test_the_core_touches_neither_world_nor_clock_nor_chance(path: Path) -> None:
    allowed = CHANCE_ALLOWED.get(path.relative_to(SOURCE).parts[0], frozenset())
    assert list(impurities(ast.parse(path.read_text()), allowed)) == []


def impurities(tree: ast.AST, allowed: frozenset[str]) -> Iterator[str]:
    """What a pure module must not name, each with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named = {alias.name.partition(".")[0] for alias in node.names}
            bad = named & IMPURE | ({"numpy.random"} & {alias.name for alias in node.names})
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = {alias.name for alias in node.names}
            if module == "random" and names <= allowed:
                continue
            bad = {module.partition(".")[0]} & IMPURE
            bad |= {module} & {"numpy.random"}
        elif isinstance(node, ast.Attribute) and node.attr == "random":
            bad = (
                {"random"} if isinstance(node.value, ast.Name) and node.value.id == "np" else set()
            )
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            bad = {node.func.id} & {"open", "print", "input", "exec", "eval"}
        else:
            continue
        yield from (f"line {getattr(node, 'lineno', 0)}: {name}" for name in sorted(bad))


@pytest.mark.parametrize("text", ["import time", "from random import random", "np.random.normal()"])
def test_impurity_is_seen(text: str) -> None:
    assert list(impurities(ast.parse(text), frozenset({"Random"})))


@pytest.mark.parametrize("path", source_files(), ids=name_of)
def test_a_file_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize("path", source_files(), ids=name_of)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert path.name == "__main__.py" or ast.get_docstring(ast.parse(path.read_text()))


def test_nothing_names_a_path_of_one_machine() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.is_file() and path.suffix not in {".png", ".gguf"}:
            text = path.read_text(encoding="utf-8", errors="replace")
            found = [word for word in PRIVATE if word in text.replace("../" + PRIVATE[1], "")]
            assert not found, f"{name} names {found}"


# What can be used is described.


def test_every_setting_is_described_in_the_code_and_in_the_reference() -> None:
    page = (REFERENCE / "config.md").read_text()
    tree = ast.parse(Path(settings.__file__).read_text())
    for node in tree.body:
        struct = getattr(settings, getattr(node, "name", ""), None)
        if not (isinstance(node, ast.ClassDef) and isinstance(struct, type)):
            continue
        assert issubclass(struct, msgspec.Struct)
        for field, text in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                assert isinstance(text, ast.Expr), f"{node.name}.{field.target.id} says nothing"
        for info in msgspec.structs.fields(struct):
            assert f"`{info.encode_name}`" in page, f"{node.name}.{info.encode_name}"


def test_every_command_and_option_stands_in_the_reference() -> None:
    page = (REFERENCE / "cli.md").read_text()
    group = typer.main.get_command(app)
    for name, command in getattr(group, "commands").items():  # noqa: B009 (of a click Group)
        assert f"## paceline {name}\n" in page
        section = page.split(f"## paceline {name}\n")[1].split("\n## ")[0]
        for option in command.params:
            assert all(word in section for word in option.opts if word.startswith("-")), option


def test_every_policy_stands_in_the_reference() -> None:
    page = (REFERENCE / "policies.md").read_text()
    assert all(f"`{name}`" in page for name in POLICIES)


def test_every_metric_and_endpoint_in_the_code_stands_in_the_reference() -> None:
    http, metrics = ((REFERENCE / f"{name}.md").read_text() for name in ("http", "metrics"))
    emulated = (REFERENCE / "emulated-engine.md").read_text()
    assert all(f"`{path}`" in http for path in FLAVORS)
    for path in source_files("gateway", "observe", "engines"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Route":
                route = ast.literal_eval(node.args[0]).replace(":path", "")
                assert f"`{route}`" in http, route
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                if node.value.startswith("/emulate/"):
                    assert node.value in emulated, node.value
                elif path.parent.name == "observe" and node.value.startswith("paceline_"):
                    assert f"`{node.value}" in metrics or node.value.endswith("_"), node.value
