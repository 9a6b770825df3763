"""What the metrics say of known step stats, and that they are in the exposition under their names."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from dfastllm.core import Finish, FinishReason, StepStats, Usage
from dfastllm.errors import TimeoutError
from dfastllm.metrics import Metrics
from dfastllm.metrics.prometheus import SECONDS


class Engine:
    """The one face of an engine that metrics know."""

    def __init__(self) -> None:
        self.subscribers: list[Callable[[StepStats], None]] = []

    def subscribe(self, fn: Callable[[StepStats], None], /) -> None:
        self.subscribers.append(fn)

    def report(self, stats: StepStats) -> None:
        for fn in self.subscribers:
            fn(stats)


def stats(*finished: Finish, **changes: Any) -> StepStats:
    counts = {"sequences": 3, "rows": 96, "wanted": 40, "committed": 5, "waiting": 2, "running": 3}
    counts |= {"pages_used": 8, "pages_total": 32, "preempted": 0, **changes}
    return StepStats(model="file-name", seconds=0.004, run_seconds=0.003, finished=finished, **counts)  # type: ignore[arg-type]


USAGE = Usage(
    prompt_tokens=10,
    completion_tokens=21,
    forwards=7,
    exactness="reference",
    queue_s=0.25,
    first_token_s=0.5,
    total_s=1.5,
)


def values(metrics: Metrics) -> dict[tuple[str, str], float]:
    """(name, labels as text) -> value of every sample, from the exposition itself."""
    body, content_type = metrics.render("text/plain")
    assert content_type.startswith("text/plain")
    return {
        (
            sample.name.removeprefix("dfastllm_"),
            ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items())),
        ): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def watched(kind: str = "diffusion") -> tuple[Metrics, Engine]:
    metrics, engine = Metrics(), Engine()
    metrics.watch(engine, "m", kind)  # type: ignore[arg-type]
    return metrics, engine


M = "model_name=m"


def test_gauges_show_the_last_step_and_counters_add_up() -> None:
    metrics, engine = watched()
    assert values(metrics)["num_requests_running", M] == 0  # there from the start
    engine.report(stats())
    engine.report(stats(waiting=0, running=1, pages_used=16, preempted=2, uncaptured=True))
    seen = values(metrics)
    assert seen["num_requests_running", M] == 1
    assert seen["num_requests_waiting", M] == 0
    assert seen["kv_cache_usage_perc", M] == 0.5
    assert seen["num_preemptions_total", M] == 2
    assert seen["uncaptured_steps_total", M] == 1
    assert seen["engine_steps_total", M] == 2
    assert seen["parallel_batch_size_sum", M] == 6
    assert seen["engine_step_seconds_sum", M] == 0.008
    assert seen["engine_forward_seconds_count", M] == 2
    assert seen["diffusion_num_denoising_steps_total", M] == 6
    assert seen["diffusion_num_canvas_positions_total", M] == 80
    assert seen["diffusion_num_committed_tokens_total", M] == 10


def test_an_autoregressive_model_denoises_nothing() -> None:
    metrics, engine = watched("ar")
    engine.report(stats())
    assert not [name for name, labels in values(metrics) if name.startswith("diffusion") and labels == M]


def test_a_finished_request_in_all_its_histograms() -> None:
    metrics, engine = watched()
    engine.report(stats(Finish(FinishReason.STOP, USAGE)))
    seen = values(metrics)
    assert seen["request_success_total", f"finished_reason=stop,{M}"] == 1
    assert seen["prompt_tokens_total", M] == 10
    assert seen["generation_tokens_total", M] == 21
    assert seen["nfe_total", M] == 7
    assert seen["tokens_per_forward_sum", M] == 3.0
    assert seen["time_to_first_token_seconds_sum", M] == 0.5
    for name in ("e2e_request_latency_seconds", "request_latency_seconds"):
        assert seen[f"{name}_sum", M] == 1.5
    for name in ("request_time_per_output_token_seconds", "time_per_output_token_seconds"):
        assert seen[f"{name}_sum", M] == 1.0 / 20
    assert seen["request_queue_time_seconds_sum", M] == 0.25
    assert seen["request_prefill_time_seconds_sum", M] == 0.25
    assert seen["request_decode_time_seconds_sum", M] == 1.0
    assert seen["request_inference_time_seconds_sum", M] == 1.25


def test_what_did_not_end_by_itself_is_a_failure_and_spoils_no_latency() -> None:
    metrics, engine = watched()
    engine.report(
        stats(Finish(FinishReason.CANCELLED, USAGE), Finish(FinishReason.TIMEOUT, USAGE, error=TimeoutError("x")))
    )
    seen = values(metrics)
    assert seen["request_failure_total", f"{M},reason=cancelled"] == 1
    assert seen["request_failure_total", f"{M},reason=timeout"] == 1
    assert ("e2e_request_latency_seconds_sum", M) not in seen
    assert seen["nfe_total", M] == 14  # the compute was spent all the same


def test_drafts_are_counted_under_vllms_names() -> None:
    metrics, engine = watched("ar")
    engine.report(stats(drafts=((4, 2), (4, 0), (3, 3)), draft_seconds=0.002))
    engine.report(stats())
    seen = values(metrics)
    assert seen["spec_decode_num_drafts_total", M] == 3
    assert seen["spec_decode_num_draft_tokens_total", M] == 11
    assert seen["spec_decode_num_accepted_tokens_total", M] == 5
    positions = [seen.get(("spec_decode_num_accepted_tokens_per_pos_total", f"{M},position={i}")) for i in range(4)]
    assert positions == [2, 2, 1, None]
    assert seen["spec_decode_draft_seconds_sum", M] == 0.002
    assert seen["spec_decode_draft_seconds_count", M] == 1  # a step without drafts is no observation


def test_blocks_and_tool_calls() -> None:
    metrics, _ = watched()
    metrics.blocks("m", [0.001, 0.003])
    metrics.tool_call("m", 25, 0.5)
    seen = values(metrics)
    assert seen["time_per_block_seconds_sum", M] == 0.004
    assert seen["time_to_first_tool_call_seconds_sum", M] == 0.5
    # The gate's limit is a bucket, so the share of calls within it can be read off.
    assert seen["tokens_to_first_tool_call_bucket", f"le=25.0,{M}"] == 1
    assert seen["tokens_to_first_tool_call_bucket", f"le=16.0,{M}"] == 0


def test_buckets_suit_tiny_and_large_models() -> None:
    """From 100 µs to 10 min, no step wider than threefold, so that a percentile read off is right to that."""
    assert (min(SECONDS), max(SECONDS)) == (0.0001, 600.0)
    assert all(after / before <= 3.0 for before, after in pairwise(SECONDS))


def test_buckets_tell_milliseconds_apart() -> None:
    metrics, engine = watched()
    engine.report(stats())
    bounds = [
        float(labels.split("le=")[1].split(",")[0])
        for name, labels in values(metrics)
        if name == "engine_step_seconds_bucket"
    ]
    assert sum(bound < 0.01 for bound in bounds) >= 5
    assert values(metrics)["engine_step_seconds_bucket", f"le=0.0025,{M}"] == 0
    assert values(metrics)["engine_step_seconds_bucket", f"le=0.005,{M}"] == 1


def test_tokens_that_arrive_together_share_the_gap() -> None:
    metrics, _ = watched()
    metrics.tokens("m", 0.08, 4)
    seen = values(metrics)
    assert seen["inter_token_latency_seconds_count", M] == 4
    assert round(seen["inter_token_latency_seconds_sum", M], 9) == 0.08


def test_two_servers_do_not_mix() -> None:
    first, engine = watched()
    engine.report(stats())
    second, _ = watched()
    assert ("engine_steps_total", M) not in values(second)
    first.answered("GET", "/health", 200, 0.001)
    assert values(first)["http_requests_total", "handler=/health,method=GET,status=200"] == 1
    assert not [name for name, _ in values(second) if name == "http_requests_total"]


def test_openmetrics_when_asked() -> None:
    body, content_type = Metrics().render("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")


def test_a_method_that_http_does_not_know_makes_no_series() -> None:
    metrics = Metrics()
    for number in range(100):
        metrics.answered(f"M{number}", "/health", 405, 0.001)
    metrics.answered("GET", "/health", 200, 0.001)
    counted = {labels: value for (name, labels), value in values(metrics).items() if name == "http_requests_total"}
    assert counted == {
        "handler=/health,method=other,status=405": 100,
        "handler=/health,method=GET,status=200": 1,
    }
