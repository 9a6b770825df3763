"""Directories that are no adapter of this base, and settings that change the mathematics: refused by name; and what of
a file does not change them, taken."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.kit.adapters import model_of, with_peft

import dfastllm.lora.read as reading
from dfastllm.errors import AdapterError
from dfastllm.lora import Adapter, LoraConfig, read_adapter, read_config
from dfastllm.lora.patterns import MOST_EXPRESSIONS, Patterns, weighed
from dfastllm.models import Decoder, adapter_base

pytestmark = pytest.mark.filterwarnings("ignore")
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def model() -> Decoder:
    return model_of("llama")


@pytest.fixture(scope="module")
def made(model: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("made")
    with_peft(model, directory)
    return directory


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "adapter"))


def read(model: Decoder, directory: Path, **limits: Any) -> Adapter:
    return read_adapter(directory, adapter_base(model), **limits)


def change(directory: Path, **fields: Any) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def rewrite(directory: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


OTHER = {
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 1},
    "kasa_config": {"rank": 1},
    "layer_replication": [[0, 2]],
    "monteclora_config": {"x": 1},
    "trainable_token_indices": [3],
    "use_bdlora": {"nblocks": 2},
    "use_qalora": True,
    "a_field_of_the_future": 7,
    "init_lora_weights": "pissa_niter_4",
    "peft_type": "LOHA",
    "bias": "some",
    "r": 0,
    "lora_alpha": "8",
    "rank_pattern": {"(": 4},
    "alpha_pattern": {"q_proj": None},
    "use_dora": "yes",
    "modules_to_save": "lm_head",
}


@pytest.mark.parametrize("field", OTHER)
def test_settings_of_other_mathematics(field: str, model: Decoder, copy: Path) -> None:
    change(copy, **{field: OTHER[field]})
    with pytest.raises(AdapterError, match=field) as caught:
        read(model, copy)
    assert caught.value.param == field
    assert caught.value.status == 400


def test_settings_without_influence(model: Decoder, made: Path, copy: Path) -> None:
    change(
        copy,
        fan_in_fan_out=True,  # of GPT-2's layers
        lora_dropout=0.3,
        target_modules="all-linear",
        base_model_name_or_path="elsewhere",
        init_lora_weights="mica",
        a_field_of_the_future=None,
    )
    assert read(model, copy).hash == read(model, made).hash


def test_scales_and_ranks() -> None:
    config = LoraConfig(8, 16.0, Patterns({r"layers\.\d+\.q_proj": 4, "v_proj": 2}), Patterns({"v_proj": 6.0}))
    assert (config.rank_of("model.layers.3.q_proj"), config.scale_of("model.layers.3.q_proj")) == (4, 4.0)
    assert (config.rank_of("a.v_proj"), config.scale_of("a.v_proj")) == (2, 3.0)
    assert (config.rank_of("a.vv_proj"), config.scale_of("a.vv_proj")) == (8, 2.0)
    stabilised = LoraConfig(9, 6.0, Patterns({}), Patterns({}), rank_stabilised=True)
    assert stabilised.scale_of("x") == 2.0


def of_peft(patterns: dict[str, int], module: str) -> int:
    """peft/utils/other.py, get_pattern_key, written down again."""
    return next((held for pattern, held in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)), 0)


def test_patterns_choose_what_peft_chooses() -> None:
    draw = random.Random(3)
    words = ["layers", "1", "11", "q_proj", "k_proj", "proj", "mlp"]
    expressions = [r".*\.q_proj", r"layers\.(1|11)\.mlp", r"^mlp\.\w+", "q_proj|k_proj", r"[a-z]+\.1", "mlp..?", "(1)1"]
    for _ in range(400):
        plain = [".".join(draw.choices(words, k=draw.randint(1, 3))) for _ in range(4)]
        mixed = draw.sample([*plain, *draw.sample(expressions, 3)], 5)
        patterns = {pattern: place for place, pattern in enumerate(mixed, 1)}
        module = ".".join(draw.choices(words, k=draw.randint(1, 5)))
        assert Patterns(patterns).of(module, 0) == of_peft(patterns, module), (patterns, module)


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        (r"(\w+\.?)+!", "repeats a group"),  # doubles with each character of the name
        (r"(a|a)*x", "repeats a group"),
        (r"(?:q|q){1,40}x", "repeats a group"),
        (r".*.*.*.*.*!", "may take"),
        (r"a?" * 30 + "a" * 30, "may take"),
        (r"(a|a|a|a)" * 12 + "!", "may take"),
        (r"(a)\1+!", "refers back"),
        (r"(?P<n>a)b*", "of a kind"),
        ("(", "no regular expression"),
        ("a)|(b", "no regular expression"),
        ("x*" * 200, "characters"),
    ],
)
def test_patterns_that_could_take_for_ever(pattern: str, why: str, model: Decoder, copy: Path) -> None:
    change(copy, rank_pattern={pattern: 4})
    with pytest.raises(AdapterError, match=why) as refused:
        read(model, copy)
    assert refused.value.param == "rank_pattern"


def test_patterns_that_are_written_are_taken() -> None:
    for pattern in (
        r"^model\.layers\.\d+\.self_attn\.q_proj",
        r".*\.(0|1|2|3)\..*proj",
        r"layers\.[0-9]+\.mlp",
        r"a\+b\.[\]+]x",
    ):
        assert weighed(pattern) > 0
    with pytest.raises(ValueError, match="more than 64"):
        Patterns({f"x.*{n}": 1 for n in range(MOST_EXPRESSIONS + 1)})
    many = Patterns({f"layers.{layer}.experts.{i}.up_proj": layer for layer in range(48) for i in range(128)})
    began = time.process_time()
    assert [many.of(f"model.layers.{layer}.experts.127.up_proj", -1) for layer in range(48)] == list(range(48))
    assert time.process_time() - began < 1


@pytest.mark.parametrize("number", ["1" + "0" * 400, "1" + "0" * 5000, "1e400", "NaN", "-1", "0", "1.5", "true", '"8"'])
def test_ranks_that_are_none(number: str, model: Decoder, copy: Path) -> None:
    config = copy / "adapter_config.json"
    fields = json.loads(config.read_text())
    for field in ("r", "lora_alpha"):
        if field == "lora_alpha" and number in ("-1", "0", "1.5"):
            continue  # these scale, if oddly
        config.write_text(json.dumps(fields | {field: "HERE"}).replace('"HERE"', number))
        with pytest.raises(AdapterError) as refused:
            read(model, copy)
        assert field in str(refused.value) or "digits" in str(refused.value)


@pytest.mark.parametrize("how", ["cut", "written over", "replaced"])
def test_files_that_change_while_they_are_read(
    how: str, model: Decoder, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A map of a file that is cut is a bus error, which ends the server; data of two files together are neither's."""
    weights = copy / "adapter_model.safetensors"
    plain = reading.read_tensor
    done: list[str] = []

    def disturbed(entry: Any, name: str, file: Any = None) -> torch.Tensor:
        if len(done) == 1:
            if how == "cut":
                os.truncate(weights, 600)
            elif how == "written over":
                weights.write_bytes(weights.read_bytes()[:-64] + bytes(64))
            else:
                other = copy / "other"
                other.write_bytes(weights.read_bytes()[:-64] + bytes(64))
                other.replace(weights)
        done.append(name)
        return plain(entry, name, file)

    monkeypatch.setattr(reading, "read_tensor", disturbed)
    with pytest.raises(AdapterError, match=r"ends inside tensor|was changed while it was read"):
        read(model, copy)
    assert len(done) > 1


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.full((4, 32), torch.nan)}), "not finite"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 31)}), r"shape \[4, 31\], wanted \[4, 32\]"),
        (lambda t: t.update({f"{Q}.lora_B.weight": torch.zeros(33, 4)}), "shape"),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(5, 32), f"{Q}.lora_B.weight": torch.zeros(32, 5)}),
            "rank",
        ),
        (lambda t: t.pop(f"{Q}.lora_B.weight"), "one of A and B"),
        (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(32)}), "lora_magnitude_vector"),
        (lambda t: t.update({f"{Q}.weight": torch.ones(32, 32)}), "whole matrix"),
        (lambda t: t.update({f"{Q}.bias": torch.ones(32)}), "bias"),
        (lambda t: t.update({f"{Q}.lora_diag": torch.ones(4)}), "no part of a LoRA adapter"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 32, dtype=torch.float64)}), "F64"),
        (
            lambda t: t.update({"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.zeros(4, 32)}),
            "no module",
        ),
        (lambda t: t.update({"base_model.model.model.vision.fc1.lora_A.weight": torch.zeros(4, 32)}), "no module"),
        (lambda t: t.clear(), "holds no adapter"),
    ],
)
def test_tensors_that_do_not_fit(edit: Any, what: str, model: Decoder, copy: Path) -> None:
    rewrite(copy, edit)
    with pytest.raises(AdapterError, match=what):
        read(model, copy)


def test_files_that_are_none(model: Decoder, copy: Path, tmp_path: Path) -> None:
    def refused(what: str) -> None:
        with pytest.raises(AdapterError, match=what):
            read(model, copy)

    weights, config = copy / "adapter_model.safetensors", copy / "adapter_config.json"
    whole, fields = weights.read_bytes(), config.read_text()
    weights.write_bytes(whole[:-8])
    refused("damaged or incomplete")
    weights.write_bytes((1 << 60).to_bytes(8, "little") + whole[8:])
    refused("damaged or incomplete")
    weights.write_bytes(b"")
    refused("damaged or incomplete")
    weights.unlink()
    refused("adapter_model.safetensors is missing")
    (copy / "adapter_model.bin").write_bytes(b"\x80\x04.")
    refused(r"adapter_model\.bin: a pickle")
    config.write_text("[]")
    refused("JSON object")
    config.write_text("{" + " " * (1 << 20) + "}")
    refused("more than 1,048,576 bytes")
    config.write_text("{")
    refused("cannot be read as JSON")
    config.write_bytes(b"\xef\xbb\xbf" + fields.encode())  # as some editors begin a file
    refused(r"adapter_model\.bin: a pickle")
    config.unlink()
    refused(r"adapter_config\.json is missing")
    os.mkfifo(config)  # would be waited for
    refused("is no file")
    config.unlink()
    config.symlink_to("/dev/zero")  # would be read without end
    refused("is no file")
    with pytest.raises(AdapterError, match="is not a directory"):
        read(model, tmp_path / "nowhere")
    assert fields


def test_limits_hold_before_a_tensor_is_read(model: Decoder, made: Path, copy: Path) -> None:
    size = sum(tensor.nbytes for tensor in load_file(made / "adapter_model.safetensors").values())
    assert read(model, made, max_rank=4, max_bytes=size).rank == 4
    rewrite(copy, lambda t: t.update({f"{Q}.lora_A.weight": torch.full((4, 32), torch.nan)}))
    with pytest.raises(AdapterError, match="rank 4, wanted at most 3"):
        read(model, copy, max_rank=3)
    with pytest.raises(AdapterError, match=f"at most {size - 1}"):
        read(model, copy, max_bytes=size - 1)


def test_another_base(made: Path) -> None:
    for other in (model_of("llama", hidden_size=64, heads=4), model_of("llama", layers=1), model_of("llada")):
        with pytest.raises(AdapterError, match=r"shape|no module"):
            read(other, made)


def test_dora_lacks_a_magnitude(model: Decoder, tmp_path: Path) -> None:
    with_peft(model, tmp_path, use_dora=True)
    rewrite(tmp_path, lambda t: t.pop(f"{Q}.lora_magnitude_vector"))  # type: ignore[arg-type, return-value]
    with pytest.raises(AdapterError, match="lacks its magnitude"):
        read(model, tmp_path)


def test_the_hash_is_of_what_is_computed(model: Decoder, made: Path, copy: Path) -> None:
    first = read(model, made)
    assert read(model, copy).hash == first.hash
    change(copy, lora_alpha=9)
    assert read(model, copy).hash != first.hash
    change(copy, lora_alpha=8)
    assert read(model, copy).hash == first.hash
    rewrite(copy, lambda t: t[f"{Q}.lora_B.weight"].view(-1)[3:4].add_(1e-3))  # type: ignore[arg-type, return-value]
    assert read(model, copy).hash != first.hash
    assert first.bytes == sum(t.nbytes for d in first.deltas.values() for _, t in d.tensors)
    with pytest.raises(TypeError):
        first.deltas["x"] = first.deltas["layers.0.attn.q_proj"]  # type: ignore[index]


def test_the_base_that_is_written_beside_an_embedding_is_not_kept(model: Decoder, tmp_path: Path) -> None:
    """PEFT saves the frozen embedding of the base, too, where the embedding has an adapter."""
    with_peft(model, tmp_path, target_modules=r".*q_proj|embed")
    before = read(model, tmp_path)
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    rewrite(tmp_path, lambda t: t.update({name: model.embed.weight.clone()}))
    assert read(model, tmp_path).hash == before.hash
    grown = torch.cat((model.embed.weight, torch.ones(2, model.config.hidden_size)))
    rewrite(tmp_path, lambda t: t.update({name: grown}))
    resized = read(model, tmp_path)
    assert resized.deltas["embed"].full is not None
    assert torch.equal(resized.deltas["embed"].full, model.embed.weight)
    assert "cannot be asked for" in resized.notes[0]


def test_experts_as_one_parameter(tmp_path: Path) -> None:
    """The form of newer releases of transformers: all experts' ranks in one A and one B, both parameters under nested
    names. Compared with the sum over ranks written out."""
    mixture = model_of("qwen3_moe")
    moe, hidden = mixture.config.moe, mixture.config.hidden_size
    assert moe is not None
    experts, inner, rank = moe.experts, moe.intermediate_size, 3
    draw = torch.Generator().manual_seed(1)
    sizes = {"": (hidden, 2 * inner), ".base_layer": (inner, hidden)}
    tensors = {}
    for nested, (inputs, outputs) in sizes.items():
        at = f"base_model.model.model.layers.1.mlp.experts{nested}"
        tensors[f"{at}.lora_A.weight"] = torch.randn(experts * rank, inputs, generator=draw)
        tensors[f"{at}.lora_B.weight"] = torch.randn(outputs, experts * rank, generator=draw)
    tmp_path.joinpath("adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 6}))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    deltas = read(mixture, tmp_path).deltas
    assert len(deltas) == 3 * experts
    a = tensors["base_model.model.model.layers.1.mlp.experts.lora_A.weight"]
    b = tensors["base_model.model.model.layers.1.mlp.experts.lora_B.weight"]
    for e in (0, experts - 1):
        whole = sum(torch.outer(b[:, j * experts + e], a[e * rank + j]) for j in range(rank))
        got = [deltas[f"layers.1.mlp.experts.{e}.{name}_proj"] for name in ("gate", "up")]
        for delta, part in zip(got, whole.chunk(2), strict=True):  # type: ignore[union-attr]
            assert delta.a is not None
            assert delta.natural_b is not None
            assert torch.allclose(delta.natural_b.T @ delta.a, part, atol=1e-5)
            assert delta.scale == 2.0


def test_the_config_that_peft_writes_is_read(made: Path) -> None:
    config = read_config(made)
    assert (config.rank, config.alpha, config.bias, config.saved) == (4, 8.0, "none", ())
