"""Is what the documentation tells to do still right?"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from paceline.cli import app
from paceline.config import load
from paceline.engines.emulated import load_engines
from paceline.simulator.load import load_scenario
from paceline.simulator.simulation import play

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```(\w+)(?: title=\S+)?\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
SECRETS = {"ACME_KEY": "a", "ENGINE_KEY": "b", "OLD": "c", "NEW": "d"}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[str]:
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [text for language, text in found if language in languages]


def test_the_reference_is_what_the_code_says() -> None:
    command = [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_configuration_in_the_docs_can_be_used(page: Path, tmp_path: Path) -> None:
    for name in ("cert.pem", "key.pem"):
        (tmp_path / name).touch()
    for shown in blocks(page, "yaml"):
        text = re.sub(r"/(etc|var/log)/paceline", str(tmp_path), shown)
        file = tmp_path / "shown.yaml"
        settings: dict[str, Any] = yaml.safe_load(text)
        if "engines" in settings:
            file.write_text(text)
            assert load_engines(file)
        elif "requests" in settings:
            file.write_text(text.replace("examples/", f"{ROOT}/examples/"))
            assert load_scenario(file).requests
        elif "scrape_configs" not in settings:
            worker = {"name": "m", "workers": [{"url": "http://127.0.0.1:1"}]}
            file.write_text(yaml.safe_dump({"models": [worker], **settings}))
            assert load(file, SECRETS).models


def test_the_examples_can_be_used() -> None:
    assert load(ROOT / "examples" / "paceline.yaml", SECRETS).models
    assert load_engines(ROOT / "examples" / "engines.yaml")


@pytest.mark.parametrize("file", sorted((ROOT / "scenarios").glob("*.yaml")), ids=name_of)
def test_every_scenario_can_be_played(file: Path) -> None:
    scenario = load_scenario(file, [("seconds", "5"), ("warmup_s", "0"), ("faults", "[]")])
    assert play(scenario, "headroom", seed=1).total.requests


def command_lines(page: Path) -> Iterator[list[str]]:
    """Every `paceline …` that a reader is told to type."""
    for text in blocks(page, "bash"):
        for line in text.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|\||;", line):
                words = shlex.split(part.removesuffix("&"), comments=True)
                while words and "=" in words[0]:
                    words.pop(0)
                if words[:1] == ["paceline"]:
                    yield words[1:]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_in_the_docs_is_understood(page: Path) -> None:
    group: Any = typer.main.get_command(app)
    for words in command_lines(page):
        if words == ["--version"]:
            continue
        command = group.commands[words[0]]
        with command.make_context(words[0], words[1:], resilient_parsing=False):
            pass


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_make_target_in_the_docs_is_there(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`make ([a-z -]+)`", text)
    named += [line for block in blocks(page, "bash") for line in re.findall(r"^make (.*)", block)]
    for words in named:
        assert set(words.partition("#")[0].split()) <= targets


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith(("http:", "https:")):
            continue
        other = (page.parent / target).resolve() if target else page
        assert other.exists(), f"{target} is not there"
        if anchor:
            slugs = {slug(text) for text in HEADING.findall(other.read_text(encoding="utf-8"))}
            assert anchor in slugs, f"{target} has no {anchor}"


def slug(heading: str) -> str:
    """How a heading is linked to."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_in_the_docs_compiles(page: Path) -> None:
    for text in blocks(page, "python"):
        compile(text, name_of(page), "exec")
