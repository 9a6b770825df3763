"""Every field of every front reaches the engine or is refused: one test over the table of options."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dfastllm.cli import app
from dfastllm.core import Request, SpeculativeConfig
from dfastllm.engine import Engine
from dfastllm.engine.admission import Admission
from dfastllm.errors import UnsupportedError
from dfastllm.llm import LLM
from dfastllm.lora import Adapter
from dfastllm.options import FRONTS, OPTIONS, DecodeParams, Option, SamplingParams, SpeculativeParams, wire_fields
from tests.kit.live import Live, serving
from tests.kit.served import random_engine

# A value of each option that is not the default.
OTHER: dict[str, Any] = {
    "n": 2,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "repetition_penalty": 1.2,
    "temperature": 0.7,
    "top_p": 0.0,
    "top_k": 5,
    "min_p": 0.1,
    "seed": 7,
    "stop": ("a b", "c"),
    "stop_token_ids": (3, 4),
    "ignore_eos": True,
    "max_tokens": 9,
    "min_tokens": 2,
    "logprobs": 1,
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "logit_bias": {3: -1.5},
    "allowed_token_ids": (5, 6),
    "rule": "threshold",
    "cache": "prefix",
    "steps": 8,
    "block_length": 8,
    "remasking": "entropy",
    "threshold": 0.8,
    "factor": 1.5,
    "options": {"early_stop_confidence": 0.5},
    "cfg_scale": 1.5,
    "logits_eos_inf": True,
    "confidence_eos_eot_inf": True,
    "early_stop": False,
    "provisional": True,
    "mode": "fast",
    "method": "suffix",
    "num_speculative_tokens": 3,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 7,
    "acceptance": "rejection",
    "adaptive": False,
    "suffix_decoding_max_tree_depth": 9,
    "suffix_decoding_max_cached_requests": 10,
    "suffix_decoding_max_spec_factor": 1.5,
    "suffix_decoding_min_token_prob": 0.2,
    "priority": 3,
    "timeout": 5.0,
    "cache_salt": "a tenant's",
    "lora": "an-adapter",
}
ROWS = pytest.mark.parametrize("row", OPTIONS, ids=lambda row: row.name)


class Watched:
    """An engine for each kind, and what it has admitted."""

    def __init__(self) -> None:
        self.seen: list[Admission] = []
        self.engines = {"ar": self._watch(random_engine("llama")), "canvas": self._watch(random_engine("llada"))}

    def _watch(self, engine: Engine) -> Engine:
        real = engine.admit
        engine.adapters.read = lambda path: Adapter.of({})  # it changes nothing: here it need only arrive
        engine.adapters.load(OTHER["lora"], Path("anywhere"))

        def admit(request: Request) -> Admission:
            self.seen.append(real(request))
            return self.seen[-1]

        engine.admit = admit  # type: ignore[method-assign]
        return engine

    def holds(self, row: Option, wanted: Any) -> None:
        """Every admission since the last call has the value."""
        seen, self.seen[:] = list(self.seen), []
        assert seen
        if row.name == "n":
            assert len(seen) == wanted
            return
        for admission in seen:
            request = admission.request
            owner: Any = {
                "sampling": request.sampling,
                "decode": request.decode,
                "speculative": request.speculative,
                "request": request,
            }[row.group]
            assert getattr(owner, row.name) == wanted
            assert row.name != "seed" or admission.state.seed == wanted


@pytest.fixture(scope="module")
def watched() -> Watched:
    return Watched()


@pytest.fixture(scope="module")
def live(watched: Watched) -> Iterator[Live]:
    with serving(watched.engines) as live:
        yield live


def of_kind(row: Option) -> str:
    return "canvas" if row.applies == "canvas" else "ar"


def speculative(row: Option, value: Any) -> dict[str, Any]:
    return {"method": "ngram", row.name: value}


def short(row: Option) -> dict[str, Any]:
    return {} if row.name == "max_tokens" else {"max_tokens": 8}


def test_the_table_above_is_complete() -> None:
    assert list(OTHER) == [row.name for row in OPTIONS]
    assert all(OTHER[row.name] != row.default and OTHER[row.name] not in row.kinds.values() for row in OPTIONS)


@ROWS
def test_python(row: Option, watched: Watched) -> None:
    value = OTHER[row.name]
    fields: dict[str, Any] = {"sampling": short(row)} | {row.group: {**short(row), row.name: value}}
    if row.group == "speculative":
        fields = {"sampling": short(row), "speculative": speculative(row, value)}
    elif row.group == "decode":
        fields = {"sampling": short(row), "decode": {row.name: value}}
    more: dict[str, Any] = {row.name: value} if row.group == "request" else {}
    if row.group == "speculative":
        more["speculative"] = SpeculativeParams(**fields["speculative"])
    decode = DecodeParams(**fields["decode"]) if "decode" in fields else None
    with LLM(engine=watched.engines[of_kind(row)]) as llm:
        sampling = SamplingParams(**fields["sampling"])
        if row.name == "priority":
            list(llm.submit("The dog", sampling, decode, **more))
        else:
            llm.generate("The dog", sampling, decode, **more)
    watched.holds(row, value)


def as_json(value: Any) -> Any:
    return {str(k): v for k, v in value.items()} if isinstance(value, Mapping) else value


def bodies(row: Option, front: Any) -> list[tuple[dict[str, Any], Any, str]]:
    """(fields of a body, the value they mean, the name of the field) for each field of the route that gives it."""
    value, found = OTHER[row.name], []
    if row.group == "speculative":
        return [({"speculative_config": speculative(row, value)}, value, "speculative_config")]
    for field in wire_fields(front):
        if field.option is not row:
            continue
        wanted = value
        body: dict[str, Any] = {field.name: as_json(value)}
        match field.name:
            case "use_cache":
                body, wanted = {field.name: False}, "none"
            case "use_dual_cache":
                body = {field.name: False}
            case "top_logprobs":
                body["logprobs"] = True
            case "logprobs" if front == "chat":
                body, wanted = {field.name: True}, 0
            case "stream_options.canvas_events":
                body = {"stream": True, "stream_options": {"canvas_events": True}}
        found.append((body, wanted, field.name))
    return found


def send(live: Live, front: str, model: str, row: Option, body: Mapping[str, Any]) -> Any:
    names = {name for name in body if "max" in name}
    whole = {"model": model, **({} if names else short(row)), **body}
    if front == "chat":
        return live.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "The dog"}], **whole})
    return live.post("/v1/completions", {"prompt": "The dog", **whole})


@pytest.mark.parametrize("front", FRONTS)
@ROWS
def test_http(row: Option, front: str, watched: Watched, live: Live) -> None:
    ways = bodies(row, front)
    assert ways, "an option that no field gives"
    for body, wanted, _ in ways:
        reply = send(live, front, of_kind(row), row, body)
        assert reply.status_code == 200, reply.text
        watched.holds(row, wanted)


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("row", [row for row in OPTIONS if row.applies != "any"], ids=lambda row: row.name)
def test_http_refuses_by_name_what_the_model_has_not(row: Option, front: str, watched: Watched, live: Live) -> None:
    other = "ar" if row.applies == "canvas" else "canvas"
    for body, _, name in bodies(row, front):
        if body == {"use_cache": False} or body == {"use_dual_cache": False}:
            continue  # below: what an autoregressive model does with them
        reply = send(live, front, other, row, body)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, name), reply.text
    assert watched.seen == []


def test_the_caches_switches_on_an_autoregressive_model(live: Live, watched: Watched) -> None:
    """It keeps K,V anyway, and cannot but keep them."""
    row = next(row for row in OPTIONS if row.name == "cache")
    for dual in (False, True):
        assert send(live, "completions", "ar", row, {"use_cache": True, "use_dual_cache": dual}).status_code == 200
    watched.seen.clear()
    refused = send(live, "completions", "ar", row, {"use_cache": False})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "use_cache")


@pytest.mark.parametrize("row", [row for row in OPTIONS if row.applies == "canvas"], ids=lambda row: row.name)
def test_python_refuses_by_name_what_the_model_has_not(row: Option, watched: Watched) -> None:
    with LLM(engine=watched.engines["ar"]) as llm, pytest.raises(UnsupportedError) as refused:
        llm.generate("The dog", SamplingParams(max_tokens=4), DecodeParams(**{row.name: OTHER[row.name]}))
    assert refused.value.param == row.name


def flags(row: Option) -> list[str]:
    """The option on a command line."""
    flag, value = f"--{row.name.replace('_', '-')}", OTHER[row.name]
    if row.group == "speculative":
        return ["--speculative-config", json.dumps(speculative(row, value))]
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    if isinstance(value, Mapping):
        return [part for k, v in value.items() for part in (flag, f"{k}={v}")]
    return [part for one in (value if isinstance(value, tuple) else (value,)) for part in (flag, str(one))]


@ROWS
def test_command_line(row: Option, watched: Watched, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / OTHER["lora"]).mkdir()  # the command line names an adapter by its directory
    monkeypatch.chdir(tmp_path)

    def opened(model: str, settings: Any, draft: str | None = None) -> LLM:
        engine = watched.engines[of_kind(row)]
        asked = settings.speculative_config
        engine.drafting.default = SpeculativeConfig.parse(asked)[0].params if asked else None
        return LLM(engine=engine)

    monkeypatch.setattr("dfastllm.cli.session.open_model", opened)
    rest = ["--json"] if row.name == "logprobs" else []
    rest += [] if row.name == "max_tokens" else ["--max-tokens", "8"]
    result = CliRunner().invoke(app, ["generate", "The dog", "--raw", *flags(row), *rest])
    watched.engines["ar"].drafting.default = None
    if row.group == "request" and not row.flag:
        assert result.exit_code == 2
        assert "No such option" in result.output
        return
    assert result.exit_code == 0, result.output
    watched.holds(row, OTHER[row.name])
