"""Makes dfastllm.json, the Grafana dashboard, of the table below: python deploy/grafana/make.py

A row is a title and its panels; a panel is a title, a unit of Grafana's, and queries with the words of their legend.
tests/deploy checks that every query parses and that the metrics and labels in it are a server's own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("dfastllm.json")
MODEL = '{model_name=~"$model"}'
RATE = "$__rate_interval"


def rate(name: str, by: str = "model_name", match: str = MODEL) -> str:
    return f"sum by ({by}) (rate(dfastllm_{name}{match}[{RATE}]))"


def quantile(share: float, name: str) -> str:
    return f"histogram_quantile({share}, {rate(name + '_bucket', 'le, model_name')})"


def mean(name: str) -> str:
    return f"{rate(name + '_sum')} / {rate(name + '_count')}"


def quantiles(name: str) -> dict[str, str]:
    return {"p50 {{model_name}}": quantile(0.5, name), "p95 {{model_name}}": quantile(0.95, name)}


ROWS: tuple[tuple[str, tuple[tuple[str, str, dict[str, str]], ...]], ...] = (
    (
        "Now",
        (
            ("Output tokens a second", "short", {"{{model_name}}": rate("generation_tokens_total")}),
            ("Prompt tokens a second", "short", {"{{model_name}}": rate("prompt_tokens_total")}),
            (
                "Requests",
                "short",
                {
                    "running {{model_name}}": f"dfastllm_num_requests_running{MODEL}",
                    "waiting {{model_name}}": f"dfastllm_num_requests_waiting{MODEL}",
                },
            ),
            ("K,V pages in use", "percentunit", {"{{model_name}}": f"dfastllm_kv_cache_usage_perc{MODEL}"}),
        ),
    ),
    (
        "Latency",
        (
            ("Time to first token", "s", quantiles("time_to_first_token_seconds")),
            ("Time per output token", "s", quantiles("request_time_per_output_token_seconds")),
            ("Whole request", "s", quantiles("e2e_request_latency_seconds")),
            ("Time in the queue", "s", quantiles("request_queue_time_seconds")),
        ),
    ),
    (
        "Engine",
        (
            ("Steps a second", "short", {"{{model_name}}": rate("engine_steps_total")}),
            (
                "A step",
                "s",
                {
                    "step {{model_name}}": mean("engine_step_seconds"),
                    "forward {{model_name}}": mean("engine_forward_seconds"),
                },
            ),
            ("Sequences in a step", "short", {"{{model_name}}": mean("parallel_batch_size")}),
            ("Preemptions a second", "short", {"{{model_name}}": rate("num_preemptions_total")}),
            (
                "Prompt tokens found in shared K,V",
                "percentunit",
                {"{{model_name}}": f"{rate('prefix_cache_hits_total')} / {rate('prefix_cache_queries_total')}"},
            ),
        ),
    ),
    (
        "Diffusion and speculation",
        (
            ("Tokens per forward", "short", {"{{model_name}}": mean("tokens_per_forward")}),
            ("Time per block", "s", quantiles("time_per_block_seconds")),
            (
                "Draft tokens accepted",
                "percentunit",
                {
                    "{{model_name}}": f"{rate('spec_decode_num_accepted_tokens_total')} / "
                    f"{rate('spec_decode_num_draft_tokens_total')}"
                },
            ),
            ("Tokens to the first tool call", "short", quantiles("tokens_to_first_tool_call")),
        ),
    ),
    (
        "Tenants and adapters",
        (
            (
                "Output tokens a second by tenant",
                "short",
                {"{{tenant}}": rate("tenant_generation_tokens_total", "tenant")},
            ),
            ("Requests by tenant", "short", {"{{tenant}}": "sum by (tenant) (dfastllm_tenant_requests_running)"}),
            (
                "Time to first token by tenant, p95",
                "s",
                {
                    "{{tenant}}": "histogram_quantile(0.95, "
                    + rate("tenant_time_to_first_token_seconds_bucket", "le, tenant", "")
                    + ")"
                },
            ),
            ("Refused a second by tenant", "short", {"{{tenant}}": rate("tenant_refused_total", "tenant", "")}),
            (
                "Output tokens a second by adapter",
                "short",
                {"{{lora_name}}": rate("lora_generation_tokens_total", "lora_name")},
            ),
            (
                "Usage not in the database yet",
                "short",
                {"rows": "dfastllm_ledger_owed_rows", "database up": "dfastllm_ledger_up"},
            ),
        ),
    ),
    (
        "Requests and connections",
        (
            (
                "Requests ended a second",
                "short",
                {
                    "{{finished_reason}}": rate("request_success_total", "finished_reason"),
                    "{{reason}}": rate("request_failure_total", "reason"),
                },
            ),
            ("Answers a second by status", "short", {"{{status}}": rate("http_requests_total", "status", "")}),
            ("Open connections", "short", {"connections": "dfastllm_http_connections"}),
            ("Memory of the process", "bytes", {"resident": "process_resident_memory_bytes"}),
        ),
    ),
)


def panel(number: int, place: dict[str, int], title: str, unit: str, queries: dict[str, str]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${source}"}
    return {
        "id": number,
        "type": "timeseries",
        "title": title,
        "datasource": source,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": unit, "min": 0, "custom": {"fillOpacity": 8}}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": source, "expr": query, "legendFormat": legend}
            for i, (legend, query) in enumerate(queries.items())
        ],
    }


def dashboard() -> dict[str, Any]:
    panels: list[dict[str, Any]] = []
    top = 0
    for title, members in ROWS:
        row = {"id": len(panels) + 1, "type": "row", "title": title, "collapsed": False, "panels": []}
        panels.append(row | {"gridPos": {"h": 1, "w": 24, "x": 0, "y": top}})
        top += 1
        for i, (name, unit, queries) in enumerate(members):
            place = {"h": 8, "w": 6, "x": 6 * (i % 4), "y": top + 8 * (i // 4)}
            panels.append(panel(len(panels) + 1, place, name, unit, queries))
        top += 8 * -(-len(members) // 4)
    return {
        "uid": "dfastllm",
        "title": "dfastllm",
        "tags": ["dfastllm", "llm"],
        "schemaVersion": 41,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {
            "list": [
                {"name": "source", "label": "Data source", "type": "datasource", "query": "prometheus"},
                {
                    "name": "model",
                    "label": "Model",
                    "type": "query",
                    "datasource": {"type": "prometheus", "uid": "${source}"},
                    "query": {"query": "label_values(dfastllm_num_requests_running, model_name)", "refId": "model"},
                    "multi": True,
                    "includeAll": True,
                    "allValue": ".*",
                    "current": {"text": "All", "value": "$__all"},
                    "refresh": 2,
                },
            ]
        },
        "panels": panels,
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(dashboard(), indent=1) + "\n", encoding="utf-8")
