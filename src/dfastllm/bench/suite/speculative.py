"""The suite under the names of the document that it set out from, for scripts that call them.

    suite = SpeculativeSuite()
    suite.test_prompts["custom"] = {"prompt": "...", "description": "Custom test", "expected_tokens": 200}
    results = suite.test_speculative_configurations("lm_studio")
    suite.generate_report(results, output_file="my_results.json")

Each method is a run of `run.Suite` with some of its parts, or shows and keeps what a run found."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dfastllm.bench.suite.configurations import Axes
from dfastllm.bench.suite.load import points
from dfastllm.bench.suite.probe import normalise, probe_all
from dfastllm.bench.suite.run import Plan, Suite
from dfastllm.bench.suite.schema import Results, ServerStatus, save_results
from dfastllm.bench.suite.sweep import Settings
from dfastllm.bench.suite.terminal import print_report
from dfastllm.bench.suite.workloads import SYSTEM_PROMPTS, Prompt, PromptSource, prompt_types
from dfastllm.errors import ValidationError

__all__ = ["SERVERS", "SpeculativeSuite"]

SERVERS: Mapping[str, str] = {
    "speculative": "http://127.0.0.1:8000",
    "lm_studio": "http://127.0.0.1:1234",
    "mlx": "http://127.0.0.1:11434",
}
TYPES = ("security", "code", "technical", "creative")
FIELDS = ("prompt", "description", "expected_tokens")
IN_FLIGHT = (1, 2, 4, 8)


class SpeculativeSuite:
    """Measures speculative decoding of a server.

    model           to ask for; None: the first that the server lists.
    out             directory of each run's files.
    settings        requests, rounds, tokens, seed; see `sweep.Settings`.
    axes            drafting methods and draft lengths; None: every method with 3, 5 and 7 tokens.
    test_prompts    prompt type to its questions. A type of one's own is {"prompt": text} with, if wanted, "description"
                    (its label) and "expected_tokens" (answers may be at least so long).
    system_prompts  name to text, of `test_system_prompts`.

    `server` of the methods is a name of SERVERS or a URL. They raise ValidationError for wrong input and
    DFastLLMError where nothing could be measured; a server that is lost on the way gives partial results.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        out: str | Path = "bench-results",
        settings: Settings | None = None,
        axes: Axes | None = None,
    ) -> None:
        self.model = model
        self.out = Path(out)
        self.settings = settings or Settings()
        self.axes = axes or Axes()
        built = prompt_types(self.settings.seed)
        self.test_prompts: dict[str, PromptSource | Mapping[str, Any]] = {name: built[name] for name in TYPES}
        self.system_prompts: dict[str, str] = dict(SYSTEM_PROMPTS)

    def check_servers(self) -> list[ServerStatus]:
        """Which of SERVERS run, and why the others do not."""
        return asyncio.run(probe_all(SERVERS))

    def test_speculative_configurations(self, server: str = "speculative") -> Results:
        """No speculation and every method and draft length in turns, over every prompt type."""
        return self._run(server, "sweep")

    def test_prompt_types(self, server: str = "speculative") -> Results:
        """What each prompt type gains: `Results.prompt_types`. Types are compared under the same configurations, so
        this measures what `test_speculative_configurations` does."""
        return self._run(server, "sweep")

    def test_system_prompts(self, server: str = "speculative") -> Results:
        """The baseline under each system prompt."""
        return self._run(server, "systems")

    def run_complete(self, server: str = "speculative") -> Results:
        """All of it, and requests in flight: configurations, prompt types, system prompts, load."""
        return self._run(server, "sweep", "systems", "load")

    def generate_report(self, results: Results, output_file: str | Path = "test_results.json") -> None:
        """Show the tables with the recommendations, and write the results to a file that `load_results` reads."""
        save_results(results, Path(output_file))
        print_report(results)

    def _run(self, server: str, *parts: str) -> Results:
        own = {name: given for name, given in self.test_prompts.items() if isinstance(given, Mapping)}
        longest = max([self.settings.max_tokens, *(_tokens(name, given) for name, given in own.items())])
        sources = {
            name: _source(name, given) if isinstance(given, Mapping) else given
            for name, given in self.test_prompts.items()
        }
        plan = Plan(
            sources=sources,
            url=normalise(SERVERS.get(server, server)),
            model=self.model,
            parts=("status", *parts),
            axes=self.axes,
            settings=dataclasses.replace(self.settings, max_tokens=longest),
            systems=self.system_prompts,
            points=tuple(points(list(IN_FLIGHT), [], "fixed", [], 32, 10.0)),
        )
        results = asyncio.run(Suite(plan, self.out).run())
        labels = {name: str(given["description"]) for name, given in own.items() if "description" in given}
        kinds = [k.model_copy(update={"label": labels.get(k.name, k.label)}) for k in results.prompt_types]
        return results.model_copy(update={"prompt_types": tuple(kinds)})


def _tokens(name: str, given: Mapping[str, Any]) -> int:
    """How long answers of an own type may be at least; 0 where it does not say. Raises ValidationError for a type that
    is none."""
    if unknown := sorted(set(given) - set(FIELDS)):
        raise ValidationError(
            f"test_prompts[{name!r}]: unknown field {unknown[0]!r}; there are {', '.join(FIELDS)}.",
            param="test_prompts",
        )
    if not isinstance(given.get("prompt"), str) or not given["prompt"]:
        raise ValidationError(f"test_prompts[{name!r}]: prompt must be a text.", param="test_prompts")
    tokens = given.get("expected_tokens", 0)
    if not isinstance(tokens, int) or tokens < 0:
        raise ValidationError(
            f"test_prompts[{name!r}]: expected_tokens must be a whole number of at least 0, got {tokens!r}.",
            param="test_prompts",
        )
    return tokens


def _source(name: str, given: Mapping[str, Any]) -> PromptSource:
    prompt = Prompt(f"{name}/own", name, ({"role": "user", "content": given["prompt"]},))
    return lambda index: prompt
