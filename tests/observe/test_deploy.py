"""Do alerts and dashboards name what Paceline really exports?"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parent.parent.parent
RULES = ROOT / "deploy" / "prometheus" / "rules.yaml"
GRAFANA = ROOT / "deploy" / "grafana"
METRIC = re.compile(r"(?<!:)\bpaceline_\w+")


def exposition() -> str:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text: str = module.exposition()
    return text


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """All series by name, each with its labels."""
    series: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(exposition()):
        for sample in family.samples:
            series.setdefault(sample.name, set()).update(sample.labels)
    return series


def expressions() -> list[str]:
    rules = yaml.safe_load(RULES.read_text())
    alerts = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    dashboard = json.loads((GRAFANA / "paceline.json").read_text())
    panels = [target["expr"] for p in dashboard["panels"] for target in p.get("targets", ())]
    choices: list[Any] = [v["query"] for v in dashboard["templating"]["list"]]
    return [*alerts, *panels, *choices]


def test_every_metric_of_an_alert_or_a_panel_exists(exported: dict[str, set[str]]) -> None:
    named = {name for text in expressions() for name in METRIC.findall(text)}
    assert len(named) > 20
    assert named <= set(exported), named - set(exported)


def test_every_label_that_is_asked_by_exists(exported: dict[str, set[str]]) -> None:
    labels = set().union(*exported.values()) | {"job"}
    for text in expressions():
        asked = {
            x.strip() for group in re.findall(r"by \(([^)]*)\)", text) for x in group.split(",")
        }
        asked |= set(re.findall(r"[{,]\s*(\w+)=~?\"", text))
        assert asked <= labels, text


def test_the_grafana_dashboard_is_what_its_script_writes() -> None:
    command = [sys.executable, str(GRAFANA / "generate.py"), "--check"]
    assert subprocess.run(command, check=False, timeout=30).returncode == 0


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads((GRAFANA / "paceline.json").read_text())["panels"]:
        place = panel["gridPos"]
        across = range(place["x"], place["x"] + place["w"])
        cells = {(x, y) for x in across for y in range(place["y"], place["y"] + place["h"])}
        assert place["x"] + place["w"] <= 24
        assert not cells & taken
        taken |= cells


def unknown(ours: Any, theirs: Any, at: str = "") -> Iterator[str]:
    """Where a dashboard says what Grafana's own types do not take up."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key, value in ours.items():
            yield from unknown(value, theirs[key], f"{at}.{key}") if key in theirs else [at + key]
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            yield from unknown(mine, other, f"{at}[{i}]")
    elif ours != theirs:
        yield at


def test_grafanas_own_types_take_up_all_that_the_dashboard_says() -> None:
    types = pytest.importorskip("grafana_foundation_sdk.models.dashboard")
    common = pytest.importorskip("grafana_foundation_sdk.models.common")
    plugins = pytest.importorskip("grafana_foundation_sdk.cog.plugins")
    encoder = pytest.importorskip("grafana_foundation_sdk.cog.encoder")
    plugins.register_default_plugins()
    ours = json.loads((GRAFANA / "paceline.json").read_text())

    def taken_up() -> Any:
        return json.loads(encoder.JSONEncoder().encode(types.Dashboard.from_json(ours)))

    assert list(unknown(ours, taken_up())) == []
    for variable in ours["templating"]["list"]:
        types.VariableType(variable["type"])
        types.VariableRefresh(variable.get("refresh", 0))
    for panel in ours["panels"]:
        if panel["type"] == "timeseries":
            common.LegendDisplayMode(panel["options"]["legend"]["displayMode"])
            common.LegendPlacement(panel["options"]["legend"]["placement"])
            common.TooltipDisplayMode(panel["options"]["tooltip"]["mode"])
            common.SortOrder(panel["options"]["tooltip"]["sort"])
    ours["panels"][1]["options"]["legend"]["palcement"] = "bottom"
    assert [place[-9:] for place in unknown(ours, taken_up())] == ["palcement"]
