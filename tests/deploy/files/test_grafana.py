"""deploy/grafana/ringspan.json: every metric and label in it is one that we have."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ringspan.cluster.metrics import Metrics

EVERYWHERE = {"job", "instance", "le"}
"""Labels that Prometheus adds, and a histogram's own."""
FUNCTIONS = {"sum", "max", "rate", "increase", "changes", "histogram_quantile", "label_values"}


@pytest.fixture(scope="module")
def dashboard() -> Any:
    path = Path(__file__).resolve().parents[3] / "deploy/grafana/ringspan.json"
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """Each name as it is scraped, and its labels."""
    names = {}
    for family in Metrics().registry._collector_to_names:
        (described,) = family.describe()
        labels = set(family._labelnames)
        endings = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
        for ending in endings.get(described.type, [""]):
            names[described.name + ending] = labels
    return names


def expressions(dashboard: Any) -> list[str]:
    targets = [target for panel in dashboard["panels"] for target in panel.get("targets", [])]
    return [
        *(target["expr"] for target in targets),
        *(note["expr"] for note in dashboard["annotations"]["list"]),
    ]


def unknown(expression: str, exported: dict[str, set[str]]) -> set[str]:
    """Names of an expression that are no metric, label or function of ours."""
    bare = re.sub(r'"[^"]*"|\[[^\]]*\]', "", expression)
    metrics = set(re.findall(r"\bringspan_\w+", bare))
    grouped = re.findall(r"\bby \(([^)]*)\)", bare)
    selected = re.findall(r"(\w+)\s*(?:=~|!=|!~|=)", bare)
    labels = {label.strip() for group in grouped for label in group.split(",")} | set(selected)
    known = EVERYWHERE.union(*(exported.get(metric, set()) for metric in metrics))
    called = set(re.findall(r"\b(\w+)\(", bare))
    return (metrics - exported.keys()) | (labels - known) | (called - FUNCTIONS)


def test_every_name_is_one_that_is_exported(dashboard: Any, exported: dict[str, set[str]]) -> None:
    found = expressions(dashboard)
    assert len(found) > 20
    for expression in found:
        assert unknown(expression, exported) == set(), expression
        assert expression.count("(") == expression.count(")")
        if "histogram_quantile" in expression:
            assert "by (le)" in expression
            assert "_bucket" in expression
        if "_total" in expression:
            assert re.search(r"\b(rate|increase|changes)\(", expression), expression


def test_a_name_that_is_none_is_found(exported: dict[str, set[str]]) -> None:
    assert unknown("sum(ringspan_prefills)", exported) == {"ringspan_prefills"}
    assert unknown("sum by (rank) (ringspan_answers_total)", exported) == {"rank"}


def test_every_name_is_documented(dashboard: Any, root: Path) -> None:
    documented = set(re.findall(r"`(ringspan_\w+)`", (root / "docs/metrics.md").read_text()))
    for expression in expressions(dashboard):
        for name in re.findall(r"\bringspan_\w+", expression):
            assert name.removesuffix("_bucket") in documented


def test_panels_lie_beside_one_another(dashboard: Any) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)


def test_the_source_is_chosen_by_whoever_looks(dashboard: Any) -> None:
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert variables == {"source", "job"}
    for panel in dashboard["panels"]:
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${source}"}
            assert panel["description"]
