"""The tokens that a draft model says: `shortlist.json` beside its weights.

A small model of a large vocabulary spends most of its time on its head, and most of what a target says is a few
thousand tokens. A draft that looks at these alone is quicker and loses only the rare ones, which the target then says
itself; answers cannot change (Zhao et al. 2025, arXiv 2502.14856). The file is one object: {"ids": [...]}, ascending.
The weights stay whole, so the directory is a model like any other wherever the file is not known.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dfastllm.errors import ModelLoadError, StorageError, ValidationError

__all__ = ["FILE", "checked", "read_shortlist", "write_shortlist"]

FILE = "shortlist.json"


def checked(ids: Iterable[int], vocabulary: int) -> Tensor:
    """int64 [n], ascending. Raises ValidationError for none at all, for an id twice and for one outside the
    vocabulary."""
    found = sorted(ids)
    if not found or found[0] < 0 or found[-1] >= vocabulary or len(set(found)) < len(found):
        raise ValidationError(
            f"a shortlist must have different ids, each in [0, {vocabulary - 1}]; got {len(found)} ids"
            f"{f', {found[0]} to {found[-1]}, {len(set(found))} of them different' if found else ''}.",
            param="shortlist",
        )
    return torch.tensor(found, dtype=torch.int64)


def read_shortlist(directory: Path, vocabulary: int) -> Tensor | None:
    """The ids, int64 [n] ascending; None where the directory has no such file (a GGUF file has none). Raises
    ModelLoadError for a file that is none."""
    path = directory / FILE
    if not path.is_file():
        return None
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))["ids"]
        if not isinstance(ids, list) or not all(type(id) is int for id in ids):
            raise ValueError("ids must be a list of integers")
        return checked(ids, vocabulary)
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise ModelLoadError(
            f'{path} must hold {{"ids": [...]}}: {error}', param="shortlist", hint="Remove or rewrite it."
        ) from error


def write_shortlist(directory: Path, ids: Sequence[int], vocabulary: int) -> Path:
    """Write the file and return its path. Raises ValidationError as `checked` does, and StorageError."""
    path = directory / FILE
    found = checked(ids, vocabulary).tolist()
    try:
        path.write_text(json.dumps({"ids": found}) + "\n", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}.") from error
    return path
