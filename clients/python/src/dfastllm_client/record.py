"""What the client gives back are frozen dataclasses that are read as mappings too: `result.text`, `result["text"]`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

__all__ = ["Record"]


class Record:
    """For dataclasses. Code written for dictionaries goes on working."""

    def __getitem__(self, name: str) -> Any:
        if name in self.keys():
            return getattr(self, name)
        raise KeyError(name)

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name) if name in self.keys() else default

    def keys(self) -> list[str]:
        return [field.name for field in fields(self)]  # type: ignore[arg-type]
