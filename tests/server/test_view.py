"""GET /admin/v1/view tells of everybody, so it is for the owner's key; where there are no keys, for everybody."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from dfastllm.errors import ForbiddenError
from dfastllm.server.view import view
from dfastllm.tenants import ANYONE, OWNER, Identity, Key, Tenant
from tests.kit.live import serving
from tests.kit.served import random_engine


def test_only_a_key_with_the_scope_admin_may_look() -> None:
    tenant = Tenant("tn-1", "one")
    with serving({"m": random_engine("llama")}) as live:
        app = SimpleNamespace(state=SimpleNamespace(serving=live.serving))

        def look(identity: Identity) -> int:
            request: Any = SimpleNamespace(app=app, state=SimpleNamespace(identity=identity))
            return asyncio.run(view(request)).status_code

        assert look(ANYONE) == look(OWNER) == 200
        assert look(Identity(tenant, Key("k", "tn-1", frozenset({"admin"})))) == 200
        with pytest.raises(ForbiddenError, match="admin"):
            look(Identity(tenant, Key("k", "tn-1", frozenset({"generate", "metrics", "usage"}))))
