"""Threads: how many torch operations beside the kernels run on, and kernels in a forked process."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from dfastllm.kernels import torch_alone, torch_team
from dfastllm.kernels.extension import TEAM


@pytest.fixture
def three() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def elsewhere() -> int:
    """Torch threads of a thread that begins now."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_one_thread_is_alone_and_the_others_are_as_before(three: None) -> None:
    seen: dict[str, int] = {}

    def engine() -> None:
        seen["before"] = torch.get_num_threads()
        torch_alone()
        seen["alone"] = torch.get_num_threads()
        with torch_team(TEAM - 1):
            seen["small"] = torch.get_num_threads()
        with contextlib.suppress(RuntimeError), torch_team(TEAM):
            seen["large"] = torch.get_num_threads()
            raise RuntimeError
        seen["after"] = torch.get_num_threads()
        seen["later thread"] = elsewhere()

    thread = threading.Thread(target=engine)
    thread.start()
    thread.join()
    assert seen == {"before": 3, "alone": 1, "small": 1, "large": 3, "after": 1, "later thread": 3}
    assert torch.get_num_threads() == 3


def test_a_thread_that_did_not_ask_is_left_alone(three: None) -> None:
    with torch_team(TEAM):
        assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == 3


FORK = """
import os, signal, torch
from dfastllm import LLM, SamplingParams
from dfastllm.errors import NotReadyError
from dfastllm.kernels import set_threads, threads

def ask(llm):
    return llm.generate(["What is 12 + 30?"], SamplingParams(temperature=0.5, seed=1, max_tokens=8))[0].text

def both(after):
    set_threads(2)
    llm = LLM("demo-ar")
    torch.ones(1 << 20).exp()  # so that torch's threads are there too
    answer = ask(llm)
    if after is None:
        return answer, llm
    assert answer == after, answer
    assert threads() == 2 or not NATIVE

from dfastllm.kernels import native
NATIVE = native() is not None
answer, llm = both(None)
child = os.fork()
if child == 0:
    signal.alarm(60)  # a hang ends here
    try:
        ask(llm)  # its engine's thread was not forked
    except NotReadyError:
        both(answer)
        os._exit(0)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert ask(llm) == answer
print("well")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_can_load_and_run_at_two_threads() -> None:
    ended = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120, check=False)
    assert ended.stdout == "well\n", ended.stderr
