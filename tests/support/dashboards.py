"""What cluster/grafana asks of Prometheus: the queries of dashboards and rules, and the metrics in a query."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from beats_ray.telemetry import EXPORTED, prometheus_name

ROOT = Path(__file__).parents[2]
GRAFANA = ROOT / "cluster" / "grafana"
DASHBOARDS = sorted((GRAFANA / "dashboards").glob("*.json"))
VARIABLES = {
    "$__rate_interval": "1m", "$__range": "1h", "$run": ".*", "$gpu_hour_price": "2", "$cpu_hour_price": "0.05",
}  # fmt: skip
NEEDS_GPU = {
    "ray_beats_ray_perf_mfu", "ray_beats_ray_perf_gpu_memory_gib", "ray_node_gpus_utilization",
}  # fmt: skip
"""Metrics that a machine without a GPU does not have."""

_NO_METRICS = {"and", "or", "unless", "bool", "offset", "by", "on", "without", "ignoring", "inf", "nan"}


def read_dashboard(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def panel_queries() -> list[tuple[str, str]]:
    """(dashboard: panel, query as Grafana would send it) of every target."""
    return [
        (f"{file.stem}: {panel['title']}", as_sent(target["expr"]))
        for file in DASHBOARDS
        for panel in read_dashboard(file)["panels"]
        for target in panel["targets"]
    ]


def as_sent(query: str) -> str:
    """A query with Grafana's variables replaced, each run chosen."""
    for name in sorted(VARIABLES, key=len, reverse=True):
        query = query.replace(name, VARIABLES[name])
    assert "$" not in query, query
    return query


def rules() -> list[dict[str, Any]]:
    """The recording and alerting rules."""
    found = yaml.safe_load((GRAFANA / "alerts.yml").read_text())
    return [rule for group in found["groups"] for rule in group["rules"]]


def metrics_in(query: str) -> set[str]:
    """The names of the metrics that a query reads, those of recording rules among them."""
    plain = re.sub(r'"(?:[^"\\]|\\.)*"', "", query)
    plain = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", plain)
    plain = re.sub(r"\b(by|on|without|ignoring|group_left|group_right)\s*\([^)]*\)", r"\1", plain)
    names = re.findall(r"(?<![\w:.])([a-zA-Z_:][\w:]*)\b(?!\s*\()", plain)
    functions_before_by = {"sum", "max", "min", "count", "avg"}
    return {name for name in names if name not in _NO_METRICS | functions_before_by}


def documented_metrics() -> set[str]:
    """What docs/metrics.md says that runs report, as scraped; and what the package's own code exports."""
    text = (ROOT / "docs" / "metrics.md").read_text()
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    reported = {name for row in rows for name in re.findall(r"`([a-z_]+(?:/[a-z0-9_]+)?)`", row)}
    reported -= {metric.name for metric in EXPORTED}
    return {f"ray_{prometheus_name(name)}" for name in reported} | {metric.scraped_name for metric in EXPORTED}


def unserved(query: str, recorded: set[str], of_ray: set[str]) -> set[str]:
    """The metrics of a query that nobody exports."""
    return metrics_in(query) - documented_metrics() - recorded - of_ray - {"ALERTS"}
