"""A GGUF file as what is converted: its matrices as the floats that its blocks stand for, its tokenizer as the files of
a Hugging Face directory."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfastllm import assemble
from dfastllm.convert.source import Source
from dfastllm.errors import ModelLoadError, ModelNotFoundError, TokenizerError, UnsupportedError
from dfastllm.kernels.packed import QTensor
from dfastllm.models.checkpoint import DTYPES, config_json, quantisable, skeleton
from dfastllm.models.config import DecoderConfig
from dfastllm.models.decoder import Decoder
from dfastllm.models.family import Family, Fields, find_family
from dfastllm.models.gguf import GgufModel, open_gguf
from dfastllm.options import generation_config
from dfastllm.quant.formats import Format
from dfastllm.quant.gguf.types import FLOATS
from dfastllm.quant.partial import place
from dfastllm.text import Tokenizer
from dfastllm.text.gguf import read_tokenizer
from dfastllm.text.saving import save_tokenizer

__all__ = ["GgufSource", "open_source"]


class GgufSource(Source):
    """A GGUF file that stays open. Raises ModelNotFoundError where there is none, what opening it raises, and
    ValidationError for a shape that the family's config.json cannot say."""

    def __init__(self, path: str | Path) -> None:
        self.directory = Path(path)  # of messages; there are no files beside it
        if not assemble.is_gguf(self.directory):
            raise ModelNotFoundError(f"{path} is no GGUF file.", hint="A GGUF file begins with the four letters GGUF.")
        self._gguf: GgufModel = open_gguf(self.directory)
        self.info = self._gguf.info
        self.family = find_family(self.info.family)
        self.config = _as_config_json_says(self.family, self._gguf.config)
        shapes = skeleton(self.config, self.info, torch.bfloat16)
        self.config_json = config_json(shapes)
        self.shapes = {name: tuple(parameter.shape) for name, parameter in shapes.named_parameters()}
        self.names = list(self.shapes)
        self.matrices = {name: (self.shapes[name][0], self.shapes[name][1]) for name in quantisable(shapes)}

    def dtype(self, own: str) -> torch.dtype:
        """Of a float type its own; of a quantised one, and of vectors, float32, which holds every value of it."""
        name = self._gguf.sources[own].tensor.type.name
        matrix = len(self.shapes[own]) == 2
        return DTYPES[name] if matrix and name in DTYPES else torch.float32

    def tensor(self, own: str) -> Tensor:
        value, _ = self._gguf.read(self._gguf.sources[own])
        found = value.dequantise() if isinstance(value, QTensor) else value
        return found.to(self.dtype(own))

    @property
    def nbytes(self) -> int:
        sources = self._gguf.sources.values()
        return sum(s.tensor.nbytes * (s.stop - s.start) // s.tensor.shape[0] for s in sources)

    @property
    def parameters(self) -> int:
        return sum(torch.Size(self.shapes[own]).numel() for own in self.names)

    def require_holds(self, format: Format, own: str) -> None:
        """A format of fewer than 8 bits made of a type of fewer than 8 rounds twice, coarsely both times."""
        kind = self._gguf.sources[own].tensor.type
        bits = 8 * kind.size / kind.block
        if kind.name not in FLOATS and bits < 8 and format.code_bits < 8:
            raise UnsupportedError(
                f"{self.directory} holds {self._gguf.sources[own].tensor.name} in {kind.name}; rounding it to "
                f"{format.name} too loses more than once.",
                param="source",
                hint="Take a format of 8 bits (w8r), or the original checkpoint; the file is served as it is.",
            )

    def float_model(self) -> Decoder:
        model = assemble.dequantised(self.directory, torch.float32).model
        assert isinstance(model, Decoder)
        return model

    def tokenizer(self) -> Tokenizer:
        return read_tokenizer(self._gguf.file.metadata)

    def require_tokenizer(self, what: str) -> None:
        try:
            self.tokenizer()
        except TokenizerError as error:
            raise ModelLoadError(f"{what} needs a tokenizer: {error}") from error

    def write_small_files(self, directory: Path) -> None:
        save_tokenizer(self.tokenizer(), directory)
        if self.info.defaults:
            text = json.dumps(generation_config(self.info.defaults), indent=2) + "\n"
            place(directory / "generation_config.json", text.encode())


def _as_config_json_says(family: Family, config: DecoderConfig) -> DecoderConfig:
    """The shape with its numbers as the family's config.json gives them: a file keeps float32, and a scale that
    config.json derives (query_pre_attn_scalar ** -0.5) is not the same double."""
    said = family.read(Fields(family.write(config)))
    near: dict[str, Any] = {}
    for name in DecoderConfig.__dataclass_fields__:
        own, other = getattr(config, name), getattr(said, name)
        if isinstance(own, float) and isinstance(other, float) and math.isclose(own, other, rel_tol=1e-6):
            near[name] = other
    return replace(config, **near)


def open_source(model: str | Path) -> Source:
    """A shipped model's name, a Hugging Face directory or a GGUF file."""
    return GgufSource(model) if str(model).endswith(".gguf") or assemble.is_gguf(model) else Source(model)
