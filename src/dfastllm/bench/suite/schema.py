"""The form of test_results.json: what a run of the suite found, as frozen values. Version 1.

    Results
    ├── environment    hardware and its profile key, versions, commit
    ├── run            what was asked for: endpoint, model, parts, sizes, seed
    ├── servers        which servers answer, and why the others do not
    ├── target         the server that was measured, and what it can do
    ├── configurations each: request options, speed, accuracy, equality with the baseline; the same per prompt type
    ├── prompt_types   which type gains most from which configuration
    ├── system_prompts the same prompts under other system messages
    ├── load           points of concurrency and request rate
    ├── accuracy_vs_parallelism   points and the area under them
    ├── recommendations
    ├── client         what the measuring itself cost
    └── skipped, notes, partial, partial_reason

Latencies are written flat under vllm-bench's names, {mean,median,std,p50,p90,p95,p99}_{ttft,tpot,itl,e2el,icl,block}_ms
(a metric that could not be measured is absent), and read as `speed.ttft.p95`. Tokens are committed tokens as the server
counts them (`tokens_source` says from where); they are never chunks, never padding, never the end of text. None means
unknown, 0 means measured as zero.

Knows no HTTP, no terminal and no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator
from pydantic import ValidationError as SchemaError

from dfastllm.errors import ValidationError

__all__ = [
    "METRICS",
    "SCHEMA",
    "SCHEMA_VERSION",
    "STATISTICS",
    "Accuracy",
    "AccuracyVsParallelism",
    "Client",
    "Comparison",
    "ConfigurationResult",
    "Environment",
    "Equality",
    "Figures",
    "Forwards",
    "Latency",
    "LoadPoint",
    "Output",
    "ParallelismPoint",
    "PromptTypeResult",
    "Recommendation",
    "Results",
    "Round",
    "Run",
    "ServerStatus",
    "Skipped",
    "Speculation",
    "Speed",
    "SystemPromptResult",
    "Target",
    "load_results",
    "save_results",
]

SCHEMA: Literal["dfastllm-bench"] = "dfastllm-bench"
SCHEMA_VERSION: Literal[1] = 1
METRICS = ("ttft", "tpot", "itl", "e2el", "icl", "block")
STATISTICS = ("mean", "median", "std", "p50", "p90", "p95", "p99")

Verdict = Literal["faster", "slower", "same", "no verdict"]


class Part(BaseModel):
    """Frozen, and strict about names: a field this version does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class Latency(Part):
    """Milliseconds over `n` values. Percentiles are linear, std is the population's."""

    mean: float
    median: float
    std: float
    p50: float
    p90: float
    p95: float
    p99: float
    n: int


class Speed(Part):
    """What a set of requests took.

    requests      that ended well; `errors` of them did not and count in nothing else here.
    error_kinds   kind to number: refused, http_500, timeout, disconnected, malformed, ...
    duration      seconds from the first send to the last byte.
    output_tokens None when the server gives no usage and nothing else counts tokens.
    tokens_source usage: the server's own count. tokenize: its tokenize endpoint. estimate: characters / 4, a label of
                  last resort, never compared across servers. mixed, none.
    *_throughput  per second of `duration`. request_goodput: requests within the SLOs, per second.
    user_tps      median over requests of (n-1)/(t_last-t_first): what one reader sees; None for one-chunk answers.
    ttft          first content; for a diffusion model the first committed block or token. tpot: (e2el-ttft)/(n-1).
    itl           gap between tokens: a chunk of m tokens counts its gap / m, m times; absent where the tokens of a
                  chunk are not known. icl: gap between chunks. block: time per block of a diffusion model.
    ttfa          to the first complete tool call that fits its tool's schema, over the requests that should make one.
    cdf           metric to its quantiles at 0, 5, ..., 100 % in ms.
    """

    requests: int
    errors: int = 0
    error_kinds: dict[str, int] = Field(default_factory=dict)
    duration: float
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    tokens_source: Literal["usage", "tokenize", "estimate", "mixed", "none"] = "none"
    request_throughput: float
    output_throughput: float | None = None
    total_token_throughput: float | None = None
    request_goodput: float | None = None
    user_tps: float | None = None
    ttft: Latency | None = None
    tpot: Latency | None = None
    itl: Latency | None = None
    e2el: Latency | None = None
    icl: Latency | None = None
    block: Latency | None = None
    ttfa: Latency | None = None
    cdf: dict[str, tuple[float, ...]] = Field(default_factory=dict)

    @model_serializer(mode="wrap")
    def _flat(self, handler: Any) -> dict[str, Any]:
        out: dict[str, Any] = handler(self)
        for metric in (*METRICS, "ttfa"):
            latency = out.pop(metric, None)
            if latency is not None:
                out |= {f"{name}_{metric}_ms": latency[name] for name in STATISTICS}
                out[f"n_{metric}"] = latency["n"]
        return out

    @model_validator(mode="before")
    @classmethod
    def _nested(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        rest = dict(data)
        for metric in (*METRICS, "ttfa"):
            if f"mean_{metric}_ms" in rest:
                rest[metric] = {name: rest.pop(f"{name}_{metric}_ms", None) for name in STATISTICS}
                rest[metric]["n"] = rest.pop(f"n_{metric}", None)
        return rest


class Speculation(Part):
    """Drafts of the measured requests. Mirrors vllm:spec_decode_num_{drafts,draft_tokens,accepted_tokens}_total.

    accepted_per_position  how often the draft's first, second, ... token was accepted; empty when not told.
    source                 response: summed over the requests' own figures. metrics: difference of /metrics, which
                           counts whatever else the server did.
    """

    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    accepted_per_position: tuple[int, ...] = ()
    acceptance_rate: float | None
    acceptance_length: float | None = Field(description="1 + accepted / drafts: tokens per verifying forward.")
    source: Literal["response", "metrics"]


class Forwards(Part):
    """nfe: forward passes, mean per request. tokens_per_forward: all tokens / all forwards."""

    nfe: float
    tokens_per_forward: float


class Accuracy(Part):
    """Exact match: `correct` of `n` graded answers; low, high: 95 % Wilson interval."""

    n: int
    correct: int
    value: float
    low: float
    high: float


class Equality(Part):
    """Answers that equal the baseline's: token for token where both sides tell their ids, else as text."""

    compared: int
    equal: int
    by: Literal["tokens", "text"]


class Comparison(Part):
    """Speed over the baseline's, paired per round: ratio above 1 is faster. low, high: 95 % interval of the median over
    rounds, the wider of the bootstrap's and the sign test's. verdict: same, when the whole interval is within the
    margin of 1; else faster or slower, when the whole interval is on that side of 1; else "no verdict", as with fewer
    than six rounds: the noise won."""

    ratio: float
    low: float
    high: float
    rounds: tuple[float, ...]
    margin: float
    verdict: Verdict


class Output(Part):
    """What the answers look like, graded or not. repetition: mean share of word 4-grams that occur before in the same
    answer. finish_reasons: reason to number."""

    mean_tokens: float | None
    mean_characters: float
    empty: int
    repetition: float
    finish_reasons: dict[str, int]


class Figures(Part):
    """Everything measured of one set of requests. None: not measurable here."""

    speed: Speed
    output: Output
    accuracy: Accuracy | None = None
    speculation: Speculation | None = None
    forwards: Forwards | None = None
    exactness: dict[str, int] = Field(default_factory=dict, description="Tier the server names to number of answers.")
    equality: Equality | None = None
    versus_baseline: Comparison | None = None


class Round(Part):
    """One turn of a configuration: output tokens per second over its requests."""

    output_throughput: float | None
    duration: float
    errors: int


class ConfigurationResult(Part):
    """One configuration. `options` are the request fields it adds; the first baseline of the list is what others are
    compared with.

    status   measured; refused: the server will not or cannot do it, `message` has its words; failed: every request
             failed; skipped: the run ended before.
    axis     what it varies: speculation (method, k), diffusion (options), custom.
    """

    name: str
    label: str
    axis: Literal["baseline", "speculation", "diffusion", "custom"]
    baseline: bool = False
    method: str | None = None
    num_speculative_tokens: int | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    status: Literal["measured", "refused", "failed", "skipped"]
    message: str | None = None
    figures: Figures | None = None
    rounds: tuple[Round, ...] = ()
    prompt_types: dict[str, Figures] = Field(default_factory=dict)


class PromptTypeResult(Part):
    """gradable: prompts whose answers are graded. best_configuration: fastest with a verdict, None when none is."""

    name: str
    label: str
    prompts: int
    gradable: int
    best_configuration: str | None = None
    gain: Comparison | None = None


class SystemPromptResult(Part):
    name: str
    text: str
    configuration: str
    figures: Figures


class LoadPoint(Part):
    """kind: closed (so many in flight), fixed or poisson (arrivals per second), ramp (concurrency or rate rising
    through `steps`). timeline of a ramp: (second, requests in flight, tokens per second, errors) each second."""

    name: str
    kind: Literal["closed", "fixed", "poisson", "ramp"]
    configuration: str
    concurrency: int | None = None
    request_rate: float | None = None
    steps: tuple[float, ...] = ()
    slo: dict[str, float] = Field(default_factory=dict, description="ttft, tpot, e2el: at most so many ms.")
    achieved_rate: float
    max_in_flight: int
    timeouts: int = 0
    timeline: tuple[tuple[float, int, float, int], ...] = ()
    figures: Figures
    partial: bool = False
    partial_reason: str | None = None


class ParallelismPoint(Part):
    configuration: str
    tokens_per_forward: float
    accuracy: float
    n: int


class AccuracyVsParallelism(Part):
    """Points by rising tokens per forward. area: of the trapezoids under the best accuracy reached at that parallelism
    or a higher one, from 1 token per forward to the most parallel point; mean_accuracy: area / width, None without
    width."""

    points: tuple[ParallelismPoint, ...]
    area: float
    mean_accuracy: float | None


class Recommendation(Part):
    kind: Literal["configuration", "use_case", "system_prompt", "load", "warning"]
    text: str
    configuration: str | None = None
    prompt_type: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    gain: Comparison | None = None


class ServerStatus(Part):
    """status: running, or why not. latency_ms: of GET /v1/models, median of three."""

    name: str
    url: str
    status: Literal["running", "refused", "timeout", "not_http", "not_openai", "loading", "unauthorised", "error"]
    message: str
    models: tuple[str, ...] = ()
    latency_ms: float | None = None
    software: str | None = None


class Target(Part):
    """kind: ar, diffusion or block where the server tells. fields: request field beyond OpenAI's to whether the server
    honours it: yes, no (refuses it), ignored (takes anything in it, so it does nothing). fallbacks: what the client had
    to do without."""

    url: str
    model: str
    kind: str | None = None
    software: str | None = None
    started_here: bool = False
    api: Literal["chat", "completions"] = "chat"
    fields: dict[str, Literal["yes", "no", "ignored"]] = Field(default_factory=dict)
    fallbacks: tuple[str, ...] = ()


class Environment(Part):
    """hardware: of the client's machine, which is the server's only where `server_is_local`. profile_key: records are
    comparable only where it is the same; "unknown-..." is never equal to another."""

    hardware: dict[str, Any]
    profile_key: str
    server_is_local: bool | None
    versions: dict[str, str]
    commit: str | None


class Run(Part):
    """What was asked for. arguments: the whole of it, as the command line understood it."""

    parts: tuple[str, ...]
    prompt_types: tuple[str, ...]
    requests: int = Field(description="Prompts of each type in a round.")
    rounds: int
    concurrency: int
    max_tokens: int
    temperature: float
    seed: int
    quick: bool
    arguments: dict[str, Any] = Field(default_factory=dict)


class Client(Part):
    """The measuring's own cost. cpu_us_per_chunk: the client thread's CPU per stream chunk received. cpu_share: of one
    core, while measuring. loop_lag_*: how late the event loop woke up, ms. bounded: below the limits that docs/bench.md
    names."""

    chunks: int
    cpu_us_per_chunk: float | None
    cpu_share: float
    loop_lag_p50_ms: float
    loop_lag_p99_ms: float
    loop_lag_max_ms: float
    bounded: bool


class Skipped(Part):
    part: str
    reason: str


class Results(Part):
    """The file. started, finished: UTC, ISO 8601. partial: something that was asked for is missing; why is in
    partial_reason."""

    schema_name: Literal["dfastllm-bench"] = Field(default=SCHEMA, alias="schema")
    schema_version: Literal[1] = SCHEMA_VERSION
    started: str
    finished: str
    seconds: float
    partial: bool = False
    partial_reason: str | None = None
    environment: Environment
    run: Run
    servers: tuple[ServerStatus, ...] = ()
    target: Target | None = None
    configurations: tuple[ConfigurationResult, ...] = ()
    prompt_types: tuple[PromptTypeResult, ...] = ()
    system_prompts: tuple[SystemPromptResult, ...] = ()
    load: tuple[LoadPoint, ...] = ()
    accuracy_vs_parallelism: AccuracyVsParallelism | None = None
    recommendations: tuple[Recommendation, ...] = ()
    client: Client | None = None
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()

    model_config = ConfigDict(populate_by_name=True)  # the rest is inherited

    @property
    def baseline(self) -> ConfigurationResult | None:
        """What the others are compared with."""
        return next((c for c in self.configurations if c.baseline and c.figures is not None), None)


def save_results(results: Results, path: Path) -> None:
    """Write the file whole or not at all: a run that is killed leaves the previous one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(results.model_dump_json(by_alias=True, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def load_results(path: Path) -> Results:
    """Read test_results.json. Raises ValidationError for a file that is missing, cut short, of another version or of
    another tool; the message says which."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValidationError(f"{path} cannot be read: {error}.", param="results") from error
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ValidationError(
            f"{path} is no complete JSON ({error}): it was cut short or is another kind of file.",
            param="results",
            hint="Take a file that `dfastllm bench` finished writing.",
        ) from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        got = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise ValidationError(
            f"{path} is no result of `dfastllm bench`: its schema is {got!r}, wanted {SCHEMA!r}.", param="results"
        )
    version = data.get("schema_version")
    if version != SCHEMA_VERSION:
        older = isinstance(version, int) and version < SCHEMA_VERSION
        raise ValidationError(
            f"{path} has schema version {version!r}; this dfastllm reads {SCHEMA_VERSION}.",
            param="results",
            hint="Run the suite again." if older else "Read it with a newer dfastllm.",
        )
    try:
        return Results.model_validate(data)
    except SchemaError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValidationError(
            f"{path} does not fit its schema: {first['msg']} at {where} ({error.error_count()} in all).",
            param="results",
        ) from error
