"""Grafana's dashboard of the service, made from the list of metrics: `python -m deployments.dashboard` writes it anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deployments.metrics import METRICS, Metric

FILE = Path(__file__).with_name("grafana-dashboard.json")
RAY_PREFIX = "ray_"  # Ray's agents put it before every name
QUANTILES = {"p50": 0.5, "p99": 0.99}
WIDTH, HEIGHT, COLUMNS = 8, 8, 3  # of a panel in Grafana's grid of 24 columns
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it; it asks for a Prometheus data source."""
    return {
        "uid": "plora-serving",
        "title": "PLoRA serving",
        "tags": ["plora"],
        "schemaVersion": 39,
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "30s",
        "templating": {"list": [{"name": "datasource", "type": "datasource", "query": "prometheus"}]},
        "panels": [_panel(place, name, metric) for place, (name, metric) in enumerate(METRICS.items())],
    }


def text() -> str:
    """The bytes of the file."""
    return json.dumps(dashboard(), indent=1) + "\n"


def _panel(place: int, name: str, metric: Metric) -> dict[str, Any]:
    row, column = divmod(place, COLUMNS)
    targets = [
        {"refId": chr(ord("A") + number), "datasource": DATASOURCE, "expr": query, "legendFormat": legend}
        for number, (query, legend) in enumerate(_queries(RAY_PREFIX + name, metric))
    ]
    return {
        "id": place + 1,
        "type": "timeseries",
        "title": metric.title,
        "description": metric.description,
        "datasource": DATASOURCE,
        "gridPos": {"x": column * WIDTH, "y": row * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": metric.unit}, "overrides": []},
        "targets": targets,
    }


def _queries(name: str, metric: Metric) -> list[tuple[str, str]]:
    """PromQL and legend of each line of a panel."""
    legend = " ".join(f"{{{{{label}}}}}" for label in metric.labels)
    if metric.kind == "counter":
        return [(f"sum by ({', '.join(metric.labels)}) (rate({name}[$__rate_interval]))", legend)]
    if metric.kind == "histogram":
        by = ", ".join(("le", *metric.labels))
        return [
            (f"histogram_quantile({quantile}, sum by ({by}) (rate({name}_bucket[$__rate_interval])))", f"{legend} {shown}".strip())
            for shown, quantile in QUANTILES.items()
        ]
    if name.endswith("_created_seconds"):
        return [(f"time() - min({name})", "oldest"), (f"time() - max({name})", "newest")]
    return [(f"max({name})", "most"), (f"min({name})", "fewest")]


def main() -> None:
    """Write the file."""
    FILE.write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    main()
