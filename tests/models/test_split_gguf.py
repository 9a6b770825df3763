"""GGUF files in several parts, split by the gguf package: the first part stands for all of them."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from dfastllm import assemble, models
from dfastllm.errors import CheckpointError, ModelLoadError
from dfastllm.hub import find_model
from dfastllm.models.gguf import open_gguf, write_gguf
from dfastllm.quant.gguf import GgufFile, to_float

KINDS = {str: gguf.GGUFValueType.STRING, int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32}


def split(whole: Path, out: Path, tensors: int) -> list[Path]:
    """The same file in parts with so many tensors each."""
    with GgufFile.open(whole) as file:
        writer = gguf.GGUFWriter(str(out), str(file.metadata["general.architecture"]), split_max_tensors=tensors)
        for key, value in file.metadata.items():
            if key not in ("general.architecture", "general.alignment") and type(value) in KINDS:
                writer.add_key_value(key, value, KINDS[type(value)])
        for name, tensor in file.tensors.items():
            writer.add_tensor(name, to_float(file, tensor).numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(out.parent.glob(f"{out.stem}-*-of-*.gguf"))


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return write_gguf(models.tiny("llama", seed=5), tmp_path / "whole.gguf", "F32")


@pytest.fixture
def parts(whole: Path, tmp_path: Path) -> list[Path]:
    (tmp_path / "parts").mkdir()
    return split(whole, tmp_path / "parts" / "model.gguf", 7)


def test_the_first_part_stands_for_all(whole: Path, parts: list[Path]) -> None:
    assert len(parts) == 3
    with open_gguf(whole) as one, open_gguf(parts[0]) as many:
        assert many.config == one.config
        assert many.file.parts == 3
        of_one = {name: value for name, value, _ in one.tensors()}
        for name, value, _ in many.tensors():
            other = of_one.pop(name)
            same = value == other if isinstance(value, torch.Tensor) else value.dequantise() == other.dequantise()
            assert bool(torch.as_tensor(same).all()), name
        assert not of_one
    assert models.check(parts[0]).info is not None
    assert assemble.is_gguf(parts[0])


def test_a_directory_of_parts_is_its_first(parts: list[Path]) -> None:
    assert find_model(parts[0].parent) == parts[0]


def test_another_part_names_the_first(parts: list[Path]) -> None:
    with pytest.raises(ModelLoadError, match=rf"part 2 of 3 .*{parts[0]}"):
        open_gguf(parts[1])


def test_what_is_missing_is_named(parts: list[Path], tmp_path: Path) -> None:
    parts[2].rename(tmp_path / "away.gguf")
    with pytest.raises(ModelLoadError, match=rf"first of 3 parts; missing: {parts[2].name}"):
        open_gguf(parts[0])
    parts[1].rename(parts[2])
    parts[0].rename(parts[0].with_name("renamed.gguf"))
    with pytest.raises(ModelLoadError, match=r"which its name does not say.*NAME-00001-of-00003"):
        open_gguf(parts[0].with_name("renamed.gguf"))


def test_parts_of_different_files_are_refused(parts: list[Path]) -> None:
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(CheckpointError, match=r"is in .*00003-of-00003"):
        open_gguf(parts[0])
