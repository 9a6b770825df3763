"""Who may ask for what: the key of every HTTP request and every WebSocket is proved before a route sees it.

The server has one key of its own (`--api-key`), a database of tenants with keys (`--tenants-db`), both, or neither.
`Access` puts the `Identity` into the scope's state, and what a route does, it does as that identity. A request without
a key, with one that is not taken, or with one that has not the scope of the path ends here. A path that nobody thought
of asks for a key with `generate`, and a scope that is neither HTTP nor WebSocket does not get in.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from dfastllm.errors import AuthenticationError, DFastLLMError, ForbiddenError
from dfastllm.server.refusals import error_response
from dfastllm.tenants import ANYONE, OWNER, Identity

if TYPE_CHECKING:
    from dfastllm.tenants.store import Store

__all__ = ["Access", "Keys", "identity_of", "require_names", "scope_of"]

# Beginnings of paths, whole segments of them, and the scope that a key needs there; None: no key at all.
PATHS: tuple[tuple[str, str | None], ...] = (
    ("/health", None),
    ("/docs", None),
    ("/openapi.json", None),
    ("/version", None),
    ("/metrics", "metrics"),
    ("/admin", "admin"),
    ("/v1/usage", "usage"),
    ("/v1/pipelines", "pipelines"),
    ("/v1/load_lora_adapter", "adapters"),
    ("/v1/unload_lora_adapter", "adapters"),
)
HINT = "Send it as 'Authorization: Bearer KEY'."


def scope_of(path: str, *, tenants: bool) -> str | None:
    """The scope that a key needs for a path, None where none is asked for. tenants: whether the server has some, whose
    names and usage /metrics tells; with its own key alone they are open, as ever."""
    if path == "/":
        return None
    for beginning, scope in PATHS:
        if path == beginning or path.startswith(beginning + "/"):
            return None if scope == "metrics" and not tenants else scope
    return "generate"


class Keys:
    """What proves a key: the server's own, compared as digests in constant time, so that neither its length nor its
    beginning can be guessed from timing; else the database of tenants."""

    def __init__(self, own: str | None = None, store: Store | None = None) -> None:
        self.digest = None if own is None else hashlib.sha256(own.encode()).digest()
        self.store = store

    @property
    def wanted(self) -> bool:
        """Whether keys are asked for at all."""
        return self.digest is not None or self.store is not None

    async def identify(self, text: str) -> Identity:
        """Who carries this key. Raises AuthenticationError, and what `Store.identify` raises."""
        given = hashlib.sha256(text.encode("utf-8", "replace")).digest()
        if self.digest is not None and hmac.compare_digest(given, self.digest):
            return OWNER
        if self.store is None:
            raise AuthenticationError("The API key is wrong.", hint=HINT)
        return await self.store.identify(text)


class Access:
    """Says in the scope's state who asks, `identity`, and keeps the key as `credential`. Without keys that is `ANYONE`.
    A WebSocket that shows no key in its head gets in with the identity None: what it may do is prove one, and which
    scopes it needs then depends on what it asks for."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            raise RuntimeError(f"a scope of type {scope['type']!r} has no key, so nobody may ask")
        state = scope.setdefault("state", {})
        state["credential"] = state["identity"] = None
        try:
            await self._let_in(scope, state)
        except DFastLLMError as refusal:
            await error_response(refusal)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    async def _let_in(self, scope: Scope, state: dict[str, object]) -> None:
        """Raises what the request is refused with."""
        if not self.keys.wanted:
            state["identity"] = ANYONE
            return
        socket = scope["type"] == "websocket"
        wanted = scope_of(scope["path"], tenants=self.keys.store is not None)
        if (wanted is None and not socket) or (socket and "authorization" not in Headers(scope=scope)):
            return
        key = _bearer(scope)
        identity = await self.keys.identify(key)
        if wanted is not None and not socket:
            identity.require(wanted)
        state["credential"], state["identity"] = key, identity


def identity_of(request: HTTPConnection) -> Identity:
    """Who asks, as `Access` found. Raises AuthenticationError where nobody proved who they are: on the open paths, and
    where somebody forgot the middleware."""
    identity: Identity | None = getattr(request.state, "identity", None)
    if identity is None:
        raise AuthenticationError("No API key was given.", hint=HINT)
    return identity


def require_names(identity: Identity, adapter: str, model: str | None) -> None:
    """Raises ForbiddenError unless these names of an adapter and its model are the identity's to change."""
    if not identity.allows_adapter(adapter) or (model is not None and not identity.allows_model(model)):
        raise ForbiddenError(f"This key may not change the adapter {adapter[:200]!r}.", param="lora_name")


def _bearer(scope: Scope) -> str:
    """The key that a request's head carries. Raises AuthenticationError where there is none."""
    scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
    if not given.strip():
        raise AuthenticationError("No API key was given.", hint=HINT)
    if scheme.lower() != "bearer":
        raise AuthenticationError("The API key is wrong.", hint=HINT)
    return given.strip().encode("latin-1", "replace").decode("utf-8", "replace")
