"""The table of options: what is given and what is not, layers of defaults, the wire, the reference page."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from typing import Any

import pytest

from dfastllm.core import DecodeParams, SamplingParams, SpeculativeParams
from dfastllm.errors import ValidationError
from dfastllm.options import (
    FRONTS,
    HINTS,
    OPTIONS,
    changed,
    generation_config,
    generation_defaults,
    kind_defaults,
    reference,
    resolved,
    wire_fields,
)
from tests.kit.source import ROOT


def test_parameters_know_what_was_given() -> None:
    assert SamplingParams().given == frozenset()
    params = SamplingParams(2, temperature=1.0, stop="x")
    assert params.given == {"n", "temperature", "stop"}
    assert params == SamplingParams(n=2, stop=("x",)), "a default that was given is still the default"
    more = dataclasses.replace(params, seed=3)
    assert (more.given, more.temperature, more.seed) == (params.given | {"seed"}, 1.0, 3)
    assert dataclasses.replace(SamplingParams(), min_tokens=0).given == frozenset()
    assert changed(SamplingParams(), min_tokens=0).given == {"min_tokens"}
    for twin in (copy.copy(params), pickle.loads(pickle.dumps(params))):
        assert (twin, twin.given) == (params, params.given)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 3  # type: ignore[misc]
    assert SamplingParams(max_tokens=None, seed=None).given == frozenset(), "None says nothing"
    assert DecodeParams().options is not DecodeParams().options


def test_wrong_arguments_are_type_errors() -> None:
    for args, fields in (((), {"temprature": 1}), ((1,), {"n": 2}), (tuple(range(40)), {})):
        with pytest.raises(TypeError, match="SamplingParams got"):
            SamplingParams(*args, **fields)
    with pytest.raises(TypeError, match=r"'temprature'\. Did you mean 'temperature'\?"):
        SamplingParams(temprature=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"arguments: 'zzz'\.$"):
        SamplingParams(zzz=1)  # type: ignore[call-arg]
    assert "temperature" in inspect.signature(SamplingParams).parameters


def test_layers_of_defaults() -> None:
    asked = SamplingParams(top_k=3)
    got = resolved(asked, {"top_k": 9, "temperature": 0.5}, {"temperature": 0.1, "max_tokens": 128, "cache": "dual"})
    assert (got.top_k, got.temperature, got.max_tokens) == (3, 0.5, 128)
    assert got.given == {"top_k"}
    assert asked.temperature == 1.0
    assert resolved(asked, {"top_k": 9}) is asked
    assert kind_defaults("ar") == {}
    assert kind_defaults("diffusion") == {
        "temperature": 0.0,
        "max_tokens": 128,
        "cache": "dual",
        "steps": 128,
        "block_length": 32,
    }
    assert kind_defaults("block") == {"temperature": 0.0, "max_tokens": 128}


def test_min_tokens_is_held_against_a_given_max_tokens() -> None:
    assert SamplingParams(min_tokens=17).max_tokens is None
    with pytest.raises(ValidationError, match=r"min_tokens must be in \[0, max_tokens=16\], got 17"):
        SamplingParams(min_tokens=17, max_tokens=16)


def test_generation_config() -> None:
    config = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "max_new_tokens": 9, "do_sample": True, "eos_token_id": 3}
    assert generation_defaults(config) == {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "max_tokens": 9}
    assert generation_defaults({"temperature": 0.6, "do_sample": False}) == {"temperature": 0.0}
    assert generation_defaults({"temperature": None}) == {}
    assert generation_defaults({"dfastllm": {"cache": "none", "threshold": 0.8}}) == {"cache": "none", "threshold": 0.8}
    for defaults in ({"temperature": 0.0, "cache": "none"}, {"temperature": 0.7, "max_tokens": 5}, {}):
        assert generation_defaults(generation_config(defaults)) == defaults
    for bad in ({"top_p": 2}, {"temperature": "hot"}, {"dfastllm": {"cache": "dul"}}, {"dfastllm": 3}):
        with pytest.raises(ValidationError):
            generation_defaults(bad)
    for name, said in (("cashe", "Did you mean 'cache'"), ("zzz", "Known: "), ("n", "has no option 'n'")):
        with pytest.raises(ValidationError, match=said) as refused:
            generation_defaults({"dfastllm": {name: 2}}, "diffusion")
        assert refused.value.param == name
    own = {"dfastllm": {"cache": "none", "top_k": 3}}
    assert generation_defaults(own, "diffusion") == own["dfastllm"]
    with pytest.raises(ValidationError, match=r"dfastllm\.cache is an option of diffusion models.* of kind ar"):
        generation_defaults(own, "ar")


@pytest.mark.parametrize("row", OPTIONS, ids=lambda row: row.name)
def test_every_option_says_what_it_is(row: Any) -> None:
    assert row.help.endswith(".")
    assert row.default is not None or row.default_help
    assert row.default in (None, "") or row.check(row.default) == row.default
    assert row.wire
    assert all(row.check(value) == value for value in row.kinds.values())


def test_wire_names_are_of_one_option_each() -> None:
    for front in FRONTS:
        names = [f.name for f in wire_fields(front)] + [hint.name for hint in HINTS]
        assert len(names) == len(set(names))
    assert {f.name for f in wire_fields("chat")} >= {"max_tokens", "max_completion_tokens", "top_logprobs", "use_cache"}


def test_fields_without_effect_take_only_what_asks_for_nothing() -> None:
    """Of beam search, storing, echoing and functions only the "no"; one tier of service, whatever it is called."""
    assert {hint.name: hint.accepts for hint in HINTS if hint.accepts is not None} == {
        "store": (False,),
        "service_tier": ("auto", "default", "flex"),
        "use_beam_search": (False,),
        "length_penalty": (1, 1.0),
        "function_call": ("none",),
        "echo": (False,),
        "add_special_tokens": (False,),
    }
    for hint in HINTS:
        assert ("is refused" in hint.help) == (hint.accepts == (False,)), hint.name


def test_lists_and_mappings_are_checked() -> None:
    assert SamplingParams(stop_token_ids=[3, 4]).stop_token_ids == (3, 4)
    assert SamplingParams(stop=None).stop == ()
    for field, value in (
        ("stop", (3,)),
        ("stop_token_ids", ("3",)),
        ("stop_token_ids", 3),
        ("logit_bias", {"3": 1.0}),
        ("logit_bias", [3]),
    ):
        with pytest.raises(ValidationError) as error:
            SamplingParams(**{field: value})
        assert error.value.param == field
    with pytest.raises(ValidationError, match=r"logit_bias of 3 must be a number in \[-100, 100\], got 101.0"):
        SamplingParams(logit_bias={3: 101.0})
    with pytest.raises(ValidationError, match="prompt_lookup_max must be at least prompt_lookup_min 4, got 3"):
        SpeculativeParams(prompt_lookup_min=4, prompt_lookup_max=3)


def test_a_default_gives_way_to_the_bound_that_was_given() -> None:
    for given, low, high in (
        ({"prompt_lookup_max": 1}, 1, 1),
        ({"prompt_lookup_min": 9}, 9, 9),
        ({"prompt_lookup_max": 4}, 2, 4),
        ({"prompt_lookup_min": 3}, 3, 5),
    ):
        asked = SpeculativeParams(method="ngram", **given)
        assert (asked.prompt_lookup_min, asked.prompt_lookup_max) == (low, high)


def test_the_page_is_the_table() -> None:
    assert (ROOT / "docs" / "options.md").read_text() == reference(), "run python -m dfastllm.options > docs/options.md"


def test_what_a_list_of_texts_wants_is_said() -> None:
    with pytest.raises(ValidationError, match="stop must be strings that are not empty, got ''"):
        SamplingParams(stop=("a", ""))
    with pytest.raises(ValidationError, match="allowed_token_ids must be a whole number, got ''"):
        SamplingParams(allowed_token_ids=("",))  # type: ignore[arg-type]
