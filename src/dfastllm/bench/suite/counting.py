"""What a server says about itself beside its answers: token counts of a text, and counters of /metrics."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpx2

from dfastllm.bench.suite.client import Answer, Client
from dfastllm.bench.suite.figures import spec_counts
from dfastllm.bench.suite.schema import Speculation

__all__ = ["CHARACTERS_PER_TOKEN", "Counters", "TokenCounter"]

CHARACTERS_PER_TOKEN = 4  # the usual rule of thumb for English; only ever used as a labelled estimate


class TokenCounter:
    """Counts the tokens of answers whose server gave no usage: by its tokenize endpoint (dfastllm and vLLM,
    llama-server, llama-cpp-python), else as an estimate. Outside the timed part."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self._form: Callable[[str], Awaitable[int | None]] | None = None
        self._tried = False

    async def fill(self, answers: Sequence[Answer]) -> None:
        """Give every good answer without a count one, and say from where."""
        for answer in answers:
            if answer.ok and answer.completion_tokens is None:
                text = answer.graded
                counted = await self._count(text)
                answer.tokens_source = "estimate" if counted is None else "tokenize"
                answer.completion_tokens = -(-len(text) // CHARACTERS_PER_TOKEN) if counted is None else counted

    async def _count(self, text: str) -> int | None:
        if not self._tried:
            self._tried = True
            for form in (self._vllm, self._llama_server, self._llama_cpp_python):
                if await form("Hello there.") is not None:
                    self._form = form
                    break
        return await self._form(text) if self._form is not None else None

    async def _vllm(self, text: str) -> int | None:
        body = {"model": self.client.model, "prompt": text, "add_special_tokens": False}
        return await self._post("/tokenize", body)

    async def _llama_server(self, text: str) -> int | None:
        return await self._post("/tokenize", {"content": text})

    async def _llama_cpp_python(self, text: str) -> int | None:
        return await self._post("/extras/tokenize/count", {"input": text})

    async def _post(self, path: str, body: dict[str, Any]) -> int | None:
        try:
            response = await self.client.http.post(self.client.base + path, json=body)
            data = response.json() if response.status_code == 200 else {}
            count = data.get("count", len(data["tokens"]) if isinstance(data.get("tokens"), list) else None)
        except (httpx2.HTTPError, ValueError, AttributeError):
            return None
        return count if isinstance(count, int) else None


class Counters:
    """Speculation counters of a server's /metrics: vllm:spec_decode_num_*_total or dfastllm's of the same names.
    `mark` remembers, `since` tells the difference; None for a server without them."""

    NAMES = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    PER_POSITION = "num_accepted_tokens_per_pos"

    def __init__(self, client: Client) -> None:
        self.client = client
        self._before: dict[str, float] | None = None

    async def mark(self) -> None:
        self._before = await self._read()

    async def since(self) -> Speculation | None:
        before, after = self._before, await self._read()
        if before is None or after is None:
            return None
        change = {name: round(after[name] - before.get(name, 0.0)) for name in after}
        drafts, tokens, accepted = (change.get(name, 0) for name in self.NAMES)
        if drafts <= 0:
            return None
        places = sorted((int(key.partition("@")[2]), count) for key, count in change.items() if "@" in key)
        return spec_counts(drafts, tokens, accepted, [count for _, count in places], "metrics")

    async def _read(self) -> dict[str, float] | None:
        from prometheus_client.parser import text_string_to_metric_families

        try:
            response = await self.client.http.get(f"{self.client.base}/metrics")
            if response.status_code != 200:
                return None
            families = list(text_string_to_metric_families(response.text))
        except (httpx2.HTTPError, ValueError):
            return None
        found: dict[str, float] = {}
        for sample in (sample for family in families for sample in family.samples):
            _, marker, name = sample.name.partition("spec_decode_")
            name = name.removesuffix("_total")
            if not marker or sample.labels.get("model_name", self.client.model) != self.client.model:
                continue
            if name in self.NAMES:
                found[name] = found.get(name, 0.0) + sample.value
            elif name == self.PER_POSITION and sample.labels.get("position", "").isdigit():
                key = f"{name}@{sample.labels['position']}"
                found[key] = found.get(key, 0.0) + sample.value
        return found if found else None
