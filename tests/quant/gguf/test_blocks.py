"""Blocks of every GGML type against the `gguf` package, and against bounds where a format holds them rounded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, quants

from dfastllm.errors import CheckpointError, ValidationError
from dfastllm.kernels.packed import GROUP
from dfastllm.quant.gguf import BY_NAME, FILE_TYPES, GgufFile, encode, to_float, to_qtensor, type_for
from dfastllm.quant.gguf.blocks import DECODERS, E2M1
from dfastllm.quant.gguf.reader import GgufTensor

NEWER = {"Q2_0"}  # types that the package has no number for
UNDECODED = {"Q1_0", "Q2_0"}  # types that it cannot decode
IQ = ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"]


def oracle(raw: np.ndarray, kind: str) -> np.ndarray:
    """float32 values of rows of blocks."""
    if kind not in UNDECODED:
        with np.errstate(all="ignore"):
            return quants.dequantize(raw, GGMLQuantizationType[kind])
    # As ggml-quants.c says: one float16, then fields of one bit (-d, d) or two bits ((q - 1) d), lowest first.
    entry = BY_NAME[kind]
    blocks = raw.reshape(-1, entry.size)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    bits = np.unpackbits(blocks[:, 2:], axis=-1, bitorder="little").astype(np.float32)
    values = bits * 2 - 1 if kind == "Q1_0" else bits[:, ::2] + 2 * bits[:, 1::2] - 1
    with np.errstate(all="ignore"):
        return (values * scale).reshape(len(raw), -1).astype(np.float32)


def random_rows(kind: str, n: int, k: int, seed: int = 0) -> np.ndarray:
    """Any bytes, but for rows whose values would not be finite or whose scales no float16 holds."""
    entry = BY_NAME[kind]
    draw = np.random.default_rng(seed)
    raw = draw.integers(0, 256, (8 * n, k // entry.block * entry.size), dtype=np.uint8)
    if kind == "MXFP4":  # most exponents are far beyond float16
        raw[:, :: entry.size] = 104 + raw[:, :: entry.size] % 40
    values = oracle(raw, kind)
    finite = np.isfinite(values).all(axis=1) & (np.abs(values).max(axis=1) < 127 * 65504)
    if kind in DECODERS:
        with np.errstate(all="ignore"):
            _, scales, mins = DECODERS[kind].decode(raw.reshape(-1, entry.size))
        for part in (scales, mins):
            if part is not None:  # products beyond float16 are refused; a test below
                finite &= (np.abs(part.reshape(len(raw), -1)) <= 65504).all(axis=1)
    return raw[finite][:n]


def opened(path: Path, kind: str, raw: np.ndarray) -> tuple[GgufFile, GgufTensor]:
    """A file with one tensor of these bytes."""
    out = GGUFWriter(path, "llama")
    if kind in NEWER:  # written as bytes of a type of the same block size, then renumbered
        stand_in = GGMLQuantizationType.Q4_0
        out.add_tensor("w", raw, raw_shape=raw.shape, raw_dtype=stand_in)
    else:
        out.add_tensor("w", raw, raw_dtype=GGMLQuantizationType[kind])
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    if kind in NEWER:
        data = bytearray(path.read_bytes())
        at = data.index(b"\x01\0\0\0\0\0\0\0w") + 9
        data[at + 4 : at + 12] = (raw.shape[1] // BY_NAME[kind].size * BY_NAME[kind].block).to_bytes(8, "little")
        data[at + 20 : at + 24] = BY_NAME[kind].number.to_bytes(4, "little")
        path.write_bytes(data)
    file = GgufFile.open(path)
    return file, file.tensors["w"]


def test_the_table_of_types_is_the_packages() -> None:
    decoded = {t.name for t in quants._type_traits} | {"F32", "F16"}
    assert decoded <= set(BY_NAME)
    assert set(BY_NAME) - decoded == UNDECODED
    for name, entry in BY_NAME.items():
        if name not in NEWER:
            kind = GGMLQuantizationType[name]
            assert (entry.number, (entry.block, entry.size)) == (kind.value, GGML_QUANT_SIZES[kind])


@pytest.mark.parametrize("kind", sorted(DECODERS))
def test_values_are_those_of_the_file(kind: str, tmp_path: Path) -> None:
    """Equal where scales are exact; else within the bound of blocks' docstring."""
    raw = random_rows(kind, 24, 768)
    file, tensor = opened(tmp_path / "t.gguf", kind, raw)
    value, note = to_qtensor(file, tensor)
    wanted = torch.from_numpy(oracle(raw, kind))
    assert len(raw) == 24
    assert tuple(value.shape) == (24, 768)
    assert value.format == DECODERS[kind].format
    assert note is None
    found = value.dequantise()
    if DECODERS[kind].exact:
        assert torch.equal(found, wanted)
    else:
        assert value.scales is not None
        group = GROUP[value.format]
        mins = torch.zeros(24, 768) if value.mins is None else value.mins.float().repeat_interleave(group, dim=1)
        scaled = found + mins
        steps = value.codes.float().abs() + 64
        bound = 2**-11 * 1.001 * (scaled.abs() + mins.abs()) + 2**-25 * steps + 1e-6 * wanted.abs()
        assert ((found - wanted).abs() <= bound).all()
        relative = (found - wanted).pow(2).sum() / wanted.pow(2).sum()
        assert relative < 2**-22
    assert torch.equal(to_float(file, tensor), found)


@pytest.mark.parametrize("kind", IQ)
def test_types_without_a_format_are_quantised_again(kind: str, tmp_path: Path) -> None:
    raw = random_rows(kind, 16, 512)
    file, tensor = opened(tmp_path / "t.gguf", kind, raw)
    value, note = to_qtensor(file, tensor)
    wanted = torch.from_numpy(oracle(raw, kind))
    assert value.format == "w8g"
    assert note is not None
    assert kind in note
    amax = wanted.view(16, -1, 32).abs().amax(dim=-1).repeat_interleave(32, dim=1)
    assert ((value.dequantise() - wanted).abs() <= amax / 250 + 2**-25 * 128).all()
    assert torch.equal(to_float(file, tensor), wanted)


@pytest.mark.parametrize("kind", sorted(DECODERS))
def test_extreme_blocks(kind: str, tmp_path: Path) -> None:
    """All bits clear, all bits set, alternating ones; the scales are whatever finite number comes of it, or refused."""
    entry = BY_NAME[kind]
    for fill in (0x00, 0xFF, 0x55, 0xAA, 0x7B, 0x80):
        raw = np.full((2, 256 // entry.block * entry.size), fill, np.uint8)
        file, tensor = opened(tmp_path / f"{fill}.gguf", kind, raw)
        wanted = torch.from_numpy(oracle(raw, kind))
        try:
            value, _ = to_qtensor(file, tensor)
        except CheckpointError as error:
            assert "NaN or infinite" in str(error) or "beyond float16" in str(error)  # noqa: PT017
            with np.errstate(all="ignore"):
                _, scales, mins = DECODERS[kind].decode(raw.reshape(-1, entry.size))
            parts = [scales] if mins is None else [scales, mins]
            assert not all(np.isfinite(part).all() and np.abs(part).max() <= 65504 for part in parts)
        else:
            torch.testing.assert_close(value.dequantise(), wanted, rtol=2**-10, atol=2**-18)


def test_many_chunks_are_one_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = random_rows("Q4_K", 31, 512)
    file, tensor = opened(tmp_path / "t.gguf", "Q4_K", raw)
    whole, _ = to_qtensor(file, tensor)
    monkeypatch.setattr("dfastllm.quant.gguf.convert.CHUNK", 1024)
    cut, _ = to_qtensor(file, tensor)
    assert whole.mins is not None
    assert cut.mins is not None
    assert whole.scales is not None
    assert cut.scales is not None
    assert torch.equal(whole.codes, cut.codes)
    assert torch.equal(whole.scales, cut.scales)
    assert torch.equal(whole.mins, cut.mins)


def test_mxfp4_reaches_the_ends_of_float16(tmp_path: Path) -> None:
    """Exponents up to 2^15 are exact; below 2^-24 weights vanish, which moves them by less than 12 * 2^-24."""
    row = np.zeros((3, 17), np.uint8)
    row[:, 0] = [128 + 12, 128 - 24, 1]
    row[:, 1:] = 0x7F  # codes 15 (-12) and 7 (12)
    file, tensor = opened(tmp_path / "t.gguf", "MXFP4", row)
    found = to_qtensor(file, tensor)[0].dequantise()
    assert torch.equal(found[:2], torch.from_numpy(oracle(row, "MXFP4"))[:2])
    assert found[2].abs().max() == 0
    assert E2M1[7] == 12


@pytest.mark.parametrize(
    ("kind", "at"), [("Q8_0", 0), ("Q4_K", 0), ("Q4_K", 2), ("Q6_K", 208), ("Q4_1", 2), ("IQ3_S", 0)]
)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scales_that_are_not_finite(kind: str, at: int, bad: float, tmp_path: Path) -> None:
    raw = random_rows(kind, 5, 256)
    raw[3, at : at + 2] = np.array([bad], "<f2").view(np.uint8)
    file, tensor = opened(tmp_path / "t.gguf", kind, raw)
    with pytest.raises(CheckpointError, match=rf"tensor 'w' \({kind}.*NaN or infinite, first in row 3"):
        to_qtensor(file, tensor)
    with pytest.raises(CheckpointError, match="row 3"):
        to_float(file, tensor)


def test_an_exponent_that_is_nan(tmp_path: Path) -> None:
    row = np.full((2, 17), 255, np.uint8)
    file, tensor = opened(tmp_path / "t.gguf", "MXFP4", row)
    with pytest.raises(CheckpointError, match="NaN"):
        to_qtensor(file, tensor)


def test_scales_beyond_float16(tmp_path: Path) -> None:
    raw = np.zeros((1, 210), np.uint8)
    raw[0, 192:208] = 127
    raw[0, 208:] = np.array([60000.0], "<f2").view(np.uint8)
    file, tensor = opened(tmp_path / "t.gguf", "Q6_K", raw)
    with pytest.raises(CheckpointError, match="beyond float16"):
        to_qtensor(file, tensor)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_float_weights(kind: str, bad: float, tmp_path: Path) -> None:
    values = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    file, tensor = opened(tmp_path / "t.gguf", kind, encode(values, BY_NAME[kind]))
    value, note = to_qtensor(file, tensor)
    narrow = values.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind])
    assert value.format == ("bf16" if kind == "BF16" else "f32")
    assert torch.equal(value.dequantise(), narrow.float())
    assert (note is not None) == (kind == "F16")
    raw = encode(values, BY_NAME[kind])
    size = BY_NAME[kind].size
    wrong = torch.tensor([bad]).to(narrow.dtype).view(torch.uint8).numpy()
    raw[4, 3 * size : 4 * size] = wrong
    file, tensor = opened(tmp_path / "bad.gguf", kind, raw)
    with pytest.raises(CheckpointError, match="weights that are NaN or infinite, first in row 4"):
        to_qtensor(file, tensor)


# Encoding


@pytest.mark.parametrize("kind", sorted(FILE_TYPES))
def test_encoding_is_ggmls(kind: str) -> None:
    values = torch.randn(9, 96, generator=torch.Generator().manual_seed(1))
    raw = encode(values, BY_NAME[kind])
    assert np.array_equal(
        raw, quants.quantize(values.numpy(), GGMLQuantizationType[kind]).view(np.uint8).reshape(9, -1)
    )
    back = torch.from_numpy(quants.dequantize(raw, GGMLQuantizationType[kind]))
    bits = {"F32": 24, "F16": 11, "BF16": 8, "Q8_0": 7, "Q5_0": 4, "Q5_1": 4, "Q4_0": 3, "Q4_1": 3}[kind]
    assert (back - values).abs().max() <= 1.01 * 2.0**-bits * values.abs().max()


@pytest.mark.parametrize("kind", sorted(FILE_TYPES))
@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-38, 1e-12, 1.0, 1e4])
def test_encoding_at_any_size(kind: str, scale: float) -> None:
    """Denormal and zero blocks included: what comes back is finite and close."""
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(2)) * scale
    with np.errstate(all="raise", under="ignore"):
        raw = encode(values, BY_NAME[kind])
    back = torch.from_numpy(quants.dequantize(raw, GGMLQuantizationType[kind]))
    assert torch.isfinite(back).all()
    assert (back - values).abs().max() <= 0.15 * values.abs().max() + 2**-24 * 16


def test_what_cannot_be_encoded() -> None:
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValidationError, match="NaN or infinite"):
            encode(torch.full((1, 32), bad), BY_NAME["Q8_0"])
    with pytest.raises(ValidationError, match="cannot hold"):
        encode(torch.full((1, 32), 1e6), BY_NAME["F16"])
    assert np.isfinite(encode(torch.full((1, 32), 1e6), BY_NAME["BF16"])).all()


def test_the_type_of_each_tensor() -> None:
    assert type_for((64,), "Q4_0") == "F32"
    assert type_for((8, 64), "Q4_0") == "Q4_0"
    assert type_for((8, 48), "Q4_0") == "F16"
    assert type_for((8, 48), "BF16") == "BF16"
    with pytest.raises(ValidationError, match="type must be one of"):
        type_for((8, 64), "Q9_9")
