"""The dashboards and alerts of cluster/grafana ask only for metrics that are exported, and Grafana can load them.

`tests/slow/test_grafana.py` puts the same queries to a real Prometheus.
"""

import importlib.util
import re
from itertools import combinations
from pathlib import Path

import pytest
import yaml
from support.dashboards import (
    DASHBOARDS,
    GRAFANA,
    NEEDS_GPU,
    ROOT,
    documented_metrics,
    metrics_in,
    panel_queries,
    read_dashboard,
    rules,
    unserved,
)

from beats_ray.telemetry import EXPORTED

pytestmark = pytest.mark.unit

RECORDED = {rule["record"] for rule in rules() if "record" in rule}


@pytest.fixture(scope="module")
def of_ray() -> set[str]:
    """The metrics that Ray's own dashboards, of the Ray that is installed, ask for."""
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    text = "\n".join(file.read_text() for file in folder.glob("*.py"))
    return set(re.findall(r"\bray_(?!beats)\w+", text))


def test_names_of_metrics_are_taken_out_of_queries() -> None:
    query = (
        'sum by (run, le) (rate(ray_a_total{run=~"x|y", b="c{d"}[5m])) / on (run) clamp_min(a:b:15m, 1) or vector(0)'
    )
    assert metrics_in(query) == {"ray_a_total", "a:b:15m"}
    assert metrics_in("3600 * max by (run) (x) > 0.01 and on (run) y == 1e3") == {"x", "y"}
    assert metrics_in("max(x) by (run) unless y offset 5m") == {"x", "y"}


def test_every_panel_asks_for_metrics_that_are_exported(of_ray: set[str]) -> None:
    queries = panel_queries()
    assert len(queries) > 50
    for panel, query in queries:
        assert metrics_in(query), panel
        assert not unserved(query, set(), of_ray), f"{panel}: {query}"


def test_every_rule_asks_for_metrics_that_are_exported_or_recorded(of_ray: set[str]) -> None:
    for rule in rules():
        assert not unserved(rule["expr"], RECORDED, of_ray), rule


@pytest.mark.parametrize(
    "query", ["max(ray_beats_ray_trian_loss)", "rate(ray_node_cpu_utilisation[1m])", "beats_ray:x > 1"]
)
def test_a_misspelt_metric_is_found(query: str, of_ray: set[str]) -> None:
    assert unserved(query, RECORDED, of_ray)


def test_what_the_package_exports_stands_in_the_docs_with_its_labels() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    rows = {row[0]: row[1] for row in re.findall(r"^\| (`\S.*?) \| (.*?) \|", text, re.MULTILINE)}
    for metric in EXPORTED:
        (labels,) = [labels for names, labels in rows.items() if f"`{metric.name}`" in names]
        assert set(re.findall(r"`(\w+)`", labels)) == set(metric.labels), metric
    assert NEEDS_GPU - {"ray_node_gpus_utilization"} < documented_metrics()


def test_alerts_go_by_recorded_figures_so_that_each_can_be_looked_at() -> None:
    alerts = [rule for rule in rules() if "alert" in rule]
    assert {rule["alert"] for rule in alerts} >= {
        "BeatsRayRunStalled", "BeatsRayDataWait", "BeatsRayRecoveries", "BeatsRayQuarantineGrows",
    }  # fmt: skip
    for rule in alerts:
        assert metrics_in(rule["expr"]) <= RECORDED, rule
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert {"summary", "action"} <= rule["annotations"].keys()


def test_dashboards_have_lasting_ids_and_let_choose_the_source_and_the_runs() -> None:
    dashboards = {file.stem: read_dashboard(file) for file in DASHBOARDS}
    assert dashboards.keys() == {"training", "data", "sweep", "cost", "faults"}
    for name, dashboard in dashboards.items():
        assert dashboard["uid"] == f"beats-ray-{name}"
        assert "id" not in dashboard, "Grafana gives that"
        variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
        assert variables["datasource"]["type"] == "datasource"
        assert (variables["run"]["multi"], variables["run"]["allValue"]) == (True, ".*")
        assert not unserved(re.sub(r"label_values\((\w+), run\)", r"\1", variables["run"]["definition"]), set(), set())
        used = set(
            re.findall(
                r"\$(\w+)", " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
            )
        )
        assert used <= {*variables, "__range", "__rate_interval"}


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)
def test_panels_have_places_of_their_own_units_and_titles(file: Path) -> None:
    panels = read_dashboard(file)["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert all(part["datasource"]["uid"] == "${datasource}" for part in (panel, *panel["targets"]))
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)


def test_the_files_that_start_prometheus_and_grafana_fit_together() -> None:
    config = yaml.safe_load((GRAFANA / "prometheus.yml").read_text())
    assert [(GRAFANA / name).is_file() for name in config["rule_files"]] == [True]
    (job,) = config["scrape_configs"]
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    assert job["file_sd_configs"] == [{"files": [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]}]
    sources = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "beats-ray.yml").read_text())
    assert [source["type"] for source in sources["datasources"]] == ["prometheus"]
    providers = yaml.safe_load((GRAFANA / "provisioning" / "dashboards" / "beats-ray.yml").read_text())
    assert providers["providers"][0]["type"] == "file"
