"""ModelRegistry: names for models, where the name leads, and one LLM for each that was opened."""

from __future__ import annotations

import builtins
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from dfastllm.errors import ModelNotFoundError, ValidationError

if TYPE_CHECKING:
    from dfastllm.llm import LLM

__all__ = ["ModelRegistry"]


class ModelRegistry:
    """Names -> directories or open LLMs. The models shipped with the package are always there, under their own names.

    Thread-safe. Use as a context manager, or call `close`, to close the LLMs that it opened.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._models: dict[str, Path | LLM] = {}
        self._opened: dict[str, LLM] = {}

    def register(self, name: str, model: str | Path | LLM) -> None:
        """Give `model` a name: a directory, another known name, or an LLM. Raises ValidationError for a name that is
        empty or taken (a shipped name too), ModelNotFoundError for a directory that is not there."""
        if not name or name != name.strip():
            raise ValidationError(
                f"a model's name must not be empty or padded with spaces, got {name!r}.", param="name"
            )
        with self._lock:
            if name in self.list():
                raise ValidationError(f"the name {name!r} is taken.", param="name", hint="Unregister it first.")
            self._models[name] = self.resolve(model) if isinstance(model, str | Path) else model

    def unregister(self, name: str) -> None:
        """Forget a registered name and close the LLM opened for it. Raises ModelNotFoundError."""
        with self._lock:
            if name not in self._models:
                raise ModelNotFoundError(f"no model is registered as {name!r}.", param="name")
            del self._models[name]
            opened = self._opened.pop(name, None)
        if opened is not None:
            opened.close()

    def list(self) -> builtins.list[str]:
        """All names, sorted."""
        from dfastllm.llm import shipped_models

        with self._lock:
            return sorted({*self._models, *shipped_models()})

    def resolve(self, name: str | Path) -> Path | LLM:
        """Where a name leads: a directory, or the LLM that was registered. A path to a directory leads to itself.
        Raises ModelNotFoundError naming what there is."""
        from dfastllm.llm import resolve

        with self._lock:
            if str(name) in self._models:
                return self._models[str(name)]
        try:
            return resolve(name)
        except ModelNotFoundError as error:
            if error.hint is not None:  # of a name that could be had
                raise
            known = ", ".join(self.list()) or "none"
            raise ModelNotFoundError(
                f"no model {str(name)!r}: it is neither a name known here ({known}) nor a directory.", param="model"
            ) from None

    def open(self, name: str | Path) -> LLM:
        """The LLM of a name, loaded on first use and kept. Raises ModelNotFoundError and what loading raises."""
        from dfastllm.llm import LLM

        with self._lock:
            found = self.resolve(name)
            if isinstance(found, LLM):
                return found
            if str(name) not in self._opened:
                self._opened[str(name)] = LLM(found)
            return self._opened[str(name)]

    def close(self) -> None:
        """Close every LLM this registry opened; those it was given stay open."""
        with self._lock:
            opened, self._opened = self._opened, {}
        for llm in opened.values():
            llm.close()

    def __enter__(self) -> ModelRegistry:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
