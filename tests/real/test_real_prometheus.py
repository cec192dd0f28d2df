"""Does Prometheus itself understand what Paceline says, and what it is told to alert on?"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from install import prometheus_tool
from live import free_port

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
PROMTOOL, PROMETHEUS = prometheus_tool("promtool"), prometheus_tool("prometheus")

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        PROMTOOL is None or PROMETHEUS is None,
        reason="Prometheus is not installed: python tests/real/install.py prometheus",
    ),
]


def promtool(*arguments: str, told: bytes = b"") -> str:
    """Its words; it must be content."""
    command = [str(PROMTOOL), *arguments]
    done = subprocess.run(
        command, input=told, capture_output=True, cwd=ROOT, check=False, timeout=60
    )
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, said
    return said


def test_the_alert_rules_are_sound_and_fire_when_they_should() -> None:
    promtool("check", "rules", "deploy/prometheus/rules.yaml")
    promtool("test", "rules", "deploy/prometheus/rules_test.yaml")


@contextmanager
def running(*command: str) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(20)


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=5) as answer:
        body: bytes = answer.read()
        return body


def eventually(ask: Any, seconds: float = 30.0) -> Any:
    """What is said once there is something to say."""
    give_up = time.monotonic() + seconds
    while True:
        try:
            if said := ask():
                return said
        except (urllib.error.URLError, ConnectionError) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                raise
        assert time.monotonic() < give_up, "it never came"
        time.sleep(0.1)


def test_a_real_prometheus_scrapes_a_gateway_and_understands_every_panel(tmp_path: Path) -> None:
    engine, clients, admin, prometheus = (free_port() for _ in range(4))
    config = {
        "listen": f"127.0.0.1:{clients}",
        "admin": f"127.0.0.1:{admin}",
        "models": [{"name": "m", "workers": [{"url": f"http://127.0.0.1:{engine}"}]}],
        "tiers": {"standard": {"ttft_s": 5.0, "attain": 0.99}},
    }
    (tmp_path / "paceline.yaml").write_text(json.dumps(config))
    scrape = {"job_name": "paceline", "static_configs": [{"targets": [f"127.0.0.1:{admin}"]}]}
    told = {
        "global": {"scrape_interval": "250ms", "evaluation_interval": "250ms"},
        "rule_files": [str(DEPLOY / "prometheus" / "rules.yaml")],
        "scrape_configs": [scrape],
    }
    (tmp_path / "prometheus.yml").write_text(json.dumps(told))
    paceline = (sys.executable, "-m", "paceline")
    with ExitStack() as stack:
        emulated = ("engine", "--emulate", "tiny", "--name", "m", "--port", str(engine))
        stack.enter_context(running(*paceline, *emulated))
        serve = ("serve", "--config", str(tmp_path / "paceline.yaml"))
        stack.enter_context(running(*paceline, *serve))
        eventually(lambda: get(f"http://127.0.0.1:{admin}/health/ready"))
        body = json.dumps({"model": "m", "prompt": "x", "stream": True, "max_tokens": 5}).encode()
        kind = {"content-type": "application/json"}
        for _ in range(5):
            url = f"http://127.0.0.1:{clients}/v1/completions"
            asked = urllib.request.Request(url, body, kind)
            with urllib.request.urlopen(asked, timeout=20) as answer:
                answer.read()
        promtool("check", "metrics", told=get(f"http://127.0.0.1:{admin}/metrics"))
        stack.enter_context(
            running(
                str(PROMETHEUS),
                f"--config.file={tmp_path / 'prometheus.yml'}",
                f"--storage.tsdb.path={tmp_path / 'data'}",
                f"--web.listen-address=127.0.0.1:{prometheus}",
            )
        )

        def query(expression: str) -> list[Any]:
            asked = urllib.parse.urlencode({"query": expression})
            told = json.loads(get(f"http://127.0.0.1:{prometheus}/api/v1/query?{asked}"))
            found: list[Any] = told["data"]["result"]
            return found

        (up,) = eventually(lambda: query("up"))
        assert up["value"][1] == "1"
        (kept,) = eventually(lambda: query("sum by (tier) (paceline_promises_kept_total)"))
        assert kept["metric"] == {"tier": "standard"}
        assert kept["value"][1] == "5"
        (allowed,) = eventually(lambda: query("tier:paceline_allowed:ratio"))
        assert float(allowed["value"][1]) == pytest.approx(0.01)
        assert query('ALERTS{alertname=~"Paceline.*"}') == []
        for panel in json.loads((DEPLOY / "grafana" / "paceline.json").read_text())["panels"]:
            for target in panel.get("targets", ()):
                expression = target["expr"].replace("$__rate_interval", "5s")
                query(re.sub(r"\$(model|tier)", ".*", expression))
