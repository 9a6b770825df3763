"""Every setting of dfastllm, declared once: the fields of `Settings`. Imports no room but errors, and no torch.

A setting is a typed field with a default, a help line and its limits. From that one table derive the command line
(`--max-num-seqs`), the environment (`DFASTLLM_MAX_NUM_SEQS`), the reference page (`python -m dfastllm.settings` prints
docs/settings.md) and the tests. Precedence: command line, then environment, then default.

What this file does not do: read files, or act on a value. A setting that nothing reads does not exist: a house test
fails when a field here is used nowhere.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from dfastllm.errors import ValidationError

__all__ = ["GROUPS", "PREFIX", "SETTINGS", "Setting", "Settings", "reference", "unknown_variables"]

PREFIX = "DFASTLLM_"
Group = Literal["server", "model", "engine"]
GROUPS: Mapping[Group, str] = {
    "server": "Server: where it listens and what it lets in.",
    "model": "Models: what is loaded and how it runs.",
    "engine": "Engine: the budgets of the step loop, for each served model.",
}
BLOCK = 16  # positions of a block of K,V of the native kernels (kernels.step.BLOCK; this room imports none)
FLOATS = ("auto", "float32", "bfloat16", "float16")
DEVICE = r"cpu|mps|cuda(:\d+)?"


def _field(
    default: Any,
    help: str,
    *,
    group: Group,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] = (),
    pattern: str | None = None,
    pattern_help: str = "",
    unit: str = "",
    secret: bool = False,
    alone: bool = False,
    engine: str = "",
) -> Any:
    metadata = {
        "help": help,
        "group": group,
        "minimum": minimum,
        "maximum": maximum,
        "choices": choices,
        "pattern": pattern,
        "pattern_help": pattern_help,
        "unit": unit,
        "secret": secret,
        "alone": alone,
        "engine": engine,
    }
    return dataclasses.field(default=default, repr=not secret, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Validated settings. Raises ValidationError with `param` set to the setting's name."""

    host: str = _field("127.0.0.1", "Address to listen on; 0.0.0.0 for every interface.", group="server")
    port: int = _field(8000, "TCP port; 0 takes a free one.", group="server", minimum=0, maximum=65535)
    uds: str | None = _field(
        None,
        "Unix socket to listen on, a path, in place of host and port; its file is gone afterwards.",
        group="server",
    )
    uds_mode: str = _field(
        "600",
        "Permissions of that socket's file, in octal: who may connect.",
        group="server",
        pattern=r"[0-7]{3}",
        pattern_help="three octal digits",
    )
    allowed_hosts: tuple[str, ...] = _field(
        (),
        "Names that this server has, besides addresses and names without a dot; '*.example.com' for all below, '*' for"
        " any. Others get 421: by default where it listens on this machine only and has no API key, and wherever a name"
        " is given here.",
        group="server",
    )
    api_key: str | None = _field(
        None,
        "When set, requests must carry it as 'Authorization: Bearer KEY'. Health and metrics stay open.",
        group="server",
        secret=True,
    )
    tenants_db: str | None = _field(
        None,
        "Database of tenants, their keys, limits and usage: an SQLite file, or postgresql://USER:PASSWORD@HOST/NAME."
        " Then every request needs a key of `dfastllm keys create`; see docs/tenants.md.",
        group="server",
        secret=True,
    )
    usage_journal: str | None = _field(
        None,
        "File that keeps the usage while that database does not answer; default: beside an SQLite file, else below"
        " ~/.local/state/dfastllm.",
        group="server",
    )
    usage_retention_days: int = _field(
        400,
        "After so many days the usage of a request is removed from that database; 0 keeps it for ever.",
        group="server",
        minimum=0,
        maximum=36500,
        unit="days",
    )
    allowed_origins: tuple[str, ...] = _field(
        (), "Web origins that browsers may call from (CORS); none by default, '*' for any.", group="server"
    )
    max_body_bytes: int = _field(
        8 << 20, "Largest request body; a larger one is refused with 413.", group="server", minimum=1024, unit="bytes"
    )
    max_body_values: int = _field(
        1 << 18,
        "Most numbers, texts, lists and objects in one request body; a larger one is refused with 413. A million take"
        " about 100 ms to read.",
        group="server",
        minimum=1024,
    )
    max_tokenize_length: int = _field(
        1 << 20,
        "Longest text that /tokenize takes, in characters, and most ids that /detokenize takes.",
        group="server",
        minimum=1,
    )
    max_prompts: int = _field(
        256, "Largest number of sequences in one request (prompts x n).", group="server", minimum=1
    )
    max_connections: int = _field(
        1024,
        "Most connections at a time; one more takes the place of an idle one, or gets 503.",
        group="server",
        minimum=1,
    )
    websocket_connections: int = _field(
        512,
        "Most WebSockets at a time, of those connections; one more takes the place of one without a key, or gets 503.",
        group="server",
        minimum=1,
    )
    websocket_calls: int = _field(
        64,
        "Most calls that run at once on a WebSocket; one more is refused with RATE_LIMIT_EXCEEDED.",
        group="server",
        minimum=1,
    )
    websocket_auth_timeout: float = _field(
        10.0, "Time for the key on a WebSocket whose head has none.", group="server", minimum=0.001, unit="s"
    )
    websocket_ping_interval: float = _field(
        20.0,
        "Time between two pings of a WebSocket, and for the answer to one; then it ends.",
        group="server",
        minimum=0.001,
        unit="s",
    )
    header_timeout: float = _field(
        10.0, "Time for a request's head; then it ends with 408.", group="server", minimum=0.001, unit="s"
    )
    body_timeout: float = _field(
        30.0,
        "Time for a request's body, besides a second for each 8 KiB that came; then it ends with 408.",
        group="server",
        minimum=0.001,
        unit="s",
    )
    write_timeout: float = _field(
        30.0,
        "Time in which a client must read on, 8 KiB a second or all that waits; then its connection ends.",
        group="server",
        minimum=0.001,
        unit="s",
    )
    keep_alive_timeout: float = _field(
        75.0, "How long a connection may be idle between two requests.", group="server", minimum=0.001, unit="s"
    )
    request_timeout: float = _field(
        600.0,
        "Time a request may take, waiting included; then it ends with 504.",
        group="server",
        minimum=0.001,
        unit="s",
    )
    shutdown_timeout: float = _field(
        10.0, "How long a stopping server lets running requests finish.", group="server", minimum=0.0, unit="s"
    )
    pipelines: tuple[str, ...] = _field(
        (),
        "Files of pipelines, YAML or JSON, that every tenant may run; see docs/pipelines.md.",
        group="server",
    )
    record_prompts: str | None = _field(
        None,
        "File to which the messages and tools of every chat request are appended, a JSON object a line, to train a"
        " draft model on one's own traffic; mode 0600. Never keys, headers, options or answers. Off by default; see"
        " docs/server.md.",
        group="server",
    )
    record_prompts_bytes: int = _field(
        64 << 20,
        "Largest size of that file; at it the file becomes FILE.1, in place of an older one, and begins anew.",
        group="server",
        minimum=1024,
        unit="bytes",
    )
    log_level: str = _field(
        "info", "Least severe log line written.", group="server", choices=("debug", "info", "warning", "error")
    )

    model: tuple[str, ...] = _field(
        (),
        "Model to serve: a name of `dfastllm list`, a Hugging Face directory, a GGUF file, or ORG/NAME[@REVISION] of a"
        " hub, fetched once; repeatable. None given: every shipped model.",
        group="model",
    )
    served_model_name: tuple[str, ...] = _field(
        (), "Name in the API of each --model, in the same order; default: its directory's name.", group="model"
    )
    draft_model: str | None = _field(
        None,
        "Small autoregressive model of the same vocabulary: the second opinion of rule apd on the served diffusion"
        " models.",
        group="model",
    )
    device: str = _field(
        "cpu",
        "Where models run: cpu, cuda, cuda:N or mps.",
        group="model",
        pattern=DEVICE,
        pattern_help="cpu, cuda, cuda:N or mps",
        alone=True,
    )
    dtype: str = _field(
        "auto",
        "Number format of the weights; auto keeps the checkpoint's.",
        group="model",
        choices=FLOATS,
        alone=True,
    )
    threads: int | None = _field(
        None,
        "CPU threads of a forward pass; default: the physical cores this process may use.",
        group="model",
        minimum=1,
        maximum=1024,
        alone=True,
    )
    backend: str = _field(
        "auto",
        "What computes: native (packed weights, our own kernels) on a CPU, triton (our own kernels) on a GPU, or torch;"
        " auto: one of the first two where it can be.",
        group="model",
        choices=("auto", "native", "torch", "triton"),
        alone=True,
    )
    batch_invariant: bool = _field(
        False,
        "On a GPU: a request's bits do not depend on the requests beside it, at some cost in speed; always so with w8"
        " and on a CPU.",
        group="model",
        alone=True,
    )
    quantization: str | None = _field(
        None,
        "Quantise a float checkpoint's matrices while loading, embedding and head to 8 bits at least; 8bit: w8r, or w8g"
        " for a model that w8r cannot hold; fp8: on a GPU; default: as stored. Better and faster to start: `dfastllm"
        " quantize` once.",
        group="model",
        choices=("8bit", "w8", "w8r", "w8g", "w8gr", "w6", "w4m", "w4", "w4r", "fp8"),
        alone=True,
    )
    kv_cache_dtype: str = _field(
        "auto",
        "Number format of K,V: auto is the weights' (bfloat16 for quantised ones); int8 needs the native or the triton"
        " backend, fp8 the triton one.",
        group="model",
        choices=("auto", "float32", "bfloat16", "int8", "fp8"),
        alone=True,
    )
    speculative_config: str | None = _field(
        None,
        'Speculative decoding of autoregressive models, vLLM\'s JSON: {"method": "draft_model", "model": "demo-draft",'
        ' "num_speculative_tokens": 5}; methods ngram, suffix, draft_model, diffusion. A list: the first is the'
        " default, the others are there for requests to choose. See docs/speculation.md.",
        group="model",
        alone=True,
    )
    chat_template: str | None = _field(
        None,
        "File with the chat template (Jinja) of every model that is loaded; default: the one of its checkpoint.",
        group="model",
        alone=True,
    )
    default_chat_template_kwargs: str | None = _field(
        None,
        'Variables of the chat template, as JSON: {"enable_thinking": false}; those of a request win.',
        group="model",
        alone=True,
    )
    chat_parse_special: bool = _field(
        False,
        "Special tokens that people spell out in messages become those tokens, unless a request says parse_special"
        " false; default: they stay text.",
        group="model",
        alone=True,
    )
    edits: str = _field(
        "auto",
        "Whether the model was trained to overwrite tokens that it committed (LLaDA2.1), which `edit` rules need; auto:"
        " as its config.json or its name says.",
        group="model",
        choices=("auto", "yes", "no"),
        alone=True,
    )
    trained_block: int | None = _field(
        None,
        "Block length that a block-diffusion model was trained for; default: as its config.json says, which published"
        " ones do not always.",
        group="model",
        minimum=1,
        maximum=4096,
        alone=True,
    )
    lora_modules: tuple[str, ...] = _field(
        (),
        "LoRA adapter to serve, NAME=PATH: a PEFT directory or a shipped adapter's name; where several models are"
        " served MODEL:NAME=PATH; repeatable. Requests choose it by `model` or `lora`. See docs/lora.md.",
        group="model",
    )
    enable_lora: bool = _field(
        False,
        "With --lora-root: adapters may be loaded and unloaded at run time (POST /v1/load_lora_adapter), and are loaded"
        " again when the server starts anew.",
        group="model",
    )
    lora_root: str | None = _field(
        None,
        "Directory below which adapters that are loaded at run time must lie; which they are is kept in a file there.",
        group="model",
    )
    max_model_len: int | None = _field(
        None,
        "Longest prompt plus output; default, and at most: the model's context. A model with longrope (Phi-3.5, "
        "Phi-4-mini) takes its factors for short texts where this is at most the length that it was trained for, else "
        "those for long texts, for texts of every length.",
        group="model",
        minimum=8,
        unit="tokens",
        alone=True,
        engine="max_len",
    )

    max_num_seqs: int = _field(
        64, "Most sequences that run at once.", group="engine", minimum=1, engine="max_sequences"
    )
    max_num_batched_tokens: int = _field(
        2048,
        "Most rows of one forward pass; a canvas longer than it runs alone.",
        group="engine",
        minimum=1,
        unit="rows",
        engine="max_batch_rows",
    )
    min_num_batched_tokens: int | None = _field(
        None,
        "Backend torch pads a smaller forward pass to this many rows, so that a request's numbers do not depend on its"
        " neighbours; default: 8 per CPU thread, at least 16. 1: no padding, and no such promise.",
        group="engine",
        minimum=1,
        unit="rows",
        engine="min_rows",
    )
    prefill_chunk: int = _field(
        512,
        "Most prompt rows of one sequence in a forward pass, so that a long prompt does not hold up the others.",
        group="engine",
        minimum=1,
        unit="rows",
        engine="prefill_chunk",
    )
    max_waiting: int = _field(
        1024,
        "Most requests that wait; one more is refused with 429 queue_full.",
        group="engine",
        minimum=1,
        engine="max_waiting",
    )
    ageing_steps: int = _field(
        64,
        "Steps waited that raise a request's priority by one level, so that none starves; 0: no ageing.",
        group="engine",
        minimum=0,
        unit="steps",
        engine="ageing_steps",
    )
    kv_cache_tokens: int = _field(
        65536, "K,V memory of all sequences together.", group="engine", minimum=16, unit="tokens", engine="kv_tokens"
    )
    gpu_memory_utilization: float | None = _field(
        None,
        "On a GPU: share of its memory that may be in use; K,V get what is left of it, in place of kv_cache_tokens.",
        group="engine",
        minimum=0.01,
        maximum=1.0,
        engine="gpu_memory_utilization",
    )
    page_size: int = _field(
        16,
        "K,V page: the unit of allocation; a multiple of 16 but for backend torch.",
        group="engine",
        minimum=1,
        unit="tokens",
        engine="page_size",
    )
    enable_prefix_caching: bool = _field(
        True,
        "Requests that begin alike share the K,V of their common beginning, exactly; off for masked-diffusion models,"
        " whose K,V of a prompt depend on the response.",
        group="engine",
        engine="prefix_caching",
    )

    max_loras: int = _field(
        64,
        "Most LoRA adapters in memory; the least recently used one that no request runs on gives way, and is read again"
        " when it is asked for.",
        group="engine",
        minimum=1,
        engine="max_loras",
    )
    lora_memory: int = _field(
        1 << 30,
        "Memory of all LoRA adapters together.",
        group="engine",
        minimum=1,
        unit="bytes",
        engine="lora_memory",
    )
    max_lora_rank: int = _field(
        512, "Largest rank of a LoRA adapter.", group="engine", minimum=1, engine="max_lora_rank"
    )

    def __post_init__(self) -> None:
        for setting in SETTINGS:
            object.__setattr__(self, setting.name, setting.parse(getattr(self, setting.name)))
        if self.served_model_name and len(self.served_model_name) != len(self.model):
            raise ValidationError(
                f"served_model_name must name each model once: got {len(self.served_model_name)} names for "
                f"{len(self.model)} models.",
                param="served_model_name",
            )
        if not _is_object(self.default_chat_template_kwargs or "{}"):
            raise ValidationError(
                f"default_chat_template_kwargs must be a JSON object; got {self.default_chat_template_kwargs!r:.200}.",
                param="default_chat_template_kwargs",
            )
        if self.page_size > self.kv_cache_tokens:
            raise ValidationError(
                f"page_size must not exceed kv_cache_tokens: got {self.page_size} > {self.kv_cache_tokens}.",
                param="page_size",
            )
        self._check_backend()

    def _check_backend(self) -> None:
        """Refuse what would fail for want of the native backend, or because of it, when a model is already loaded."""
        native = self.device == "cpu" and self.backend not in ("torch", "triton")
        triton = (self.device.startswith("cuda") and self.backend in ("auto", "triton")) or self.backend == "triton"
        if (native or triton) and self.page_size % BLOCK:
            raise ValidationError(
                f"page_size must be a multiple of {BLOCK} on the {'native' if native else 'triton'} backend; got "
                f"{self.page_size}.",
                param="page_size",
                hint="Any other goes with backend torch.",
            )
        for name, given in (("quantization", self.quantization), ("kv_cache_dtype", self.kv_cache_dtype)):
            if given in (None, *FLOATS) or triton or (native and given != "fp8"):
                continue
            wanted = "the triton backend" if given == "fp8" else "the native or the triton backend"
            raise ValidationError(
                f"{name} {given} needs {wanted}; got device {self.device} and backend {self.backend}.",
                param=name,
                hint="Take device cuda, and backend triton or auto."
                if given == "fp8"
                else "Take device cpu or cuda, and no backend or auto.",
            )
        for name, there in (
            ("gpu_memory_utilization", self.gpu_memory_utilization is not None),
            ("batch_invariant", self.batch_invariant),
        ):
            if there and not triton:
                raise ValidationError(
                    f"{name} is for the triton backend; got device {self.device} and backend {self.backend}.",
                    param=name,
                    hint="Leave it out, or take device cuda.",
                )

    @classmethod
    def load(cls, given: Mapping[str, Any] | None = None, env: Mapping[str, str] | None = None) -> Settings:
        """Settings from `given` (values by name; None means not given), then `env` (default: the process's)."""
        env = os.environ if env is None else env
        given = given or {}
        for name in given:
            if name not in _BY_NAME:
                near = difflib.get_close_matches(name, _BY_NAME, n=1)
                raise ValidationError(
                    f"there is no setting {name!r}." + (f" Did you mean {near[0]!r}?" if near else ""), param=name
                )
        values = {}
        for setting in SETTINGS:
            value = given.get(setting.name)
            if value is not None and value not in ((), []):
                values[setting.name] = setting.parse(value, source=setting.flag)
            elif env.get(setting.variable):
                values[setting.name] = setting.parse(env[setting.variable], source=setting.variable)
        return cls(**values)

    def engine_options(self) -> dict[str, Any]:
        """Keyword arguments of engine.EngineConfig: `EngineConfig(**settings.engine_options())`."""
        return {s.engine: getattr(self, s.name) for s in SETTINGS if s.engine}


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table. `type` is str, int, float, bool or tuple (of str); `optional` allows None."""

    name: str
    type: type
    optional: bool
    default: Any
    help: str
    group: Group
    minimum: float | None
    maximum: float | None
    choices: tuple[str, ...]
    pattern: str | None
    pattern_help: str
    unit: str
    secret: bool
    alone: bool  # also an option of the commands that load one model and serve nothing
    engine: str  # the field of EngineConfig that it sets, if it is one

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return PREFIX + self.name.upper()

    @property
    def wanted(self) -> str:
        """The values that pass, in words."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        if self.pattern is not None:
            return self.pattern_help
        if self.type is tuple:
            return "a list of non-empty texts, separated by commas"
        noun = {int: "a whole number", float: "a number", bool: "true or false", str: "a non-empty text"}[self.type]
        if self.maximum is not None:
            return f"{noun} from {self.minimum:g} to {self.maximum:g}"
        return f"{noun}, at least {self.minimum:g}" if self.minimum is not None else noun

    def parse(self, value: Any, *, source: str = "") -> Any:
        """The validated value of `value`, which may be text (environment) or already typed. Raises ValidationError."""
        if value is None and self.optional:
            return None
        try:
            parsed = _PARSERS[self.type](value)
        except (TypeError, ValueError):
            raise self._refusal(value, source) from None
        ok = parsed != ""
        if self.choices:
            ok = parsed in self.choices
        elif self.pattern is not None:
            ok = re.fullmatch(self.pattern, parsed) is not None
        if self.minimum is not None:
            ok = ok and parsed >= self.minimum  # False for nan
        if self.maximum is not None:
            ok = ok and parsed <= self.maximum
        if not ok:
            raise self._refusal(value, source)
        return parsed

    def _refusal(self, value: Any, source: str) -> ValidationError:
        got = "a value that is not shown" if self.secret else repr(value)
        origin = f" (from {source})" if source else ""
        return ValidationError(f"{self.name} must be {self.wanted}; got {got}{origin}.", param=self.name)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _parse_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if str(value).lower() in ("1", "true", "yes", "on"):
        return True
    if str(value).lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError(value)


def _parse_int(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError(value)
    return int(value)


def _parse_float(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError(value)
    number = float(value)
    if number in (float("inf"), float("-inf")):
        raise ValueError(value)
    return number


def _parse_str(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _parse_list(value: Any) -> tuple[str, ...]:
    items = value.split(",") if isinstance(value, str) else value
    parsed = tuple(_parse_str(item).strip() for item in items)
    if not all(parsed):
        raise ValueError(value)
    return parsed


_PARSERS: Mapping[type, Any] = {
    bool: _parse_bool,
    int: _parse_int,
    float: _parse_float,
    str: _parse_str,
    tuple: _parse_list,
}


def _table() -> tuple[Setting, ...]:
    hints = typing.get_type_hints(Settings)
    rows = []
    for f in dataclasses.fields(Settings):
        hint = hints[f.name]
        optional = typing.get_origin(hint) is types.UnionType
        if optional:
            hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
        kind = cast(type, typing.get_origin(hint) or hint)
        rows.append(Setting(name=f.name, type=kind, optional=optional, default=f.default, **f.metadata))
    return tuple(rows)


SETTINGS: tuple[Setting, ...] = _table()
_BY_NAME: Mapping[str, Setting] = {setting.name: setting for setting in SETTINGS}


def unknown_variables(env: Mapping[str, str] | None = None) -> list[str]:
    """Names of DFASTLLM_* variables that are no setting: mistyped, or put there by something else (Kubernetes does so
    for a service called dfastllm), so callers warn and go on."""
    env = os.environ if env is None else env
    known = {setting.variable for setting in SETTINGS} | {f"{PREFIX}NATIVE", f"{PREFIX}ISA"}  # of the kernels
    return sorted(name for name in env if name.startswith(PREFIX) and name not in known)


def _shown(setting: Setting) -> str:
    if setting.default is None or setting.default == ():
        return "—"
    number = f"{setting.default:g}" if isinstance(setting.default, float) else str(setting.default)
    return f"`{number}`" + (f" {setting.unit}" if setting.unit else "")


def reference() -> str:
    """The settings page (Markdown), generated from the table."""
    lines = [
        "# Settings",
        "",
        "Generated by `python -m dfastllm.settings > docs/settings.md`; a test fails when it is stale.",
        "",
        "`dfastllm serve` takes every setting as a flag or from the environment; the flag wins. A list is a repeated",
        "flag, or one comma-separated variable; an empty variable counts as not set. Values are checked before",
        "anything is loaded, a chat template and what is JSON included.",
    ]
    for group, title in GROUPS.items():
        lines += ["", f"## {title.rstrip('.')}", "", "| flag | environment | default | wanted | what it does |"]
        lines += ["|---|---|---|---|---|"]
        for s in SETTINGS:
            if s.group == group:
                flag = f"`{s.flag}`" + (f", `--no-{s.flag[2:]}`" if s.type is bool else "")
                lines.append(f"| {flag} | `{s.variable}` | {_shown(s)} | {s.wanted} | {s.help} |")
    alone = ", ".join(f"`{s.flag}`" for s in SETTINGS if s.alone)
    lines += ["", f"`dfastllm generate` and `dfastllm chat` take {alone} too."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(reference(), end="")
