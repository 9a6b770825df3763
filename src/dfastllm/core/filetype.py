"""What a file is that should have been a model's: its first bytes tell, and the message that names it the way out.

Downloads go wrong in few ways: Git saves a pointer instead of the file, a server saves its error page, a disk fills up.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["INDEX_FILE", "WEIGHTS_FILE", "Mistaken", "is_gguf", "mistaken", "mistaken_bytes", "shards_of"]

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
MOST_SHARDS = 10_000
_SHARD = re.compile(r"(.*)-\d{5}-of-(\d{5})(\.\w+)")

_LFS = b"version https://git-lfs"
_AGAIN = "Download it again."


@dataclass(frozen=True, slots=True)
class Mistaken:
    """what: the end of "FILE is ...", without a full stop. hint: what to do about it, a sentence."""

    what: str
    hint: str


def is_gguf(path: str | Path) -> bool:
    """Whether this is a file that says it is GGUF. A directory never is."""
    return _head(Path(path)).startswith(b"GGUF")


def mistaken(path: Path) -> Mistaken | None:
    """What a file is instead of a model's, None where its first bytes do not tell."""
    return mistaken_bytes(_head(path)) if path.is_file() else None


def mistaken_bytes(head: bytes) -> Mistaken | None:
    """The same from the first bytes of a file (a few hundred will do)."""
    if not head:
        return Mistaken("empty", _AGAIN)
    if head.startswith(_LFS):
        size = re.search(rb"^size (\d{1,15})\s*$", head, re.MULTILINE)
        stands = f", which stands for a file of {int(size[1]):,} bytes that is not here" if size else ""
        return Mistaken(
            f"a Git LFS pointer{stands}", "Run `git lfs pull` in its directory, or download the file itself."
        )
    if re.match(rb"\s*<(!doctype|html|\?xml)", head, re.IGNORECASE):
        return Mistaken("a web page", "An error page was saved in place of the file: download it again.")
    if head.startswith(b"PK\x03\x04"):
        return Mistaken(
            "a ZIP archive, as PyTorch's own files are",
            "Use a checkpoint in safetensors or GGUF; pickles are not read.",
        )
    if not head.strip(b"\x00"):
        return Mistaken("full of zeros", _AGAIN)
    return None


def shards_of(name: str) -> tuple[str, ...]:
    """All parts of a file whose name says that it is one of several, NAME-00001-of-00003; of another file itself."""
    match = _SHARD.fullmatch(name)
    if match is None or int(match[2]) > MOST_SHARDS:
        return (name,)
    return tuple(f"{match[1]}-{i:05d}-of-{match[2]}{match[3]}" for i in range(1, int(match[2]) + 1))


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(512)
    except OSError:
        return b""
