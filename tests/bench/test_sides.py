"""What can be compared: commands, servers, models, commits; and what is said about sides that are none."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dfastllm.bench import sides
from dfastllm.bench.cpu.wire import Peer, PeerError
from dfastllm.bench.sides import Asked, open_side
from dfastllm.errors import GenerationError, ValidationError
from dfastllm.llm import load_engine
from tests.kit.live import Live, serving
from tests.kit.source import ROOT

SMALL = Asked(requests=1, max_tokens=4)


def test_asked_conversations_need_no_tools() -> None:
    prompts = Asked(requests=3).prompts()
    assert len(prompts) == 3
    assert all(message["role"] in ("system", "user") for messages in prompts for message in messages)
    assert prompts == Asked(requests=3).prompts()


def test_a_command_is_timed() -> None:
    code = f'"{sys.executable}" -S -c "import time; time.sleep(0.2)"'
    with open_side(code, SMALL) as once:
        assert 0.2 <= once() < 5


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        (f'"{sys.executable}" -c "import sys; sys.exit(\'broken\')"', GenerationError, "status 1: broken"),
        ("no-such-command-here --x", ValidationError, "cannot run 'no-such-command-here'"),
    ],
)
def test_commands_that_fail(text: str, error: type[Exception], said: str) -> None:
    with open_side(text, SMALL) as once, pytest.raises(error, match=said):
        once()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("  ", "got an empty text"),
        ("model:demo-diffusion?cash=dual", "cash"),
        ("model:demo-diffusion?cache=triple", "cache"),
        ("http://127.0.0.1:9", "names no model"),
        ("git:no-such-revision", "no-such-revision"),
        ("git:--output=x", "rev-parse"),
    ],
)
def test_sides_that_are_none(text: str, said: str) -> None:
    with pytest.raises(ValidationError, match=said), open_side(text, SMALL):
        pass


def test_a_model_with_options() -> None:
    spec = 'model:demo-ar?speculative={"method":"ngram","num_speculative_tokens":3}'
    for text in ("model:demo-diffusion?cache=dual&threshold=0.9", spec):
        with open_side(text, SMALL) as once:
            assert once() > 0


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving({"demo-ar": load_engine("demo-ar")}) as running:
        yield running


def test_a_server(live: Live) -> None:
    before = live.metric("request_success_total", model_name="demo-ar")
    with open_side(f"{live.url}/v1", Asked(requests=2, max_tokens=4)) as once:
        assert once() > 0
        assert once() > 0
    assert live.metric("request_success_total", model_name="demo-ar") == before + 4
    with open_side(live.url, Asked(1, 4, model="none")) as once, pytest.raises(GenerationError, match="none"):
        once()


def test_the_worker_runs_the_sources_it_is_given() -> None:
    """A process out of this work tree, editable installation or not."""
    command = [str(Path(sides.__file__).with_name("commit_worker.py")), str(ROOT / "src")]
    with Peer(Path(sys.executable), command) as peer:
        where = peer.call("load", model="demo-ar", prompts=SMALL.prompts(), max_tokens=4)
        assert where == str(ROOT / "src" / "dfastllm" / "__init__.py")
        assert float(peer.call("once")) > 0
    with (
        Peer(Path(sys.executable), [command[0], str(ROOT / "tests")]) as peer,
        pytest.raises(PeerError, match="not the"),
    ):
        peer.call("load", model="demo-ar", prompts=SMALL.prompts(), max_tokens=4)


def test_commits_with_other_kernels_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And one that is measured leaves no work tree behind. In a repository of its own: an archive has none."""
    git = ("git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t")
    (tmp_path / "CMakeLists.txt").write_text("one")
    (tmp_path / "src" / "dfastllm").mkdir(parents=True)
    (tmp_path / "src" / "dfastllm" / "__init__.py").write_text("")
    for words in (("init", "-q"), ("add", "."), ("commit", "-qm", "one")):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(sides, "HERE", tmp_path)
    monkeypatch.setattr("dfastllm.kernels.extension.native", lambda: sys)
    monkeypatch.setattr(sys, "__file__", "x.so", raising=False)
    (tmp_path / "CMakeLists.txt").write_text("two")
    with pytest.raises(ValidationError, match="other native kernels"), open_side("git:HEAD", SMALL):
        pass
    monkeypatch.setattr("dfastllm.kernels.extension.native", lambda: None)
    # The worker itself is not in that repository, so opening fails after the work tree was made.
    with pytest.raises(GenerationError, match="git:HEAD"), open_side("git:HEAD", SMALL):
        pass
    listed = subprocess.run([*git, "worktree", "list"], capture_output=True, text=True, check=True).stdout
    assert len(listed.splitlines()) == 1
