"""What a Hugging Face directory holds, from headers alone: every tensor's file, dtype and shape. Reads no weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dfastllm.core.filetype import INDEX_FILE, WEIGHTS_FILE, mistaken, shards_of
from dfastllm.errors import CheckpointError, ModelLoadError
from dfastllm.quant.header import BYTES, TensorEntry, read_header

__all__ = ["BYTES", "INDEX_FILE", "WEIGHTS_FILE", "TensorEntry", "inventory", "read_json"]

NO_WEIGHTS = ("adapter_model.safetensors", "bigram.safetensors")  # files that lie beside the weights of a model


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelLoadError when it is absent, unreadable or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelLoadError(f"{path.name} is missing in {path.parent}.") from None
    except (OSError, ValueError, RecursionError) as error:
        if (found := mistaken(path)) is not None:
            raise ModelLoadError(f"{path} is no JSON but {found.what}.", hint=found.hint) from error
        raise ModelLoadError(f"{path} cannot be read as JSON: {error}.", hint="Download it again.") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} must hold a JSON object, got {type(value).__name__}.")
    return value


def inventory(directory: Path) -> dict[str, TensorEntry]:
    """Every tensor of a directory: of the shards its index names, of model.safetensors, or of the one set of shards (or
    the one file) that is there without an index.

    Raises CheckpointError for no weights, a missing or corrupt shard, an index path outside the directory, and an
    index that disagrees with its shards.
    """
    index = directory / INDEX_FILE
    if not index.exists():
        return _together(directory, _without_index(directory))
    where = _weight_map(index)
    found = _together(directory, sorted(set(where.values())))
    for tensor, name in where.items():
        if tensor not in found or found[tensor].file != directory / name:
            raise CheckpointError(f"{INDEX_FILE} says tensor {tensor!r} is in {name}, which does not hold it.")
    return found


def _together(directory: Path, names: Sequence[str]) -> dict[str, TensorEntry]:
    """The tensors of several files. Raises CheckpointError for one that is in two of them."""
    found: dict[str, TensorEntry] = {}
    for name in names:
        for tensor, entry in read_header(_shard(directory, name)).items():
            if tensor in found:
                raise CheckpointError(f"tensor {tensor!r} is in two shards: {found[tensor].file.name} and {name}.")
            found[tensor] = entry
    return found


def _without_index(directory: Path) -> tuple[str, ...]:
    """model.safetensors; else all shards of the one set that says how many it has; else the only file there is."""
    if (directory / WEIGHTS_FILE).exists():
        return (WEIGHTS_FILE,)
    files = sorted(path.name for path in directory.glob("*.safetensors") if path.name not in NO_WEIGHTS)
    sets = sorted({shards_of(name) for name in files})
    if not files:
        others = sorted(p.name for p in directory.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
        instead = f"; found {', '.join(others)}, which are not read" if others else ""
        raise CheckpointError(
            f"no weights in {directory}: neither {WEIGHTS_FILE} nor {INDEX_FILE}{instead}.",
            hint="Convert the checkpoint to safetensors.",
        )
    if len(sets) > 1:
        raise CheckpointError(
            f"{directory} has no {WEIGHTS_FILE} and no {INDEX_FILE}, but several sets: {', '.join(files[:8])}.",
            hint=f"Download {INDEX_FILE} too, or keep one set in the directory.",
        )
    missing = [name for name in sets[0] if name not in files]
    if missing:
        raise CheckpointError(
            f"{directory} has {len(files)} of {len(sets[0])} shards; missing: {', '.join(missing[:8])}.",
            hint="Download the rest.",
        )
    return sets[0]


def _weight_map(index: Path) -> dict[str, str]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()) or not where:
        raise CheckpointError(f"{index.name}: weight_map must map tensor names to file names, got {where!r:.80}.")
    return where


def _shard(directory: Path, name: str) -> Path:
    """The shard's path, which must lie directly or below the directory: an index is untrusted input."""
    path = directory / name
    if Path(name).is_absolute() or ".." in Path(name).parts or "\x00" in name or path.suffix != ".safetensors":
        raise CheckpointError(f"{INDEX_FILE} names {name!r}, which is not a .safetensors file inside the directory.")
    if not path.is_file():
        raise CheckpointError(f"shard {name} named by {INDEX_FILE} is missing in {directory}.")
    return path
