"""Models in GGUF files: shapes and capabilities, row orders, and logits against llama.cpp for every type it writes."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quants
from torch import Tensor

from dfastllm.errors import CheckpointError, ModelLoadError, TokenizerError, ValidationError
from dfastllm.kernels.packed import QTensor
from dfastllm.models import FAMILIES as MODELS
from dfastllm.models import Decoder, RopeScaling, dense_attention, load, save, tiny
from dfastllm.models.checkpoint import skeleton
from dfastllm.models.gguf import GgufModel, open_gguf, write_gguf
from dfastllm.models.gguf.names import interleave, separate
from dfastllm.models.gguf.rope import scaling_from_factors
from dfastllm.models.parts import inverse_frequencies
from dfastllm.models.program import RopeTable
from dfastllm.quant.gguf import BY_NAME, GgufFile, Planned, to_float, write_file
from dfastllm.text.gguf import read_tokenizer, tokenizer_metadata

DEMO = Path(__file__).parents[2] / "src/dfastllm/shipped/demo-ar"
FAMILIES = sorted({found.gguf.arch: name for name, found in reversed(MODELS.items()) if found.gguf}.values())
PROMPT = list(range(3, 60, 3))
QUESTIONS = [
    "What is 22 + 39?",
    "Extract city, age as JSON: My friend David Khan from Berlin just turned 75.",
    "Python function guitar(value: int) -> int: returns the smaller of value and 43.",
    "Write the date 2016-10-13 in words.",
]


def expanded(path: Path) -> Decoder:
    """A float decoder with the values of the file's weights."""
    with open_gguf(path) as opened:
        model = skeleton(opened.config, opened.info, torch.float32).to_empty(device="cpu")
        weights = {name: v.dequantise() if isinstance(v, QTensor) else v for name, v, _ in opened.tensors()}
        model.load_state_dict(weights)
    return model.requires_grad_(False)


def logits(model: Decoder, ids: list[int]) -> np.ndarray:
    attend = dense_attention(1, len(ids), "causal" if model.info.kind == "ar" else "full")
    hidden = model(torch.tensor(ids), torch.arange(len(ids)), attend)
    return model.head(hidden).detach().numpy()


def greedy(model: Decoder, ids: list[int], count: int) -> list[int]:
    ids = list(ids)
    for _ in range(count):
        ids.append(int(logits(model, ids)[-1].argmax()))
    return ids[-count:]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))


def same(model: Decoder, other: Decoder) -> None:
    assert (model.config, model.info) == (other.config, other.info)
    for (name, one), (_, two) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(one, two), name


# Round trips


UNTIED = {"olmo2"}  # llama.cpp wants a head of its own


@pytest.mark.parametrize(
    ("family", "tied"), [(f, t) for f in FAMILIES for t in (False, True) if not t or f not in UNTIED]
)
def test_a_model_comes_back(family: str, tied: bool, tmp_path: Path) -> None:
    model = tiny(family, tied=tied, hidden_size=64, heads=4)
    same(model, expanded(write_gguf(model, tmp_path / "m.gguf", "F32")))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_formats_of_parameters(kind: str, tmp_path: Path) -> None:
    model = tiny("llama", hidden_size=64, heads=4, intermediate_size=96)
    seen: list[tuple[int, int]] = []
    path = write_gguf(model, tmp_path / "m.gguf", kind, progress=lambda done, total: seen.append((done, total)))
    format = {"F32": "f32", "F16": "f32", "BF16": "bf16", "Q8_0": "w8g", "Q4_0": "w4g", "Q4_1": "w4g"}.get(kind, "w6g")
    with open_gguf(path, name="other") as opened:
        assert opened.info.name == "other"
        found = {name: (value, note) for name, value, note in opened.tensors()}
    assert list(found) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        value, note = found[name]
        if parameter.ndim == 1:
            assert isinstance(value, Tensor)
            assert value.dtype == torch.float32
            continue
        assert isinstance(value, QTensor)
        assert value.format == ("w8g" if name == "lm_head.weight" and kind.startswith(("Q4", "Q5")) else format), name
        assert (note is not None) == (kind == "F16")
        step = {"w8g": 1 / 127, "w4g": 1 / 7, "w6g": 1 / 15}.get(value.format, 2**-8)
        assert (value.dequantise() - parameter).abs().max() <= step * parameter.abs().max() * 1.02, name
    assert seen[-1][0] == seen[-1][1] > 0
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_directory_streams_tensor_by_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are read when their turn comes, so memory holds one tensor at a time."""
    model = tiny("qwen2", hidden_size=64, heads=4)
    directory = save(model, tmp_path / "source")
    order: list[str] = []
    from dfastllm.quant.gguf import writer

    whole = writer._write_tensor

    def watched(file: Any, entry: Planned, kind: Any) -> None:
        first = entry.read()
        assert entry.read() is not first  # read anew, nothing is kept
        order.append(entry.name)
        whole(file, entry, kind)

    monkeypatch.setattr(writer, "_write_tensor", watched)
    path = write_gguf(directory, tmp_path / "m.gguf", "F32", name=model.info.name)
    assert order == list(GgufFile.open(path).tensors)
    same(model, expanded(path))


def test_mistral_is_written_as_llama(tmp_path: Path) -> None:
    path = write_gguf(tiny("mistral"), tmp_path / "m.gguf", "F32")
    with open_gguf(path) as opened:
        assert (opened.architecture, opened.info.family) == ("llama", "llama")


@pytest.mark.parametrize("family", sorted(name for name, found in MODELS.items() if found.gguf))
def test_names_are_those_of_the_converter(family: str) -> None:
    """Published name -> name in the file, as the gguf package maps them; experts of a layer first become one tensor."""
    found = MODELS[family]
    assert found.gguf is not None
    arch = next(number for number, name in MODEL_ARCH_NAMES.items() if name == found.gguf.arch)
    table = get_tensor_name_map(arch, 8)
    for own, _ in tiny(family).named_parameters():
        published = re.sub(r"(?<=\.experts\.)\d+\.", "", found.names.published(own)).removeprefix("language_model.")
        assert table.get_name(published, try_suffixes=(".weight", ".bias")) == found.gguf.names.published(own)


def test_rows_of_rotary_pairs() -> None:
    """llama.cpp: neighbouring channels rotate together. File row (head, pair, side) is our row (head, side, pair)."""
    assert interleave(2, 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    rows = torch.arange(3 * 8)
    assert torch.equal(rows[interleave(3, 8)][separate(3, 8)], rows)


def test_fused_qkv_is_cut(tmp_path: Path) -> None:
    model = tiny("llama", hidden_size=64, heads=4, qkv_bias=True, out_bias=True)
    plain = write_gguf(model, tmp_path / "plain.gguf", "F32")
    with GgufFile.open(plain) as file:
        values = {name: to_float(file, tensor) for name, tensor in file.tensors.items()}
        metadata = file.metadata
    for i in range(model.config.layers):
        for leaf in ("weight", "bias"):
            parts = [values.pop(f"blk.{i}.attn_{part}.{leaf}") for part in "qkv"]
            values[f"blk.{i}.attn_qkv.{leaf}"] = torch.cat(parts)
    planned = [Planned(n, tuple(v.shape), "F32", lambda v=v: v) for n, v in values.items()]
    same(model, expanded(write_file(tmp_path / "fused.gguf", metadata, planned)))


def test_the_logit_scale_of_granite_divides(tmp_path: Path) -> None:
    model = tiny("granite", logits_factor=1 / 3)
    path = write_gguf(model, tmp_path / "m.gguf", "F32")
    same(model, expanded(path))
    with GgufFile.open(path) as file:
        names = ("logit_scale", "attention.scale", "embedding_scale", "residual_scale")
        assert [file.metadata[f"granite.{name}"] for name in names] == [3.0, 0.1875, 12.0, 0.22]
    with pytest.raises(ModelLoadError, match=r"rope\.scaling\.finetuned=False is not supported"):
        open_gguf(changed(tmp_path, "granite", A__rope__scaling__finetuned=False))


@pytest.mark.parametrize(
    ("windowed", "said", "read"),
    [
        ((), None, ()),
        ((True, True, False), [True, True, False], (True, True, False)),
        ((), 3, (True, True, False)),  # a period
        ((True, False, False), 0, ()),  # no layer without a window
    ],
)
def test_the_windows_of_olmo3(windowed: tuple[bool, ...], said: Any, read: tuple[bool, ...], tmp_path: Path) -> None:
    model = tiny("olmo2", layers=3, window=24, windowed=windowed, local_theta=5e4, rope_scaling=SCALINGS[3])
    path = write_gguf(model, tmp_path / "m.gguf", "F32")
    same(model, expanded(path))
    with GgufFile.open(path) as file:
        pattern = file.metadata["olmo2.attention.sliding_window_pattern"]
        assert list(pattern) == [not windowed or windowed[i] for i in range(3)]
        values = {name: to_float(file, tensor) for name, tensor in file.tensors.items()}
        metadata = file.metadata
    if said is not None:
        metadata["olmo2.attention.sliding_window_pattern"] = np.array(said) if isinstance(said, list) else said
    planned = [Planned(n, tuple(v.shape), "F32", lambda v=v: v) for n, v in values.items()]
    with open_gguf(write_file(tmp_path / "other.gguf", metadata, planned)) as opened:
        assert (opened.config.window, opened.config.windowed) == (24, read)


EVERY_FOURTH = tuple(i % 4 == 3 for i in range(64))
OTHERS = tuple(not mark for mark in EVERY_FOURTH)


@pytest.mark.parametrize(
    ("said", "windowed"),
    [
        (None, OTHERS),
        (8, tuple(i % 8 != 7 for i in range(64))),
        (np.array([True, False] * 32), (True, False) * 32),
        (np.array([True] * 64), ()),
        (np.array([False] * 64), (False,) * 64),
    ],
)
def test_the_windows_of_exaone4(said: Any, windowed: tuple[bool, ...], tmp_path: Path) -> None:
    """llama.cpp has them in 64 layers; those without know no positions."""
    model = tiny("exaone4", layers=64, window=24, windowed=OTHERS, ropeless=EVERY_FOURTH, rope_scaling=SCALINGS[0])
    same(model, expanded(write_gguf(model, tmp_path / "m.gguf", "F32")))
    with GgufFile.open(tmp_path / "m.gguf") as file:
        assert file.metadata["exaone4.attention.sliding_window_pattern"].tolist() == list(OTHERS)
        values = {name: to_float(file, tensor) for name, tensor in file.tensors.items()}
        metadata = {key: value for key, value in file.metadata.items() if not key.endswith("window_pattern")}
    if said is not None:
        metadata["exaone4.attention.sliding_window_pattern"] = said
    planned = [Planned(n, tuple(v.shape), "F32", lambda v=v: v) for n, v in values.items()]
    with open_gguf(write_file(tmp_path / "other.gguf", metadata, planned)) as opened:
        found = opened.config
    assert (found.window, found.windowed) == ((24, windowed) if windowed[:1] != (False,) else (0, ()))
    assert found.ropeless == tuple(not mark for mark in windowed)
    for bad in (np.array([True, False]), 0):
        metadata["exaone4.attention.sliding_window_pattern"] = bad
        path = write_file(tmp_path / "bad.gguf", metadata, planned)
        with pytest.raises(ModelLoadError, match="must be a number above 0 or 64 marks, got"):
            open_gguf(path)


def test_queries_scaled_by_position_are_refused(tmp_path: Path) -> None:
    """Ministral 3, which shares the architecture of Mistral Small 3.1."""
    with pytest.raises(ModelLoadError, match=r"attention\.temperature_scale=0\.5 is not supported"):
        open_gguf(changed(tmp_path, "mistral3", A__attention__temperature_scale=0.5))


# Rotary scaling

SCALINGS = [
    RopeScaling("linear", 4.0),
    RopeScaling("llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0),
    RopeScaling("llama3", 32.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0),
    RopeScaling("yarn", 4.0, 64),
    RopeScaling("yarn", 8.0, 64, beta_fast=16.0, beta_slow=2.0, attention_factor=1.3),
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: f"{s.kind}-{s.factor:g}")
def test_rope_scaling_comes_back(scaling: RopeScaling, tmp_path: Path) -> None:
    model = tiny(
        "llama", rope_scaling=scaling, rope_theta=500000.0, hidden_size=128, heads=2, max_len=scaling.stretched(256)
    )
    again = expanded(write_gguf(model, tmp_path / "m.gguf", "F32")).config.rope_scaling
    assert again is not None
    assert again == replace(scaling, attention_factor=again.attention_factor)
    assert again.attention_factor == pytest.approx(scaling.attention_factor)


@pytest.mark.parametrize("head_dim", [8, 16, 128])
@pytest.mark.parametrize(
    ("original", "low", "high", "factor"),
    [(32, 1.0, 4.0, 8.0), (2048, 1.0, 4.0, 8.0), (4096, 0.5, 6.0, 3.0), (2, 1.0, 4.0, 8.0), (64, 1.0, 4.0, 0.5)],
)
@pytest.mark.parametrize("family", ["llama", "exaone"])
def test_llama3_scaling_of_other_numbers_keeps_its_frequencies(
    family: str, original: int, low: float, high: float, factor: float, head_dim: int, tmp_path: Path
) -> None:
    """Also where no frequency lies between the kept and the stretched, which four numbers cannot be told from."""
    made = RopeScaling("llama3", factor, original, low_freq_factor=low, high_freq_factor=high)
    model = tiny(family, rope_scaling=made, rope_theta=5e5, heads=2, kv_heads=2, hidden_size=2 * head_dim)
    again = expanded(write_gguf(model, tmp_path / "m.gguf", "F32"))
    wanted, on_angles = inverse_frequencies(RopeTable(5e5, head_dim, made))
    config = again.config
    found, read_on_angles = inverse_frequencies(RopeTable(config.rope_theta, head_dim, config.rope_scaling))
    assert torch.allclose(found, wanted, rtol=1e-4, atol=0)
    assert read_on_angles == on_angles == 1.0
    assert np.allclose(logits(again, PROMPT), logits(model, PROMPT), rtol=1e-3, atol=1e-4)


def test_rope_factors_of_no_rule_are_held() -> None:
    assert scaling_from_factors(torch.ones(8), 10000.0, 64) is None
    factors = torch.rand(32, generator=torch.Generator().manual_seed(0)) + 1
    plain, _ = inverse_frequencies(RopeTable(10000.0, 64))
    for length in (32, 4096):  # whatever the context
        table = RopeTable(10000.0, 64, scaling_from_factors(factors, 10000.0, 64), length)
        found, on_angles = inverse_frequencies(table)
        assert torch.equal(found, plain / factors)
        assert on_angles == 1.0
    for bad in (torch.zeros(8), torch.full((8,), -2.0), torch.full((8,), math.nan), torch.full((8,), math.inf)):
        with pytest.raises(ValidationError, match="positive numbers"):
            scaling_from_factors(bad, 10000.0, 64)


# Against llama.cpp


@pytest.fixture
def theirs(llama: Any) -> Iterator[Any]:
    opened = []

    def run(path: Path, ids: list[int]) -> np.ndarray:
        opened.append(llama.Reference(path))
        return opened[-1].logits(ids)  # type: ignore[no-any-return]

    yield run
    for reference in opened:
        reference.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_every_architecture(family: str, theirs: Any, tmp_path: Path) -> None:
    """Weights large enough that position and every row order matter: any mistake shows at this bound."""
    layers = {"layers": 6} if family == "gemma3" else {}  # llama.cpp aborts without a layer that has no window
    model = tiny(family, hidden_size=64, heads=4, intermediate_size=96, **layers)
    path = write_gguf(model, tmp_path / "m.gguf", "F32")
    found = theirs(path, PROMPT)
    assert cosine(found, logits(expanded(path), PROMPT)) > 0.999999
    assert cosine(found, logits(model, PROMPT[::-1])) < 0.99


def test_logits_of_olmo3(theirs: Any, tmp_path: Path) -> None:
    """Windows shorter than the text, whose layers have unscaled positions."""
    shape = {"layers": 5, "window": 8, "windowed": (True, True, True, False, True), "local_theta": 1e4}
    model = tiny("olmo2", hidden_size=64, heads=4, rope_scaling=RopeScaling("yarn", 4.0, 64), **shape)
    path = write_gguf(model, tmp_path / "m.gguf", "F32")
    found = theirs(path, PROMPT)
    assert cosine(found, logits(expanded(path), PROMPT)) > 0.999999
    wide = Decoder(replace(model.config, window=0, windowed=()), model.info)
    wide.load_state_dict(model.state_dict())
    assert cosine(found, logits(wide, PROMPT)) < 0.99


# llama.cpp takes beta_fast 32 and beta_slow 1 in these architectures whatever the file says.
COMPUTED_ALIKE = [*SCALINGS[:4], replace(SCALINGS[4], beta_fast=32.0, beta_slow=1.0)]


@pytest.mark.parametrize("scaling", COMPUTED_ALIKE, ids=lambda s: f"{s.kind}-{s.factor:g}")
def test_logits_with_rope_scaling(scaling: RopeScaling, theirs: Any, tmp_path: Path) -> None:
    model = tiny("llama", rope_scaling=scaling, hidden_size=128, heads=2)
    path = write_gguf(model, tmp_path / "m.gguf", "F32")
    assert cosine(theirs(path, PROMPT), logits(expanded(path), PROMPT)) > 0.999999


@pytest.mark.parametrize("bias", ["qkv_bias", "out_bias", "mlp_bias"])
def test_logits_with_biases(bias: str, theirs: Any, tmp_path: Path) -> None:
    flags = {"qkv_bias": True, "out_bias": True} if bias != "mlp_bias" else {"mlp_bias": True}
    model = tiny("llama", hidden_size=64, heads=4, **flags)
    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw))
    path = write_gguf(model, tmp_path / "m.gguf", "F32")
    assert cosine(theirs(path, PROMPT), logits(expanded(path), PROMPT)) > 0.999999


# GGML type -> llama.cpp's file type that writes it.
WRITTEN = {
    **{name: name for name in "F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q6_K IQ4_NL IQ4_XS TQ1_0 TQ2_0 Q1_0 Q2_0".split()},
    "Q2_K": "Q2_K",
    "Q3_K": "Q3_K_M",
    "Q4_K": "Q4_K_M",
    "Q5_K": "Q5_K_M",
    "MXFP4": "MXFP4_MOE",
}
# To write these llama.cpp first builds search tables, up to half a minute each; it reads random blocks as well.
BY_HAND = ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "NVFP4"]


@pytest.mark.parametrize(("kind", "ftype"), WRITTEN.items())
def test_logits_of_every_type_llama_cpp_writes(
    kind: str, ftype: str, small: tuple[Path, dict[str, int]], llama: Any, theirs: Any, tmp_path: Path
) -> None:
    """llama.cpp rounds activations to 8 bits for quantised types, this comparison does not: that is the distance."""
    source, matrices = small
    number = getattr(llama.llama_cpp, f"LLAMA_FTYPE_MOSTLY_{ftype}", None)
    if number is None:
        pytest.skip(f"this llama-cpp-python knows no {ftype}")
    assert llama.quantise(source, tmp_path / "q.gguf", number, matrices)
    with GgufFile.open(tmp_path / "q.gguf") as file:
        assert {tensor.type.name for tensor in file.tensors.values() if len(tensor.shape) == 2} == {kind}
    found = theirs(tmp_path / "q.gguf", PROMPT)
    assert cosine(found, logits(expanded(tmp_path / "q.gguf"), PROMPT)) >= 0.999


def random_blocks(kind: str, n: int, k: int, draw: np.random.Generator) -> np.ndarray:
    """Rows of blocks with any codes and a scale that gives weights of deviation about 0.12."""
    block = BY_NAME[kind]
    data = draw.integers(0, 256, (n, k // block.block, block.size), dtype=np.uint8)

    def scaled(by: float) -> np.ndarray:
        half = int(np.float16(by).view(np.uint16))
        if kind == "NVFP4":  # four unsigned 4-bit-exponent floats: 2^-4 to 2^-3
            data[..., :4] = data[..., :4] & 7 | 3 << 3
        elif kind == "IQ1_M":  # the high nibbles of four words
            for i in range(4):
                data[..., 49 + 2 * i] = data[..., 49 + 2 * i] & 15 | (half >> 4 * i & 15) << 4
        else:
            data[..., :2] = np.array([half & 255, half >> 8], np.uint8)
        return data.reshape(n, -1)

    ones = quants.dequantize(scaled(1.0), GGMLQuantizationType[kind])
    return scaled(0.12 / float(ones.std()))


@pytest.mark.parametrize("kind", BY_HAND)
def test_logits_of_types_that_are_slow_to_write(
    kind: str, small: tuple[Path, dict[str, int]], theirs: Any, tmp_path: Path
) -> None:
    draw = np.random.default_rng(0)
    out = GGUFWriter(tmp_path / "h.gguf", "llama")
    with GgufFile.open(small[0]) as file:
        for key, value in file.metadata.items():
            if isinstance(value, str) and key != "general.architecture":
                out.add_string(key, value)
            elif isinstance(value, int):
                out.add_uint32(key, value)
            elif isinstance(value, float):
                out.add_float32(key, value)
        for tensor in file.tensors.values():
            if len(tensor.shape) == 1:
                out.add_tensor(tensor.name, to_float(file, tensor).numpy())
                continue
            raw = random_blocks(kind, *tensor.shape, draw)
            out.add_tensor(tensor.name, raw, raw_dtype=GGMLQuantizationType[kind])
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    found = theirs(tmp_path / "h.gguf", PROMPT)
    assert cosine(found, logits(expanded(tmp_path / "h.gguf"), PROMPT)) >= 0.999


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"])
def test_greedy_tokens_of_the_shipped_model(kind: str, llama: Any, tmp_path: Path) -> None:
    """On the tasks it was trained for its margins are wide: the same tokens, one by one."""
    path = write_gguf(DEMO, tmp_path / "d.gguf", kind, tokenizer=tokenizer_metadata(DEMO, 1280))
    model, reference = expanded(path), llama.Reference(path)
    assert model.info == replace(load(DEMO).info, defaults={})  # a file says nothing of a request's options
    with open_gguf(path) as opened:
        tokenizer = read_tokenizer(opened.file.metadata)
    for text in QUESTIONS:
        prompt = tokenizer.encode(tokenizer.apply_chat_template([{"role": "user", "content": text}]))
        assert cosine(reference.logits(prompt), logits(model, prompt)) >= 0.999
        answer = greedy(model, prompt, 12)
        assert answer == reference.greedy(prompt, 12)
        assert len(set(answer)) > 3
    reference.close()


# What is refused


def changed(tmp_path: Path, family: str = "llama", **changes: Any) -> Path:
    """A tiny file with metadata replaced (None: removed); in keys `__` stands for a dot, `A` for the architecture."""
    path = write_gguf(tiny(family), tmp_path / "sound.gguf", "F32")
    with GgufFile.open(path) as file:
        values = {name: to_float(file, tensor) for name, tensor in file.tensors.items()}
        renamed = {key.replace("__", ".").replace("A.", f"{family}."): value for key, value in changes.items()}
        metadata = {key: value for key, value in {**file.metadata, **renamed}.items() if value is not None}
    planned = [Planned(n, tuple(v.shape), "F32", lambda v=v: v) for n, v in values.items()]
    return write_file(tmp_path / "changed.gguf", metadata, planned)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"general__architecture": "gpt2"},
            "'gpt2' is not supported; supported: dream, .*llada-moe, llama, .*phi3, qwen2, qwen3",
        ),
        ({"general__architecture": None}, "general.architecture' is missing"),
        ({"general__architecture": 7}, "must be str"),
        ({"A__expert_count": 8}, "expert_count=8 is not supported"),
        ({"A__attention__causal": False}, "not supported"),
        ({"A__logit_scale": 2.0}, "logit_scale=2.0 is not supported"),
        ({"A__block_count": 3}, "missing tensor blk.2"),
        ({"A__block_count": 1}, "unexpected tensor blk.1"),
        ({"A__block_count": 10**9}, "layers must be"),
        ({"A__embedding_length": 64}, "has shape"),
        ({"A__embedding_length": 0}, "must be"),
        ({"A__attention__head_count": 0}, "must be"),
        ({"A__attention__head_count": np.array([4, 2], np.int32)}, "must be int"),
        ({"A__attention__value_length": 4}, "not supported"),
        ({"A__rope__dimension_count": 4}, "not supported"),
        ({"A__rope__scaling__type": "longrope"}, "supported: none, linear, yarn"),
        ({"A__rope__freq_base": float("nan")}, "freq_base. must be a finite number"),
        ({"A__attention__layer_norm_rms_epsilon": None}, "is missing"),
        ({"A__context_length": "many"}, "must be int"),
        ({"split__count": 3}, "one of 3 parts of a split GGUF file"),
    ],
)
def test_unsupported_files_are_named(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=said):
        open_gguf(changed(tmp_path, **changes))


def test_ids_outside_the_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="below 96"):
        open_gguf(changed(tmp_path, tokenizer__ggml__eos_token_id=96))


def test_settings_without_effect_are_taken(tmp_path: Path) -> None:
    path = changed(
        tmp_path,
        A__attention__head_count=np.array([4, 4], np.int32),  # per layer, all the same
        A__attention__sliding_window=100,
        A__expert_count=0,
    )
    with open_gguf(path) as opened:
        assert (opened.config.heads, opened.config.window, opened.config.max_len) == (4, 100, 256)


def test_a_diffusion_file_that_shifts_otherwise(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"diffusion\.shift_logits"):
        open_gguf(changed(tmp_path, "llada", diffusion__shift_logits=True))


def test_mask_ids_by_key_and_by_text(tmp_path: Path) -> None:
    tokens = [f"t{i}" for i in range(95)] + ["<|mdm_mask|>"]
    fields = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens}
    model = tiny("llada")
    path = write_gguf(model, tmp_path / "m.gguf", "F32", tokenizer=fields)
    assert open_gguf(path).info.mask_id == 95
    bare = write_gguf(replace_info(model, mask_id=None), tmp_path / "n.gguf", "F32", tokenizer=fields)
    assert open_gguf(bare).info.mask_id == 95
    with pytest.raises(ModelLoadError, match="needs a mask token id"):
        open_gguf(write_gguf(replace_info(model, mask_id=None), tmp_path / "o.gguf", "F32"))


def replace_info(model: Decoder, **changes: Any) -> Decoder:
    model.info = replace(model.info, **changes)
    return model


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    model = tiny("llama")
    model.norm.weight.data[3] = math.nan
    with pytest.raises(ValidationError, match="output_norm"):
        write_gguf(model, tmp_path / "m.gguf", "F32")
    assert list(tmp_path.iterdir()) == []  # nothing half written


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: tiny("fast_dllm_v2"), "no GGUF architecture"),
        (lambda: tiny("llama", rope_dim=4), "no place for rope_dim=4"),
        (lambda: tiny("qwen3", rope_scaling=SCALINGS[1]), "llama3 rope scaling"),
        (
            lambda: tiny("smollm3", ropeless=(False, True, False, True)),
            "smollm3 has no rotary positions in every layer",
        ),
        (lambda: tiny("smollm3", window=8, windowed=(False, False, False, True)), "no place for window=8"),
        (lambda: tiny("smollm3", qkv_bias=True, out_bias=True), "no place for qkv_bias=True"),
        (lambda: tiny("smollm3", rope_scaling=SCALINGS[1]), "llama3 rope scaling"),
        (lambda: tiny("seed_oss", out_bias=True), "no place for out_bias=True"),
        (lambda: tiny("exaone4", window=8, windowed=(True, False), ropeless=(False, True)), "window in 64 layers"),
        (lambda: tiny("mistral3", window=8), "no place for window=8"),
        (lambda: tiny("olmo2", tied=True), "olmo2 has no tied head"),
        (lambda: tiny("phi3", head_dim=16), r"heads \* head_dim equal to the hidden size"),
        (lambda: tiny("olmo2", qkv_bias=True, out_bias=True), "no place for qkv_bias=True"),
    ],
)
def test_models_llama_cpp_has_no_place_for(make: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=said):
        write_gguf(make(), tmp_path / "m.gguf", "F32")


def test_types_that_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="BF16, F16, F32, Q4_0"):
        write_gguf(tiny("llama"), tmp_path / "m.gguf", "Q4_K")


def test_a_directory_that_is_quantised_or_does_not_fit(tmp_path: Path) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(DEMO, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 7}))
    with pytest.raises(CheckpointError, match=r"missing tensor model\.layers\.6"):
        write_gguf(directory, tmp_path / "m.gguf")


def test_a_model_that_is_dropped_closes_its_file() -> None:
    """And one that could not be opened has none to close."""
    closed: list[int] = []

    class Noted(GgufModel):
        def close(self) -> None:
            closed.append(1)

    bare = object.__new__(Noted)
    bare.__del__()
    assert closed == []
    bare.file = object()  # type: ignore[assignment]
    bare.__del__()
    assert closed == [1]
