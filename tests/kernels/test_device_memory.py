"""What is said of a device that is not there, too old or full, with torch's own words for it faked."""

from __future__ import annotations

import pytest
import torch

from dfastllm import assemble
from dfastllm.errors import ModelLoadError, UnsupportedError, ValidationError
from dfastllm.kernels.triton import memory, ops
from dfastllm.models import tiny

GIB = 1 << 30


def card(monkeypatch: pytest.MonkeyPatch, *, count: int = 1, capability: tuple[int, int] = (9, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Old Card")


def test_a_device_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, count=0)
    with pytest.raises(ModelLoadError, match=r"device 'cuda' cannot be used here: (torch was built|it finds no card)"):
        memory.named_device("cuda")
    card(monkeypatch, count=2)
    with pytest.raises(ModelLoadError, match=r"this machine has 2 card\(s\), cuda:0 to cuda:1"):
        memory.named_device("cuda:2")
    assert memory.named_device("cuda:1") == torch.device("cuda:1")
    assert memory.named_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ModelLoadError, match="no Metal device"):
        memory.named_device("mps")


def test_what_a_machine_without_triton_cannot_do_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assemble, "triton_problem", lambda device: "triton is not installed")
    card(monkeypatch)
    cuda = torch.device("cuda")
    assert assemble._form(cuda, "auto", quantised=False) == "torch"
    for backend, given, match in (
        ("triton", {"quantised": False}, "backend triton cannot be had: triton is not installed"),
        ("auto", {"quantised": True}, "quantised weights are computed by the native backend"),
        ("auto", {"quantised": True, "fp8": True}, "quantization fp8 cannot be had: triton is not installed"),
    ):
        with pytest.raises(UnsupportedError, match=match) as caught:
            assemble._form(cuda, backend, **given)  # type: ignore[arg-type]
        assert "triton" in str(caught.value.hint)


def test_what_a_device_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assemble, "triton_problem", lambda device: None)
    card(monkeypatch)
    cuda, mps, cpu = torch.device("cuda"), torch.device("mps"), torch.device("cpu")
    assert assemble._form(cuda, "auto", quantised=False) == "triton"
    assert assemble._form(cuda, "auto", quantised=True) == "triton"
    assert assemble._form(cuda, "torch", quantised=False) == "torch"
    assert assemble._form(cpu, "auto", quantised=True) == "native"
    assert assemble._form(cpu, "triton", quantised=True) == "triton"
    assert assemble._form(mps, "auto", quantised=False) == "torch"
    with pytest.raises(UnsupportedError, match="on a CPU, not on mps"):
        assemble._form(mps, "auto", quantised=True)
    with pytest.raises(UnsupportedError, match=r"not torch|on cuda"):
        assemble._form(cuda, "torch", quantised=True)


def test_a_card_too_old_for_fp8_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assemble, "triton_problem", lambda device: None)
    card(monkeypatch, capability=(8, 0))
    with pytest.raises(UnsupportedError, match=r"needs a card of compute capability 8\.9 or later; Old Card has 8\.0"):
        assemble._form(torch.device("cuda"), "auto", quantised=True, fp8=True)


def test_triton_says_why_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.importlib.util, "find_spec", lambda name: None)
    assert ops.triton_problem(torch.device("cuda")) == "triton is not installed"
    chosen = ops.ops_for(torch.device("cpu"))
    assert not chosen.captured
    assert {choice.reason for choice in chosen.choices} == {"triton is not installed"}
    assert {choice.op for choice in chosen.choices} == set(ops.TWINS)


def test_room_for_kv(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 80 GiB, 20 are taken: at 90 %, with 2 for a forward, 50 less the spare are left."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (60 * GIB, 80 * GIB))
    cuda = torch.device("cuda")
    found = memory.room_for_kv(cuda, 0.9, 1 << 17, 2 * GIB)
    assert found == (int(80 * GIB * 0.9) - 22 * GIB - memory.SPARE) // (1 << 17)
    with pytest.raises(ModelLoadError, match=r"no room for K,V: 25% of 80.0 GiB are 20.0 GiB, of which 20.0 GiB are"):
        memory.room_for_kv(cuda, 0.25, 1 << 17, 2 * GIB)
    with pytest.raises(ValidationError, match="for device cuda, got cpu"):
        memory.room_for_kv(torch.device("cpu"), 0.9, 1, 0)


def test_memory_that_runs_out_while_loading_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **more: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore")

    monkeypatch.setattr(assemble, "device_decoder", full)
    model = tiny("llama")
    with pytest.raises(ModelLoadError, match=r"ran out while loading the weights: CUDA out of memory.*20.00 MiB. L"):
        assemble._served(assemble._built(model), "triton", torch.device("cpu"), None, None, invariant=False)
