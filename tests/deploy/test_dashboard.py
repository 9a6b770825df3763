"""The Grafana dashboard is what its table makes, and every query of it answers on a server that has served."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import promql_parser as promql
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dfastllm.tenants.store import Store
from tests.kit.live import serving
from tests.kit.served import random_engine

GRAFANA = Path(__file__).parents[2] / "deploy" / "grafana"
Labels = dict[str, str]
# Series that exist once what they count has happened; here nothing fails, no tool is called, nothing is preempted.
QUIET = {
    "dfastllm_request_failure_total": {"model_name", "reason"},
    "dfastllm_num_preemptions_total": {"model_name"},
    "dfastllm_tokens_to_first_tool_call_bucket": {"model_name", "le"},
    "dfastllm_tenant_refused_total": {"tenant"},
    "dfastllm_lora_generation_tokens_total": {"model_name", "lora_name"},
}


@pytest.fixture(scope="module")
def make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_dashboard", GRAFANA / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Labels]]:
    """The labels of each series of /metrics after an answer of every kind, by name."""
    database = str(tmp_path_factory.mktemp("tenants") / "tenants.db")
    store = Store(database, create=True)
    store.create_tenant("acme", actor="test")
    _, key = store.create_key("acme", scopes=("generate", "metrics"), actor="test")
    store.close()
    head = {"Authorization": f"Bearer {key}"}
    engines = {"causal": random_engine("llama"), "canvas": random_engine("llada", seed=1)}
    with serving(engines, tenants_db=database) as live:
        ngram = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}}
        for model, more in (("causal", ngram), ("canvas", {})):
            body = {"model": model, "prompt": "abcabcabcabc", "max_tokens": 32, "temperature": 0, **more}
            assert live.post("/v1/completions", body, headers=head).status_code == 200
        text = live.get("/metrics", headers=head).text
        metrics = live.serving.metrics
    found: dict[str, list[Labels]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    for name, labels in QUIET.items():
        assert name not in found, f"{name} was scraped: it needs no exception"
        declared = metrics.registry._names_to_collectors[name]._labelnames  # type: ignore[attr-defined]
        found[name] = [dict.fromkeys({*declared, *labels}, "causal")]
        assert {*declared, "le"} >= labels
    return found


def queries(board: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"].replace("$__rate_interval", "1m").replace("$model", ".*")
            yield panel["title"], expression, target["legendFormat"]


def labels_of(node: Any, scraped: dict[str, list[Labels]]) -> set[str]:
    """The labels that the result of an expression has. Fails where it would be empty."""
    match node:
        case promql.MatrixSelector():
            return labels_of(node.vector_selector, scraped)
        case promql.VectorSelector():
            series = scraped.get(node.name, [])
            assert series, f"no series {node.name}"
            for matcher in node.matchers.matchers:
                assert all(matcher.name in labels for labels in series), f"{node.name} has no label {matcher.name}"
                assert any(re.fullmatch(matcher.value, labels[matcher.name]) for labels in series)
            return set(series[0])
        case promql.Call():
            inner = [labels_of(arg, scraped) for arg in node.args]
            labels = inner[-1]
            if node.func.name == "histogram_quantile":
                assert "le" in labels
                labels = labels - {"le"}
            if node.func.name == "rate":
                name = node.args[0].vector_selector.name
                assert name.endswith(("_total", "_bucket", "_sum", "_count")), f"{name} is no counter"
            return labels
        case promql.AggregateExpr():
            inner_labels = labels_of(node.expr, scraped)
            by = set(node.modifier.labels)
            assert by <= inner_labels, f"{node} groups by what there is not"
            return by
        case promql.BinaryExpr():
            left, right = labels_of(node.lhs, scraped), labels_of(node.rhs, scraped)
            assert left == right, f"{node}: the sides would not match"
            return left
        case promql.NumberLiteral():
            return set()
    raise AssertionError(f"an expression of another kind: {node!r}")


def test_the_file_is_what_the_table_makes(make: ModuleType) -> None:
    assert json.loads((GRAFANA / "dfastllm.json").read_text()) == make.dashboard(), "run deploy/grafana/make.py"


def test_every_query_answers(make: ModuleType, scraped: dict[str, list[Labels]]) -> None:
    asked = list(queries(make.dashboard()))
    assert len(asked) >= 30
    for title, expression, legend in asked:
        labels = labels_of(promql.parse(expression), scraped)
        wanted = set(re.findall(r"\{\{(\w+)\}\}", legend))
        assert wanted <= labels, f"{title}: the legend names {wanted - labels}, which {expression} does not give"


def test_the_variable_of_models_is_a_metric(make: ModuleType, scraped: dict[str, list[Labels]]) -> None:
    model = make.dashboard()["templating"]["list"][1]
    name, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", model["query"]["query"]).groups()  # type: ignore[union-attr]
    assert {labels[label] for labels in scraped[name]} == {"causal", "canvas"}


def test_the_check_sees_what_is_wrong(scraped: dict[str, list[Labels]]) -> None:
    for wrong in (
        "dfastllm_nothing",
        'dfastllm_num_requests_running{tenant="a"}',
        "sum by (tenant) (dfastllm_num_requests_running)",
        "rate(dfastllm_num_requests_running[1m])",
        "dfastllm_num_requests_running / sum(dfastllm_num_requests_waiting)",
    ):
        with pytest.raises((AssertionError, AttributeError)):
            labels_of(promql.parse(wrong), scraped)


def test_places_do_not_overlap(make: ModuleType) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in make.dashboard()["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
