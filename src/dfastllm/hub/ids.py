"""Ids of models on a hub: ORG/NAME, ORG/NAME@REVISION, ORG/NAME:VARIANT of a repository with several GGUF files."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["MAIN", "ModelId", "parse_id"]

MAIN = "main"
_ID = re.compile(r"(?P<repo>[\w.-]{1,96}/[\w.-]{1,96})(:(?P<variant>[\w.-]{1,96}))?(@(?P<revision>[\w./-]{1,200}))?")


@dataclass(frozen=True, slots=True)
class ModelId:
    """repo: ORG/NAME. revision: a branch, a tag or a commit. variant: part of the name of one GGUF file, as Q4_K_M."""

    repo: str
    revision: str = MAIN
    variant: str = ""

    @property
    def title(self) -> str:
        """What the model is called where it is served: its id, whatever its revision."""
        return f"{self.repo}:{self.variant}" if self.variant else self.repo

    def __str__(self) -> str:
        return self.title if self.revision == MAIN else f"{self.title}@{self.revision}"


def parse_id(name: str) -> ModelId | None:
    """The id that a name is, None where it can be none: more than one slash, or a part that begins with a dot."""
    match = _ID.fullmatch(name)
    if match is None or any(part.startswith(".") for part in match["repo"].split("/")):
        return None
    revision = match["revision"] or MAIN
    if ".." in revision or revision.startswith("/"):
        return None
    return ModelId(match["repo"], revision, match["variant"] or "")
