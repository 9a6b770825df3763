"""Tenants and keys in both databases: what is kept, what is refused, what nobody may read."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from argon2 import extract_parameters
from argon2.low_level import Type, verify_secret

from dfastllm.errors import (
    AuthenticationError,
    DatabaseError,
    ForbiddenError,
    KeyNotFoundError,
    TenantNotFoundError,
    UnsupportedError,
    ValidationError,
)
from dfastllm.tenants import ANYONE, OWNER, SCOPES, Identity, Key, Tenant, tables
from dfastllm.tenants.database import Database
from dfastllm.tenants.store import Store

LIMITS = {"weight": 2.5, "requests_per_minute": 60, "tokens_per_minute": 10**9, "max_concurrent": 1, "priority_min": -3}


def test_a_tenant_is_kept(store: Store, url: str) -> None:
    made = store.create_tenant("acme", actor="cli:me", models=["b", "a"], adapters=[], **LIMITS)
    assert made == Tenant(made.id, "acme", models=frozenset("ab"), adapters=frozenset(), **LIMITS)
    plain = store.create_tenant("Beta-1.x_", actor="cli:me")
    assert plain == Tenant(plain.id, "Beta-1.x_")
    again = Store(url)
    assert again.tenants() == [plain, made] or again.tenants() == [made, plain]  # by name, as the database collates
    assert again.tenant("acme") == again.tenant(made.id) == made
    changed = again.set_tenant("acme", actor="cli:me", name="acme2", tokens_per_minute=None, models=None, disabled=True)
    assert changed == replace(made, name="acme2", tokens_per_minute=None, models=None, disabled=True)
    assert store.tenant(made.id) == changed
    assert again.salt(made.id) == store.salt(made.id)
    assert len({store.salt(made.id), store.salt(plain.id), ""}) == 3
    again.close()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"name": "a b"}, "name"),
        ({"name": "tn-0123456789ab"}, "name"),
        ({"name": "x" * 65}, "name"),
        ({"weight": 0.0}, "weight"),
        ({"weight": float("nan")}, "weight"),
        ({"requests_per_minute": 0}, "requests_per_minute"),
        ({"tokens_per_minute": -1}, "tokens_per_minute"),
        ({"max_concurrent": 10**10}, "max_concurrent"),
        ({"priority_min": 1 << 31}, "priority_min"),
        ({"models": [""]}, "models"),
        ({"adapters": ["a\n"]}, "adapters"),
        ({"id": "x"}, "id"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_what_no_tenant_can_be(tmp_path: Path, fields: dict[str, object], param: str) -> None:
    store = Store(str(tmp_path / "x.db"), create=True)
    with pytest.raises(ValidationError) as refused:
        store.create_tenant(**{"name": "acme", "actor": "me", **fields})  # type: ignore[arg-type]
    assert refused.value.param == param
    store.create_tenant("acme", actor="me")
    with pytest.raises(ValidationError) as refused:
        store.set_tenant("acme", actor="me", **fields)
    assert refused.value.param == param
    assert len(store.tenants()) == len(store.audited()) == 1, "what was refused left nothing"
    store.close()


def test_names_are_unique(store: Store) -> None:
    store.create_tenant("a", actor="me")
    store.create_tenant("b", actor="me")
    for attempt in (
        lambda: store.create_tenant("a", actor="me"),
        lambda: store.set_tenant("b", actor="me", name="a"),
    ):
        with pytest.raises(ValidationError, match="There is a tenant 'a' already"):
            attempt()
    with pytest.raises(TenantNotFoundError, match="no tenant 'c'"):
        store.set_tenant("c", actor="me", weight=2.0)
    with pytest.raises(TenantNotFoundError):
        store.create_key("c", actor="me")
    with pytest.raises(KeyNotFoundError, match="middle part"):
        store.disable_key("dfk_x", actor="me")


def test_a_key_is_shown_once_and_kept_as_argon2id(store: Store, costly: None) -> None:
    tenant = store.create_tenant("acme", actor="me")
    ends = time.time() + 100
    key, text = store.create_key(
        "acme", actor="me", scopes=["usage", "generate"], models=["m"], expires=ends, note="the shop"
    )
    scopes, models = frozenset({"generate", "usage"}), frozenset({"m"})
    assert key == Key(key.id, tenant.id, scopes, models, None, key.created, ends, False, "the shop")
    assert store.keys("acme") == store.keys() == [key] == [store.key(key.id)]
    prefix, key_id, secret = text.split("_")
    assert (prefix, key_id, len(secret)) == ("dfk", key.id, 52)
    with store.database.reading() as connection:
        kept = connection.execute(sa.select(tables.KEYS.c.hash)).scalar_one()
        everything = [
            str(row) for table in tables.META.metadata.tables.values() for row in connection.execute(sa.select(table))
        ]
    assert verify_secret(kept.encode(), secret.encode(), Type.ID)
    costs = extract_parameters(kept)
    assert (costs.type, costs.memory_cost, costs.time_cost, costs.parallelism) == (Type.ID, 19 * 1024, 2, 1)
    assert not any(secret in row for row in everything)
    identity = store.authenticate(text)
    assert identity == Identity(tenant, key, store.salt(tenant.id))
    assert len(identity.salt) == 32


def test_two_databases_have_two_secrets(tmp_path: Path) -> None:
    salts = set()
    for name in ("a.db", "b.db"):
        store = Store(str(tmp_path / name), create=True)
        salts.add(store.salt("tn-0123456789ab"))
        store.close()
    assert len(salts) == 2


def test_no_byte_of_a_secret_in_any_file(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "x.db"), create=True)
    store.create_tenant("acme", actor="me")
    _, text = store.create_key("acme", actor="me")
    _, other = store.rotate_key(text.split("_")[1], actor="me")
    store.authenticate(other)
    store.close()
    for file in tmp_path.iterdir():
        data = file.read_bytes()
        assert text.split("_")[2].encode() not in data
        assert other.split("_")[2].encode() not in data
        assert file.stat().st_mode & 0o777 == 0o600


def test_who_is_refused_and_what_they_are_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.create_tenant("acme", actor="me")
    key, text = store.create_key("acme", actor="me")
    dead, dead_text = store.create_key("acme", actor="me", expires=time.time() + 1000)
    store.authenticate(dead_text)
    wrong = text[:-1] + ("a" if text[-1] != "a" else "b")
    for unknown in ("", "secret", "dfk_x_y", wrong, f"dfk_{'a' * 12}_{'b' * 52}", text + " ", "dfk_\ud800_x"):
        with pytest.raises(AuthenticationError, match=r"^The API key is not known\. "):
            store.authenticate(unknown)
    store.disable_key(key.id, actor="me")
    with pytest.raises(AuthenticationError, match=f"The API key {key.id} is disabled"):
        store.authenticate(text)
    with pytest.raises(AuthenticationError, match="not known"):  # who cannot prove it hears nothing of its state
        store.authenticate(wrong)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 1001)
    monkeypatch.setattr(store._proofs, "_wall", time.time)
    with pytest.raises(AuthenticationError, match="has expired"):
        store.authenticate(dead_text)
    with pytest.raises(ValidationError, match="is expired"):
        store.rotate_key(dead.id, actor="me")
    with pytest.raises(ValidationError, match="is disabled"):
        store.rotate_key(key.id, actor="me")
    _, third = store.create_key("acme", actor="me")
    store.set_tenant("acme", actor="me", disabled=True)
    with pytest.raises(AuthenticationError, match="The tenant 'acme' is disabled"):
        store.authenticate(third)
    store.set_tenant("acme", actor="me", disabled=False)
    assert store.authenticate(third).tenant.name == "acme"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"scopes": []}, "scopes"),
        ({"scopes": ["fly"]}, "scopes"),
        ({"models": ["\0"]}, "models"),
        ({"expires": 1.0}, "expires"),
        ({"expires": float("inf")}, "expires"),
        ({"note": "x" * 201}, "note"),
        ({"note": "two\nlines"}, "note"),
        ({"note": "\0"}, "note"),  # PostgreSQL takes none
        ({"note": "\udcff"}, "note"),  # of a command line that is not UTF-8
        ({"secret": "x"}, "secret"),
    ],
)
def test_what_no_key_can_be(tmp_path: Path, fields: dict[str, object], param: str) -> None:
    store = Store(str(tmp_path / "x.db"), create=True)
    store.create_tenant("acme", actor="me")
    with pytest.raises(ValidationError) as refused:
        store.create_key("acme", actor="me", **fields)
    assert refused.value.param == param
    assert store.keys() == []
    store.close()


def test_rotating(store: Store) -> None:
    store.create_tenant("acme", actor="me")
    old, text = store.create_key("acme", actor="me", scopes=["generate", "admin"], models=["m"], note="shop")
    new, new_text = store.rotate_key(old.id, actor="me", grace=100.0)
    assert replace(new, id="", created=0.0) == replace(old, id="", created=0.0)
    assert new_text != text
    ends = store.key(old.id).expires
    assert ends is not None
    assert 95 < ends - time.time() <= 100
    assert store.authenticate(text).key.id == old.id
    store.rotate_key(new.id, actor="me")
    with pytest.raises(AuthenticationError, match="has expired"):
        store.authenticate(new_text)
    with pytest.raises(ValidationError, match="grace must be"):
        store.rotate_key(old.id, actor="me", grace=-1.0)


def test_what_an_identity_may() -> None:
    tenant = Tenant("t", "n", models=frozenset("ab"), adapters=frozenset())
    key = Key("k", "t", frozenset({"generate"}), models=frozenset("bc"))
    identity = Identity(tenant, key)
    assert [name for name in "abcd" if identity.allows_model(name)] == ["b"], "a key never widens its tenant's list"
    assert not identity.allows_adapter("x")
    assert identity.has("generate")
    with pytest.raises(ForbiddenError, match="has not the scope 'admin'"):
        identity.require("admin")
    with pytest.raises(KeyError):
        identity.has("fly")
    for whose, admin in ((ANYONE, False), (OWNER, True)):
        assert {scope for scope in SCOPES if whose.has(scope)} == set(SCOPES) - (set() if admin else {"admin"})
        assert whose.allows_model("anything")
        assert whose.allows_adapter("anything")
        assert whose.salt == ""


def test_the_audit_log_says_who_what_and_no_secret(store: Store) -> None:
    store.create_tenant("acme", actor="cli:me", requests_per_minute=5)
    key, text = store.create_key("acme", actor="key:abc", note="shop")
    new, new_text = store.rotate_key(key.id, actor="cli:me")
    store.set_tenant("acme", actor="cli:me", models=["m"], requests_per_minute=None)
    store.disable_key(new.id, actor="cli:me")
    tenant = store.tenant("acme")
    store.save_pipeline(tenant.id, "p", "{}", actor="key:abc")
    store.audit("key:abc", "adapter.load", "french", {"path": "adapters/french"})
    rows = store.audited()
    assert [(row.actor, row.action, row.target) for row in reversed(rows)] == [
        ("cli:me", "tenant.create", tenant.id),
        ("key:abc", "key.create", key.id),
        ("cli:me", "key.rotate", key.id),
        ("cli:me", "tenant.set", tenant.id),
        ("cli:me", "key.disable", new.id),
        ("key:abc", "pipeline.save", tenant.id),
        ("key:abc", "adapter.load", "french"),
    ]
    assert rows[3].detail == '{"models": ["m"], "requests_per_minute": null}'
    assert all(abs(row.at - time.time()) < 60 for row in rows)
    told = "".join(map(str, rows))
    assert text.split("_")[2] not in told
    assert new_text.split("_")[2] not in told
    assert store.audited(2) == rows[:2]


def test_pipelines(store: Store) -> None:
    store.save_pipeline("t1", "b", "one", actor="me")
    store.save_pipeline("t1", "a", "two", actor="me")
    store.save_pipeline("t2", "a", "theirs", actor="me")
    store.save_pipeline("t1", "b", "three", actor="me")
    assert store.pipelines("t1") == {"a": "two", "b": "three"}
    assert store.delete_pipeline("t1", "a", actor="me")
    assert not store.delete_pipeline("t1", "a", actor="me")
    assert store.pipelines("t1") == {"b": "three"}
    assert store.pipelines("t2") == {"a": "theirs"}


def test_many_writers_at_once(store: Store, url: str) -> None:
    """Stores of four servers; each name is given once, each field that was set stays."""
    stores = [Store(url) for _ in range(4)]
    fields = ("requests_per_minute", "tokens_per_minute", "max_concurrent", "priority_min")
    store.create_tenant("shared", actor="me")

    def work(number: int) -> int:
        mine = stores[number % 4]
        mine.set_tenant("shared", actor="me", **{fields[number % 4]: 7})
        try:
            mine.create_tenant(f"t{number // 4}", actor="me")
        except ValidationError:
            return 0
        return 1

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(32))) == 8
    shared = store.tenant("shared")
    assert [getattr(shared, field) for field in fields] == [7] * 4
    assert len(store.tenants()) == 9
    for mine in stores:
        mine.close()


def test_made_by_many_at_once(url: str) -> None:
    barrier, stores = threading.Barrier(6), list[Store]()

    def make() -> None:
        barrier.wait()
        stores.append(Store(url, create=True))

    threads = [threading.Thread(target=make) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stores) == 6
    assert len({store.database.secret for store in stores}) == 1
    for store in stores:
        store.close()


def test_an_older_schema_is_brought_here_and_a_newer_one_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Store(url, create=True)
    tenant = first.create_tenant("acme", actor="me")
    _, text = first.create_key("acme", actor="me")
    first.close()

    def add_colour(connection: sa.Connection) -> None:
        connection.exec_driver_sql("ALTER TABLE dfastllm_tenants ADD COLUMN colour TEXT DEFAULT 'red'")

    with monkeypatch.context() as patched:
        patched.setattr(tables, "UPGRADES", (add_colour,))
        for _ in range(2):  # once only
            newer = Store(url)
            with newer.database.reading() as connection:
                read = connection.exec_driver_sql("SELECT name, colour FROM dfastllm_tenants").all()
            assert [tuple(row) for row in read] == [("acme", "red")]
            assert newer.authenticate(text).tenant == tenant
            newer.close()

        def fails(connection: sa.Connection) -> None:
            connection.exec_driver_sql("CREATE TABLE dfastllm_half (x INTEGER)")
            raise RuntimeError("the step fails")

        patched.setattr(tables, "UPGRADES", (add_colour, fails))
        with pytest.raises(RuntimeError, match="the step fails"):
            Store(url)
        patched.setattr(tables, "UPGRADES", (add_colour,))
        newer = Store(url)  # still of version 2, with nothing of the half step
        with newer.database.reading() as connection:
            assert not sa.inspect(connection).has_table("dfastllm_half")
        newer.close()
    with pytest.raises(UnsupportedError, match="has schema version 2; this dfastllm knows up to 1"):
        Store(url)


def test_what_no_database_can_be(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("no database, and long enough to be taken for one\n" * 100)
    before = text.read_bytes()
    with pytest.raises(DatabaseError, match="not a database"):
        Store(str(text))
    assert text.read_bytes() == before
    for url, param in (
        (str(tmp_path / "misspelt.db"), "there is no database of tenants by that name"),
        (f"sqlite:///{tmp_path}/x.db?synchronous=off", "only .synchronous=normal or full"),
        ("sqlite://", "must be a file"),
        ("mysql://me:s3cret@host/x", "must be a file or a PostgreSQL database"),
        ("://", "is no URL"),
    ):
        with pytest.raises(ValidationError, match=param) as refused:
            Store(url)
        assert refused.value.param == "tenants_db"
        assert "s3cret" not in str(refused.value)
    with pytest.raises(ValidationError, match="cannot be made"):
        Store(str(tmp_path / "no" / "such" / "x.db"), create=True)
    assert list(tmp_path.iterdir()) == [text]
    with pytest.raises(DatabaseError) as down:
        Store("postgresql://me:s3cret@127.0.0.1:1/x")
    assert "s3cret" not in str(down.value)
    assert "me:***@127.0.0.1" in str(down.value)


def test_a_file_that_others_may_open_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Database(str(tmp_path / "x.db"), create=True).close()
    assert caplog.text == ""
    (tmp_path / "x.db").chmod(0o640)
    Database(str(tmp_path / "x.db")).close()
    assert "chmod 600" in caplog.text


def test_a_file_that_was_removed_or_replaced_is_no_database(tmp_path: Path) -> None:
    """Not what is still open, whose rows would be lost with the process, and no new file in its place."""
    file = tmp_path / "x #1?.db"
    store = Store(str(file), create=True)
    store.create_tenant("acme", actor="me")
    away = tmp_path / "away"
    away.mkdir()

    def move(start: Path, goal: Path) -> None:
        for part in start.glob("x *"):  # its log of writes lies beside it
            part.rename(goal / part.name)

    move(tmp_path, away)
    with pytest.raises(DatabaseError, match="removed or replaced"):
        store.create_tenant("beta", actor="me")
    with pytest.raises(DatabaseError, match="removed or replaced"):
        store.tenants()
    assert not file.exists()
    Store(str(file), create=True).close()
    with pytest.raises(DatabaseError, match="removed or replaced"):
        store.tenants()
    file.unlink()
    move(away, tmp_path)
    assert [tenant.name for tenant in store.tenants()] == ["acme"]
    store.close()


def test_sqlite_as_it_is_opened(tmp_path: Path) -> None:
    for query, synchronous in (("", 1), ("?synchronous=full", 2)):
        database = Database(f"sqlite:///{tmp_path}/x.db{query}", create=True)
        with database.reading() as connection:
            pragmas = [
                connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous")
            ]
        assert pragmas == ["wal", synchronous]
        database.close()
