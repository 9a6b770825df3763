"""The derived options are the fields of the tables they come from, no more and no fewer, and all of them arrive."""

from __future__ import annotations

from typing import Any

import pytest
import typer

from dfastllm.cli import app
from dfastllm.cli.options import (
    DECODE,
    SAMPLING,
    decode_params,
    from_settings,
    sampling_params,
)
from dfastllm.core import DecodeParams, SamplingParams
from dfastllm.errors import ValidationError
from dfastllm.settings import SETTINGS

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def flags(command: str) -> set[str]:
    return {name for parameter in COMMANDS[command].params for name in parameter.opts}


def test_serve_takes_every_setting() -> None:
    assert {s.flag for s in SETTINGS} <= flags("serve")


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_generate_and_chat_take_every_parameter(command: str) -> None:
    wanted = {option.flag for option in (*SAMPLING, *DECODE, *from_settings(alone=True))}
    assert wanted <= flags(command)


def test_every_command_and_option_has_help() -> None:
    for command in COMMANDS.values():
        assert command.help
        for parameter in command.params:
            assert getattr(parameter, "help", None), (command.name, parameter.name)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"n": "2"}, {"n": 2}),
        ({"presence_penalty": "0.5"}, {"presence_penalty": 0.5}),
        ({"frequency_penalty": "-0.5"}, {"frequency_penalty": -0.5}),
        ({"repetition_penalty": "1.2"}, {"repetition_penalty": 1.2}),
        ({"temperature": "0.7"}, {"temperature": 0.7}),
        ({"top_p": ".9"}, {"top_p": 0.9}),
        ({"top_k": "5"}, {"top_k": 5}),
        ({"min_p": "0.1"}, {"min_p": 0.1}),
        ({"seed": "7"}, {"seed": 7}),
        ({"stop": ["a", "b c"]}, {"stop": ("a", "b c")}),
        ({"stop_token_ids": ["3", "4"]}, {"stop_token_ids": (3, 4)}),
        ({"ignore_eos": True}, {"ignore_eos": True}),
        ({"max_tokens": "9"}, {"max_tokens": 9}),
        ({"min_tokens": "2"}, {"min_tokens": 2}),
        ({"logprobs": "0"}, {"logprobs": 0}),
        ({"include_stop_str_in_output": True}, {"include_stop_str_in_output": True}),
        ({"skip_special_tokens": False}, {"skip_special_tokens": False}),
        ({"logit_bias": ["3=-1.5", "4=2"]}, {"logit_bias": {3: -1.5, 4: 2.0}}),
        ({"allowed_token_ids": ["1"]}, {"allowed_token_ids": (1,)}),
    ],
)
def test_sampling(given: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert sampling_params(given) == SamplingParams(**wanted)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"rule": "threshold"}, {"rule": "threshold"}),
        ({"cache": "dual"}, {"cache": "dual"}),
        ({"steps": "8"}, {"steps": 8}),
        ({"block_length": "16"}, {"block_length": 16}),
        ({"remasking": "entropy"}, {"remasking": "entropy"}),
        ({"threshold": "0.9"}, {"threshold": 0.9}),
        ({"factor": "1.5"}, {"factor": 1.5}),
        ({"options": ["gamma=0.5", "mode=fast", "on=true"]}, {"options": {"gamma": 0.5, "mode": "fast", "on": True}}),
        ({"early_stop": False}, {"early_stop": False}),
        ({"provisional": True}, {"provisional": True}),
        ({"mode": "fast"}, {"mode": "fast"}),
    ],
)
def test_decode(given: dict[str, Any], wanted: dict[str, Any]) -> None:
    got = decode_params(given)
    assert got == DecodeParams(**wanted)
    assert got.given == set(wanted)


def test_nothing_given() -> None:
    assert sampling_params({}).given == frozenset(), "the defaults are the model's and the table's"
    assert decode_params({}) is None, "an autoregressive model would refuse DecodeParams nobody asked for"


def test_pairs_are_checked() -> None:
    for text in ("x", "=1"):
        with pytest.raises(ValidationError, match="must be NAME=VALUE"):
            decode_params({"options": [text]})
