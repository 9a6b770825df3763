"""The LoRA adapters of a server: which names stand for which adapter of which model, and loading them at run time.

Three ways lead to a name: `--lora-modules`, which must be right or the server does not start; POST
/v1/load_lora_adapter, for directories below `--lora-root`; and the file there that keeps what was loaded so, from which
a server that starts anew loads it again. Reads files on the caller's thread; what adapters do is the engine's business.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dfastllm.errors import (
    AdapterError,
    AdapterNotFoundError,
    DFastLLMError,
    StorageError,
    UnsupportedError,
    ValidationError,
)
from dfastllm.llm import resolve_adapter
from dfastllm.settings import Settings

if TYPE_CHECKING:
    from dfastllm.engine import Engine
    from dfastllm.engine.adapters import Adapters, Named

__all__ = ["STATE", "Shelf"]

log = logging.getLogger("dfastllm.server")
STATE = "dfastllm-adapters.json"  # below the root
FILES = ("adapter_config.json", "adapter_model.safetensors")  # that must lie below it too, wherever links lead


class Shelf:
    """The adapters of all models that are served. `open` is called once, when they are loaded. Thread-safe after it.

    Raises ValidationError for settings that do not go together.
    """

    def __init__(self, settings: Settings) -> None:
        self.modules = settings.lora_modules
        self.root: Path | None = None
        if settings.lora_root is not None:
            if not settings.enable_lora:
                raise ValidationError(
                    "lora_root allows nothing without enable_lora.", param="lora_root", hint="Give --enable-lora too."
                )
            self.root = Path(settings.lora_root).resolve()
            if not self.root.is_dir():
                raise ValidationError(
                    f"lora_root must be a directory, got {settings.lora_root!r:.200}.", param="lora_root"
                )
        self._models: Mapping[str, Adapters] = {}
        self._kept: dict[tuple[str, str], tuple[str, str]] = {}  # (model, name) -> path below the root, hash
        self._writing = threading.Lock()

    def open(self, engines: Mapping[str, Engine]) -> None:
        """Load what the settings name, then what was loaded at run time before; of that, what is not there any more is
        told and left out. Raises what loading of the former raises."""
        self._models = {name: engine.adapters for name, engine in engines.items()}
        for module in self.modules:
            where, separator, path = module.partition("=")
            if not separator or not where or not path:
                raise ValidationError(
                    f"lora_modules must be NAME=PATH or MODEL:NAME=PATH, got {module!r:.200}.", param="lora_modules"
                )
            model, _, name = where.rpartition(":")
            model, adapters = self._of(model or None, "lora_modules")
            self._free(model, name, "lora_modules")
            named = adapters.load(name, resolve_adapter(path))
            log.info("adapter %s of %s: rank %d, %d bytes, from %s", name, model, named.rank, named.size, named.path)
        self._restore()

    def find(self, name: str) -> tuple[str, str] | None:
        """(model, adapter) that a name in place of a model's stands for: an adapter's, or MODEL:ADAPTER; None: for
        none. Raises ValidationError where several models have an adapter of that name."""
        model, separator, adapter = name.partition(":")
        while separator:  # a model's name may hold a colon, an adapter's never does
            if model in self._models and ":" not in adapter:
                self._models[model].find(adapter)
                return model, adapter
            more, separator, adapter = adapter.partition(":")
            model = f"{model}:{more}"
        having = [model for model in self._models if self._has(model, name)]
        if len(having) > 1:
            raise ValidationError(
                f"several models have an adapter {name!r}.",
                param="model",
                hint="Say which: " + ", ".join(f"{model}:{name}" for model in having) + ".",
            )
        return (having[0], name) if having else None

    def named(self) -> list[tuple[str, str, Named]]:
        """(name in place of a model's, model, adapter) of all: the adapter's own name where no other model has it."""
        found = [(model, named) for model, adapters in self._models.items() for named in adapters.named()]
        names = [named.name for _, named in found]
        return [
            (named.name if names.count(named.name) == 1 else f"{model}:{named.name}", model, named)
            for model, named in found
        ]

    def load(self, name: str, path: str, model: str | None, *, replace: bool = False) -> tuple[str, Named]:
        """Load a directory below the root under a name, for a model that may be left out where there is one. Returns
        the model too. Raises UnsupportedError where this is off, ValidationError, AdapterError, StorageError."""
        root = self._open_root()
        model, adapters = self._of(model, "model")
        self._free(model, name, "lora_name")
        named = adapters.load(name, self._below(root, path), replace=replace)
        with self._writing:
            self._kept[model, name] = str(named.path.relative_to(root)), named.hash.hex()
            self._write(root)
        log.info("adapter %s of %s: rank %d, %d bytes, loaded from %s", name, model, named.rank, named.size, named.path)
        return model, named

    def unload(self, name: str, model: str | None) -> str:
        """Forget an adapter; requests that run on it end as they would have. Returns its model. Raises UnsupportedError
        where this is off, AdapterNotFoundError, ValidationError, StorageError."""
        root = self._open_root()
        if model is None:
            model, name = self.find(name) or self._left_out(name)
        model, adapters = self._of(model, "model")
        with self._writing:
            if self._kept.pop((model, name), None) is not None:  # one that could not be restored is forgotten so too
                self._write(root)
                if not self._has(model, name):
                    return model
        adapters.unload(name)
        log.info("adapter %s of %s: unloaded", name, model)
        return model

    def _left_out(self, name: str) -> tuple[str, str]:
        """(model, adapter) of one that was loaded at run time and could not be restored. Raises
        AdapterNotFoundError."""
        found = [key for key in self._kept if key[1] == name]
        if not found:
            known = ", ".join(row[0] for row in self.named()) or "none"
            raise AdapterNotFoundError(
                f"no adapter {name[:200]!r} is loaded; there are: {known:.500}.", param="lora_name"
            )
        return found[0]

    def _has(self, model: str, name: str) -> bool:
        return any(named.name == name for named in self._models[model].named())

    def _of(self, model: str | None, param: str) -> tuple[str, Adapters]:
        """A model's name and adapters; None: of the only one."""
        if model is None and len(self._models) == 1:
            model = next(iter(self._models))
        if model is None or model not in self._models:
            known = ", ".join(sorted(self._models))
            got = "which model is it for?" if model is None else f"no model {model[:200]!r} is served."
            raise ValidationError(f"{got} There are: {known}.", param=param)
        return model, self._models[model]

    def _free(self, model: str, name: str, param: str) -> None:
        """Raises ValidationError for a name that a model has."""
        if name in self._models:
            raise ValidationError(f"{name!r} is the name of a model; an adapter needs another.", param=param)

    def _open_root(self) -> Path:
        if self.root is None:
            raise UnsupportedError(
                "adapters cannot be loaded or unloaded on this server while it runs.",
                hint="Start it with --enable-lora and --lora-root DIR.",
            )
        return self.root

    def _below(self, root: Path, path: str) -> Path:
        """The directory of that path, below the root with all its files, wherever links lead. The answer for what lies
        elsewhere does not tell whether it exists."""
        try:
            found = (root / path).resolve()
            inside = all(one.resolve().is_relative_to(root) for one in (found, *(found / name for name in FILES)))
        except (OSError, RuntimeError, ValueError):  # a circle of links, a NUL
            inside = False
        if not inside or found == root:
            raise ValidationError("lora_path must lie below the server's --lora-root.", param="lora_path")
        if not found.is_dir():
            raise AdapterError(f"there is no directory {path[:200]!r} below the server's root.", param="lora_path")
        return found

    def _restore(self) -> None:
        if self.root is None or not (file := self.root / STATE).is_file():
            return
        try:
            rows = [
                (str(r["model"]), str(r["name"]), str(r["path"]), str(r["hash"])) for r in json.loads(file.read_text())
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AdapterError(f"{file} cannot be read: {error!r:.200}.", hint="Mend it, or remove it.") from error
        for model, name, path, hash in rows:
            self._kept[model, name] = path, hash  # kept for the next start, whatever hinders it now
            try:
                _, adapters = self._of(model, "model")
                self._free(model, name, "lora_name")
                named = adapters.load(name, self._below(self.root, path))
                if named.hash.hex() != hash:
                    adapters.unload(name)
                    raise AdapterError("its content is not what it was when it was loaded.")
            except DFastLLMError as error:
                log.warning("adapter %s of %s, which was loaded at run time, is left out: %s", name, model, error)

    def _write(self, root: Path) -> None:
        """Keep what is loaded at run time, the file whole at any moment. Raises StorageError."""
        rows = [
            {"model": model, "name": name, "path": path, "hash": hash}
            for (model, name), (path, hash) in sorted(self._kept.items())
        ]
        try:
            with tempfile.NamedTemporaryFile("w", dir=root, prefix=f".{STATE}.", delete=False) as file:
                json.dump(rows, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            Path(file.name).replace(root / STATE)
        except OSError as error:
            raise StorageError(
                f"the list of adapters cannot be written to {root / STATE}: {error.strerror}.",
                hint="It is loaded all the same, until the server ends.",
            ) from error
