"""The metrics of one server, in a registry of its own (two servers in one process do not mix).

Names are those of vLLM behind the prefix `dfastllm_`, so that its dashboards need one edit, and `model_name` is the
label; what vLLM has no name for (nfe, tokens per forward) has ours. Times are in seconds, and the buckets begin well
under 10 ms, where small models live.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.exposition import choose_encoder

from dfastllm.core import Finish, FinishReason, Kind, StepStats
from dfastllm.metrics.tenants import TenantMetrics

__all__ = ["Metrics", "Subscribable"]

SECONDS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)
METHODS = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE"})
LORA = ("model_name", "lora_name")
MOST_LORAS = 256  # names of adapters that have series of their own; further ones share "other"
SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
COUNTS = (1.0, 2.0, 4.0, 8.0, 16.0, 25.0, 32.0, 48.0, 64.0, 96.0, 128.0, 256.0, 512.0, 1024.0, 4096.0)
RATIOS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0, 64.0)


class Subscribable(Protocol):
    def subscribe(self, fn: Callable[[StepStats], None], /) -> None: ...


class Metrics:
    """All metrics of a server. Thread-safe: engines report on their own thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self._declare_engine()
        self._declare_requests()
        self._declare_http()
        self.tenants = TenantMetrics(self.registry)
        self._declare_websockets()

    def _gauge(self, name: str, help: str) -> Gauge:
        return Gauge(name, help, ["model_name"], namespace="dfastllm", registry=self.registry)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(name, help, labels or ("model_name",), namespace="dfastllm", registry=self.registry)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...] = SECONDS, *labels: str) -> Histogram:
        return Histogram(
            name, help, labels or ("model_name",), namespace="dfastllm", registry=self.registry, buckets=buckets
        )

    def _declare_engine(self) -> None:
        self.running = self._gauge("num_requests_running", "Requests with a place in the batch.")
        self.waiting = self._gauge("num_requests_waiting", "Requests that wait for a place.")
        self.kv_usage = self._gauge("kv_cache_usage_perc", "Part of the K,V pages in use; 1 is all of them.")
        self.preemptions = self._counter("num_preemptions", "Times a running request lost its pages to another.")
        self.prefix_queries = self._counter(
            "prefix_cache_queries", "Prompt tokens looked up in the K,V that requests share."
        )
        self.uncaptured = self._counter(
            "uncaptured_steps", "Forward passes on a GPU that ran op by op, for want of a graph that holds them."
        )
        self.prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens found there, which no forward computed.")
        self.steps = self._counter("engine_steps", "Turns of the engine's loop.")
        self.batch = self._histogram("parallel_batch_size", "Sequences in a step.", SIZES)
        self.step_time = self._histogram("engine_step_seconds", "One turn of the loop, forward pass included.")
        self.run_time = self._histogram("engine_forward_seconds", "The forward pass of a step.")
        self.drafts = self._counter("spec_decode_num_drafts", "Drafts that a forward verified.")
        self.draft_tokens = self._counter("spec_decode_num_draft_tokens", "Tokens of verified drafts.")
        self.accepted = self._counter("spec_decode_num_accepted_tokens", "Draft tokens that were accepted.")
        self.accepted_at = self._counter(
            "spec_decode_num_accepted_tokens_per_pos",
            "Drafts whose token at this position (0: the first) was accepted.",
            "model_name",
            "position",
        )
        self.draft_time = self._histogram("spec_decode_draft_seconds", "Drafting of a step that drafted.")
        self.denoising = self._counter(
            "diffusion_num_denoising_steps", "Forward passes of a diffusion request's canvas, refreshes included."
        )
        self.canvas = self._counter("diffusion_num_canvas_positions", "Canvas positions whose logits were computed.")
        self.committed = self._counter("diffusion_num_committed_tokens", "Canvas positions that were fixed.")
        about = ("model_name", "max_lora", "running_lora_adapters", "waiting_lora_adapters")
        self.lora_info = Gauge(
            "lora_requests_info",
            "When the running requests' LoRA adapters were last as its labels say; one series a model.",
            about,
            namespace="dfastllm",
            registry=self.registry,
        )
        self.lora_requests = self._counter("lora_requests", "Requests of a LoRA adapter that ended.", *LORA)
        self.lora_prompt_tokens = self._counter("lora_prompt_tokens", "Prompt tokens of those requests.", *LORA)
        self.lora_tokens = self._counter("lora_generation_tokens", "Output tokens of those requests.", *LORA)
        self._loras: dict[str, tuple[str, ...]] = {}  # of each model, the labels that lora_requests_info has now
        self._lora_names: set[str] = set()

    def _declare_requests(self) -> None:
        self.success = self._counter(
            "request_success", "Requests that ended by themselves.", "model_name", "finished_reason"
        )
        self.failure = self._counter(
            "request_failure", "Requests that were cancelled, failed or timed out.", "model_name", "reason"
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of ended requests.")
        self.generation_tokens = self._counter("generation_tokens", "Output tokens of ended requests, EOS not counted.")
        self.nfe = self._counter("nfe", "Forward passes of ended requests (number of function evaluations).")
        self.per_forward = self._histogram("tokens_per_forward", "Output tokens per forward pass of a request.", RATIOS)
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "Arrival to the first settled token; for a canvas, its first settled block."
        )
        self.latency = (
            self._histogram("e2e_request_latency_seconds", "Arrival to end of a request."),
            self._histogram("request_latency_seconds", "The same as e2e_request_latency_seconds."),
        )
        self.per_token = (
            self._histogram("request_time_per_output_token_seconds", "(end - first token) / (tokens - 1)."),
            self._histogram("time_per_output_token_seconds", "The same as request_time_per_output_token_seconds."),
        )
        self.queue_time = self._histogram("request_queue_time_seconds", "Arrival to the first forward pass.")
        self.prefill_time = self._histogram("request_prefill_time_seconds", "First forward pass to first token.")
        self.decode_time = self._histogram("request_decode_time_seconds", "First token to the end.")
        self.inference_time = self._histogram("request_inference_time_seconds", "First forward pass to the end.")
        self.inter_token = self._histogram(
            "inter_token_latency_seconds", "Time between output tokens; tokens that arrive together share the gap."
        )

        self.block_time = self._histogram(
            "time_per_block_seconds", "One block of a canvas to the next; the first from the first forward pass."
        )
        self.first_call = self._histogram(
            "time_to_first_tool_call_seconds", "Arrival to the first complete call of one of the request's tools."
        )
        self.first_call_tokens = self._histogram(
            "tokens_to_first_tool_call", "Output tokens until the first complete call of a tool.", COUNTS
        )

    def _declare_http(self) -> None:
        self.http = self._counter("http_requests", "HTTP requests answered.", "method", "handler", "status")
        self.http_time = self._histogram(
            "http_request_duration_seconds", "HTTP request to the last byte.", SECONDS, "handler"
        )
        self.connections = Gauge("http_connections", "Open connections.", namespace="dfastllm", registry=self.registry)
        self.ended = self._counter("http_connections_ended", "Connections that the server ended, by why.", "reason")

    def _declare_websockets(self) -> None:
        self.websockets = Gauge(
            "websocket_connections", "Open WebSockets.", namespace="dfastllm", registry=self.registry
        )
        self.websocket_closes = self._counter(
            "websocket_connections_closed", "WebSockets that the server closed, by close code.", "code"
        )
        self.websocket_frames = self._counter("websocket_frames", "Frames: received or sent.", "direction")
        self.websocket_calls = self._counter(
            "websocket_calls",
            "Calls by how they ended; function none: frames that began no call.",
            "function",
            "status",
        )
        self.websocket_time = self._histogram(
            "websocket_call_duration_seconds", "A call's frame to its last one.", SECONDS, "function"
        )

    def websocket_call(self, function: str, status: str, seconds: float) -> None:
        """A call ended. function, status: of closed sets."""
        self.websocket_calls.labels(function, status).inc()
        self.websocket_time.labels(function).observe(seconds)

    def watch(self, engine: Subscribable, name: str, kind: Kind) -> None:
        """Count what this engine does, under the model's name in the API."""
        for gauge in (self.running, self.waiting, self.kv_usage):
            gauge.labels(name).set(0)
        engine.subscribe(partial(self._step, name, kind))

    def _step(self, name: str, kind: Kind, stats: StepStats) -> None:
        self.running.labels(name).set(stats.running)
        self.waiting.labels(name).set(stats.waiting)
        self.kv_usage.labels(name).set(stats.pages_used / stats.pages_total if stats.pages_total else 0.0)
        self.steps.labels(name).inc()
        self.step_time.labels(name).observe(stats.seconds)
        self.run_time.labels(name).observe(stats.run_seconds)
        if stats.sequences:
            self.batch.labels(name).observe(stats.sequences)
        if stats.preempted:
            self.preemptions.labels(name).inc(stats.preempted)
        if stats.uncaptured:
            self.uncaptured.labels(name).inc()
        if stats.prefix_queries or stats.prefix_hits:
            self.prefix_queries.labels(name).inc(stats.prefix_queries)
            self.prefix_hits.labels(name).inc(stats.prefix_hits)
        if stats.draft_seconds:
            self.draft_time.labels(name).observe(stats.draft_seconds)
        for drafted, accepted in stats.drafts:
            self._draft(name, drafted, accepted)
        self._lora_step(name, stats)
        if kind != "ar":
            self.denoising.labels(name).inc(stats.sequences)
            self.canvas.labels(name).inc(stats.wanted)
            self.committed.labels(name).inc(stats.committed)
        for finish in stats.finished:
            self._finished(name, finish)

    def _lora_step(self, name: str, stats: StepStats) -> None:
        """Which adapters run now. A model that has had none has no series."""
        running, waiting = (",".join(sorted(names)) for names in (stats.running_loras, stats.waiting_loras))
        before = self._loras.get(name)
        if before is None and not running and not waiting:
            return
        now = (name, str(stats.max_loras), running, waiting)
        if before is not None and before != now:
            self.lora_info.remove(*before)
        self._loras[name] = now
        self.lora_info.labels(*now).set_to_current_time()

    def _lora_finished(self, name: str, finish: Finish) -> None:
        lora = finish.lora
        if len(self._lora_names) < MOST_LORAS:
            self._lora_names.add(lora)
        lora = lora if lora in self._lora_names else "other"
        self.lora_requests.labels(name, lora).inc()
        self.lora_prompt_tokens.labels(name, lora).inc(finish.usage.prompt_tokens)
        self.lora_tokens.labels(name, lora).inc(finish.usage.completion_tokens)

    def _draft(self, name: str, drafted: int, accepted: int) -> None:
        self.drafts.labels(name).inc()
        self.draft_tokens.labels(name).inc(drafted)
        self.accepted.labels(name).inc(accepted)
        for position in range(accepted):
            self.accepted_at.labels(name, str(position)).inc()

    def _finished(self, name: str, finish: Finish) -> None:
        usage = finish.usage
        self.prompt_tokens.labels(name).inc(usage.prompt_tokens)
        self.generation_tokens.labels(name).inc(usage.completion_tokens)
        self.nfe.labels(name).inc(usage.forwards)
        if finish.lora:
            self._lora_finished(name, finish)
        if finish.reason not in (FinishReason.STOP, FinishReason.LENGTH):
            self.failure.labels(name, finish.reason.value).inc()
            return
        self.success.labels(name, finish.reason.value).inc()
        self.per_forward.labels(name).observe(usage.tokens_per_forward)
        for histogram in self.latency:
            histogram.labels(name).observe(usage.total_s)
        self.queue_time.labels(name).observe(usage.queue_s)
        self.inference_time.labels(name).observe(usage.total_s - usage.queue_s)
        if usage.first_token_s is None:
            return
        decode = usage.total_s - usage.first_token_s
        self.first_token.labels(name).observe(usage.first_token_s)
        self.prefill_time.labels(name).observe(usage.first_token_s - usage.queue_s)
        self.decode_time.labels(name).observe(decode)
        if usage.completion_tokens > 1:
            for histogram in self.per_token:
                histogram.labels(name).observe(decode / (usage.completion_tokens - 1))

    def tokens(self, name: str, gap: float, count: int) -> None:
        """`count` tokens reached a client `gap` seconds after the ones before."""
        for _ in range(count):
            self.inter_token.labels(name).observe(gap / count)

    def blocks(self, name: str, seconds: Iterable[float]) -> None:
        """What each finished block of one request took."""
        for each in seconds:
            self.block_time.labels(name).observe(each)

    def tool_call(self, name: str, tokens: int, seconds: float) -> None:
        """A request's first complete tool call came after so many tokens and seconds."""
        self.first_call_tokens.labels(name).observe(tokens)
        self.first_call.labels(name).observe(seconds)

    def answered(self, method: str, handler: str, status: int, seconds: float) -> None:
        """One HTTP request; `handler` is the route's template, so that ids in paths make no new series, and a method
        that HTTP does not know is `other`: a series lives as long as the server, and clients do not choose labels."""
        self.http.labels(method if method in METHODS else "other", handler, str(status)).inc()
        self.http_time.labels(handler).observe(seconds)

    def count_connections(self, count: Callable[[], int]) -> None:
        """Where the number of open connections is to be had."""
        self.connections.set_function(count)

    def connection_ended(self, reason: str) -> None:
        """The server ended a connection, or took none in. reason: of a closed set (server.cuts.Reason)."""
        self.ended.labels(reason).inc()

    def render(self, accept: str) -> tuple[bytes, str]:
        """The exposition and its content type, in the format that `accept` asks for."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type
