"""What does an operator see in Grafana? Writes paceline.json beside this file.

python deploy/grafana/generate.py            write it anew
python deploy/grafana/generate.py --check    exit 1 if it is not what stands here
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).with_name("paceline.json")
SOURCE = {"type": "prometheus", "uid": "${source}"}
WHERE = '{model=~"$model", tier=~"$tier"}'
OF_MODEL = '{model=~"$model"}'
Panel = dict[str, Any]
Query = tuple[str, str]
"""What is asked, and how its series are called."""

HALF, THIRD = 12, 8
"""Widths of panels, of 24."""
PANEL_HEIGHT = 8
LEGEND = {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []}


def quantile(share: float, name: str, by: str = "tier") -> Query:
    rate = f"sum by (le, {by}) (rate(paceline_{name}_bucket{WHERE}[$__rate_interval]))"
    return f"histogram_quantile({share}, {rate})", f"{{{{{by}}}}} p{share * 100:g}"


def per_second(metric: str, by: str, where: str = WHERE) -> Query:
    total = f"sum by ({by}) (rate(paceline_{metric}{where}[$__rate_interval]))"
    return total, " ".join(f"{{{{{label}}}}}" for label in by.split(", "))


def gauge(metric: str, where: str = OF_MODEL) -> Query:
    return f"paceline_worker_{metric}{where}", "{{worker}}"


KEPT = (
    f"sum by (tier) (rate(paceline_promises_kept_total{WHERE}[$__rate_interval]))"
    f" / sum by (tier) (rate(paceline_requests_total{WHERE}[$__rate_interval]))"
)
ALLOWED = 'on (tier) (1 - min by (tier) (paceline_tier_attain{tier=~"$tier"}))'

ROWS: list[tuple[str, int, list[tuple[str, str, list[Query]]]]] = [
    (
        "Promises",
        HALF,
        [
            ("Promises kept", "percentunit", [(KEPT, "{{tier}}")]),
            (
                "Burn: promises broken over those that may be",
                "none",
                [(f"(1 - {KEPT}) / {ALLOWED}", "{{tier}}")],
            ),
        ],
    ),
    (
        "Timing",
        THIRD,
        [
            (
                "Time to first token",
                "s",
                [quantile(share, "time_to_first_token_seconds") for share in (0.5, 0.99)],
            ),
            (
                "Inter-token latency of requests",
                "s",
                [quantile(share, "request_inter_token_latency_seconds") for share in (0.5, 0.99)],
            ),
            (
                "Every gap, by worker",
                "s",
                [quantile(0.99, "inter_token_latency_seconds", by="worker")],
            ),
        ],
    ),
    (
        "Load",
        THIRD,
        [
            ("Requests", "reqps", [per_second("requests_total", "tenant, status")]),
            ("Tokens", "none", [per_second("tokens_total", "direction")]),
            (
                "Waiting at the gateway",
                "none",
                [(f"sum by (tier) (paceline_waiting_requests{WHERE})", "{{tier}}")],
            ),
            (
                "Turned away, degraded, over a quota",
                "reqps",
                [
                    (per_second("sheds_total", "tier")[0], "shed {{tier}}"),
                    (per_second("degraded_total", "tier")[0], "degraded {{tier}}"),
                    (per_second("quota_refusals_total", "tenant", "")[0], "quota {{tenant}}"),
                ],
            ),
            (
                "Moved and paused",
                "reqps",
                [
                    (per_second("moves_total", "because")[0], "moved: {{because}}"),
                    (per_second("pauses_total", "because")[0], "paused: {{because}}"),
                ],
            ),
            ("Retries", "reqps", [per_second("retries_total", "model", OF_MODEL)]),
        ],
    ),
    (
        "Workers",
        THIRD,
        [
            ("Healthy", "none", [gauge("healthy")]),
            ("Streams", "none", [gauge("streams")]),
            (
                "Step time over that at its own best",
                "none",
                [gauge("slower", '{model=~"$model", than="itself"}')],
            ),
            ("KV cache in use", "percentunit", [gauge("kv_used_ratio")]),
            ("Prompt tokens ahead", "none", [gauge("uncached_tokens_ahead")]),
            (
                "Preemptions",
                "none",
                [per_second("worker_preemptions_total", "worker", OF_MODEL)],
            ),
            ("Error of ITL predictions", "percentunit", [gauge("itl_prediction_error")]),
            ("Error of TTFT predictions", "percentunit", [gauge("ttft_prediction_error")]),
            ("Waiting in the engine", "none", [gauge("engine_waiting")]),
        ],
    ),
    (
        "GPUs, of workers with an exporter (`gpus`)",
        THIRD,
        [
            ("Utilisation: anything ran", "percentunit", [gauge("gpu_utilisation_share")]),
            ("Multiprocessors with work", "percentunit", [gauge("gpu_sm_active_share")]),
            ("GPUs with a lowered clock", "none", [gauge("gpus_lowered")]),
        ],
    ),
]


def dashboard() -> dict[str, Any]:
    numbers = count(1)
    panels: list[Panel] = []
    top = 0
    for title, width, shown in ROWS:
        place = {"h": 1, "w": 24, "x": 0, "y": top}
        panels.append({"id": next(numbers), "type": "row", "title": title, "gridPos": place})
        top += 1
        for index, (name, unit, queries) in enumerate(shown):
            line, column = divmod(index * width, 24)
            place = {"h": PANEL_HEIGHT, "w": width, "x": column, "y": top + line * PANEL_HEIGHT}
            panels.append(panel(next(numbers), name, unit, queries, place))
        top += -(-len(shown) * width // 24) * PANEL_HEIGHT
    return {
        "title": "Paceline",
        "uid": "paceline",
        "tags": ["paceline"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,  # one cursor for all panels
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [source(), choice("model"), choice("tier")]},
        "panels": panels,
    }


def panel(number: int, title: str, unit: str, queries: Sequence[Query], place: object) -> Panel:
    return {
        "id": number,
        "type": "timeseries",
        "title": title,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "options": {"legend": LEGEND, "tooltip": {"mode": "multi", "sort": "desc"}},
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": SOURCE, "expr": expr, "legendFormat": legend}
            for i, (expr, legend) in enumerate(queries)
        ],
    }


def source() -> dict[str, str]:
    return {"name": "source", "type": "datasource", "query": "prometheus", "label": "Source"}


def choice(label: str) -> dict[str, Any]:
    """A variable with the values that a label has."""
    return {
        "name": label,
        "type": "query",
        "datasource": SOURCE,
        "query": f"label_values(paceline_requests_total, {label})",
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def main(arguments: Sequence[str]) -> int:
    text = json.dumps(dashboard(), indent=1) + "\n"
    if "--check" in arguments:
        return int(DASHBOARD.read_text(encoding="utf-8") != text)
    DASHBOARD.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
