"""What a run says of its teacher: where it is, what it is asked, how fast, and what it may cost.

The key of the server is not here: only the name of the environment variable that holds it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic import ValidationError as Malformed

from dfastllm.errors import ValidationError

__all__ = ["RESERVED", "TeacherSettings"]

RESERVED = frozenset({"model", "messages", "tools", "stream", "n", "logprobs", "top_logprobs"})


def _root(url: str) -> str:
    """The root of the API, with /v1 where no path was given."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"must be http://HOST:PORT/v1 or https://HOST/v1, got {url!r}")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must hold no user and no password; name the variable of the key in api_key_env")
    if parts.query or parts.fragment:
        raise ValueError(f"must end with its path, got {url!r}")
    return url.rstrip("/") + ("/v1" if not parts.path.strip("/") else "")


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class TeacherSettings(BaseModel):
    """A teacher behind an OpenAI-compatible server.

    base_url        root of its API, with /v1.
    model           the name that its server knows it by; "": the only one that it serves.
    api_key_env     the environment variable that holds the key; None: no key is sent.
    max_tokens      of an answer. An answer that reaches it is rejected.
    temperature     0: the likeliest token each time. At other temperatures some servers give log-probabilities of the
                    distribution that was drawn from, not of the model's own.
    seed            of sampling; None leaves it to the server.
    top_logprobs    best tokens of each position whose log-probabilities are asked for, 0 to 20 (what servers give at
                    most); 0 asks for none.
    token_ids       also ask for token ids, as vLLM and dfastllm give them; a server that refuses is asked without.
    options         further fields of the request (top_p, max_completion_tokens ...); null takes one of ours away.
    concurrency     requests under way at once.
    requests_per_minute, tokens_per_minute   limits of the server; None: none.
    attempts        times a question is asked at most.
    backoff, backoff_most   seconds before the second attempt, doubled each time, and their bound.
    longest_wait    seconds of Retry-After that are waited for; a server that asks for more ends the run.
    timeout         seconds of one attempt.
    row_deadline    seconds of one question with all its attempts and waits.
    deadline        seconds after which no further question is asked; None: none.
    give_up_after   questions that fail one after the other before the run ends.
    price_prompt, price_completion   of a million tokens, in any currency.
    budget_tokens, budget_price      what all answers of the run's file may cost together, those from the cache and the
                    requests whose outcome is unknown included; None: no bound.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    base_url: Annotated[str, AfterValidator(_root)]
    model: str = ""
    api_key_env: str | None = None
    max_tokens: int = Field(256, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)
    seed: int | None = 0
    top_logprobs: int = Field(20, ge=0, le=20)
    token_ids: bool = True
    options: dict[str, Any] = Field(default_factory=dict)
    concurrency: int = Field(8, ge=1, le=1024)
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    attempts: int = Field(6, ge=1, le=100)
    backoff: Positive = 1.0
    backoff_most: Positive = 60.0
    longest_wait: Positive = 300.0
    timeout: Positive = 120.0
    row_deadline: Positive = 900.0
    deadline: Positive | None = None
    give_up_after: int = Field(8, ge=1)
    price_prompt: Price = 0.0
    price_completion: Price = 0.0
    budget_tokens: int | None = Field(None, ge=1)
    budget_price: Positive | None = None

    @field_validator("options")
    @classmethod
    def _only_further(cls, options: dict[str, Any]) -> dict[str, Any]:
        ours = sorted(RESERVED & options.keys())
        if ours:
            raise ValueError(f"must not hold {', '.join(ours)}, which the client itself decides")
        return options

    @model_validator(mode="after")
    def _agree(self) -> TeacherSettings:
        if self.budget_price is not None and not (self.price_prompt or self.price_completion):
            raise ValueError("budget_price needs price_prompt or price_completion, or it bounds nothing")
        return self

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> TeacherSettings:
        """The settings of a table of fields. Raises ValidationError naming the first field that is wrong."""
        try:
            return cls(**fields)
        except Malformed as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"]) or "teacher"
            words = first["msg"].removeprefix("Value error, ")
            raise ValidationError(f"teacher.{name}: {words}.", param=f"teacher.{name}") from None

    @property
    def params(self) -> dict[str, Any]:
        """The fields of a request beside model, messages and tools: what an answer follows from."""
        fields: dict[str, Any] = {"max_tokens": self.max_tokens, "temperature": self.temperature, "seed": self.seed}
        if self.top_logprobs:
            fields |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        return {name: value for name, value in {**fields, **self.options}.items() if value is not None}

    def describe(self) -> dict[str, Any]:
        """What answers follow from, for the head of a file: the server's root, the model, the fields of a request."""
        return {"base_url": self.base_url, "model": self.model, "params": self.params}

    def api_key(self) -> str | None:
        """The key from the environment. Raises ValidationError when the variable that was named is not there."""
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise ValidationError(
                f"api_key_env names {self.api_key_env}, which is not set in this environment.",
                param="teacher.api_key_env",
                hint=f"export {self.api_key_env}=..., or leave api_key_env out for a server without keys.",
            )
        return key
