"""Which file or directory is loaded for a path of the disk: a checkpoint directory itself, or the GGUF file in one."""

from __future__ import annotations

import re
from pathlib import Path

from dfastllm.core.filetype import is_gguf, mistaken
from dfastllm.errors import ModelLoadError

__all__ = ["first_parts", "place_of"]

_PART = re.compile(r"-(\d{5})-of-\d{5}\.gguf$")
_CHECKPOINT = ("config.json", "adapter_config.json")
_MODELS = "A model is a directory with config.json and safetensors files, or a GGUF file."


def place_of(path: Path) -> Path:
    """What is loaded for a path that exists. A directory without safetensors files but with one GGUF file (or the parts
    of one) stands for that file. Raises ModelLoadError for a file that is no GGUF file, naming what it is, and for a
    directory with several."""
    if path.is_file():
        _require_gguf(path)
        return path
    files = first_parts([file.name for file in path.glob("*.gguf")])
    if not files or any(path.glob("*.safetensors")):
        return path
    if len(files) == 1:
        _require_gguf(path / files[0])
        return path / files[0]
    raise ModelLoadError(
        f"{path} holds {len(files)} GGUF files: {', '.join(files[:8])}{', ...' if len(files) > 8 else ''}.",
        hint="Name the one to load.",
        param="model",
    )


def first_parts(names: list[str]) -> list[str]:
    """Of names of GGUF files those that are a model each: of a split file its first part, no projector of images."""
    found = []
    for name in sorted(names):
        part = _PART.search(name)
        if (part is None or int(part[1]) == 1) and not name.lower().startswith("mmproj"):
            found.append(name)
    return found


def _require_gguf(path: Path) -> None:
    if is_gguf(path):
        return
    if (found := mistaken(path)) is not None:
        raise ModelLoadError(f"{path} is no model file but {found.what}.", hint=found.hint, param="model")
    if path.suffix == ".safetensors" or path.name in _CHECKPOINT:
        raise ModelLoadError(f"{path} is one file of a checkpoint.", hint=f"Name its directory, {path.parent}.")
    raise ModelLoadError(f"{path} is neither a GGUF file nor a directory.", hint=_MODELS, param="model")
