"""Files that lie, at random and on purpose: a named error or a report, in little time and memory, whatever they say."""

from __future__ import annotations

import contextlib
import json
import resource
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dfastllm import assemble, models
from dfastllm.errors import ContextLengthError, DFastLLMError, ModelLoadError, TokenizerError
from dfastllm.llm import LLM
from dfastllm.models.gguf import open_gguf, write_gguf
from dfastllm.models.headers import inventory
from dfastllm.text import Tokenizer
from dfastllm.text.gguf import tokenizer_metadata
from tests.kit.convert_models import write_tiny

FAMILIES = ("llama", "qwen3_moe", "llada", "gemma3", "exaone4", "llada2_moe", "phi3", "smollm3")
VALUES: list[Any] = [None, True, False, -1, 0, 1, 3, 2**31 - 2, 2**31, 64_000_000, 10**30, 10**400, 1e-300, 1e308, ""]
VALUES += [-0.5, "silu", float("inf"), float("nan"), [], [1, 2], ["full_attention"], {}, {"rope_type": "yarn"}, [[]]]
ROPE = {"rope_type": "yarn", "factor": 1e308, "original_max_position_embeddings": 2**31 - 2}
MOST_SECONDS = 2.0  # of the CPU, for one file
MOST_BYTES = 300 << 20  # more resident memory than before


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("hostile")
    return {family: write_tiny(place / family, family) for family in FAMILIES}


class Bounds:
    """Around what reads one file."""

    def __enter__(self) -> None:
        self.seconds = time.process_time()
        self.memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def __exit__(self, *_: object) -> None:
        assert time.process_time() - self.seconds < MOST_SECONDS
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.memory) * 1024 < MOST_BYTES


def load_or_refuse(path: Path) -> None:
    with Bounds():
        with contextlib.suppress(DFastLLMError):
            assemble.load(path)
        report = models.check(path)
        assert report.problems or report.info is not None


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(family=st.sampled_from(FAMILIES), data=st.data())
def test_any_field_of_config_may_say_anything(family: str, data: st.DataObject, directories: dict[str, Path]) -> None:
    file = directories[family] / "config.json"
    sound = file.read_text()
    raw = json.loads(sound)
    names = sorted({*raw, "head_dim", "rope_scaling", "sliding_window", "layer_types", "num_hidden_layers"})
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)):
        raw[name] = data.draw(st.sampled_from([*VALUES, ROPE]))
    try:
        file.write_text(json.dumps(raw))
        load_or_refuse(directories[family])
    finally:
        file.write_text(sound)


@pytest.mark.parametrize(
    "fields",
    [
        {"head_dim": 2**31 - 2},
        {"hidden_size": 64_000_000},
        {"num_hidden_layers": 2**31 - 1, "sliding_window": 5},
        {"vocab_size": 4_000_000_000},
        {"num_experts": 4096, "num_hidden_layers": 1000},
        {"max_position_embeddings": 2**31 - 1, "rope_scaling": ROPE},
        {"hidden_size": 10**400},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_sizes_are_compared_before_anything_is_made_of_them(
    fields: dict[str, Any], directories: dict[str, Path]
) -> None:
    file = directories["qwen3_moe"] / "config.json"
    sound = file.read_text()
    try:
        file.write_text(json.dumps({**json.loads(sound), **fields}))
        if "rope_scaling" not in fields:
            with Bounds(), pytest.raises(ModelLoadError):
                assemble.load(directories["qwen3_moe"])
        load_or_refuse(directories["qwen3_moe"])
    finally:
        file.write_text(sound)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_header_of_safetensors_may_say_anything(data: st.DataObject, directories: dict[str, Path]) -> None:
    directory = directories["llama"]
    file = directory / "model.safetensors"
    sound = file.read_bytes()
    size = struct.unpack("<Q", sound[:8])[0]
    header = json.loads(sound[8 : 8 + size])
    entry = header[data.draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))]
    field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
    entry[field] = data.draw(st.sampled_from([*VALUES, [2**62, 2**62], [-1], [0, 2**40], "F64", "F4", "BF16"]))
    text = json.dumps(header).encode()
    try:
        file.write_bytes(len(text).to_bytes(8, "little") + text + sound[8 + size :])
        load_or_refuse(directory)
    finally:
        file.write_bytes(sound)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_tokenizer_file_may_say_anything(data: st.DataObject, directories: dict[str, Path]) -> None:
    directory = directories["llama"]
    file = directory / data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
    sound = file.read_text()
    raw = json.loads(sound)
    place = raw
    for _ in range(data.draw(st.integers(0, 2))):
        inner = [
            value for value in (place.values() if isinstance(place, dict) else place) if isinstance(value, dict | list)
        ]
        if not inner:
            break
        place = data.draw(st.sampled_from(inner))
    keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
    if keys:
        place[data.draw(st.sampled_from(keys))] = data.draw(st.sampled_from([*VALUES, 4_000_000_000]))
    try:
        file.write_text(json.dumps(raw))
        with Bounds(), contextlib.suppress(DFastLLMError):
            Tokenizer.load(directory).encode("hello")
    finally:
        file.write_text(sound)


BROKEN: dict[str, dict[str, Any]] = {
    "an id of 4e9": {"model": {"type": "BPE", "vocab": {"a": 0, "b": 4_000_000_000}, "merges": []}},
    "an added id of 4e9": {"added_tokens": [{"id": 4_000_000_000, "content": "<x>", "special": True}]},
    "a junk map of characters": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "an empty pattern": {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}},
    "a template with an id that is not there": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {},
        }
    },
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_damaged_tokenizer_never_panics_through(what: str, tmp_path: Path) -> None:
    directory = write_tiny(tmp_path / "tiny")
    file = directory / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **BROKEN[what]}))
    with Bounds(), pytest.raises(TokenizerError, match="tokenizer"):
        Tokenizer.load(directory).encode("hello world", add_special=True)


def test_a_tokenizer_of_a_gguf_file_is_no_array(tmp_path: Path) -> None:
    import numpy as np

    directory = write_tiny(tmp_path / "tiny")
    rows = models.load(directory).info.vocab_size
    metadata = {**tokenizer_metadata(directory, rows), "tokenizer.ggml.model": np.zeros(3, np.int32)}
    file = write_gguf(directory, tmp_path / "m.gguf", "F32", tokenizer=metadata)
    with pytest.raises(TokenizerError, match=r"tokenizer\.ggml\.model"):
        assemble.load(file)
    assert [problem.code for problem in models.check(file).problems] == ["bad_tokenizer"]


def test_a_gguf_file_that_describes_more_than_it_holds(tmp_path: Path) -> None:
    directory = write_tiny(tmp_path / "tiny")
    file = write_gguf(directory, tmp_path / "m.gguf", "F32", tokenizer={})
    data = file.read_bytes()
    key = b"llama.attention.key_length"
    at = data.index(key) + len(key) + 4
    file.write_bytes(data[:at] + struct.pack("<I", 16_000) + data[at + 4 :])
    with Bounds(), pytest.raises(ModelLoadError, match=r"m\.gguf"):
        open_gguf(file)
    assert inventory(directory)


def test_a_run_of_one_letter_is_refused_unread() -> None:
    with LLM("demo-ar") as llm, Bounds(), pytest.raises(ContextLengthError, match=r"at least [\d,]+ tokens"):
        llm.generate("a" * 5_000_000)
