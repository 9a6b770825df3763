"""Training checkpoints: safetensors and JSON only, each written whole or not at all.

A checkpoint is a directory `step-N` with weights.safetensors, optimizer.safetensors, rng.safetensors and state.json. It
holds all that a run needs to continue bit for bit: the works here key their random draws by the step, and the state of
the global generators is kept for those that do not.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dfastllm.errors import CheckpointError

__all__ = [
    "content",
    "drop_after",
    "latest",
    "newest_good",
    "prune",
    "read_checkpoint",
    "read_weights",
    "require_same",
    "sweep",
    "write_checkpoint",
]

RNG = "rng.safetensors"


def _flat(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """State tensors as "optimizer.parameter.name"; plain numbers become 0-d float64 tensors."""
    return {
        f"{o}.{p}.{key}": (value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64))
        for o, optimizer in enumerate(optimizers)
        for p, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def write_checkpoint(
    run: Path, step: int, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], state: dict[str, Any]
) -> Path:
    """Write run/step-N, or replace it. `state`: JSON values (data position, recipe, counters)."""
    target, temporary = run / f"step-{step}", run / f".step-{step}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(
        {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}, temporary / "weights.safetensors"
    )
    save_file(
        {k: v.detach().cpu().contiguous() for k, v in _flat(optimizers).items()}, temporary / "optimizer.safetensors"
    )
    save_file(_generators(), temporary / RNG)
    (temporary / "state.json").write_text(json.dumps({**state, "step": step}, indent=1))
    old = run / f".old-{step}.{os.getpid()}"
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    return target


def _generators() -> dict[str, Tensor]:
    """States of torch's global generators, uint8."""
    found = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def content(path: Path) -> str:
    """SHA-256 of what a file holds, for `require_same`. Raises CheckpointError for a file that cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error


def require_same(run: Path, file: str, what: Mapping[str, Any]) -> None:
    """Keep what a run is made of in `run`/`file`, before its first checkpoint; later hold it to that, so that nothing
    goes on with the weights that another recipe, other texts or another schedule made.

    what: values that become JSON. Raises CheckpointError naming those that differ, or that nothing is known of an
    earlier run.
    """
    path = run / file
    now = json.loads(json.dumps(what, default=str))
    newest = latest(run)
    if newest is not None:
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            before = None
        hint = "Choose another directory for this run, or remove that one."
        if not isinstance(before, dict):
            raise CheckpointError(
                f"{run} holds a run ({newest.name}) of which {file} does not say what it was.", hint=hint
            )
        if before != now:
            keys = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
            first = keys[0]
            raise CheckpointError(
                f"{run} holds a run of something else: {', '.join(keys)} differ"
                f" ({first}: {before.get(first)!r:.80} there, {now.get(first)!r:.80} here).",
                hint=hint,
            )
    run.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")


def latest(run: Path) -> Path | None:
    """The checkpoint with the highest step, None when there is none."""
    found = [p for p in run.glob("step-*") if (p / "state.json").is_file()]
    return max(found, key=_step, default=None)


def newest_good(run: Path, good: Callable[[Mapping[str, Any]], bool]) -> Path | None:
    """The newest checkpoint whose work's state (`state.json`, "work") is good; None when there is none."""
    found = [p for p in run.glob("step-*") if (p / "state.json").is_file()]
    for path in sorted(found, key=_step, reverse=True):
        if good(json.loads((path / "state.json").read_text()).get("work", {})):
            return path
    return None


def sweep(run: Path) -> None:
    """Remove what a process that was killed while it wrote a checkpoint has left."""
    for pattern in (".step-*", ".old-*"):
        for path in run.glob(pattern):
            shutil.rmtree(path)


def drop_after(run: Path, step: int) -> None:
    """Remove the checkpoints of later steps: a run that went back does not resume from them."""
    for path in run.glob("step-*"):
        if _step(path) > step:
            shutil.rmtree(path)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def prune(run: Path, keep: int, milestones: Sequence[int]) -> None:
    """Remove all but the newest `keep` checkpoints and the milestones."""
    for path in sorted(run.glob("step-*"), key=_step)[:-keep]:
        if _step(path) not in milestones:
            shutil.rmtree(path)


def read_weights(path: Path, model: nn.Module, layers: Sequence[int | None] = ()) -> list[str]:
    """Fill the parameters of the same name and shape; the names of those the checkpoint does not have are returned.

    layers: which of the checkpoint's layers each of the model's takes; None: a new layer, whose projections into the
    residual stream become 0. Raises CheckpointError for a tensor of another shape or a file that cannot be read."""
    try:
        tensors = load_file(path / "weights.safetensors")
    except Exception as error:  # the library raises its own plain errors and OSErrors
        raise CheckpointError(f"cannot read {path / 'weights.safetensors'}: {error}.") from error
    missing = []
    for name, parameter in model.named_parameters():
        source = name
        if layers and name.startswith("layers."):
            _, number, rest = name.split(".", 2)
            if layers[int(number)] is None:
                if rest.endswith(("o_proj.weight", "down_proj.weight")):
                    nn.init.zeros_(parameter)
                continue
            source = f"layers.{layers[int(number)]}.{rest}"
        if source not in tensors:
            missing.append(name)
            continue
        if tensors[source].shape != parameter.shape:
            raise CheckpointError(
                f"{path}: {source} has shape {tuple(tensors[source].shape)}, the model wants {tuple(parameter.shape)}."
            )
        with torch.no_grad():
            parameter.copy_(tensors[source])
    return missing


def read_checkpoint(path: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    """Restore weights, optimizer state and the global generators in place; returns the state's JSON. Raises
    CheckpointError."""
    missing = read_weights(path, model)
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}.", hint="Start this run afresh.")
    try:
        tensors = load_file(path / "optimizer.safetensors")
        generators = load_file(path / RNG) if (path / RNG).is_file() else {}  # older runs have none
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
    except Exception as error:
        raise CheckpointError(f"cannot read {path}: {error}.") from error
    for o, optimizer in enumerate(optimizers):
        restored: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            which, parameter, key = name.split(".", 2)
            if int(which) == o:
                restored.setdefault(int(parameter), {})[key] = tensor
        optimizer.load_state_dict({**optimizer.state_dict(), "state": restored})
    if "cpu" in generators:
        torch.set_rng_state(generators["cpu"])
    if "cuda" in generators and torch.cuda.is_available():
        torch.cuda.set_rng_state(generators["cuda"])
    return state
