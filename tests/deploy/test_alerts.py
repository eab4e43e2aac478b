"""The alert rules name metrics that are told, with labels that they have, and are written as Prometheus reads them."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry
from sqlalchemy.orm import Session, sessionmaker

from api.request_metrics import RequestMetrics
from service.metrics import ServiceCollector, rendered
from service.settings import Settings
from worker.metrics import GpuCollector, WorkerMetrics

ROOT = Path(__file__).parents[2]
FILE = ROOT / "deploy" / "prometheus-alerts.yml"
GUIDE = ROOT / "docs" / "guides" / "operations.md"

_NAME = re.compile(r"\bnibble_[a-z_]+\b")
_SUFFIXES = ("_count", "_sum", "_bucket")


def _rules() -> list[dict[str, Any]]:
    document = yaml.safe_load(FILE.read_text("utf-8"))
    return [rule for group in document["groups"] for rule in group["rules"]]


@pytest.fixture
def told(settings: Settings, sessions: sessionmaker[Session]) -> set[str]:
    """The names of all metrics, as scrapes have them."""
    service = CollectorRegistry()
    service.register(ServiceCollector(settings, sessions, lambda: 1))
    RequestMetrics(service)
    worker = WorkerMetrics().registry
    worker.register(GpuCollector([]))
    text = (rendered(service) + rendered(worker)).decode()
    families = re.findall(r"^# TYPE (\S+) (\S+)", text, re.MULTILINE)
    names = {name for name, kind in families if kind != "histogram"}
    return names | {n + s for n, kind in families if kind == "histogram" for s in _SUFFIXES}


def test_every_metric_of_the_rules_is_told(told: set[str]) -> None:
    named = {name for rule in _rules() for name in _NAME.findall(rule["expr"])}

    assert len(named) > 10
    assert named - told == set()


def test_every_metric_and_alert_is_in_the_guide(told: set[str]) -> None:
    guide = GUIDE.read_text("utf-8")
    families = {re.sub(r"_(count|sum|bucket)$", "", name) for name in told}

    missing = {
        name for name in families if f"`{name}" not in guide and not name.endswith("_created")
    }
    assert missing == set()
    assert {rule["alert"] for rule in _rules() if f"`{rule['alert']}`" not in guide} == set()


def test_every_rule_has_what_people_need() -> None:
    rules = _rules()

    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule["labels"]["severity"] in ("warning", "critical"), rule
        assert rule["annotations"]["summary"].endswith("."), rule
        for opening, closing in ("()", "{}", "[]"):
            assert rule["expr"].count(opening) == rule["expr"].count(closing), rule
