"""The float checkpoint that is converted: its shape from the small files, its tensors one at a time. GGUF files:
`gguf_source`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfastllm.core import ModelInfo
from dfastllm.errors import CheckpointError, ModelLoadError, UnsupportedError
from dfastllm.llm import resolve
from dfastllm.models.checkpoint import DTYPES, compare, load, quant_config, quantisable, read_model, skeleton
from dfastllm.models.config import DecoderConfig
from dfastllm.models.decoder import Decoder
from dfastllm.models.family import Family
from dfastllm.models.headers import BYTES, TensorEntry, inventory, read_json
from dfastllm.quant.checkpoint import stored
from dfastllm.quant.formats import Format
from dfastllm.quant.partial import storing
from dfastllm.quant.stream import read_tensor
from dfastllm.text import Tokenizer

__all__ = ["COPIED", "Source", "files_for_other_weights"]

# Small files that a model directory has beside config.json and the weights; copied as they are.
COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "shortlist.json",
    "bigram.safetensors",
    "README.md",
    "LICENSE",
)
# Of these, what was learned for or says something of the very weights beside it.
OF_THESE_WEIGHTS = ("bigram.safetensors", "README.md")


def files_for_other_weights(directory: Path) -> list[Path]:
    """What of a model's directory goes with a model that is trained or made from it: tokenizer, template, ends of text,
    terms; not its card and not a head that was learned for its own drafts."""
    return [directory / name for name in COPIED if name not in OF_THESE_WEIGHTS and (directory / name).is_file()]


class Source:
    """A float checkpoint: a shipped model's name or a Hugging Face directory.

    names: own parameter names in order. matrices: those that may be quantised -> (n, k). Raises ModelNotFoundError,
    ModelLoadError and CheckpointError as loading does, UnsupportedError for a GGUF file or a quantised checkpoint.
    """

    def __init__(self, model: str | Path) -> None:
        if str(model).endswith(".gguf"):
            raise UnsupportedError(
                f"{model} is a GGUF file; this starts from a Hugging Face directory or a shipped model.",
                param="source",
                hint="A GGUF file is served as it is; `dfastllm quantize` makes a directory of it (`--format w8r`).",
            )
        self.directory = resolve(model)
        described: tuple[Family, DecoderConfig, ModelInfo] = read_model(self.directory)
        self.found: dict[str, TensorEntry] = inventory(self.directory)
        config = quant_config(self.directory, self.found)
        if config is not None:
            raise UnsupportedError(
                f"{self.directory} is already quantised ({config.label}); rounding twice loses more than once.",
                param="source",
                hint="Give the original bfloat16 or float32 checkpoint.",
            )
        self.family, self.config, self.info = described
        self.config_json: dict[str, Any] = read_json(self.directory / "config.json")
        model_ = skeleton(self.config, self.info, torch.float32)
        problems = compare(self.family, model_, stored(self.found))
        if problems:
            raise CheckpointError(
                f"{self.directory} does not fit family {self.family.name}: {'; '.join(problems[:6])}."
            )
        shapes = {name: tuple(parameter.shape) for name, parameter in model_.named_parameters()}
        self.names = list(shapes)
        self.matrices = {name: (shapes[name][0], shapes[name][1]) for name in quantisable(model_)}
        self.shapes = shapes

    def published(self, own: str) -> str:
        return self.family.names.published(own)

    def entry(self, own: str) -> TensorEntry:
        return self.found[self.published(own)]

    def dtype(self, own: str) -> torch.dtype:
        return DTYPES[self.entry(own).dtype]

    def tensor(self, own: str) -> Tensor:
        """As stored."""
        return read_tensor(self.entry(own), self.published(own))

    @property
    def nbytes(self) -> int:
        """Of the parameters in the files (a tied head that is written twice counts once)."""
        return sum(self.entry(own).size * BYTES[self.entry(own).dtype] for own in self.names)

    @property
    def parameters(self) -> int:
        return sum(self.entry(own).size for own in self.names)

    def fill(self, module: nn.Module, prefix: str) -> None:
        """Give the parameters of a part of a skeleton their values, float32. prefix: its name, with the dot."""
        for name, _ in list(module.named_parameters()):
            parent, _, leaf = name.rpartition(".")
            value = self.tensor(prefix + name).float()
            if not bool(value.isfinite().all()):
                raise CheckpointError(f"{self.published(prefix + name)} holds NaN or infinity; nothing was written.")
            setattr(module.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=False))

    def files(self) -> list[Path]:
        return [self.directory / name for name in COPIED if (self.directory / name).is_file()]

    def write_small_files(self, directory: Path) -> None:
        """Everything that a model's directory has beside config.json and the weights. Raises StorageError."""
        for file in self.files():
            with storing(directory / file.name, file.stat().st_size):
                shutil.copyfile(file, directory / file.name)

    def require_holds(self, format: Format, own: str) -> None:
        """Raise UnsupportedError where this matrix should not be rounded to `format`. Floats allow all."""

    def float_model(self) -> Decoder:
        """The whole model in float32."""
        return load(self.directory, dtype=torch.float32)

    def tokenizer(self) -> Tokenizer:
        """Raises TokenizerError."""
        return Tokenizer.load(self.directory)

    def require_tokenizer(self, what: str) -> None:
        """Raise ModelLoadError saying that `what` needs one, where there is none."""
        if not (self.directory / "tokenizer.json").is_file():
            raise ModelLoadError(f"{what} needs a tokenizer, and {self.directory} has no tokenizer.json.")
