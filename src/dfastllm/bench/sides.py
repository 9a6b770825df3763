"""What `dfastllm gate compare` can put on a side: a command, a server, a model with options, a commit.

Each is opened as a context and then measures one thing over and over, in seconds:

- a command: from start to exit; a status other than 0 is an error.
- http://HOST:PORT or https://...: the same few requests to an OpenAI-compatible server, one after the other.
- model:NAME?option=value&...: the same requests to a model in this process; options of the decoder as in a request
  (cache, threshold, steps, ...), and speculative (JSON).
- git:REVISION: the same on that commit's Python code, in a process of its own out of a temporary work tree. The native
  kernels are those of this installation, so commits that differ in them are refused.
"""

from __future__ import annotations

import asyncio
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from dfastllm.bench.cpu.wire import Peer, PeerError
from dfastllm.core import DecodeParams, SamplingParams
from dfastllm.errors import GenerationError, ValidationError
from dfastllm.metrics.workload import speed_samples

__all__ = ["Asked", "open_side"]

Side = Callable[[], float]
HERE = Path(__file__).parent
NATIVE = ("src/dfastllm/kernels/native", "CMakeLists.txt")  # what the compiled kernels are made of


@dataclass(frozen=True)
class Asked:
    """What servers, models and commits are asked each time. model: of a commit, and of a server with several."""

    requests: int = 4
    max_tokens: int = 64
    model: str | None = None

    def prompts(self) -> list[Sequence[dict[str, Any]]]:
        """Conversations of the task mix without tools, which every server can answer."""
        samples = speed_samples(2 * self.requests)[1::2]
        return [[dict(message) for message in sample.messages] for sample in samples]


@contextmanager
def open_side(text: str, asked: Asked) -> Iterator[Side]:
    """Raises ValidationError for a side that is none; what measuring raises when it fails."""
    if not text.strip():
        raise ValidationError(
            "a side is a command, a URL, model:NAME or git:REVISION, got an empty text.", param="side"
        )
    if text.startswith(("http://", "https://")):
        opened = _server(text, asked)
    elif text.startswith("model:"):
        opened = _model(text.removeprefix("model:"), asked)
    elif text.startswith("git:"):
        opened = _commit(text.removeprefix("git:"), asked)
    else:
        opened = _command(text)
    with opened as side:
        yield side


@contextmanager
def _command(text: str) -> Iterator[Side]:
    words = shlex.split(text)

    def once() -> float:
        began = time.perf_counter()
        try:
            done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
        except OSError as error:
            raise ValidationError(f"cannot run {words[0]!r}: {error}.", param="side") from error
        took = time.perf_counter() - began
        if done.returncode:
            said = (done.stderr or done.stdout).strip()[-500:]
            raise GenerationError(f"{text!r} ended with status {done.returncode}: {said}")
        return took

    yield once


@contextmanager
def _server(url: str, asked: Asked) -> Iterator[Side]:
    from dfastllm.bench.suite.client import Call, Client

    base = url.rstrip("/").removesuffix("/v1")
    calls = [Call(messages, max_tokens=asked.max_tokens) for messages in asked.prompts()]
    with asyncio.Runner() as runner:
        model = asked.model or runner.run(_first_model(base))
        client = Client(base, model)

        async def all_calls() -> None:
            for call in calls:
                answer = await client.ask(call)
                if not answer.ok:
                    raise GenerationError(f"{url}: {answer.error}: {answer.message}")

        def once() -> float:
            began = time.perf_counter()
            runner.run(all_calls())
            return time.perf_counter() - began

        try:
            yield once
        finally:
            runner.run(client.aclose())


async def _first_model(base: str) -> str:
    import httpx2

    try:
        async with httpx2.AsyncClient(timeout=10.0, trust_env=False) as client:
            answer = await client.get(f"{base}/v1/models")
            return str(answer.raise_for_status().json()["data"][0]["id"])
    except (httpx2.HTTPError, ValueError, LookupError, TypeError) as error:
        raise ValidationError(f"{base}/v1/models names no model: {error}.", param="side") from error


@contextmanager
def _model(text: str, asked: Asked) -> Iterator[Side]:
    from dfastllm.llm import LLM

    name, _, query = text.partition("?")
    options: dict[str, Any] = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    speculative = options.pop("speculative", None)
    if isinstance(speculative, dict):
        speculative = json.dumps(speculative)
    try:
        decode = DecodeParams(**options) if options else None
    except TypeError as error:
        raise ValidationError(f"model:{text}: {error}.", param="side") from error
    sampling = SamplingParams(temperature=0.0, max_tokens=asked.max_tokens)
    with LLM(name, speculative=speculative) as llm:
        prompts = [llm.render(messages) for messages in asked.prompts()]

        def once() -> float:
            began = time.perf_counter()
            for prompt in prompts:
                llm.generate([prompt], sampling, decode)
            return time.perf_counter() - began

        yield once


@contextmanager
def _commit(revision: str, asked: Asked) -> Iterator[Side]:
    root = _git("rev-parse", "--show-toplevel", cwd=str(HERE))
    commit = _git("rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}", cwd=root)
    with tempfile.TemporaryDirectory() as directory:
        tree = str(Path(directory) / "tree")
        kernels = _kernels(revision, commit, root)
        _git("worktree", "add", "--detach", "--quiet", tree, commit, cwd=root)
        try:
            source = str(Path(tree) / "src")
            with Peer(
                Path(sys.executable), [str(HERE / "commit_worker.py"), source], environment={"DFASTLLM_NATIVE": kernels}
            ) as peer:
                model = asked.model or "demo-ar"
                peer.call("load", model=model, prompts=asked.prompts(), max_tokens=asked.max_tokens)
                yield lambda: float(peer.call("once"))
        except PeerError as error:
            raise GenerationError(f"git:{revision}: {error}") from error
        finally:
            _git("worktree", "remove", "--force", tree, cwd=root)


def _kernels(revision: str, commit: str, root: str) -> str:
    """DFASTLLM_NATIVE for a commit: this installation's kernels, if the commit has the same ones; "0" without any."""
    from dfastllm.kernels.extension import native

    module = native()
    if module is None:
        return "0"
    if _git("diff", "--name-only", commit, "--", *NATIVE, cwd=root):
        raise ValidationError(
            f"commit {revision} has other native kernels than this work tree, which would have to be built.",
            param="side",
            hint="Set DFASTLLM_NATIVE=0, or install the commits into environments of their own and compare commands.",
        )
    return str(module.__file__)


def _git(*words: str, cwd: str) -> str:
    try:
        done = subprocess.run(["git", *words], cwd=cwd, capture_output=True, text=True)
    except OSError as error:
        raise ValidationError(f"git cannot be run: {error}.", param="side") from error
    if done.returncode:
        raise ValidationError(f"git {' '.join(words)}: {done.stderr.strip()}", param="side")
    return done.stdout.strip()
