"""Streamed safetensors files, read back by the safetensors library, and quantised weights in them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dfastllm.errors import CheckpointError, ModelLoadError
from dfastllm.kernels.packed import QTensor
from dfastllm.models.headers import inventory
from dfastllm.quant import FORMATS, Planned, QuantConfig, SafetensorsWriter, quantise, stored
from dfastllm.quant.checkpoint import pack_bits, plan, read_one, unpack_bits, write
from dfastllm.quant.stream import read_tensor

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "odd": torch.tensor([1, -2, 3], dtype=torch.int8),
    "half": torch.tensor([0.5, -1.5], dtype=torch.float16),
    "brain": torch.tensor([[1.0], [2.5]], dtype=torch.bfloat16),
    "none": torch.zeros(0, 4),
    "bytes": torch.tensor([255, 0, 7], dtype=torch.uint8),
    "scalar": torch.tensor(3.5),
}


def read(directory: Path) -> dict[str, QTensor | Tensor]:
    return {name: read_one(name, weight) for name, weight in stored(inventory(directory)).items()}


def planned(tensors: dict[str, Tensor]) -> dict[str, Planned]:
    return {name: Planned(t.dtype, tuple(t.shape)) for name, t in tensors.items()}


def write_all(directory: Path, tensors: dict[str, Tensor], **options: Any) -> None:
    with SafetensorsWriter(directory, planned(tensors), **options) as writer:
        for name in sorted(tensors):  # another order than planned
            writer.write(name, tensors[name])


def test_the_library_reads_what_was_streamed(tmp_path: Path) -> None:
    write_all(tmp_path, TENSORS)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].equal(tensor), name
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_every_tensor_is_aligned_to_its_dtype(tmp_path: Path) -> None:
    write_all(tmp_path, TENSORS)
    for name, entry in inventory(tmp_path).items():
        assert entry.offset % TENSORS[name].element_size() == 0, name


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    for name, entry in inventory(tmp_path).items():
        found = read_tensor(entry, name)
        assert found.dtype == TENSORS[name].dtype
        assert found.equal(TENSORS[name]), name


def test_last_tensor_may_be_empty(tmp_path: Path) -> None:
    write_all(tmp_path, {"x": torch.ones(3), "z": torch.zeros(0, dtype=torch.uint8)})
    assert load_file(tmp_path / "model.safetensors")["x"].tolist() == [1, 1, 1]
    write_all(tmp_path, {"z": torch.zeros(0)})
    assert load_file(tmp_path / "model.safetensors")["z"].numel() == 0


def test_shards(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(5)}
    write_all(tmp_path, tensors, shard_bytes=900)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)] + ["model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 2000}
    for name, tensor in tensors.items():
        assert load_file(tmp_path / index["weight_map"][name])[name].equal(tensor)
    assert read(tmp_path).keys() == set(tensors)
    write_all(tmp_path, tensors)  # fewer files: the shards and their index go
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_nothing_is_left_of_what_went_wrong(tmp_path: Path) -> None:
    write_all(tmp_path, {"a": torch.ones(2)})
    with pytest.raises(CheckpointError, match="1 planned tensors were not written: b"):  # noqa: SIM117
        with SafetensorsWriter(tmp_path, planned({"a": torch.ones(2), "b": torch.ones(1)})) as writer:
            writer.write("a", torch.zeros(2))
    with pytest.raises(KeyboardInterrupt), SafetensorsWriter(tmp_path, planned({"a": torch.ones(2)})):
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert load_file(tmp_path / "model.safetensors")["a"].tolist() == [1, 1]  # the earlier one is still there


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("b", torch.ones(2), "tensor 'b' .* is not planned"),
        ("a", torch.ones(3), r"tensor 'a' of torch.float32 \[3\] is planned as torch.float32 \[2\], once"),
        ("a", torch.ones(2).half(), "is planned as torch.float32"),
    ],
)
def test_unplanned_tensors(tmp_path: Path, name: str, tensor: Tensor, said: str) -> None:
    with (
        pytest.raises(CheckpointError, match=said),
        SafetensorsWriter(tmp_path, planned({"a": torch.ones(2)})) as writer,
    ):
        writer.write(name, tensor)


def test_written_twice(tmp_path: Path) -> None:
    with SafetensorsWriter(tmp_path, planned({"a": torch.ones(2)})) as writer:
        writer.write("a", torch.ones(2))
        with pytest.raises(CheckpointError, match="once"):
            writer.write("a", torch.zeros(2))
    assert load_file(tmp_path / "model.safetensors")["a"].tolist() == [1, 1]


@pytest.mark.parametrize(("kind", "bits"), [("w4g", 4), ("w4s", 4), ("w6g", 6), ("w8", 8), ("w8g", 8)])
def test_bits(kind: str, bits: int) -> None:
    """Packed and back; the bits themselves follow from the documented order, written out with Python's integers."""
    draws = torch.Generator().manual_seed(0)
    signed = bits == 8
    codes = torch.randint(-127, 128, (3, 96), generator=draws).to(torch.int8) if signed else None
    if codes is None:
        codes = torch.randint(0, 1 << bits, (3, 96), generator=draws).to(torch.uint8)
    data = pack_bits(kind, codes)
    assert data.shape == (3, 96 * bits // 8)
    assert unpack_bits(kind, data).equal(codes)
    if not signed:
        for row in range(3):
            whole = sum(int(code) << bits * i for i, code in enumerate(codes[row]))
            assert bytes(data[row].tolist()) == whole.to_bytes(96 * bits // 8, "little")


def store(directory: Path, weights: dict[str, str], seed: int = 0) -> dict[str, QTensor]:
    """Quantised random weights [6, 64] by name -> format, with a float norm beside them."""
    draws = torch.Generator().manual_seed(seed)
    made = {n: quantise(torch.randn(6, 64, generator=draws), f) for n, f in weights.items()}
    tensors = {"norm": Planned(torch.bfloat16, (64,))}
    for name, format in weights.items():
        tensors |= plan(name, FORMATS[format], (6, 64))
    with SafetensorsWriter(directory, tensors) as writer:
        writer.write("norm", torch.ones(64, dtype=torch.bfloat16))
        for name, weight in made.items():
            write(writer, name, weight)
    return made


def test_weights_come_back_exactly(tmp_path: Path) -> None:
    made = store(tmp_path, {f"layers.{f}.weight": f for f in FORMATS})
    found = read(tmp_path)
    assert found.keys() == {*made, "norm"}
    assert isinstance(found["norm"], Tensor)
    for name, weight in made.items():
        back = found[name]
        assert isinstance(back, QTensor)
        assert back.format == weight.format
        assert back.codes.equal(weight.codes)
        for part in ("scales", "mins", "steps"):
            ours, theirs = getattr(weight, part), getattr(back, part)
            assert (ours is None) == (theirs is None)
            assert ours is None or ours.equal(theirs)


def test_bytes_are_those_of_the_file(tmp_path: Path) -> None:
    store(tmp_path, {f: f for f in FORMATS})
    for name, weight in stored(inventory(tmp_path)).items():
        if name in FORMATS:
            assert weight.nbytes == FORMATS[name].nbytes(6, 64)
            assert weight.shape == (6, 64)


def damage(directory: Path, **changes: Tensor | None) -> None:
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("format", "changes", "said"),
    [
        ("w4", {"x__scales": None}, r"has x\.codes without x\.scales"),
        ("w4m", {"x__codes": None}, r"without x\.codes"),
        ("w4", {"x__scales": torch.zeros(5, 2).half()}, "x: its parts fit no format"),
        ("w4", {"x__scales": torch.zeros(6, 2)}, "x: its parts fit no format"),
        (
            "w4",
            {"x__codes": torch.zeros(6, 40, dtype=torch.uint8)},
            "fit no format of dfastllm: codes U8|fit no format",
        ),
        ("w4", {"x__codes": torch.zeros(6, 32, dtype=torch.int8)}, "fit no format"),
        ("w4m", {"x__mins": torch.zeros(6, 1).half()}, "fit no format"),
        ("w8", {"x__mins": torch.zeros(6, 2).half()}, "fit no format"),
        ("w8g", {"x__mins": torch.zeros(6, 2).half()}, "fit no format"),
        ("w8", {"x__scales": torch.zeros(7)}, "fit no format"),
        ("w8", {"x__codes": torch.zeros(6, 8, 8, dtype=torch.int8)}, "fit no format"),
        ("w4r", {"x__steps": None}, "fit no format"),
        ("w4r", {"x__codes": None}, r"without x\.codes"),
        ("w4r", {"x__steps": torch.zeros(6, 1, dtype=torch.uint8)}, "fit no format"),
        ("w4r", {"x__steps": torch.zeros(6, 2, dtype=torch.int8)}, "fit no format"),
        ("w4r", {"x__codes": torch.zeros(6, 32, dtype=torch.int8)}, "fit no format"),
        ("w4", {"x__steps": torch.zeros(6, 2, dtype=torch.uint8)}, "fit no format"),
        ("w8", {"x__steps": torch.zeros(6, 2, dtype=torch.uint8)}, "fit no format"),
    ],
)
def test_parts_that_do_not_fit(tmp_path: Path, format: str, changes: dict[str, Tensor | None], said: str) -> None:
    store(tmp_path, {"x": format})
    damage(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=said):
        stored(inventory(tmp_path))


def test_steps_that_leave_a_byte(tmp_path: Path) -> None:
    store(tmp_path, {"x": "w4r"})
    damage(tmp_path, x__steps=torch.full((6, 2), 0x0F, dtype=torch.uint8))
    with pytest.raises(CheckpointError, match=r"x\.codes lie further from their zero than a signed byte holds"):
        read(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["scales", "mins"])
def test_scales_that_are_no_numbers(tmp_path: Path, part: str, value: float) -> None:
    store(tmp_path, {"x": "w4m"})
    damage(tmp_path, **{f"x__{part}": torch.full((6, 2), value).half()})
    with pytest.raises(CheckpointError, match=rf"x\.{part} holds NaN or infinity"):
        read(tmp_path)


def test_config_round_trip() -> None:
    config = QuantConfig("w4", "w8g", "gptq")
    assert QuantConfig.parse(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ([], "quantization_config must be an object"),
        ({}, "quantised by None are not supported"),
        ({"quant_method": "awq", "bits": 4}, "quantised by 'awq' are not supported; supported: 'dfastllm'"),
        ({"quant_method": "dfastllm", "version": 2}, "has version 2, this dfastllm reads 1"),
        ({"format": "w3"}, "quantization_config.format must be one of w8, .* got 'w3'"),
        ({"head": 8}, "quantization_config.head must be one of"),
        ({"calibration": None}, "quantization_config.calibration must be one of none, aware, gptq, got None"),
    ],
)
def test_configs_that_are_not_ours(raw: Any, said: str) -> None:
    if isinstance(raw, dict) and raw and "quant_method" not in raw:
        raw = {**QuantConfig("w4", "w8").to_json(), **raw}
    with pytest.raises(ModelLoadError, match=said):
        QuantConfig.parse(raw)
