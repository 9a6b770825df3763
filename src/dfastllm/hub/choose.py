"""Which files of a repository a model needs: its small files, and its weights once, in safetensors or one GGUF file.

Never a pickle (.bin, .pt), a second copy of the weights (consolidated.safetensors beside the shards), code, pictures.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from dfastllm.core.filetype import INDEX_FILE, WEIGHTS_FILE, shards_of
from dfastllm.errors import ModelLoadError
from dfastllm.hub.places import first_parts

__all__ = ["Choice", "choose"]

_SMALL = re.compile(
    r"[\w.-]+\.json|merges\.txt|vocab\.txt|tokenizer\.model|[\w.-]+\.jinja|additional_chat_templates/[\w.-]+\.jinja"
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")


@dataclass(frozen=True, slots=True)
class Choice:
    """small: files to fetch first. weights: the rest; empty where INDEX_FILE is among the small ones and names them."""

    small: tuple[str, ...]
    weights: tuple[str, ...]

    @property
    def indexed(self) -> bool:
        return INDEX_FILE in self.small


def choose(names: Collection[str], repo: str, variant: str = "") -> Choice:
    """names: all files of the repository. variant: part of the name of the GGUF file that is wanted. Raises
    ModelLoadError where nothing can be loaded, or where it is not clear what."""
    safe = sorted(name for name in names if ".." not in name and not name.startswith("/") and "\\" not in name)
    small = tuple(name for name in safe if _SMALL.fullmatch(name))
    tensors = [name for name in safe if name.endswith(".safetensors") and "/" not in name]
    if not variant and "config.json" in small and tensors:
        if INDEX_FILE in small:
            return Choice(small, ())
        return Choice(small, (WEIGHTS_FILE,) if WEIGHTS_FILE in tensors else _whole(tensors, repo))
    files = first_parts([name for name in safe if name.endswith(".gguf")])
    wanted = [name for name in files if variant.lower() in name.lower()] if variant else files
    if len(wanted) > 1 and variant:  # Q4_K is in Q4_K_M too
        exact = re.compile(rf"(^|[.-]){re.escape(variant)}(-\d{{5}}-of-\d{{5}})?\.gguf$", re.IGNORECASE)
        wanted = [name for name in wanted if exact.search(name)] or wanted
    if len(wanted) == 1:
        return Choice((), shards_of(wanted[0]))
    if files:
        shown = ", ".join(files[:12]) + (", ..." if len(files) > 12 else "")
        what = f"none called {variant!r}" if variant and not wanted else f"{len(wanted)} that could be meant"
        raise ModelLoadError(
            f"{repo} has {len(files)} GGUF files, {what}: {shown}.",
            hint=f"Name one by what tells it apart: {repo}:{_telling(files[0])}",
            param="model",
        )
    pickles = [name for name in safe if name.endswith(_PICKLES)]
    found = (
        f"it has {', '.join(pickles[:4])}, which are not read" if pickles else f"it has {', '.join(safe[:6]) or 'none'}"
    )
    raise ModelLoadError(
        f"{repo} has no weights in safetensors or GGUF: {found}.",
        hint="Look for a conversion of it; many repositories have one in a branch (ORG/NAME@refs/pr/1).",
        param="model",
    )


def _whole(tensors: list[str], repo: str) -> tuple[str, ...]:
    """The one set of safetensors files without an index."""
    sets = sorted({shards_of(name) for name in tensors})
    if len(sets) == 1:
        return sets[0]
    raise ModelLoadError(
        f"{repo} has several safetensors files and neither {WEIGHTS_FILE} nor {INDEX_FILE}: {', '.join(tensors[:8])}.",
        hint="Download the ones that are wanted into a directory, and give that.",
        param="model",
    )


def _telling(name: str) -> str:
    return name.removesuffix(".gguf").rsplit("-", 1)[-1].rsplit(".", 1)[-1]
