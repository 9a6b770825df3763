"""The suite under the document's names, against a server that speculates."""

from __future__ import annotations

from pathlib import Path

import pytest

from dfastllm.bench.suite import load_results
from dfastllm.bench.suite.configurations import Axes
from dfastllm.bench.suite.speculative import SERVERS, SpeculativeSuite
from dfastllm.bench.suite.sweep import Settings
from dfastllm.errors import ValidationError
from tests.kit.mock_server import Behaviour, MockServer, faster

SPECULATES = Behaviour(ttft=0.002, itl=0.001, tokens=12, honours={"speculative_config": faster(1.1)})


def test_the_documents_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its three lines: own prompts, one server, a file of another name."""
    suite = SpeculativeSuite(
        out=tmp_path, settings=Settings(1, 2, max_tokens=16), axes=Axes(ks=(3,), methods=("ngram",))
    )
    assert list(suite.test_prompts) == ["security", "code", "technical", "creative"]
    for name in ("code", "technical", "creative"):
        del suite.test_prompts[name]
    suite.test_prompts["custom"] = {"prompt": "Your prompt.", "description": "Custom test", "expected_tokens": 200}
    with MockServer(SPECULATES) as server:
        monkeypatch.setattr("dfastllm.bench.suite.speculative.SERVERS", {**SERVERS, "lm_studio": server.url})
        results = suite.test_speculative_configurations("lm_studio")
    assert [c.name for c in results.configurations] == ["none", "ngram-3"]
    assert [kind.label for kind in results.prompt_types][-1] == "Custom test"
    asked = [body for body in server.bodies if body["messages"][-1]["content"] == "Your prompt."]
    assert {body.get("max_tokens", body.get("max_completion_tokens")) for body in asked} >= {200}
    suite.generate_report(results, output_file=tmp_path / "my_results.json")
    assert load_results(tmp_path / "my_results.json") == results
    assert "Performance by configuration" in capsys.readouterr().out


def test_system_prompts_and_servers(tmp_path: Path) -> None:
    suite = SpeculativeSuite(out=tmp_path, settings=Settings(1, 1, max_tokens=8))
    suite.test_prompts = {"custom": {"prompt": "Say yes."}}
    suite.system_prompts = {"empty": "", "concise": "Be brief."}
    with MockServer(SPECULATES) as server:
        results = suite.test_system_prompts(server.url)
    assert {s.name for s in results.system_prompts} == {"empty", "concise"}
    assert {s.name for s in suite.check_servers()} == {"speculative", "lm_studio", "mlx"}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, "prompt must be"),
        ({"prompt": "x", "tokens": 3}, "'tokens'"),
        ({"prompt": "x", "expected_tokens": -1}, "-1"),
    ],
)
def test_wrong_own_prompts_are_named(tmp_path: Path, given: dict[str, object], named: str) -> None:
    suite = SpeculativeSuite(out=tmp_path)
    suite.test_prompts["custom"] = given
    with pytest.raises(ValidationError, match=named):
        suite.test_speculative_configurations("http://127.0.0.1:9")
