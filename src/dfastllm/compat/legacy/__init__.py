"""Old module names, kept until dfastllm 2.0. Each warns, names its replacement, and delegates to it.

No behaviour of its own: configurations are DiffusionConfig or SchedulerConfig with another default, generators and
batchers are DiffusionGenerator and Scheduler. One table makes the modules, when they are imported.
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from dfastllm.compat.config import DiffusionConfig
from dfastllm.compat.generator import DiffusionGenerator
from dfastllm.compat.queueing import SchedulerConfig, SchedulerStats
from dfastllm.compat.scheduler import Scheduler

__all__ = [
    "advanced_batcher",
    "batcher",
    "enhanced_speculative",
    "fast_diffusion",
    "speculative",
    "streaming_diffusion",
    "turbo_decoder",
    "ultra_fast_streaming",
]


@dataclass(frozen=True)
class _Old:
    """What a module held under its old names: `values`, a configuration or counters, and `runner`.

    defaults: fields of the configuration that had another default there. method: of the runner, for the warning.
    """

    values: str
    values_now: type
    runner: str
    runner_now: type
    defaults: Mapping[str, Any] = field(default_factory=dict)
    method: str = ""

    def replacements(self) -> tuple[str, str]:
        """What to use in place of the values and of the runner, in the words of the warnings."""
        values, runner = self.values_now.__name__, self.runner_now.__name__ + self.method
        if not self.defaults:
            return values, runner
        values += f"({', '.join(f'{name}={value!r}' for name, value in self.defaults.items())})"
        return values, f"{runner} with {values}"

    def classes(self, module: str) -> dict[str, type]:
        """The classes of the module by name."""
        own = {"default_config": self.values_now(**self.defaults)} if self.defaults else {}
        changed = [(name, Any, value) for name, value in self.defaults.items()]
        frozen = self.values_now is not SchedulerStats
        values = make_dataclass(self.values, changed, bases=(self.values_now,), frozen=frozen)
        found = {self.values: values, self.runner: type(self.runner, (self.runner_now,), own)}
        for made, replacement in zip(found.values(), self.replacements(), strict=True):
            made.__module__ = module
            _warn_when_made(made, replacement)
        return found


def _diffusion(values: str, runner: str, mode: str, method: str = "") -> _Old:
    return _Old(values, DiffusionConfig, runner, DiffusionGenerator, {"mode": mode}, method)


def _speculative(values: str, runner: str) -> _Old:
    return _Old(values, SchedulerConfig, runner, Scheduler, {"enable_speculative": True})


_MODULES: Mapping[str, _Old] = {
    "advanced_batcher": _Old("AdvancedBatcherConfig", SchedulerConfig, "AdvancedBatcher", Scheduler),
    "batcher": _Old("BatchStats", SchedulerStats, "ContinuousBatcher", Scheduler),
    "enhanced_speculative": _speculative("EnhancedSpeculativeConfig", "EnhancedSpeculativeDecoder"),
    "fast_diffusion": _diffusion("FastDiffusionConfig", "FastDiffusionGenerator", "fast"),
    "speculative": _speculative("SpeculativeConfig", "SpeculativeDecoder"),
    "streaming_diffusion": _diffusion("StreamingDiffusionConfig", "StreamingDiffusionGenerator", "streaming"),
    "turbo_decoder": _diffusion("TurboConfig", "TurboDecoder", "turbo"),
    "ultra_fast_streaming": _diffusion("UltraFastConfig", "UltraFastStreamer", "streaming", ".generate_stream"),
}


def _warn(name: str, replacement: str) -> None:
    """Warn the caller of who calls this."""
    message = f"{name} is deprecated and will be removed in dfastllm 2.0; use {replacement}."
    warnings.warn(message, DeprecationWarning, stacklevel=3)


def _warn_when_made(made: Any, replacement: str) -> None:
    init = made.__init__

    @functools.wraps(init)
    def warn_and_init(self: Any, *args: Any, **kwargs: Any) -> None:
        _warn(made.__name__, replacement)
        init(self, *args, **kwargs)

    made.__init__ = warn_and_init


class _Modules(MetaPathFinder, Loader):
    """The import system's way to the modules of the table."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if package == __name__ and name in _MODULES else None

    def exec_module(self, module: ModuleType) -> None:
        old = _MODULES[module.__name__.rpartition(".")[2]]
        replacement = f"dfastllm.{old.replacements()[1]}"
        _warn(module.__name__, replacement)
        classes = old.classes(module.__name__)
        vars(module).update(classes, __all__=sorted(classes), __doc__=f"Deprecated: use {replacement}.")


sys.meta_path.insert(0, _Modules())  # first: nobody else has to look for files that are not there


def __getattr__(name: str) -> ModuleType:
    if name not in __all__:
        raise AttributeError(f"module 'dfastllm.compat.legacy' has no attribute {name!r}")
    return importlib.import_module(f"dfastllm.compat.legacy.{name}")
