"""Reading JSON files of a tokenizer directory, with errors that name the file. Nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dfastllm.core.filetype import mistaken_bytes
from dfastllm.errors import TokenizerError

__all__ = ["json_object", "read_json", "read_text"]


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
    return json_object(read_text(path), f"{path.name} in {path.parent}")


def json_object(text: str, where: str) -> dict[str, Any]:
    """Text as a JSON object. where: for messages. Raises TokenizerError."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        found = mistaken_bytes(text[:512].encode("utf-8", "replace"))
        if found is not None:
            raise TokenizerError(f"{where} is no JSON but {found.what}.", hint=found.hint) from error
        raise TokenizerError(f"{where} is not valid JSON: {error}.", hint="Download the file again.") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{where} must hold a JSON object, got {type(value).__name__}.")
    return value
