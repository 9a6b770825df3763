"""Configurations: every shipped one loads, every wrong one is an error that names the key and the way out."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from dfastllm.distill.config import changed_keys, load_config, parse_config
from dfastllm.errors import ModelNotFoundError, ValidationError
from dfastllm.quant.formats import EIGHT_BITS, FORMATS

CONFIGS = Path(__file__).parents[2] / "configs"
LEAST: dict[str, Any] = {"model": {"student": "demo-ar"}, "data": {"generate": {"samples": 20}}}


def with_key(key: str, value: Any) -> dict[str, Any]:
    """The least configuration and one more key ("kd.kl_weight")."""
    raw = copy.deepcopy(LEAST)
    *path, last = key.split(".")
    at = raw
    for name in path:
        at = at.setdefault(name, {})
    at[last] = value
    return raw


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_load(path: Path) -> None:
    config = load_config(path, files=False)
    assert parse_config(json.loads(config.model_dump_json())) == config


def test_configs_hold_what_the_documents_name() -> None:
    assert {"student_9b_gqa", "short-calls", "wordy"} <= {path.stem for path in CONFIGS.glob("*.yaml")}
    raw = yaml.safe_load((CONFIGS / "student_9b_gqa.yaml").read_text())
    assert {"train", "kd", "quant"} <= raw.keys()


def test_defaults_are_the_documents() -> None:
    config = parse_config(LEAST)
    kd, speed, quant = config.kd, config.speed, config.quant
    assert (kd.kl_weight, kd.ce_teacher, kd.w_tool, kd.w_args, kd.w_integr) == (0.4, 0.2, 0.15, 0.15, 0.10)
    assert (kd.ce_ground_truth, kd.kd_temperature) == (0.2, 2.0)
    assert (speed.length_kd_hinge, speed.length_kd_slope, speed.early_tool_N) == (0.15, 1.0, 25)
    assert (speed.early_tool_ce_weight, speed.early_tool_json_prior_weight) == (0.2, 0.02)
    assert (speed.early_tool_warmup_epochs, speed.regression_threshold) == (5.0, 0.05)
    assert (quant.enabled, quant.start_fraction, quant.lr_multiplier) == (False, 0.8, 0.1)
    assert (quant.weight_bits, quant.act_bits) == (8, 8)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("kdd", {}, "unknown key kdd. Did you mean kd?"),
        ("nothing_like_it", {}, "the top level knows model, data, train, kd, speed, quant, eval"),
        ("train.stepps", 3, "unknown key train.stepps. Did you mean steps?"),
        ("kd.teacher", {"base_url": "http://x", "model": "y", "top_logprob": 3}, "Did you mean top_logprobs?"),
        ("data.generate.sampels", 3, "unknown key data.generate.sampels. Did you mean samples?"),
        ("quant.start_fractoin", 0.5, "start_fraction"),
        ("model.shape", {}, "give one of student (weights to begin with) and shape"),
        ("kd.kl_weight", -0.1, "kd.kl_weight must be greater than or equal to 0, got -0.1"),
        ("kd.kl_weight", float("nan"), "kd.kl_weight must be a finite number"),
        ("kd.kl_weight", "much", "kd.kl_weight must be a valid number, got 'much'"),
        ("speed.length_kd_weight", -1, "speed.length_kd_weight must be greater than or equal to 0"),
        ("train.steps", 0, "train.steps must be greater than or equal to 1, got 0"),
        ("train.steps", 1.5, "train.steps must be a valid integer, got 1.5"),
        ("train.steps", True, "train.steps must be a valid integer, got True"),
        ("train.lr", 0, "train.lr must be greater than 0"),
        ("train.optimizer", "sgd", "train.optimizer must be 'adamw' or 'muon', got 'sgd'"),
        ("train.betas", [0.9], "train.betas.1 is missing"),
        ("train.shape_probs", [1.0], "shape_probs needs seq_lengths"),
        ("train.use_enumerated_shapes", True, "use_enumerated_shapes needs seq_lengths"),
        ("train.seq_lengths", [256, 128], "seq_lengths must rise"),
        ("train.seq_lengths", [128, 4096], "train.seq_lengths goes up to 4096, but data.max_seq_length cuts at 2048"),
        ("quant.start_fraction", 1.0, "start_fraction must be in [0, 1), got 1.0"),
        ("quant.start_fraction", -0.1, "start_fraction must be in [0, 1), got -0.1"),
        ("quant.weight_bits", 3, "weight_bits must be 8 or 4"),
        ("quant.act_bits", 16, "act_bits must be 8"),
        ("kd.teacher", {"base_url": "ftp://x", "model": "y"}, "must be http://HOST"),
        ("kd.layers_weight", 0.1, "layers_weight needs local_teacher"),
        ("kd.choose", {}, "choose needs local_teacher"),
        ("data.train", ["x.jsonl"], "give one of train (JSONL files) and generate"),
        ("data.validation", ["x.jsonl"], "generate makes its own validation set"),
        ("data.generate.style", "chatty", "must be 'plain' or 'verbose'"),
        ("data.generate.brief", 1.5, "less than or equal to 1"),
        ("speed.early_tool_prefix", "name", "must be 'response' or 'call'"),
        ("eval.margin", 0, "eval.margin must be greater than 0"),
        ("kd.draft", {"quantization": "w9"}, f"quantization must be {', '.join(FORMATS)}, 8bit, got 'w9'"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_wanted(key: str, value: Any, said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        parse_config(with_key(key, value), "my.yaml")
    assert str(caught.value).startswith("my.yaml: ")
    assert said in str(caught.value)
    assert "pydantic" not in str(caught.value)


@pytest.mark.parametrize("format", [*FORMATS, EIGHT_BITS])
def test_a_draft_is_measured_in_every_format_that_serves(format: str) -> None:
    raw = with_key("kd.draft", {"quantization": format}) | {"model": {"student": "demo-draft"}}
    raw["kd"]["local_teacher"] = "demo-ar"
    found = parse_config(raw).kd.draft
    assert found is not None
    assert found.quantization == format


@pytest.mark.parametrize(
    ("probs", "said"), [([0.5, 0.6], "must sum to 1"), ([1.0], "has 1 shares for 2 lengths"), ([1.5, -0.5], "")]
)
def test_probabilities_that_do_not_fit_the_shapes(probs: list[float], said: str) -> None:
    raw = with_key("train.seq_lengths", [64, 128])
    raw["train"]["shape_probs"] = probs
    with pytest.raises(ValidationError, match=said or "greater than or equal to 0"):
        parse_config(raw)


def test_all_weights_of_zero_would_learn_nothing() -> None:
    names = ("kl_weight", "ce_teacher", "ce_ground_truth", "w_tool", "w_args", "w_integr")
    with pytest.raises(ValidationError, match="every weight is 0"):
        parse_config({**LEAST, "kd": dict.fromkeys(names, 0)})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: {student: demo-ar\n", "is not YAML"),
        ("- 1\n", "must hold sections"),
        ("", "must hold sections, got None"),
        ("model: {student: demo-ar}\nmodel: {student: demo-ar}\n", "key 'model' is there twice"),
        ("[model]: {student: demo-ar}\n", "a key is no text"),
        ("model: 2026-13-45\n", "is not YAML: month must be in 1..12"),
        ("model: !!python/object/apply:os.getcwd []\n", "is not YAML"),
        ("a: &a [x]\nb: [*a, *a]\n", "anchors and aliases are not taken"),  # nine of nine such lines fill any memory
        ("a: &a [*a]\n", "anchors and aliases are not taken"),  # holds itself
        ("a: " + "[" * 20_000, "nests more than 64 deep"),
        ("#" * (1 << 20) + "\n", "more than 1,048,576 bytes"),
        ("data: {generate: {}}\n", "model is missing"),
    ],
)
def test_files_that_are_no_configuration(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ValidationError, match=said):
        load_config(path)
    path.unlink()
    os.mkfifo(path)  # would be waited for
    with pytest.raises(ValidationError, match="is no file"):
        load_config(path)


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    """YAML 1.1 takes 2e-4 for a word."""
    path = tmp_path / "a.yaml"
    path.write_text("model: {student: demo-ar}\ndata: {generate: {}}\ntrain: {lr: 2e-4, weight_decay: 1e-2, clip: 1}\n")
    train = load_config(path).train
    assert (train.lr, train.weight_decay, train.clip) == (2e-4, 1e-2, 1.0)


def test_what_a_configuration_names_must_be_there(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    with pytest.raises(ValidationError, match="cannot be read"):
        load_config(path)
    for raw, error, said in (
        ({"model": {"student": "demo-nothing"}, "data": LEAST["data"]}, ModelNotFoundError, "demo-nothing"),
        ({**LEAST, "kd": {"local_teacher": str(tmp_path / "no")}}, ModelNotFoundError, "no model"),
        ({"model": LEAST["model"], "data": {"train": ["no.jsonl"]}}, ValidationError, "data.train: there is no file"),
        ({**LEAST, "speed": {"baseline": "no.json"}}, ValidationError, "speed.baseline: there is no file no.json"),
        (
            {"model": {"shape": {"layers": 1}, "tokenizer": "no"}, "data": LEAST["data"]},
            ValidationError,
            "model.tokenizer: there is no directory",
        ),
    ):
        path.write_text(json.dumps(raw))
        load_config(path, files=False)
        with pytest.raises(error, match=said):
            load_config(path)


def test_a_model_that_another_configuration_makes_is_named_with_it(tmp_path: Path) -> None:
    path = tmp_path / "short.yaml"
    path.write_text(json.dumps({**LEAST, "model": {"student": "runs/wordy/student"}}))
    with pytest.raises(ModelNotFoundError, match="no model 'runs/wordy/student'"):
        load_config(path)
    (tmp_path / "wordy.yaml").write_text("{}")
    with pytest.raises(ModelNotFoundError, match="there is no model runs/wordy/student yet") as refused:
        load_config(path)
    assert refused.value.hint == f"Make it first: dfastllm distill {tmp_path / 'wordy.yaml'}"


def test_changed_keys() -> None:
    before = json.loads(parse_config(LEAST).model_dump_json())
    after = json.loads(parse_config({**with_key("train.lr", 0.5), "kd": {"kl_weight": 0.1}}).model_dump_json())
    assert changed_keys(before, after) == ["kd.kl_weight", "train.lr"]
    assert changed_keys(before, before) == []
