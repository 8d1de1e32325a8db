"""Dashboards and alerts: they ask for what the server counts, by a real Prometheus."""

import json
import re
import runpy
import subprocess
from pathlib import Path

import numpy as np
import prometheus
import pytest
import serving
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[1]
ALERTS = ROOT / "deploy/prometheus/alerts.yml"
needs_prometheus = pytest.mark.skipif(
    not prometheus.installed(), reason="there is no Prometheus here"
)


def test_the_files_are_those_of_the_script() -> None:
    script = runpy.run_path(str(ROOT / "scripts/dashboards"), run_name="dashboards")
    written = {path.stem: json.loads(path.read_text()) for path in prometheus.DASHBOARDS}
    described = script["DASHBOARDS"]
    assert written == {
        uid: script["dashboard"](uid, title, panels) for uid, (title, panels) in described.items()
    }


def test_what_is_asked_for_is_what_the_server_counts(tmp_path: Path) -> None:
    repository = serving.write_causal(tmp_path)
    with serving.serving(repository, metrics_port=0) as server:
        text = generate_latest(server.metrics.registry).decode()
    families = {
        sample.name for family in text_string_to_metric_families(text) for sample in family.samples
    }
    families |= {family.name for family in text_string_to_metric_families(text)} | {"up"}
    asked = [query for _, _, query, _ in prometheus.expressions()] + [ALERTS.read_text()]
    names = {
        name for text in asked for name in re.findall(r"\b(?:attnserve|process)_[a-z_]+", text)
    }
    assert len(names) > 20
    histogram = ("_bucket", "_sum", "_count", "_total")
    for name in names:
        whole = name
        for ending in histogram:
            whole = whole.removesuffix(ending)
        assert {name, whole} & families, name


@needs_prometheus
def test_each_alert_fires_when_it_should() -> None:
    for command in (
        ["check", "rules", ALERTS],
        ["test", "rules", ALERTS.parent / "alerts_test.yml"],
    ):
        done = subprocess.run(["promtool", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    tried = set(re.findall(r"alertname: (\w+)", (ALERTS.parent / "alerts_test.yml").read_text()))
    assert tried == set(re.findall(r"alert: (\w+)", ALERTS.read_text()))


@needs_prometheus
@pytest.mark.slow
def test_every_panel_shows_something_of_a_loaded_server(tmp_path: Path) -> None:
    prometheus.write_models(tmp_path / "models")
    port = serving.free_port()
    options = ("--metrics-port", str(port), *prometheus.SERVER_OPTIONS)
    with (
        serving.process(tmp_path / "models", *options) as server,
        prometheus.prometheus(port, tmp_path) as found,
    ):
        prometheus.traffic(server.address, 25)
        for dashboard, panel, query, _ in prometheus.expressions():
            drawn = found.series(query, 25)
            assert drawn, (dashboard, panel, query)
            for labels, values in drawn:
                assert np.isfinite(values[-1]).all(), (dashboard, panel, labels)
        every = {panel: query for _, panel, query, _ in prometheus.expressions()}
        for panel in ("Pages of prefixes that were there", "Cached pages that made room"):
            ((_, values),) = found.series(every[panel], 25)
            assert values[:, 1].max() > 0, panel
