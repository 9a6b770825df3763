"""Reading JSON files of a tokenizer directory, with errors that name the file. Nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dfastllm.errors import TokenizerError

__all__ = ["read_json", "read_text"]


def read_text(path: Path) -> str:
    """The file's text. Raises TokenizerError when it cannot be read or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(
            f"{path.name} in {path.parent} is not UTF-8 text ({error.reason} at byte {error.start}).",
            hint="Download the file again; it may be a Git LFS download that went wrong.",
        ) from error
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror or error}.") from error


def read_json(path: Path) -> dict[str, Any]:
    """The file as a JSON object. Raises TokenizerError when it cannot be read, parsed, or is not an object."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except ValueError as error:
        hint = "Download the file again."
        if text.startswith("version https://git-lfs"):
            hint = "It is a Git LFS pointer: run `git lfs pull` in the model directory."
        raise TokenizerError(f"{path.name} in {path.parent} is not valid JSON: {error}.", hint=hint) from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path.name} in {path.parent} must hold a JSON object, got {type(value).__name__}.")
    return value
