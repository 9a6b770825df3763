"""A teacher behind an OpenAI-compatible server: one question, one answer, asked as often as it takes and paid once.

What may pass (429, 5xx, a timeout, a broken connection, an answer that cannot be read or is empty) is tried again, with
bounded backoff and as the server's Retry-After says; what will not pass (400, 401, 403, 404) is told at once. An answer
is in the cache before anybody counts it as had. Which answers are worth learning from is not judged here.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import httpx2

from dfastllm.distill.teacher.answer import Answer, read_answer
from dfastllm.distill.teacher.budget import Budget, Prices, Reservation
from dfastllm.distill.teacher.cache import AnswerCache, request_key
from dfastllm.distill.teacher.clock import SYSTEM, Clock
from dfastllm.distill.teacher.pace import Pace, backoff, retry_after
from dfastllm.distill.teacher.replies import Retry, refusal, retry_of
from dfastllm.distill.teacher.settings import TeacherSettings
from dfastllm.errors import ModelNotFoundError, RateLimitError, TeacherError

__all__ = ["Counts", "Reply", "TeacherClient", "rough_tokens"]

LARGEST = 64 << 20  # bytes of a response
EXTENSIONS = ("return_token_ids", "return_tokens_as_token_ids")
Messages = Sequence[Mapping[str, Any]]


@dataclass
class Counts:
    """What happened. sent: requests that left. answered: answers that came and were kept. cached: answers that were
    there already. retried: attempts that failed and were made again, by reason."""

    sent: int = 0
    answered: int = 0
    cached: int = 0
    retried: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Reply:
    """An answer and where it came from. key: of the request, "" where there is no cache. cached: nothing was paid."""

    answer: Answer
    key: str
    cached: bool


def rough_tokens(messages: Messages, tools: Sequence[Mapping[str, Any]]) -> int:
    """About how many tokens a prompt has, told without its tokenizer and rather too many: a third of its bytes as JSON,
    as English text has four or more bytes a token."""
    return len(json.dumps([list(messages), list(tools)], ensure_ascii=False).encode("utf-8", "replace")) // 3 + 1


class TeacherClient:
    """Asks one server. Used as an async context manager, in one event loop.

    cache   where answers are kept.
    budget  None: the settings' own, with nothing spent.
    tokens  counts the tokens of a prompt, for limits and budget; usage corrects it afterwards.
    clock, rng, transport   for tests.

    Raises ValidationError when the key's variable is not set.
    """

    def __init__(
        self,
        settings: TeacherSettings,
        cache: AnswerCache,
        *,
        budget: Budget | None = None,
        tokens: Callable[[Messages, Sequence[Mapping[str, Any]]], int] = rough_tokens,
        clock: Clock = SYSTEM,
        rng: random.Random | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self.settings = settings
        self.model = settings.model
        self.cache = cache
        prices = Prices(settings.price_prompt, settings.price_completion)
        self.budget = budget or Budget(settings.budget_tokens, settings.budget_price, prices)
        self.count_tokens = tokens
        self.clock = clock
        self.rng = rng or random.Random()
        self.pace = Pace(settings.requests_per_minute, settings.tokens_per_minute, clock)
        self.counts = Counts()
        self.extensions = settings.token_ids
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._locks: dict[str, asyncio.Lock] = {}
        self._key = settings.api_key()
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        own = httpx2.URL(settings.base_url).host in ("localhost", "127.0.0.1", "::1")
        self._http = httpx2.AsyncClient(
            headers=headers,
            timeout=httpx2.Timeout(settings.timeout, connect=min(10.0, settings.timeout), pool=None),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=settings.concurrency),
            trust_env=not own,  # proxies are for servers elsewhere
            transport=transport,
        )

    async def __aenter__(self) -> TeacherClient:
        """Also finds the model's name where the settings leave it to the server."""
        try:
            if not self.model:
                self.model = await self._only_model()
        except BaseException:
            await self._http.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    def describe(self) -> dict[str, Any]:
        """What answers follow from, for the head of a file."""
        return self.settings.describe() | {"model": self.model}

    def key(self, messages: Messages, tools: Sequence[Mapping[str, Any]]) -> str:
        return request_key(self.model, messages, tools, self.settings.params)

    async def ask(self, messages: Messages, tools: Sequence[Mapping[str, Any]] = ()) -> Reply:
        """The answer, from the cache or the server. Two that ask the same at once are asked once.

        Raises AuthenticationError (401, 403), ModelNotFoundError (404), ValidationError (other refusals),
        RateLimitError (a wait longer than `longest_wait`, or a quota that is used up), BudgetError, StorageError, and
        TeacherError when every attempt failed.
        """
        key = self.key(messages, tools)
        lock = self._locks.setdefault(key, asyncio.Lock())
        async with lock:
            try:
                return await self._ask(key, messages, tools)
            finally:
                if self._locks.get(key) is lock:  # who waits has it, and finds the answer in the cache
                    del self._locks[key]

    async def _ask(self, key: str, messages: Messages, tools: Sequence[Mapping[str, Any]]) -> Reply:
        found = self.cache.get(key)
        if found is not None:
            try:
                reply = Reply(read_answer(found), key, True)
            except ValueError:  # of a version that took for an answer what is none
                self.cache.damaged += 1
            else:
                self.counts.cached += 1
                return reply
        until = self.clock.now() + self.settings.row_deadline
        prompt = self.count_tokens(messages, tools)
        body = {"model": self.model, "messages": list(messages), **self.settings.params}
        if tools:
            body["tools"] = list(tools)
        attempt = 0
        while True:
            last = attempt + 1 >= self.settings.attempts
            try:
                answer = await self._attempt(key, body, prompt, keep_empty=last)
            except Retry as retry:
                wait = self._wait_for(retry, attempt, until, last)
                self.counts.retried[retry.reason] += 1
            else:
                self.counts.answered += 1
                return Reply(answer, key, False)
            attempt += 1
            await self.clock.sleep(wait)

    def _wait_for(self, retry: Retry, attempt: int, until: float, last: bool) -> float:
        """Seconds before the next attempt. Raises RateLimitError and TeacherError where there is none."""
        told = retry.after
        if told is not None and told > self.settings.longest_wait:
            raise RateLimitError(
                f"The teacher at {self.settings.base_url} wants to be asked again in {told:.0f} s: {retry.message}",
                retry_after=told,
                hint=f"longest_wait is {self.settings.longest_wait:g} s. All answers so far are kept.",
            )
        if last:
            raise self._failed(retry, f"{attempt + 1} attempts failed")
        wait = max(backoff(attempt, self.settings.backoff, self.settings.backoff_most, self.rng), told or 0.0)
        if self.clock.now() + wait > until:
            raise self._failed(retry, f"{self.settings.row_deadline:g} s (row_deadline) are over")
        if told is not None:
            self.pace.pause(told)  # the server means everybody
        return wait

    def _failed(self, retry: Retry, why: str) -> TeacherError:
        return TeacherError(
            f"No answer from the teacher at {self.settings.base_url}: {why}, the last with {retry.reason}: "
            f"{retry.message}",
            reason=retry.reason,
        )

    async def _attempt(self, key: str, body: Mapping[str, Any], prompt: int, *, keep_empty: bool) -> Answer:
        """One request. The answer is in the cache when this returns. keep_empty: an empty one is an answer too."""
        most = prompt + self._most_tokens()
        async with self._slots:
            held = await self.budget.reserve(prompt, self._most_tokens())
            try:
                await self.pace.enter(most)
                response = await self._send(body)
                answer = _read(response)
                self._settle(held, answer, most)
            except (Retry, asyncio.CancelledError) as error:
                if not isinstance(error, Retry) or error.paid:
                    self.budget.keep(held)
                raise
            finally:
                if held.open:
                    self.budget.release(held)
            if answer.empty and answer.finish_reason in ("stop", "tool_calls") and not keep_empty:
                raise Retry("empty", "an answer without text and calls", paid=True)
            self.cache.put(key, response)
            return answer

    def _most_tokens(self) -> int:
        params = self.settings.params
        return int(params.get("max_completion_tokens", params.get("max_tokens", self.settings.max_tokens)))

    def _settle(self, held: Reservation, answer: Answer, most: int) -> None:
        """Spend what usage says, or all that was held where the server tells none."""
        if answer.prompt_tokens is None or answer.completion_tokens is None:
            self.budget.keep(held)
            return
        self.budget.settle(held, answer.prompt_tokens, answer.completion_tokens)
        self.pace.settle(most, answer.prompt_tokens + answer.completion_tokens)

    async def _send(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The response of one POST. Raises Retry, or what `refusal` makes of a status."""
        while True:
            extended = self.extensions and bool(body.get("logprobs"))
            sent = {**body, **dict.fromkeys(EXTENSIONS, True)} if extended else body
            status, headers, data = await self._exchange("POST", "/chat/completions", json.dumps(sent).encode())
            if status == 200:
                return _object(data)
            text = self._clean(data.decode("utf-8", "replace"))
            if extended and status in (400, 422) and any(name in text for name in EXTENSIONS):
                self.extensions = False  # the server knows no such fields, and has done nothing
                continue
            after = retry_after(headers, self.clock.wall())
            retry = retry_of(status, text, after)
            raise retry if retry is not None else refusal(status, text, self.settings.base_url, self.model)

    async def _exchange(self, method: str, path: str, body: bytes | None) -> tuple[int, httpx2.Headers, bytes]:
        """Status, headers and body of one request. Raises Retry for what happens on the way."""
        if method == "POST":
            self.counts.sent += 1
        try:
            async with asyncio.timeout(self.settings.timeout):
                async with self._http.stream(method, self.settings.base_url + path, content=body) as response:
                    parts, size = [], 0
                    async for part in response.aiter_bytes():
                        parts.append(part)
                        size += len(part)
                        if size > LARGEST:
                            raise Retry("too_large", f"a response of more than {LARGEST >> 20} MiB.", paid=True)
                    return response.status_code, response.headers, b"".join(parts)
        except (TimeoutError, httpx2.TimeoutException) as error:
            paid = not isinstance(error, httpx2.ConnectTimeout)
            raise Retry("timeout", f"no complete answer within {self.settings.timeout:g} s.", paid=paid) from error
        except httpx2.ConnectError as error:
            raise Retry("connect", self._clean(f"no connection: {error}."), paid=False) from error
        except httpx2.HTTPError as error:
            raise Retry("reset", self._clean(f"{type(error).__name__}: {error}."), paid=True) from error

    async def _only_model(self) -> str:
        """The name of the one model that the server has. Raises ModelNotFoundError where it has none or several."""
        try:
            status, _, data = await self._exchange("GET", "/models", None)
            if status != 200:
                raise refusal(status, self._clean(data.decode("utf-8", "replace")), self.settings.base_url, "")
            rows = _object(data).get("data")
        except Retry as retry:
            raise self._failed(retry, "it was asked for its models") from retry
        names = [str(row.get("id")) for row in rows or () if isinstance(row, dict)] if isinstance(rows, list) else []
        if len(names) != 1:
            raise ModelNotFoundError(
                f"{self.settings.base_url} has {len(names)} models"
                + (f" ({', '.join(names[:8])})" if names else "")
                + ", and the settings name none.",
                param="teacher.model",
                hint="Name the one that shall teach.",
            )
        return names[0]

    def _clean(self, text: str) -> str:
        """A server's words without the key, which some repeat."""
        return text if self._key is None else text.replace(self._key, "***")


def _object(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Retry("bad_json", f"the response is no JSON ({error}): {data[:80]!r}.", paid=True) from error
    if not isinstance(found, dict):
        raise Retry("bad_json", f"the response is no JSON object: {data[:80]!r}.", paid=True)
    return found


def _read(response: Mapping[str, Any]) -> Answer:
    if response.get("error") and not response.get("choices"):
        raise Retry("server_error", f"{response['error']!r:.200}", paid=True)
    try:
        return read_answer(response)
    except ValueError as error:
        raise Retry("bad_json", f"the response is no chat completion: {error}.", paid=True) from error
