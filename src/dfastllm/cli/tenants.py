"""`dfastllm tenants`: who may use the server, how much, and what they used. Works on the database itself: a server that
runs takes a change over within seconds, and none has to run."""

from __future__ import annotations

import getpass
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfastllm.cli.options import Flag, takes
from dfastllm.cli.output import console, printable
from dfastllm.errors import ValidationError
from dfastllm.settings import Settings

if TYPE_CHECKING:
    from dfastllm.tenants import Tenant
    from dfastllm.tenants.store import Store

__all__ = ["TenantsDb", "ToJson", "actor", "app", "day", "names", "print_json", "print_table", "store"]

TenantsDb = Annotated[
    str | None, typer.Option("--tenants-db", help="SQLite file or postgresql:// URL. \\[DFASTLLM_TENANTS_DB]")
]
ToJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]

app = typer.Typer(
    name="tenants",
    no_args_is_help=True,
    help="Who may use the server, how much, and what they used. See docs/tenants.md.",
)


@contextmanager
def store(url: str | None, *, create: bool = False) -> Iterator[Store]:
    """The database that was named, made where it is not there yet (create). Raises ValidationError where none was."""
    found = Settings.load({"tenants_db": url}).tenants_db
    if found is None:
        raise ValidationError(
            "Which database of tenants?",
            param="tenants_db",
            hint="Give --tenants-db FILE or set DFASTLLM_TENANTS_DB; docs/tenants.md begins with it.",
        )
    from dfastllm.tenants.store import Store

    opened = Store(found, create=create)
    try:
        yield opened
    finally:
        opened.close()


def actor() -> str:
    """Who does this, for the audit log."""
    return f"cli:{getpass.getuser()}"


def print_json(value: Any) -> None:
    """A result for machines."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, right: int) -> None:
    """A result for people; the last `right` columns hold numbers. What is long is folded to the terminal's width; where
    there is no terminal each row is one line, which `grep` and `cut` can read."""
    from rich.table import Table

    out = console()
    if not out.is_terminal and "COLUMNS" not in os.environ:
        out.width = 1 << 16
    table = Table(box=None, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        number = index >= len(columns) - right
        table.add_column(column, justify="right" if number else "left", overflow="fold", no_wrap=number)
    for row in rows:
        table.add_row(*(printable(str(cell)) for cell in row))
    out.print(table)


def day(seconds: float | None) -> str:
    """A time as people read it, UTC."""
    return "never" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def names(values: frozenset[str] | None) -> str:
    """An allow-list as people read it."""
    return "all" if values is None else ", ".join(sorted(values)) or "none"


def _flag(name: str, metavar: str, help: str) -> Flag:
    return Flag(name, str, name in _LISTS, help, metavar, "", "What it may do")


_LISTS = ("models", "adapters")
_FIELDS = (
    _flag("weight", "NUMBER", "Share of the engine against other tenants: 2 gets twice what 1 gets."),
    _flag("requests_per_minute", "INT|none", "Requests in any 60 seconds."),
    _flag("tokens_per_minute", "INT|none", "Tokens, prompts included, in any 60 seconds."),
    _flag("max_concurrent", "INT|none", "Requests at once."),
    _flag("priority_min", "INT", "Lowest number that a request's priority may have; lower runs first."),
    _flag("models", "NAME|all", "Model it may use; repeatable."),
    _flag("adapters", "NAME|all|none", "LoRA adapter it may use; repeatable."),
)


def _typed(name: str, value: Any) -> Any:
    """What was given for a field of a tenant. Raises ValidationError naming it."""
    if name in _LISTS:
        return {("all",): None, ("none",): ()}.get(tuple(value), value)
    if value == "none" and name not in ("weight", "priority_min"):
        return None
    try:
        return float(value) if name == "weight" else int(value)
    except ValueError:
        wanted = "a number" if name == "weight" else "a whole number"
        raise ValidationError(f"{name} must be {wanted}; got {value!r}.", param=name) from None


@app.command()
@takes(fields=_FIELDS)
def create(
    name: Annotated[str, typer.Argument(help="Letters, digits, '.', '_' and '-'.")],
    as_json: ToJson = False,
    tenants_db: TenantsDb = None,
    *,
    fields: dict[str, Any],
) -> None:
    """Make a tenant; what is not given is not limited. It has no key yet: dfastllm keys create."""
    given = {field: _typed(field, value) for field, value in fields.items()}
    with store(tenants_db, create=True) as opened:
        _print_tenants([opened.create_tenant(name, actor=actor(), **given)], as_json)


@app.command("list")
def list_(as_json: ToJson = False, tenants_db: TenantsDb = None) -> None:
    """Show every tenant with its limits."""
    with store(tenants_db) as opened:
        _print_tenants(opened.tenants(), as_json)


@app.command("set")
@takes(fields=_FIELDS)
def set_(
    tenant: Annotated[str, typer.Argument(help="Name or id.")],
    name: Annotated[str | None, typer.Option(help="Its new name.")] = None,
    disabled: Annotated[bool | None, typer.Option("--disabled/--enabled", help="Refuse all its keys, or not.")] = None,
    as_json: ToJson = False,
    tenants_db: TenantsDb = None,
    *,
    fields: dict[str, Any],
) -> None:
    """Change what is given of a tenant; the rest stays."""
    given = {field: _typed(field, value) for field, value in fields.items()}
    given |= {field: value for field, value in (("name", name), ("disabled", disabled)) if value is not None}
    if not given:
        raise ValidationError("Nothing to set.", hint="dfastllm tenants set --help lists what there is.")
    with store(tenants_db) as opened:
        _print_tenants([opened.set_tenant(tenant, actor=actor(), **given)], as_json)


@app.command()
def disable(
    tenant: Annotated[str, typer.Argument(help="Name or id.")], as_json: ToJson = False, tenants_db: TenantsDb = None
) -> None:
    """Refuse every key of a tenant, within 5 seconds; `set NAME --enabled` takes it back."""
    with store(tenants_db) as opened:
        _print_tenants([opened.set_tenant(tenant, actor=actor(), disabled=True)], as_json)


@app.command()
def usage(
    since: Annotated[str | None, typer.Option(help="A span such as 24h or 30d, or a date (UTC).")] = None,
    until: Annotated[str | None, typer.Option(help="The same; not itself included.")] = None,
    by: Annotated[list[str] | None, typer.Option(help="tenant (default), model, adapter or key; repeatable.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Of this tenant only: name or id.")] = None,
    as_json: ToJson = False,
    tenants_db: TenantsDb = None,
) -> None:
    """Show what was used: requests, tokens and time."""
    from dfastllm.tenants.records import usage_record
    from dfastllm.tenants.usage import moment, used

    now, groups = time.time(), by or ["tenant"]
    span = {
        name: None if text is None else moment(text, now, name) for name, text in (("since", since), ("until", until))
    }
    with store(tenants_db) as opened:
        whose = None if tenant is None else opened.tenant(tenant).id
        rows = used(opened.database, by=groups, tenant_id=whose, **span)
    if as_json:
        print_json([usage_record(row, groups) for row in rows])
        return
    counts = [(r.requests, r.ok, r.requests - r.ok, r.prompt_tokens, r.completion_tokens) for r in rows]
    texts = [
        [*row.group, *(f"{n:,}" for n in count), f"{row.seconds:,.1f}"] for row, count in zip(rows, counts, strict=True)
    ]
    print_table([*groups, "requests", "ok", "not ok", "prompt", "completion", "seconds"], texts, right=6)


@app.command()
def audit(
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="Newest lines.")] = 50,
    as_json: ToJson = False,
    tenants_db: TenantsDb = None,
) -> None:
    """Show who changed what, newest first."""
    from dfastllm.tenants.records import audit_record

    with store(tenants_db) as opened:
        rows = opened.audited(limit)
    if as_json:
        print_json([audit_record(row) for row in rows])
    else:
        cells = [(day(row.at), row.actor, row.action, row.target, row.detail) for row in rows]
        print_table(("when (UTC)", "who", "what", "which", "detail"), cells, right=0)


def _print_tenants(tenants: list[Tenant], as_json: bool) -> None:
    from dfastllm.tenants.records import tenant_record

    if as_json:
        print_json([tenant_record(tenant) for tenant in tenants])
        return
    rows = []
    for t in tenants:
        limits = (
            "–" if n is None else f"{n:,}" for n in (t.requests_per_minute, t.tokens_per_minute, t.max_concurrent)
        )
        state = "disabled" if t.disabled else f"{t.weight:g}"
        rows.append((t.name, names(t.models), names(t.adapters), state, *limits))
    print_table(("tenant", "models", "adapters", "weight", "req/min", "tokens/min", "at once"), rows, right=4)
