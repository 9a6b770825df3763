"""A device's memory: what is free, and the words for when there is none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dfastllm.errors import GenerationError, ModelLoadError, ValidationError

__all__ = ["named_device", "out_of_memory", "room_for_kv", "serving_error"]

SPARE = 256 << 20  # bytes for graphs themselves, libraries' workspaces and what falls between two allocations


@contextmanager
def out_of_memory(when: str) -> Iterator[None]:
    """Memory that runs out in here, before a model serves, is a ModelLoadError that says what to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelLoadError(
            f"the device's memory ran out while {when}: {str(error).splitlines()[0]}",
            param="gpu_memory_utilization",
            hint="Lower gpu_memory_utilization, kv_cache_tokens or max_batch_rows, quantise the weights, or take"
            " another card.",
        ) from error


def serving_error(error: BaseException) -> GenerationError:
    """For the request whose rows there was no memory for."""
    return GenerationError(
        f"the device's memory ran out while computing this request: {str(error).splitlines()[0]}",
        param="max_batch_rows",
        hint="Send a shorter prompt or canvas, or start the server with a lower gpu_memory_utilization, kv_cache_tokens"
        " or max_batch_rows.",
    )


def named_device(device: str | torch.device) -> torch.device:
    """The device, if it can be used here. Raises ModelLoadError for one that is not there."""
    where = torch.device(device)
    if where.type == "cuda":
        if not torch.cuda.is_available():
            why = "torch was built without CUDA" if torch.version.cuda is None else "it finds no card"
            raise ModelLoadError(
                f"device {str(device)!r} cannot be used here: {why}.",
                param="device",
                hint="Install torch's CUDA build and the card's driver, or take device cpu.",
            )
        count = torch.cuda.device_count()
        if where.index is not None and where.index >= count:
            raise ModelLoadError(
                f"device {str(device)!r} is not there: this machine has {count} card(s), cuda:0 to cuda:{count - 1}.",
                param="device",
            )
    if where.type == "mps" and not torch.backends.mps.is_available():
        raise ModelLoadError(
            f"device {str(device)!r} cannot be used here: torch finds no Metal device.",
            param="device",
            hint="Take device cpu.",
        )
    return where


def room_for_kv(device: torch.device, share: float, position: int, peak: int) -> int:
    """Positions of K,V that fit into a share of a card's whole memory beside what it holds already.

    position: bytes of one; peak: bytes that a forward needs at most. Raises ModelLoadError where there is no room,
    ValidationError for a device whose memory is not known.
    """
    if device.type != "cuda":
        raise ValidationError(
            f"gpu_memory_utilization is for device cuda, got {device}.",
            param="gpu_memory_utilization",
            hint="Give kv_cache_tokens.",
        )
    free, whole = torch.cuda.mem_get_info(device)
    left = int(whole * share) - (whole - free) - peak - SPARE
    count = left // position
    if count < 1:
        gib = 1 << 30
        raise ModelLoadError(
            f"no room for K,V: {share:.0%} of {whole / gib:.1f} GiB are {whole * share / gib:.1f} GiB, of which"
            f" {(whole - free) / gib:.1f} GiB are taken and a forward needs {(peak + SPARE) / gib:.1f} GiB.",
            param="gpu_memory_utilization",
            hint="Raise gpu_memory_utilization, lower max_batch_rows, or quantise the weights.",
        )
    return count
