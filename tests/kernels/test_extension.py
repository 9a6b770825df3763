"""Which kernels are found, said and refused; and that a process ends well while another thread computes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dfastllm.errors import ValidationError
from dfastllm.kernels import describe, native, set_threads, table, threads

needs_native = pytest.mark.skipif(native() is None, reason="no native kernels here")


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


def test_zero_leaves_the_kernels_out() -> None:
    done = run("import dfastllm.kernels as k; print(k.native(), k.describe())", DFASTLLM_NATIVE="0")
    assert done.stdout.startswith("None DFASTLLM_NATIVE=0")


def test_the_table_names_every_op_once_with_a_reason() -> None:
    rows = table()
    assert [r.op for r in rows] == sorted({r.op for r in rows})
    assert {r.reason for r in rows} == {describe()}
    expected = "native" if native() is not None else "torch:"
    assert all(r.implementation.startswith(expected) for r in rows)


def test_a_wrong_path_is_named() -> None:
    done = run("import dfastllm.kernels as k; k.native()", DFASTLLM_NATIVE="/nowhere.so")
    assert "UnsupportedError" in done.stderr
    assert "'/nowhere.so'" in done.stderr


@needs_native
def test_an_unknown_instruction_set_is_named() -> None:
    done = run("import dfastllm.kernels as k; k.native()", DFASTLLM_ISA="avx1024")
    assert (
        "UnsupportedError: DFASTLLM_ISA must be scalar, avx2, avxvnni, avx512vl or avx512, got 'avx1024'" in done.stderr
    )


@needs_native
def test_a_lesser_instruction_set_can_be_asked_for() -> None:
    done = run("import dfastllm.kernels as k; print(k.describe())", DFASTLLM_ISA="scalar")
    assert done.stdout.strip() == "scalar: DFASTLLM_ISA asks for it"


@pytest.mark.parametrize("count", [0, -1, 1025])
def test_thread_counts_are_checked(count: int) -> None:
    before = threads()
    with pytest.raises(ValidationError, match=f"threads must be 1 to 1024, got {count}"):
        set_threads(count)
    assert threads() == before


@needs_native
def test_a_process_ends_well_while_a_daemon_thread_computes() -> None:
    """Not with torch's own operations, which abort the process in that case."""
    code = """
import threading, torch
from dfastllm.kernels import linear, native, set_threads
from dfastllm.kernels.packed import QTensor
set_threads(2)
w = linear.pack(QTensor("f32", torch.randn(512, 512)))
x, y = torch.randn(64, 512), torch.empty(64, 512)
inputs = linear.prepare(x, "f32")
where = (linear.describe(w), linear.describe_acts(inputs), y.data_ptr(), 512, False)
module, ready = native(), threading.Event()
def work():
    while True:
        module.linear(*where)
        ready.set()
threading.Thread(target=work, daemon=True).start()
ready.wait()
"""
    for _ in range(3):
        done = run(code)
        assert (done.returncode, done.stderr) == (0, "")
