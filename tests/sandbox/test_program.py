"""Programs of unknown origin: each thing they might do, and that nothing of it outlives them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dfastllm.errors import SandboxError, ValidationError
from dfastllm.sandbox import Guarantees, ProgramLimits, guarantees, run_program
from dfastllm.sandbox.confine import MACHINES, filter_of

LINUX = sys.platform == "linux" and os.uname().machine in MACHINES
SHORT = ProgramLimits(seconds=2.0, memory=256 << 20, file=1 << 16, shown=2000)


def test_a_program_that_is_right() -> None:
    ran = run_program(
        "import math, json, re, random\nprint(json.dumps({'a': math.sqrt(4)}))\nassert re.match('a', 'ab')"
    )
    assert (ran.ended, ran.output) == ("done", '{"a": 2.0}\n')


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("assert 1 == 2", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("import sys\nsys.exit(0)", ""),  # it left before its last line: its tests did not run
        ("import os\nos._exit(0)", ""),
        ("x = bytearray(1 << 30)", "MemoryError"),
        ("open('big', 'w').write('x' * (1 << 20))", "File too large"),
        ("import numpy", "No module named 'numpy'"),
        ("import dfastllm", "No module named 'dfastllm'"),
        ("files = [open(f'f{i}', 'w') for i in range(200)]", "Too many open files"),
        ("input()", "EOFError"),
    ],
)
def test_what_does_not_pass(source: str, said: str) -> None:
    ran = run_program(source, SHORT)
    assert ran.ended == "failed"
    assert said in ran.output


@pytest.mark.parametrize("source", ["while True: pass", "import time\ntime.sleep(60)"])
def test_a_program_without_end(source: str) -> None:
    began = time.monotonic()
    assert run_program(source, ProgramLimits(seconds=0.5)).ended == "timeout"
    assert time.monotonic() - began < 5


def test_output_is_cut() -> None:
    ran = run_program("print('a' * 30000)\nprint('end')", SHORT)
    assert ran.ended == "done"
    assert len(ran.output) <= 2000
    assert ran.output.endswith("end\n")


@pytest.mark.skipif(not LINUX, reason="system calls are filtered on Linux, on x86_64 and aarch64")
@pytest.mark.parametrize(
    "source",
    [
        "import socket\nsocket.socket()",
        "import os\nos.fork()",
        "import subprocess\nsubprocess.run(['/bin/true'])",
        "import os\nos.setsid()",
        "import os\nos.kill(os.getppid(), 9)",
        "import resource\nresource.prlimit(1, resource.RLIMIT_CPU, (1, 1))",
        "import multiprocessing\nmultiprocessing.Process(target=print).start()",
    ],
)
def test_calls_that_are_refused(source: str) -> None:
    ran = run_program(source, SHORT)
    assert ran.ended == "failed"
    assert "not permitted" in ran.output or "Permission denied" in ran.output


@pytest.mark.skipif(not LINUX, reason="as above")
def test_threads_are_no_processes() -> None:
    source = "import threading\nt = threading.Thread(target=print, args=('hi',))\nt.start()\nt.join()"
    assert run_program(source, SHORT).output == "hi\n"


def test_what_holds_here_is_told() -> None:
    found = guarantees()
    if LINUX:
        assert found.network
        assert found.processes
    words = found.words(ProgramLimits())
    assert words.startswith("10 s, 1024 MiB of memory")
    nothing = Guarantees(False, False, True, False).words(SHORT)
    assert "NOT ENFORCED here: no network, no other processes, writes only a directory of its own" in nothing


def test_files_of_others(tmp_path: Path) -> None:
    """Where `guarantees` says so, a program reads nothing of this project and writes nothing outside of its place."""
    secret = tmp_path / "secret"
    secret.write_text("word")
    found = guarantees()
    read = run_program(f"print(open({str(secret)!r}).read())", SHORT)
    assert ("word" in read.output) != found.reading
    run_program(f"open({str(tmp_path / 'made')!r}, 'w').write('x')", SHORT)
    assert (tmp_path / "made").exists() != found.writing
    assert run_program("open('own', 'w').write('x')\nprint(open('own').read())", SHORT).output == "x\n"


def test_variables_stay_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "abc")
    assert "abc" not in run_program("import os\nprint(dict(os.environ))").output


def test_what_no_file_can_hold_and_no_process() -> None:
    with pytest.raises(SandboxError, match="no text that a file can hold"):
        run_program("print('\ud800')")
    with pytest.raises(ValidationError, match="seconds must be above 0"):
        ProgramLimits(seconds=0)


def test_no_process_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*args: object, **more: object) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(subprocess, "Popen", none)
    with pytest.raises(SandboxError, match="no process can be started"):
        run_program("print(1)")


def test_the_filter_leaves_a_machine_that_is_not_known_alone() -> None:
    assert filter_of("riscv64") == []
    for machine, (_, refused, *_rest) in MACHINES.items():
        instructions = filter_of(machine)
        assert all(
            0 <= true < len(instructions) and 0 <= false < len(instructions) for _, true, false, _ in instructions
        )
        assert {number for code, _, _, number in instructions if code == 0x15} >= set(refused.values())
