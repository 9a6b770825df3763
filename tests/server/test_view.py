"""GET /admin/v1/view tells of everybody, so it is for the owner's key; where there are no keys, for everybody. Keys of
tenants: tests/server/test_admin.py."""

from __future__ import annotations

import httpx2 as httpx

from tests.kit.live import serving
from tests.kit.served import random_engine


def test_without_keys_everybody_may_look() -> None:
    with serving({"m": random_engine("llama")}) as live:
        answer = httpx.get(f"{live.url}/admin/v1/view", timeout=60)
        assert (answer.status_code, [model["name"] for model in answer.json()["models"]]) == (200, ["m"])


def test_a_server_with_a_key_shows_it_to_that_key_only() -> None:
    with serving({"m": random_engine("llama")}, api_key="its-own") as live:
        statuses = [
            httpx.get(f"{live.url}/admin/v1/view", headers=headers, timeout=60).status_code
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer its-own"})
        ]
    assert statuses == [401, 401, 200]
