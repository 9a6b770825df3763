"""Name tables, the registry, and token ids from a model's own files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfastllm import models
from dfastllm.errors import ModelLoadError, TokenizerError
from dfastllm.models.checkpoint import skeleton
from dfastllm.models.family import Family, Fields, Ids, NameTable, family_of, register
from dfastllm.models.ids import read_ids
from tests.kit import published_configs as published

FAMILIES = sorted(models.FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_a_bijection(family: str) -> None:
    names = models.find_family(family).names
    own = [name for name, _ in models.tiny(family).named_parameters()]
    there = [names.published(name) for name in own]
    assert len(set(there)) == len(there)
    assert [names.own(name) for name in there] == own


@settings(max_examples=100, deadline=None)
@given(family=st.sampled_from(FAMILIES), i=st.integers(0, 10**6), j=st.integers(0, 10**6), data=st.data())
def test_names_of_any_layer_and_expert(family: str, i: int, j: int, data: st.DataObject) -> None:
    names = models.find_family(family).names
    rule = data.draw(st.sampled_from(sorted(names.rules)))
    own = rule.format(i=i, j=j)
    if not rule.endswith("router.bias"):
        own += data.draw(st.sampled_from([".weight", ".bias"]))
    if own.endswith("router.bias") and "layers.{i}.mlp.router.bias" not in names.rules:
        return
    there = names.published(own)
    assert names.own(there) == own
    for number in (str(i),) if "{i}" in rule else ():
        assert f".{number}." in there


@settings(max_examples=200, deadline=None)
@given(name=st.text("abc.019_{}ij", max_size=40), family=st.sampled_from(FAMILIES))
def test_unknown_names_are_key_errors(name: str, family: str) -> None:
    names = models.find_family(family).names
    for translate in (names.own, names.published):
        with pytest.raises(KeyError):
            translate(name)


@pytest.mark.parametrize(
    "describe",
    [published.llada, published.dream, published.sdar, published.sdar_moe, published.llada_moe, published.llada2],
)
def test_published_names_and_shapes(describe: Callable[[], tuple[dict[str, Any], dict]], tmp_path: Path) -> None:
    """The tensors written out by hand in published.py are exactly the ones wanted."""
    config, shapes = describe()
    published.write(tmp_path, config, published.filled(shapes, 0))
    model = models.load(tmp_path)
    names = models.find_family(model.info.family).names
    assert {names.published(name): tuple(p.shape) for name, p in model.named_parameters()} == shapes


MINI = models.MoEConfig(256, 8, 512, "sigmoid", True, 2.5, 8, 4, 512, (False,) + (True,) * 19)
BODY_7B = {"hidden_size": 4096, "layers": 32, "heads": 32, "head_dim": 128}
WIDE = {"intermediate_size": 14336, "kv_heads": 8}
QWEN_7B = {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "layers": 28, "heads": 28}
SIZES: dict[str, tuple[str, dict[str, Any], int]] = {
    "Llama-3-8B": ("llama", {**BODY_7B, "vocab_size": 128256, **WIDE}, 8_030_261_248),
    "Mistral-7B": ("mistral", {**BODY_7B, "vocab_size": 32000, **WIDE}, 7_241_732_096),
    "Qwen2.5-7B": ("qwen2", {**QWEN_7B, "kv_heads": 4, "head_dim": 128}, 7_615_616_512),
    "Dream-7B": ("dream", {**QWEN_7B, "kv_heads": 4, "head_dim": 128}, 7_615_616_512),
    "LLaDA-8B": ("llada", {**BODY_7B, "vocab_size": 126464, "intermediate_size": 12288, "kv_heads": 32}, 8_015_581_184),
    "LLaDA2.0-mini": (
        "llada2_moe",
        {"vocab_size": 157184, "hidden_size": 2048, "intermediate_size": 5120, "layers": 20, "heads": 16, "kv_heads": 4}
        | {"head_dim": 128, "rope_dim": 64, "moe": MINI},
        16_255_643_392,
    ),
}


@pytest.mark.parametrize("model", SIZES)
def test_parameters_of_published_shapes(model: str) -> None:
    """The parameter counts that the authors' own files have, from the shape alone."""
    family, shape, wanted = SIZES[model]
    config = models.tiny_config(family, **shape)
    info = models.describe(family, config, Ids(eos=(1,), mask=2))
    assert sum(p.numel() for p in skeleton(config, info, torch.bfloat16).parameters()) == wanted


def test_defaults_of_fields_left_out() -> None:
    """What the authors' configuration classes say where a config.json is silent."""
    config, _ = published.llada2()
    config.pop("partial_rotary_factor")
    assert models.find_family("llada2_moe").read(Fields(config)).rotary_dim == 8  # half of 16
    config, _ = published.sdar()
    config.pop("head_dim")
    assert models.find_family("sdar").read(Fields(config)).head_dim == 128
    config, _ = published.llada()
    config |= {"mlp_hidden_size": None, "n_kv_heads": None, "embedding_size": None}
    read = models.find_family("llada").read(Fields(config))
    assert (read.intermediate_size, read.kv_heads, read.vocab_size) == (128, 4, published.VOCAB - 2)


def test_two_rules_for_one_name() -> None:
    with pytest.raises(ValueError, match="two rules"):
        NameTable({"a": "x", "b": "x"})


def test_registry() -> None:
    with pytest.raises(ModelLoadError, match=r"unknown model family 'gpt2'; known: .*llada"):
        models.find_family("gpt2")
    with pytest.raises(ValueError, match="registered twice"):
        register(models.find_family("llama"))
    architectures = [name for family in models.FAMILIES.values() for name in family.architectures]
    assert len(set(architectures)) == len(architectures)


def test_architecture_decides_before_model_type() -> None:
    """LLaDA and LLaDA-MoE publish the same model_type."""
    for architecture, family in (("LLaDAModelLM", "llada"), ("LLaDAMoEModelLM", "llada_moe")):
        assert family_of(Fields({"architectures": [architecture], "model_type": "llada"})).name == family
    assert family_of(Fields({"model_type": "lladamoe"})).name == "llada_moe"
    assert family_of(Fields({"model_type": "qwen3"})).name == "qwen3"


def ids(directory: Path, family: Family, config: dict[str, Any], **files: dict[str, Any]) -> Ids:
    directory.mkdir(exist_ok=True)
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return read_ids(directory, Fields(config), family, vocab_size=200_000)


def test_ids_in_order_of_trust(tmp_path: Path) -> None:
    llada, dream = models.find_family("llada"), models.find_family("dream")
    nothing = ids(tmp_path / "a", llada, {})
    assert nothing == Ids(eos=(126081, 126348), mask=126336, pad=126081)

    config = {"eos_token_id": 5, "mask_token_id": 6, "pad_token_id": 5, "bos_token_id": 1}
    assert ids(tmp_path / "b", llada, config) == Ids(eos=(5,), mask=6, bos=1, pad=5)

    generation = {"eos_token_id": [9, 5], "mask_token_id": 7}
    assert ids(tmp_path / "c", llada, config, generation_config=generation) == Ids(eos=(5, 9), mask=6, bos=1, pad=5)
    assert ids(tmp_path / "d", llada, {}, generation_config=generation).mask == 7

    tokens = {
        "mask_token": "<M>",
        "eos_token": {"content": "<E>"},
        "added_tokens_decoder": {"11": {"content": "<M>"}, "12": {"content": "<E>"}, "13": {"content": "<|im_end|>"}},
    }
    assert ids(tmp_path / "e", dream, {}, tokenizer_config=tokens) == Ids(eos=(12, 13), mask=11, pad=151643)

    added = [{"id": 21, "content": "<|mask|>"}, {"id": 22, "content": "<|im_end|>"}]
    config = {"eos_token_id": 20}
    found = ids(tmp_path / "f", dream, config, tokenizer={"added_tokens": added})
    assert (found.eos, found.mask) == ((20, 22), 21)
    assert ids(tmp_path / "g", dream, {}, added_tokens={"<|mask|>": 31}).mask == 31


def test_fallback_ids_only_inside_the_vocabulary(tmp_path: Path) -> None:
    found = read_ids(tmp_path, Fields({}), models.find_family("llada"), vocab_size=126_340)
    assert found == Ids(eos=(126081,), mask=126336, pad=126081)
    assert read_ids(tmp_path, Fields({}), models.find_family("llada"), vocab_size=100) == Ids()


def test_bad_ids_and_files(tmp_path: Path) -> None:
    llama = models.find_family("llama")
    for value in ("</s>", [1, "x"], True, 1.5):
        with pytest.raises(ModelLoadError, match="eos_token_id must be an integer"):
            ids(tmp_path, llama, {"eos_token_id": value})
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read"):
        ids(tmp_path, llama, {})


def test_empty_list_of_ids_is_none(tmp_path: Path) -> None:
    assert ids(tmp_path, models.find_family("llama"), {"eos_token_id": [], "pad_token_id": []}) == Ids()


@pytest.mark.parametrize("name", models.FAMILIES)
def test_published_ids_are_ids(name: str) -> None:
    """None below 0, no mask among the ends, and those of the family's own vocabulary."""
    ids = models.FAMILIES[name].ids
    single = [one for one in (ids.mask, ids.bos, ids.pad) if one is not None]
    assert all(one >= 0 for one in (*ids.eos, *single))
    assert len(set(ids.eos)) == len(ids.eos)
    assert ids.mask is None or ids.mask not in ids.eos


# Ids in the files that the authors published: ends of a text and of a chat's turn, the mask, and the pad.
PUBLISHED_IDS = {
    "llada": ({126081, 126348}, 126336, 126081),  # LLaDA-8B-Instruct
    "dream": ({151643, 151645}, 151666, 151643),  # Dream-v0-Instruct-7B
    "sdar": ({151643, 151645}, 151669, 151643),  # SDAR-8B-Chat
    "fast_dllm_v2": ({151645}, 151665, 151643),  # Fast_dLLM_v2_7B
    "gemma2": ({1, 107}, None, 0),
    "gemma3": ({1, 106}, None, 0),
    "phi3": ({32000, 32007}, None, 32000),
}


@pytest.mark.parametrize("name", PUBLISHED_IDS)
def test_fallback_ids_are_those_of_the_published_models(name: str) -> None:
    ids = models.find_family(name).ids
    assert (set(ids.eos), ids.mask, ids.pad) == PUBLISHED_IDS[name]


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("gemma2", "Gemma2Config"),
        ("gemma3", "Gemma3TextConfig"),
        ("phi3", "Phi3Config"),
        ("seed_oss", "SeedOssConfig"),
        ("smollm3", "SmolLM3Config"),
    ],
)
def test_fallback_ids_are_the_defaults_of_transformers(name: str, config: str) -> None:
    theirs = getattr(pytest.importorskip("transformers"), config)()
    ours = models.find_family(name).ids
    assert theirs.eos_token_id in ours.eos
    assert (ours.bos, ours.pad) == (theirs.bos_token_id, theirs.pad_token_id)


def test_what_a_config_of_olmo3_leaves_out_is_as_in_transformers() -> None:
    config = pytest.importorskip("transformers").Olmo3Config(num_hidden_layers=4, use_cache=False)
    raw = {**config.to_dict(), "architectures": ["Olmo3ForCausalLM"]}
    del raw["sliding_window"]
    family = family_of(Fields(raw))
    assert family.read(Fields(raw)).window == config.sliding_window == 4096
