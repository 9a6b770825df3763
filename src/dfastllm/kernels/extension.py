"""The compiled kernels, if this installation has them: found once, with the reason.

Environment: DFASTLLM_NATIVE=0 leaves them out (the torch twins run), a path loads that build instead; DFASTLLM_ISA
(scalar, avx2, avx512) asks for lesser kernels than the CPU has.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any

from dfastllm.errors import UnsupportedError, ValidationError

__all__ = ["describe", "native", "set_threads", "threads"]

NAME = "dfastllm.kernels._native"


@functools.cache
def _found() -> tuple[ModuleType | None, str]:
    wanted = os.environ.get("DFASTLLM_NATIVE", "")
    if wanted == "0":
        return None, "DFASTLLM_NATIVE=0 leaves the native kernels out"
    try:
        module = _from_path(wanted) if wanted not in ("", "1") else importlib.import_module(NAME)
    except ModuleNotFoundError:
        return None, "this installation was built without a C++ compiler: install one and reinstall dfastllm"
    except (ImportError, OSError, RuntimeError) as error:
        if "DFASTLLM_ISA" in str(error):
            raise UnsupportedError(f"{error}.", param="DFASTLLM_ISA") from error
        raise UnsupportedError(
            f"the native kernels cannot be loaded: {error}.",
            param="DFASTLLM_NATIVE",
            hint="Reinstall dfastllm, or set DFASTLLM_NATIVE=0 to run without them.",
        ) from error
    return module, f"{module.isa()}: {module.isa_reason()}"


def _from_path(path: str) -> ModuleType:
    """A build outside of the installation: the sanitizers' own, or a developer's."""
    spec = importlib.util.spec_from_file_location(NAME, path)
    if spec is None or spec.loader is None or not os.path.isfile(path):
        raise ImportError(f"DFASTLLM_NATIVE must be 0 or the path of an extension module, got {path!r}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def native() -> Any:
    """The extension module or None. Raises UnsupportedError when it is there but cannot be loaded, or DFASTLLM_ISA
    asks for what this CPU has not."""
    return _found()[0]


def describe() -> str:
    """One sentence: which instruction set the native kernels use and why, or why there are none."""
    return _found()[1]


def threads() -> int:
    """Threads of the native kernels; without them, torch's."""
    module = native()
    if module is not None:
        return int(module.threads())
    import torch

    return torch.get_num_threads()


def set_threads(count: int | None = None) -> None:
    """Set the native pool and torch's to `count` threads; None: OMP_NUM_THREADS if set, else the physical cores this
    process may use (torch's own default). The two never work at the same time: between two native calls torch's are
    idle. Raises ValidationError below 1 or above 1024."""
    if count is not None and not 1 <= count <= 1024:
        raise ValidationError(f"threads must be 1 to 1024, got {count}.", param="threads")
    import torch

    if count is not None:
        torch.set_num_threads(count)
    if (module := native()) is not None:
        module.set_threads(torch.get_num_threads())
