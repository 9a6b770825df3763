"""Models of a Hugging Face hub, through huggingface_hub's own cache: what is there is used, what is not is fetched.

The library resumes what was cut off, sends HF_TOKEN, asks HF_ENDPOINT and keeps files under HF_HUB_CACHE (HF_HOME).
This file chooses what is fetched, in which order, and names what goes wrong. The small files come first and the ref of
the revision last, so that a cached revision is whole unless another program stopped half way; then it is completed.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfastllm.core.filetype import INDEX_FILE
from dfastllm.errors import DFastLLMError, DownloadError, ModelLoadError, ModelNotFoundError
from dfastllm.hub.choose import Choice, choose
from dfastllm.hub.ids import ModelId
from dfastllm.hub.places import place_of

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["cache_directory", "cached", "fetch", "is_offline"]

log = logging.getLogger("dfastllm.hub")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def cache_directory() -> Path:
    """The library's cache of repositories, as its variables say."""
    from huggingface_hub import constants

    if own := os.environ.get("HF_HUB_CACHE"):
        return Path(own)
    if home := os.environ.get("HF_HOME"):
        return Path(home) / "hub"
    return Path(constants.HF_HUB_CACHE)


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids to ask the hub."""
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in _OFFLINE)


_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def cached(id: ModelId) -> Path | None:
    """What is loaded for an id whose files are all in the cache; None where one is missing."""
    folder = cache_directory() / f"models--{id.repo.replace('/', '--')}"
    ref = folder / "refs" / id.revision
    commit = ref.read_text().strip() if ref.is_file() else id.revision
    directory = folder / "snapshots" / commit
    if "/" in commit or not directory.is_dir():
        return None
    names = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.exists() and not path.is_dir()}
    try:
        choice = choose(names, id.repo, id.variant)
        weights = _indexed(directory / INDEX_FILE) if choice.indexed else choice.weights
    except ModelLoadError:
        return None
    whole = names.issuperset(weights) and (not choice.small or any(name in names for name in _TOKENIZERS))
    return _loaded(directory, choice, weights) if whole else None


def fetch(id: ModelId) -> Path:
    """Fetch what is missing of the newest commit of the id's revision, and return what is loaded for it.

    Raises ModelNotFoundError for a repository or revision that is not there (or not for this token), DownloadError for
    one that wants its conditions accepted, for a hub that does not answer and for a disk that is full, ModelLoadError
    where it has no weights that are read."""
    if is_offline():
        raise ModelNotFoundError(
            f"{id} is not in the cache ({cache_directory()}), and HF_HUB_OFFLINE forbids to fetch it.",
            hint=f"Unset HF_HUB_OFFLINE, or run `dfastllm pull {id}` where there is a network and copy the cache.",
            param="model",
        )
    from huggingface_hub import HfApi

    endpoint = os.environ.get("HF_ENDPOINT") or None
    api = HfApi(endpoint=endpoint, library_name="dfastllm")
    with _naming(id, api.endpoint):
        about = api.model_info(id.repo, revision=id.revision, files_metadata=True)
        files = {one.rfilename: one.size or 0 for one in about.siblings or ()}
        choice = choose(files, id.repo, id.variant)
        commit = str(about.sha)
        small = [_file(api, id, name, commit, quiet=True) for name in choice.small]
        directory = _snapshot(small[0], choice.small[0]) if small else None
        weights = _indexed(directory / INDEX_FILE) if directory is not None and choice.indexed else choice.weights
        size = sum(files.get(name, 0) for name in weights)
        log.info("fetching %s: %d file(s) of weights, %.2f GB", id, len(weights), size / 1e9)
        for name in weights:
            directory = _snapshot(_file(api, id, name, commit), name)
        assert directory is not None, "a choice has weights"
        _file(api, id, (*choice.small, *weights)[0], id.revision, quiet=True)  # it is there: this keeps the ref alone
    return _loaded(directory, choice, weights)


def _file(api: HfApi, id: ModelId, name: str, revision: str, *, quiet: bool = False) -> Path:
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    bars: dict[str, Any] = {} if sys.stderr.isatty() else {"tqdm_class": _lines()}
    if quiet:
        disable_progress_bars()
    try:
        return Path(api.hf_hub_download(id.repo, name, revision=revision, cache_dir=cache_directory(), **bars))
    finally:
        if quiet:
            enable_progress_bars()


def _lines() -> Any:
    """A progress bar that is a line in the log for every tenth, where there is no terminal to draw one on."""
    from huggingface_hub.utils.tqdm import tqdm

    class Lines(tqdm):  # type: ignore[misc]  # the library's, which is untyped
        said = -1

        def display(self, *_: Any, **__: Any) -> None:
            tenth = int(10 * self.n / self.total) if self.total else 0
            if self.total and tenth > self.said:
                self.said = tenth
                log.info("%s: %d %% of %.2f GB", self.desc, 10 * tenth, self.total / 1e9)

    return Lines


def _snapshot(file: Path, name: str) -> Path:
    """The directory of a commit, from one of its files."""
    return file.parents[name.count("/")]


def _indexed(index: Path) -> tuple[str, ...]:
    """The shards that an index names. Raises ModelLoadError for an index that is none."""
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(where.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelLoadError(f"{index} is no index of shards: {error!r:.200}.", hint="Fetch it again.") from error
    if not all(isinstance(name, str) and name.endswith(".safetensors") and ".." not in name for name in names):
        raise ModelLoadError(f"{index} names files that are no .safetensors files of its directory.")
    return tuple(names)


def _loaded(directory: Path, choice: Choice, weights: tuple[str, ...]) -> Path:
    """The directory of a checkpoint, or its one GGUF file."""
    return directory if choice.small else place_of(directory / weights[0])


@contextmanager
def _naming(id: ModelId, endpoint: str) -> Iterator[None]:
    """What goes wrong on the way becomes an error of ours that says what to do."""
    import httpx2
    from huggingface_hub import errors

    page = f"{endpoint}/{id.repo}"
    try:
        yield
    except DFastLLMError:
        raise
    except errors.GatedRepoError as error:
        raise DownloadError(
            f"{id.repo} is gated: its files are for people who accepted its conditions.",
            hint=f"Accept them at {page}, make a token there, and give it as HF_TOKEN (or `hf auth login`).",
            param="model",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFoundError(f"{id.repo} has no revision {id.revision!r} at {endpoint}.", param="model") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"there is no model {id.repo} at {endpoint}, or it is private.",
            hint="Look at the spelling; for a private one give HF_TOKEN. A directory is named by its path: ./NAME.",
            param="model",
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        what = "HF_TOKEN is not accepted" if status == 401 else f"the hub answered {status}"
        raise DownloadError(f"{id} cannot be fetched from {endpoint}: {what}.", param="model") from error
    except (httpx2.HTTPError, ConnectionError, TimeoutError) as error:
        raise DownloadError(
            f"{id} cannot be fetched from {endpoint}: {type(error).__name__}: {error!s:.200}.",
            hint="What came is kept: the same command goes on where it ended. HF_ENDPOINT names another hub.",
            param="model",
        ) from error
    except (OSError, ValueError, errors.EntryNotFoundError) as error:
        raise DownloadError(f"{id} cannot be fetched: {error!s:.300}", param="model") from error
