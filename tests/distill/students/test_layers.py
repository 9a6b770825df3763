"""Students by layer dropping: what stays is the source's to the bit, what is dropped is gone, what a config says of
each layer goes with its layer, and the directory is one that everything of ours loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from dfastllm import assemble
from dfastllm.convert import quantise_gguf
from dfastllm.core import SamplingParams
from dfastllm.distill.students.layers import config_of, evenly, main, make_student, most_layers
from dfastllm.errors import ValidationError
from dfastllm.llm import LLM
from dfastllm.models import FAMILIES, Decoder, dense_attention, find_family, load
from dfastllm.models.config import DecoderConfig
from dfastllm.text import Tokenizer
from tests.kit.convert_models import write_tiny
from tests.kit.served import TEMPLATE

# How a family gets layers that differ from each other, where it can have them.
MIXED: dict[str, dict[str, Any]] = {
    "gemma2": {"window": 4, "windowed": (True, False) * 3},
    "gemma3": {"window": 4, "windowed": (True, True, False) * 2, "local_theta": 500.0},
    "smollm3": {"ropeless": (False, False, True) * 2},
    "qwen2": {"window": 4, "windowed": (False, True) * 3},
}
KEEP = (0, 2, 3, 5)


def source_of(directory: Path, family: str) -> Path:
    overrides: dict[str, Any] = {"layers": 6, **MIXED.get(family, {})}
    moe = find_family(family).shape.get("moe")
    if moe is not None:
        overrides["moe"] = replace(moe, layers=(False, *[True] * 5), experts=4, groups=min(moe.groups, 2))
    return write_tiny(directory, family, **overrides)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    with safe_open(directory / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)


@pytest.mark.parametrize("layers", range(1, 31))
def test_even_steps(layers: int) -> None:
    for count in range(1, layers + 1):
        kept = evenly(layers, count)
        exact = [Fraction(i * (layers - 1), max(count - 1, 1)) for i in range(count)]
        assert list(kept) == [int(place + Fraction(1, 2)) for place in exact]
        assert len(set(kept)) == count
        assert kept[0] == 0
        assert count == 1 or kept[-1] == layers - 1


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model of each family, made once."""
    place = tmp_path_factory.mktemp("sources")

    def source(family: str) -> Path:
        found = place / family
        return found if found.exists() else source_of(found, family)

    return source


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_are_the_source_to_the_bit(family: str, sources: Callable[[str], Path], tmp_path: Path) -> None:
    source = sources(family)
    made = make_student(source, tmp_path / "student", layers=6)
    assert made.kept == tuple(range(6))
    assert made.share == 1.0
    whole, student = load(source), load(made.path)
    assert student.config == whole.config
    assert replace(student.info, name="") == replace(whole.info, name="")
    ours, theirs = tensors(source), tensors(made.path)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert made.parameters == sum(p.numel() for p in student.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_dropped_layers_are_gone_and_the_others_compute_what_they_did(
    family: str, sources: Callable[[str], Path], tmp_path: Path
) -> None:
    source = sources(family)
    made = make_student(source, tmp_path / "student", keep=KEEP)
    whole, student = load(source, dtype="float32"), load(made.path, dtype="float32")
    raw = json.loads((made.path / "config.json").read_text())
    raw = raw.get("text_config", raw)
    assert next(raw[name] for name in ("num_hidden_layers", "n_layers", "num_layers") if name in raw) == len(KEEP)
    assert len(student.layers) == student.info.layers == len(KEEP)
    names = find_family(family).names
    kept = {names.own(name) for name in tensors(made.path) if name != names.published("lm_head.weight")}
    assert {int(name.split(".")[1]) for name in kept if name.startswith("layers.")} == set(range(len(KEEP)))
    assert made.parameters == sum(p.numel() for p in student.parameters())
    assert made.source == sum(p.numel() for p in whole.parameters())
    ids, places = torch.randint(0, 250, (11,)), torch.arange(11)
    attend = dense_attention(1, 11, "causal" if find_family(family).kind == "ar" else "full")
    torch.testing.assert_close(run(student, ids, places, attend), skipping(whole, ids, places, attend), rtol=0, atol=0)


def run(model: Decoder, ids: torch.Tensor, places: torch.Tensor, attend: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.head(model(ids, places, attend))


def skipping(model: Decoder, ids: torch.Tensor, places: torch.Tensor, attend: Any) -> torch.Tensor:
    """The source's own layers, those of KEEP alone, with its own rotary tables."""
    with torch.no_grad():
        x, angles = model.embedded(ids), model.angles(places)
        for number in KEEP:
            x = model.layers[number](x, angles, attend)
        return model.head(model.norm(x))


@pytest.mark.parametrize(("keep", "wanted"), [((0, 1, 2, 5), [1, 1, 0, 0]), ((0, 1, 4), [1, 1, 1]), ((2, 5), [0, 0])])
def test_layers_without_positions_stay_so(keep: tuple[int, ...], wanted: list[int], tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", "smollm3")
    made = make_student(source, tmp_path / "student", keep=keep)
    assert json.loads((made.path / "config.json").read_text())["no_rope_layers"] == wanted


@pytest.mark.parametrize(
    ("keep", "window", "windowed", "theta"),
    [
        ((0, 1, 2, 5), 4, (True, True, False, False), 500.0),
        ((0, 1, 3), 4, (), 500.0),  # every layer that is left has a window
        ((2, 5), 0, (), 0.0),  # none has
    ],
)
def test_windows_go_with_their_layers(
    keep: tuple[int, ...], window: int, windowed: tuple[bool, ...], theta: float, tmp_path: Path
) -> None:
    made = make_student(source_of(tmp_path / "source", "gemma3"), tmp_path / "student", keep=keep)
    config = load(made.path).config
    assert (config.window, config.windowed, config.local_theta) == (window, windowed, theta)


def test_mixtures_go_with_their_layers(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", "qwen3_moe")
    shape = load(source).config
    assert [config_of(shape, (0, 5)).is_mixture(i) for i in (0, 1)] == [False, True]
    assert config_of(shape, (1, 5)).moe == replace(shape.moe, layers=())  # type: ignore[type-var]
    made = make_student(source, tmp_path / "student", keep=(0, 5))
    assert json.loads((made.path / "config.json").read_text())["mlp_only_layers"] == [0]


def test_a_share_counts_embedding_and_head(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", "llama")
    model = load(source)
    of_layer = sum(p.numel() for p in model.layers[0].parameters())
    beside = sum(p.numel() for p in model.parameters()) - 6 * of_layer
    for count in range(1, 7):
        exact = (beside + count * of_layer) / (beside + 6 * of_layer)
        assert len(most_layers(model.config, model.info, exact)) == count
        if count > 1:
            assert len(most_layers(model.config, model.info, exact - 1e-9)) == count - 1
    made = make_student(source, tmp_path / "student", share=0.8)
    assert made.share <= 0.8


def test_half_of_the_real_model() -> None:
    """SmolLM2-135M's shape: embeddings count, so half of it is 11 of 30 layers."""
    shape = DecoderConfig(49152, 576, 1536, 30, 9, 3, 64, 8192, tied=True)
    from dfastllm.models import Ids, describe

    kept = most_layers(shape, describe("llama", shape, Ids(eos=(2,))), 0.5)
    assert kept == (0, 3, 6, 9, 12, 15, 17, 20, 23, 26, 29)


def test_tokenizer_and_template_come_along(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", "llama")
    (source / "LICENSE").write_text("the source's terms")
    (source / "README.md").write_text("the source's card")
    made = make_student(source, tmp_path / "student", layers=2)
    same_tokenizer(Tokenizer.load(source), Tokenizer.load(made.path))
    assert (made.path / "LICENSE").read_text() == "the source's terms"
    card = (made.path / "README.md").read_text()
    assert "Layers 0, 5 of the 6 of source" in card
    with LLM(made.path) as llm:
        answer = llm.chat([{"role": "user", "content": "hi"}], SamplingParams(temperature=0, max_tokens=4))
        assert answer[0].outputs[0].usage.prompt_tokens == len("[user]hi[assistant]")


def same_tokenizer(one: Tokenizer, other: Tokenizer) -> None:
    text = "Grüße, <|end|> 12,345 and ☃\n"
    assert one.backend.get_vocab(True) == other.backend.get_vocab(True)
    assert one.encode(text, add_special=True) == other.encode(text, add_special=True)
    assert one.special_tokens == other.special_tokens
    assert one.eos_ids == other.eos_ids
    assert one.special_ids == other.special_ids
    said = [{"role": "user", "content": "hi"}]
    assert one.apply_chat_template(said) == other.apply_chat_template(said)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantised file with its tokenizer and two ends of text."""
    place = tmp_path_factory.mktemp("gguf")
    source = write_tiny(place / "source", layers=5, hidden_size=64, heads=4, intermediate_size=64)
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return quantise_gguf(source, place / "model.gguf", "gguf-q8_0")


def test_a_gguf_file_becomes_a_directory(gguf: Path, tmp_path: Path) -> None:
    whole = assemble.dequantised(gguf, "float32")
    assert isinstance(whole.model, Decoder)
    made = make_student(gguf, tmp_path / "all", layers=5)
    student = load(made.path)
    assert student.config == whole.model.config
    assert student.dtype == torch.float32
    ours, theirs = whole.model.state_dict(), student.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    same_tokenizer(whole.tokenizer, Tokenizer.load(made.path))
    assert student.info.eos_ids == whole.model.info.eos_ids
    half = make_student(gguf, tmp_path / "some", layers=3, dtype="bfloat16")
    assert half.kept == (0, 2, 4)
    with LLM(half.path) as llm:
        assert llm.info.layers == 3
        assert len(llm.generate("abc", SamplingParams(max_tokens=3, temperature=0, ignore_eos=True))) == 1


def test_several_templates_and_surroundings_survive_saving(tmp_path: Path) -> None:
    from tokenizers import processors

    from dfastllm.text import ChatTemplates
    from dfastllm.text.saving import save_tokenizer
    from tests.kit.served import byte_tokenizer

    before = byte_tokenizer()
    before.templates = ChatTemplates({"default": TEMPLATE, "tool_use": "{{ tools }}" + TEMPLATE}).chosen(
        None, before.special_tokens
    )
    before.backend.post_processor = processors.TemplateProcessing(
        single="bos $A", special_tokens=[("bos", before.bos_id)]
    )
    names = [path.name for path in save_tokenizer(before, tmp_path)]
    assert names == ["tokenizer.json", "tokenizer_config.json"]
    after = Tokenizer.load(tmp_path)
    same_tokenizer(before, after)
    assert before.encode("x", add_special=True)[0] == before.bos_id
    assert after.templates.names == ("default", "tool_use")
    assert after.templates.source("tool_use") == before.templates.source("tool_use")


@pytest.mark.parametrize(
    ("how", "param", "message"),
    [
        ({"layers": 0}, "layers", r"\[1, 6\]"),
        ({"layers": 7}, "layers", r"\[1, 6\]"),
        ({"keep": ()}, "keep", "ascending"),
        ({"keep": (2, 1)}, "keep", r"\[2, 1\]"),
        ({"keep": (1, 1)}, "keep", "ascending"),
        ({"keep": (-1, 2)}, "keep", r"\[0, 5\]"),
        ({"keep": (0, 6)}, "keep", r"\[0, 5\]"),
        ({"share": 0.0}, "share", r"\(0, 1\]"),
        ({"share": 1.5}, "share", r"\(0, 1\]"),
        ({"share": 0.01}, "share", "embedding, head and one layer"),
        ({"layers": 2, "keep": (0, 1)}, "layers", "one of"),
        ({"layers": 2, "dtype": "int7"}, "dtype", "float32"),
    ],
)
def test_what_cannot_be_is_named(how: dict[str, Any], param: str, message: str, tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", "llama")
    with pytest.raises(ValidationError, match=message) as raised:
        make_student(source, tmp_path / "student", **how)
    assert raised.value.param == param
    assert not (tmp_path / "student").exists()


def test_neither_the_source_nor_another_model_is_written_over(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", "llama")
    with pytest.raises(ValidationError, match="is the source"):
        make_student(source, tmp_path / "x" / ".." / "source", layers=2, force=True)
    make_student(source, tmp_path / "student", layers=2)
    with pytest.raises(ValidationError, match="holds a model"):
        make_student(source, tmp_path / "student", layers=3)
    assert make_student(source, tmp_path / "student", layers=3, force=True).kept == (0, 3, 5)
    assert load(tmp_path / "student").info.layers == 3


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = source_of(tmp_path / "source", "llama")
    assert main([str(source), str(tmp_path / "student"), "--keep", "0,2,5"]) == 0
    assert "layers 0, 2, 5 of 6" in capsys.readouterr().out
    assert load(tmp_path / "student").info.layers == 3
    assert main([str(source), str(tmp_path / "other"), "--keep", "first"]) == 1
    assert "numbers with commas" in capsys.readouterr().err
    assert main(["nowhere", str(tmp_path / "other")]) == 1
    assert "no model 'nowhere'" in capsys.readouterr().err
