"""The container: what is written is read, by the `gguf` package too; damaged and hostile files end in named errors."""

from __future__ import annotations

import mmap
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dfastllm.errors import CheckpointError, DFastLLMError, ModelLoadError, StorageError, ValidationError
from dfastllm.models import tiny
from dfastllm.models.gguf import open_gguf, write_gguf
from dfastllm.quant.gguf import GgufFile, Planned, to_float, to_qtensor, write_file
from dfastllm.text.gguf import read_tokenizer

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "yes": True,
    "no": False,
    "small": 7,
    "negative": -7,
    "large": 1 << 40,
    "largest": (1 << 64) - 1,
    "eps": 1e-6,
    "text": "Grüße\n\x00 中",
    "texts": ["", "a", "中" * 100],
    "none": [],
    "ints": np.arange(5, dtype=np.int32),
    "floats": np.linspace(0, 1, 7, dtype=np.float32),
    "flags": np.array([True, False]),
    "bytes": np.arange(256, dtype=np.uint8),
    "longs": np.array([1 << 60], np.int64),
}


def planned(**values: torch.Tensor) -> list[Planned]:
    return [Planned(name, tuple(value.shape), "F32", lambda v=value: v) for name, value in values.items()]


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    draw = torch.Generator().manual_seed(0)
    tensors = planned(a=torch.randn(3, 8, generator=draw), b=torch.randn(5, generator=draw))
    return write_file(tmp_path / "sound.gguf", METADATA, tensors)


def test_what_is_written_is_read(sound: Path) -> None:
    with GgufFile.open(sound) as file:
        assert list(file.metadata) == list(METADATA)
        for key, wanted in METADATA.items():
            found = file.metadata[key]
            if isinstance(wanted, np.ndarray):
                assert found.dtype == wanted.dtype
                assert np.array_equal(found, wanted)
            else:
                assert (found, type(found)) == (wanted, type(wanted)), key
        assert file.version == 3
        assert [(t.name, t.type.name, t.shape) for t in file.tensors.values()] == [
            ("a", "F32", (3, 8)),
            ("b", "F32", (5,)),
        ]
        draw = torch.Generator().manual_seed(0)
        assert torch.equal(to_float(file, file.tensors["a"]), torch.randn(3, 8, generator=draw))
        assert torch.equal(to_float(file, file.tensors["b"]), torch.randn(5, generator=draw))


def test_the_gguf_package_reads_it_too(sound: Path) -> None:
    reader = GGUFReader(sound)
    assert reader.fields["text"].contents() == METADATA["text"]
    assert reader.fields["texts"].contents() == METADATA["texts"]
    assert reader.fields["ints"].contents() == METADATA["ints"].tolist()
    with GgufFile.open(sound) as file:
        for tensor in reader.tensors:
            assert tensor.data_offset == file.tensors[tensor.name].offset
            assert tensor.data_offset % 32 == 0


def test_a_closed_file_says_so(sound: Path) -> None:
    file = GgufFile.open(sound)
    file.close()
    file.close()
    with pytest.raises(ModelLoadError, match="is closed"):
        to_float(file, file.tensors["a"])
    file.release(file.tensors["a"])


def resident(path: Path) -> int:
    """Resident bytes of this process's maps of the file."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists() or not hasattr(mmap, "MADV_DONTNEED"), reason="needs Linux")
def test_converted_tensors_leave_memory(tmp_path: Path) -> None:
    value = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    tensors = [Planned(f"t{i}", (1024, 1024), "Q8_0", lambda: value) for i in range(4)]
    with GgufFile.open(write_file(tmp_path / "m.gguf", {}, tensors)) as file:
        most = 0
        for tensor in file.tensors.values():
            file.raw(tensor)
            most = max(most, resident(file.path))
            to_qtensor(file, tensor)
        assert most >= 1 << 20  # it was there
        assert resident(file.path) < 1 << 18


@pytest.mark.parametrize("value", [None, 1j, {"a": 1}, [1, "a"], np.zeros((2, 2)), np.zeros(2, np.complex64)])
def test_metadata_that_cannot_be_written(value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="'key' cannot hold"):
        write_file(tmp_path / "m.gguf", {"key": value}, [])
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_is_not_as_declared(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"has shape \[3\], declared \[4\]"):
        write_file(tmp_path / "m.gguf", {}, [Planned("a", (4,), "F32", lambda: torch.zeros(3))])
    with pytest.raises(StorageError, match="cannot be written"):
        write_file(tmp_path / "absent" / "m.gguf", {}, [])


# Damaged files, each built by hand


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def info(name: str = "w", dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def whole(
    pairs: list[bytes] | None = None,
    infos: list[bytes] | None = None,
    *,
    data: int = 4096,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    pairs, infos = pairs or [], infos or []
    tensors, keys = counts or (len(infos), len(pairs))
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(pairs) + b"".join(infos)
    return head + b"\0" * (-len(head) % 32) + b"\0" * data


HUGE = (1 << 64) - 1
DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a GGUF file"),
    "other magic": (b"PK\x03\x04" + bytes(100), "not a GGUF file"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\n", "not a GGUF file"),
    "cut in the counts": (whole()[:20], "not a GGUF file"),
    "version 1": (whole(version=1), "version 1 is not read"),
    "version 4": (whole(version=4), "version 4 is not read"),
    "big-endian": (whole(version=3 << 24), "big-endian"),
    "many tensors": (whole(counts=(HUGE, 0)), "do not fit"),
    "many pairs": (whole(counts=(0, HUGE)), "do not fit"),
    "more tensors than there are": (whole(counts=(100, 0)), "dims"),
    "long key": (whole([struct.pack("<Q", 1 << 20)]), "at most 65536"),
    "endless key": (whole([struct.pack("<Q", HUGE) + bytes(16)]), "at most"),
    "key that is no text": (whole([pair(b"\xff\xfe", 4, bytes(4))]), "not UTF-8"),
    "value that is no text": (whole([pair("k", 8, text(b"\xff\xfe"))]), "not UTF-8"),
    "endless value": (whole([pair("k", 8, struct.pack("<Q", HUGE))]), "needs"),
    "unknown value type": (whole([pair("k", 13, bytes(8))]), "unknown value type 13"),
    "unknown element type": (whole([pair("k", 9, struct.pack("<IQ", 99, 1) + bytes(8))]), "unknown type 99"),
    "huge array": (whole([pair("k", 9, struct.pack("<IQ", 0, HUGE))]), "claims"),
    "huge array of texts": (whole([pair("k", 9, struct.pack("<IQ", 8, 1 << 40))]), "claims"),
    "deep arrays": (whole([pair("k", 9, struct.pack("<IQ", 9, 1) * 50 + bytes(64))]), "deep"),
    "the same key twice": (whole([pair("k", 4, bytes(4))] * 2), "occurs twice"),
    "alignment 0": (whole([pair("general.alignment", 4, struct.pack("<I", 0))]), "general.alignment is 0"),
    "alignment 24": (whole([pair("general.alignment", 4, struct.pack("<I", 24))]), "power of two"),
    "alignment 2^31": (whole([pair("general.alignment", 4, struct.pack("<I", 1 << 31))]), "power of two"),
    "alignment as text": (whole([pair("general.alignment", 8, text("32"))]), "power of two"),
    "no dims": (whole(infos=[info(dims=())]), "0 dims"),
    "many dims": (whole(infos=[info(dims=(2,) * 9)]), "9 dims"),
    "dim 0": (whole(infos=[info(dims=(32, 0))]), "cannot hold"),
    "dims that overflow": (whole(infos=[info(dims=(1 << 32, 1 << 32))]), "cannot hold"),
    "dims that overflow to zero": (whole(infos=[info(dims=(1 << 63, 2))]), "cannot hold"),
    "larger than the file": (whole(infos=[info(dims=(1000, 1000))]), "cannot hold"),
    "just larger than the file": (whole(infos=[info(dims=(1032,))]), "past the end"),
    "unknown type": (whole(infos=[info(kind=99)]), "GGML type 99"),
    "type of activations": (whole(infos=[info(kind=9)]), "GGML type 9 .Q8_1."),
    "integers": (whole(infos=[info(kind=26)]), "GGML type 26 .I32."),
    "row no block divides": (whole(infos=[info(dims=(48,), kind=2)]), "no multiple of 32"),
    "unaligned": (whole(infos=[info(offset=4)]), "no multiple of the alignment"),
    "offset past the end": (whole(infos=[info(offset=1 << 20)]), "past the end"),
    "offset that overflows": (whole(infos=[info(offset=HUGE - 31)]), "past the end"),
    "overlap": (whole(infos=[info("a"), info("b", offset=64)]), "overlaps"),
    "the same name twice": (whole(infos=[info("a"), info("a", offset=128)]), "occurs twice"),
    "cut in the data": (whole(infos=[info()], data=100), "past the end"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_named(name: str, tmp_path: Path) -> None:
    data, said = DAMAGED[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    before = time.process_time()
    with pytest.raises(CheckpointError, match=said) as caught:
        GgufFile.open(path)
    assert str(path) in str(caught.value)
    assert "not a GGUF file" in said or "at byte" in str(caught.value)
    assert time.process_time() - before < 1


def test_the_pieces_are_sound(tmp_path: Path) -> None:
    """The builder above makes files that are read when nothing is wrong with them."""
    pairs = [pair("k", 4, bytes(4)), pair("general.alignment", 4, struct.pack("<I", 64))]
    (tmp_path / "m.gguf").write_bytes(whole(pairs, [info("a"), info("b", (8, 4), 1, 128)], version=2))
    with GgufFile.open(tmp_path / "m.gguf") as file:
        assert file.version == 2
        assert file.tensors["b"].shape == (4, 8)


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="cannot be opened"):
        GgufFile.open(tmp_path / "absent.gguf")
    with pytest.raises(ModelLoadError, match="cannot be opened"):
        GgufFile.open(tmp_path)


# Fuzzing: a real model with a tokenizer, then bytes changed, cut, repeated


def everything(path: Path) -> None:
    """All that loading does."""
    with open_gguf(path) as opened:
        for _ in opened.tensors():
            pass
        read_tokenizer(opened.file.metadata)


@pytest.fixture(scope="module")
def victims(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[bytes], Path]:
    directory = tmp_path_factory.mktemp("fuzz")
    letters = [chr(c) for c in range(33, 127)]
    spm = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", *letters],
        "tokenizer.ggml.scores": -np.arange(96, dtype=np.float32),
        "tokenizer.ggml.token_type": np.array([2, 3, *[1] * 94], np.int32),
    }
    bpe = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*letters, "ab", "<|mdm_mask|>"],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.chat_template": "{{ messages }}",
    }
    made = []
    for family, kind, tokenizer in (("llama", "Q4_0", spm), ("llada", "Q5_1", bpe), ("qwen3", "BF16", bpe)):
        model = tiny(family, layers=1)
        made.append(write_gguf(model, directory / "m.gguf", kind, tokenizer=tokenizer).read_bytes())
        everything(directory / "m.gguf")
    return made, directory / "fuzzed.gguf"


def refused_or_read(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        everything(path)
    except DFastLLMError as error:
        assert str(error)  # noqa: PT017


FUZZ: Callable[..., Any] = settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@given(data=st.data())
@FUZZ
def test_changed_bytes(victims: tuple[list[bytes], Path], data: st.DataObject) -> None:
    """Most of them in the header, where they hurt."""
    sound = bytearray(data.draw(st.sampled_from(victims[0])))
    header = sound.index(b"general.type") + 5000
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, min(header, len(sound) - 9)) | st.integers(0, len(sound) - 9))
        size = data.draw(st.sampled_from([1, 4, 8]))
        sound[at : at + size] = data.draw(
            st.binary(min_size=size, max_size=size) | st.sampled_from([b"\xff" * size, b"\0" * size, b"\x7f" * size])
        )
    refused_or_read(victims[1], bytes(sound))


@given(data=st.data())
@FUZZ
def test_cut_repeated_and_moved_bytes(victims: tuple[list[bytes], Path], data: st.DataObject) -> None:
    sound = data.draw(st.sampled_from(victims[0]))
    at, size = data.draw(st.integers(0, len(sound))), data.draw(st.integers(0, 200))
    how = data.draw(st.sampled_from(["cut off", "taken out", "put in", "twice"]))
    made = {
        "cut off": sound[:at],
        "taken out": sound[:at] + sound[at + size :],
        "put in": sound[:at] + data.draw(st.binary(max_size=64)) + sound[at:],
        "twice": sound[: at + size] + sound[at:],
    }[how]
    refused_or_read(victims[1], made)


@given(data=st.binary(max_size=400))
@FUZZ
def test_any_bytes_after_the_magic(victims: tuple[list[bytes], Path], data: bytes) -> None:
    refused_or_read(victims[1], b"GGUF\x03\0\0\0" + data)


def test_every_cut_of_the_header(victims: tuple[list[bytes], Path]) -> None:
    for sound in victims[0]:
        for at in range(0, 3000, 7):
            victims[1].write_bytes(sound[:at])
            with pytest.raises(DFastLLMError):
                everything(victims[1])


def test_hostile_counts_allocate_nothing(tmp_path: Path) -> None:
    """Peak memory of refusing files that claim to be enormous."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("many tensors", "huge array", "huge array of texts", "endless value", "dims that overflow"):
        (tmp_path / "m.gguf").write_bytes(DAMAGED[name][0])
        with pytest.raises(CheckpointError):
            GgufFile.open(tmp_path / "m.gguf")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 << 10  # KiB


@pytest.mark.parametrize("kind", [0, 4, 7, 10])
def test_an_array_may_be_the_last_bytes_of_a_file(kind: int, tmp_path: Path) -> None:
    size = {0: 1, 4: 4, 7: 1, 10: 8}[kind]
    pairs = [pair("k", 9, struct.pack("<IQ", kind, 3) + bytes(3 * size))]
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + pairs[0]
    (tmp_path / "m.gguf").write_bytes(head)
    with GgufFile.open(tmp_path / "m.gguf") as file:
        assert list(file.metadata["k"]) == [0, 0, 0]
    (tmp_path / "m.gguf").write_bytes(head[:-1])
    with pytest.raises(CheckpointError, match="claims 3 elements"):
        GgufFile.open(tmp_path / "m.gguf")
