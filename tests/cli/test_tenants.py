"""`dfastllm tenants` and `dfastllm keys`, as a person and a script use them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dfastllm.errors import AuthenticationError
from dfastllm.tenants.store import Store
from dfastllm.tenants.tables import USAGE
from tests.kit.cheap_keys import cheap_keys


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cheap_keys(monkeypatch)
    monkeypatch.setenv("DFASTLLM_TENANTS_DB", str(tmp_path / "tenants.db"))
    return tmp_path / "tenants.db"


def as_json(cli: Any, *arguments: object) -> Any:
    result = cli(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_from_nothing_to_a_key(cli: Any, file: Path) -> None:
    made = cli("tenants", "create", "acme", "--requests-per-minute", 60, "--weight", 2)
    assert made.exit_code == 0, made.output
    assert "acme" in made.stdout
    key = cli("keys", "create", "acme", "--note", "the shop", "--expires", "90d", "--scope", "generate")
    text = key.stdout.strip()
    assert text.startswith("dfk_"), "the key alone, for KEY=$(...)"
    assert "not shown again" in key.stderr
    store = Store(str(file))
    assert store.authenticate(text).tenant.requests_per_minute == 60
    listed = cli("keys", "list", "acme")
    assert text.split("_")[1] in listed.stdout
    assert text.split("_")[2] not in listed.stdout + cli("tenants", "audit").stdout
    rotated = cli("keys", "rotate", text.split("_")[1], "--grace", "1h").stdout.strip()
    assert store.authenticate(text).key.note == store.authenticate(rotated).key.note == "the shop"
    assert cli("keys", "disable", text.split("_")[1]).exit_code == 0
    fresh = Store(str(file))
    with pytest.raises(AuthenticationError, match="is disabled"):
        fresh.authenticate(text)
    assert cli("tenants", "disable", "acme").exit_code == 0
    with pytest.raises(AuthenticationError, match="tenant 'acme' is disabled"):
        Store(str(file)).authenticate(rotated)
    assert [row["action"] for row in as_json(cli, "tenants", "audit", "--limit", 3)] == [
        "tenant.set",
        "key.disable",
        "key.rotate",
    ]
    assert all(row.actor.startswith("cli:") for row in fresh.audited())


def test_limits_are_set_and_lifted(cli: Any, file: Path) -> None:
    flags = ("--tokens-per-minute", 5, "--models", "a", "--models", "b", "--adapters", "none", "--priority-min", -1)
    (made,) = as_json(cli, "tenants", "create", "acme", *flags)
    assert (made["tokens_per_minute"], made["models"], made["adapters"], made["priority_min"]) == (
        5,
        ["a", "b"],
        [],
        -1,
    )
    lifted = (
        "--tokens-per-minute",
        "none",
        "--models",
        "all",
        "--adapters",
        "x",
        "--name",
        "acme2",
        "--max-concurrent",
        3,
    )
    (now,) = as_json(cli, "tenants", "set", "acme", "--name", "acme2", *lifted)
    assert now == {
        **made,
        "tokens_per_minute": None,
        "models": None,
        "adapters": ["x"],
        "name": "acme2",
        "max_concurrent": 3,
    }
    assert as_json(cli, "tenants", "list") == [now]
    assert as_json(cli, "tenants", "set", "acme2", "--disabled")[0]["disabled"]
    assert not as_json(cli, "tenants", "set", "acme2", "--enabled")[0]["disabled"]


def test_each_line_is_whole_where_there_is_no_terminal(cli: Any, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is piped can be read by grep and cut; and a note is shown as it was written, brackets and all."""
    monkeypatch.delenv("COLUMNS", raising=False)
    cli("tenants", "create", "acme")
    notes = [f"[/b] [red]{'note ' * 30}".strip(), "[bold]x[/bold]", "ключ 🗝 ّ"]
    keys = [cli("keys", "create", "acme", "--note", note).stdout.strip() for note in notes]
    listed = cli("keys", "list").stdout.splitlines()
    for text, note in zip(keys, notes, strict=True):
        (line,) = [line for line in listed if line.startswith(text.split("_")[1])]
        assert line.rstrip().endswith(note)
    audited = cli("tenants", "audit").stdout.splitlines()
    assert len(audited) == 1 + 1 + len(notes)


def test_usage_fits_a_terminal(cli: Any, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    name = "a-tenant-with-the-longest-name-that-is-taken-0123456789-0123456789"[:64]
    cli("tenants", "create", name)
    store = Store(str(file))
    row = {"request_id": "r", "tenant_id": store.tenant(name).id, "key_id": "k" * 12, "model": "demo-diffusion"}
    row |= {"adapter": "", "prompt_tokens": 123_456_789, "completion_tokens": 987_654_321, "version": 1, "writer": "w"}
    with store.database.writing() as connection:
        rows = [
            {**row, "id": str(n), "status": s, "started": 1e9, "seconds": 2.5} for n, s in enumerate(["ok", "failed"])
        ]
        connection.execute(USAGE.insert(), rows)
    for by in ((), ("--by", "model"), ("--by", "key", "--by", "model")):
        shown = cli("tenants", "usage", *by).stdout
        assert all(len(line) <= 80 for line in shown.splitlines()), shown
        assert "1,975,308,642" in shown, "no figure is cut"
    (line,) = as_json(cli, "tenants", "usage", "--by", "model", "--by", "key", "--tenant", name)
    assert line == {
        "model": "demo-diffusion",
        "key": "k" * 12,
        "requests": 2,
        "ok": 1,
        "cancelled": 0,
        "failed": 1,
        "prompt_tokens": 246_913_578,
        "completion_tokens": 1_975_308_642,
        "seconds": 5.0,
    }
    assert as_json(cli, "tenants", "usage", "--since", "7d") == []
    assert len(as_json(cli, "tenants", "usage", "--since", "2001-01-01", "--until", "2001-12-31")) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tenants", "create", "acme"), "There is a tenant 'acme' already"),
        (("tenants", "create", "a b"), "name must be 1 to 64 letters"),
        (("tenants", "set", "acme"), "Nothing to set"),
        (("tenants", "set", "nobody", "--weight", 2), "There is no tenant 'nobody'"),
        (("tenants", "set", "acme", "--weight", "x"), "weight must be a number; got 'x'"),
        (("tenants", "set", "acme", "--weight", "none"), "weight must be a number; got 'none'"),
        (("tenants", "set", "acme", "--max-concurrent", "1.5"), "max_concurrent must be a whole number"),
        (("tenants", "set", "acme", "--max-concurrent", "0"), "max_concurrent must be 1 to"),
        (("tenants", "usage", "--since", "yesterday"), "since must be a span such as 30m, 24h or 7d"),
        (("tenants", "usage", "--by", "day"), "by must be of: tenant, model, adapter, key"),
        (("tenants", "usage", "--tenant", "nobody"), "There is no tenant 'nobody'"),
        (("keys", "create", "nobody"), "There is no tenant 'nobody'"),
        (("keys", "create", "acme", "--scope", "fly"), "scopes must be of: generate, "),
        (("keys", "create", "acme", "--expires", "2020-01-01"), "expires must lie in the future"),
        (("keys", "disable", "nothing"), "There is no key with the id 'nothing'"),
        (("keys", "rotate", "nothing"), "There is no key with the id 'nothing'"),
    ],
)
def test_what_is_refused(cli: Any, file: Path, arguments: tuple[object, ...], message: str) -> None:
    cli("tenants", "create", "acme")
    refused = cli(*arguments)
    assert refused.exit_code == 2
    assert message in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_no_database_is_made_by_a_misspelt_name(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DFASTLLM_TENANTS_DB", raising=False)
    assert "Give --tenants-db FILE" in cli("tenants", "list").stderr
    refused = cli("tenants", "list", "--tenants-db", tmp_path / "misspelt.db")
    assert refused.exit_code == 2
    assert "there is no database of tenants by that name" in refused.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("package", "url", "message"),
    [
        ("sqlalchemy", "x.db", "needs SQLAlchemy, which is not installed. pip install 'dfastllm[tenants]'"),
        ("argon2", "x.db", "need argon2-cffi, which is not installed. pip install 'dfastllm[tenants]'"),
        (
            "psycopg",
            "postgresql://me@127.0.0.1:1/x",
            "needs psycopg, which is not installed. pip install 'dfastllm[postgres]'",
        ),
    ],
)
def test_a_package_that_is_missing_is_named(tmp_path: Path, package: str, url: str, message: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from dfastllm.cli import app; app(sys.argv[1:])"
    command = [sys.executable, "-c", code, "tenants", "create", "acme", "--tenants-db", url]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert ran.returncode == 2
    assert message in ran.stderr
