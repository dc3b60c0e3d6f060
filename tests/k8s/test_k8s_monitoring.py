"""Alerts ask for metrics, labels and values that the code exports; the dashboard is the code's own."""

from __future__ import annotations

import re
import typing

import pytest
from rendered import Rendered

from deployments.dashboard import RAY_PREFIX
from deployments.dashboard import text as dashboard_text
from deployments.metrics import METRICS
from deployments.observer import Call, Outcome
from plora_ray.inference.observer import PopulationReason, Tier

VALUES = {"call": Call, "outcome": Outcome, "tier": Tier, "reason": PopulationReason}
# The operator's, documented at docs.ray.io under "KubeRay metrics reference".
OPERATORS = {"kuberay_job_deployment_status": {"name", "namespace", "deployment_status"}}
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",), "gauge": ("",)}


@pytest.fixture(scope="module")
def expressions(prod: Rendered) -> dict[str, str]:
    (group,) = prod.one("PrometheusRule")["spec"]["groups"]
    return {rule["alert"]: rule["expr"] for rule in group["rules"]}


def test_every_metric_in_an_alert_is_exported_with_the_labels_and_values_it_is_asked_for(expressions: dict[str, str]) -> None:
    exported = {
        f"{RAY_PREFIX}{name}{suffix}": set(metric.labels) for name, metric in METRICS.items() for suffix in SUFFIXES[metric.kind]
    } | OPERATORS
    for alert, expression in expressions.items():
        asked = re.findall(r"\b((?:ray|kuberay)_\w+)(?:\{([^}]*)\})?", expression)
        assert asked, f"{alert} asks for no metric"
        for name, selector in asked:
            assert name in exported, f"{alert}: nothing exports {name}"
            for label, wanted in re.findall(r'(\w+)=~?"([^"]*)"', selector):
                assert label in exported[name], f"{alert}: {name} has no label {label}"
                if label in VALUES:
                    assert set(wanted.split("|")) <= set(typing.get_args(VALUES[label])), f"{alert}: {label}={wanted}"
    assert {"ray_plora_call_seconds_bucket", "kuberay_job_deployment_status"} <= set(re.findall(r"\w+", " ".join(expressions.values())))


def test_there_is_an_alert_for_errors_latency_cold_pulls_age_and_a_failed_job(expressions: dict[str, str]) -> None:
    assert {"PloraErrors", "PloraSlow", "PloraColdPulls", "PloraGenerationOld", "PloraJobFailed"} <= set(expressions)


def test_every_outcome_that_is_nobodys_fault_but_the_services_counts_as_an_error(expressions: dict[str, str]) -> None:
    (counted,) = re.findall(r'outcome=~"([^"]*)"', expressions["PloraErrors"])
    assert set(typing.get_args(Outcome)) - set(counted.split("|")) == {"ok", "refused", "client_gone"}


def test_the_dashboard_is_the_one_that_the_code_makes_and_grafana_finds_it(prod: Rendered) -> None:
    dashboard = prod.one("ConfigMap", "plora-dashboard")
    assert dashboard["data"] == {"grafana-dashboard.json": dashboard_text()}
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
