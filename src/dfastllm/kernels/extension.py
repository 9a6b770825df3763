"""The compiled kernels, if this installation has them: found once, with the reason.

Environment: DFASTLLM_NATIVE=0 leaves them out (the torch twins run), a path loads that build instead; DFASTLLM_ISA
(scalar, avx2, avxvnni, avx512vl, avx512; on ARM scalar, neon, dotprod, i8mm) asks for lesser kernels than the CPU has.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from dfastllm.errors import UnsupportedError, ValidationError

__all__ = ["describe", "native", "set_threads", "threads", "torch_alone", "torch_team"]

NAME = "dfastllm.kernels._native"
TEAM = 1 << 20  # one pass over so many numbers takes about as long as a busy machine may keep a team waiting


_forked_from: list[int] = []  # threads of the process that this one was forked from, once it had used the kernels
_alone = threading.local()  # others: torch threads of the other threads, on one that called `torch_alone`


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
    idle. In a process forked from one that used the kernels torch keeps to one thread: its team of OpenMP threads was
    not forked, and would be waited for for ever. Raises ValidationError below 1 or above 1024."""
    if count is not None and not 1 <= count <= 1024:
        raise ValidationError(f"threads must be 1 to 1024, got {count}.", param="threads")
    import torch

    if count is None:
        count = _forked_from[-1] if _forked_from else torch.get_num_threads()
    torch.set_num_threads(1 if _forked_from else count)
    if (module := native()) is not None:
        module.set_threads(count)


def torch_alone() -> None:
    """From now on the torch operations of the calling thread run on it alone, but for those in `torch_team`; those of
    other threads as before.

    What is left to torch beside the native kernels (sampling, mostly) is short, and a team of OpenMP threads waits at
    the end of each operation for its slowest: where another process or the kernels' own threads hold a core, for as
    long as the scheduler leaves it to them."""
    import torch

    _alone.others = torch.get_num_threads()
    _set_here(1, _alone.others)


@contextmanager
def torch_team(elements: int) -> Iterator[None]:
    """The torch operations within have all threads again where they are of so many elements that it pays."""
    others = getattr(_alone, "others", 1)
    if others == 1 or elements < TEAM:
        yield
        return
    _set_here(others, others)
    try:
        yield
    finally:
        _set_here(1, others)


def _set_here(here: int, others: int) -> None:
    """The calling thread's number of torch threads; others: what threads begin with that come later. torch sets both at
    once, so the second is set again by a thread that then ends."""
    import torch

    torch.set_num_threads(here)
    if here != others:
        again = threading.Thread(target=torch.set_num_threads, args=(others,))
        again.start()
        again.join()


def _fork() -> None:
    """In a process that has just been forked; the native pool begins anew by itself."""
    if _found.cache_info().currsize:
        import torch

        _forked_from.append(torch.get_num_threads())
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_fork)
