"""`dfastllm keys`: the API keys of tenants. A key's text is printed once, when it is made, and kept nowhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from dfastllm.cli.tenants import TenantsDb, ToJson, actor, day, names, print_json, print_table, store

if TYPE_CHECKING:
    from dfastllm.tenants import Key

__all__ = ["app"]

app = typer.Typer(
    name="keys", no_args_is_help=True, help="API keys of tenants: shown once, kept as a hash. See docs/tenants.md."
)
KeyId = Annotated[str, typer.Argument(metavar="ID", help="The middle part of the key: dfk_ID_SECRET.")]


@app.command()
def create(
    tenant: Annotated[str, typer.Argument(help="Name or id.")],
    scopes: Annotated[
        list[str] | None,
        typer.Option("--scope", help="generate (default), adapters, pipelines, metrics, usage or admin; repeatable."),
    ] = None,
    models: Annotated[
        list[str] | None, typer.Option("--models", metavar="NAME", help="Model it may use; repeatable.")
    ] = None,
    adapters: Annotated[
        list[str] | None, typer.Option("--adapters", metavar="NAME", help="Adapter it may use; repeatable.")
    ] = None,
    expires: Annotated[str | None, typer.Option(help="A span such as 90d, or a date (UTC); default: never.")] = None,
    note: Annotated[str, typer.Option(help="What it is for.")] = "",
    as_json: ToJson = False,
    tenants_db: TenantsDb = None,
) -> None:
    """Make a key and print it, this once. Without lists of its own it may use what its tenant may."""
    from dfastllm.tenants.usage import moment

    ends = None if expires is None else moment(expires, time.time(), "expires", ahead=True)
    with store(tenants_db) as opened:
        key, text = opened.create_key(
            tenant,
            actor=actor(),
            scopes=scopes or ["generate"],
            models=models or None,
            adapters=adapters or None,
            expires=ends,
            note=note,
        )
    _print_new(key, text, as_json)


@app.command("list")
def list_(
    tenant: Annotated[str | None, typer.Argument(help="Of this tenant only: name or id.")] = None,
    as_json: ToJson = False,
    tenants_db: TenantsDb = None,
) -> None:
    """Show keys, without their secrets."""
    with store(tenants_db) as opened:
        keys = opened.keys(tenant)
        owners = {owner.id: owner.name for owner in opened.tenants()}
    if as_json:
        from dfastllm.tenants.records import key_record

        print_json([{**key_record(key), "tenant": owners[key.tenant_id]} for key in keys])
        return
    rows = [(k.id, owners[k.tenant_id], names(k.scopes), _state(k), day(k.created), k.note) for k in keys]
    print_table(("id", "tenant", "scopes", "ends", "made (UTC)", "note"), rows, right=0)


@app.command()
def disable(key: KeyId, tenants_db: TenantsDb = None) -> None:
    """Refuse a key, within 5 seconds and for ever."""
    with store(tenants_db) as opened:
        opened.disable_key(key, actor=actor())
    typer.echo(f"{key} is disabled.", err=True)


@app.command()
def rotate(
    key: KeyId,
    grace: Annotated[str, typer.Option(help="How long the old one goes on: a span such as 1h.")] = "0s",
    as_json: ToJson = False,
    tenants_db: TenantsDb = None,
) -> None:
    """Make a key that may do what this one may, print it, and end this one."""
    from dfastllm.tenants.usage import moment

    with store(tenants_db) as opened:
        new, text = opened.rotate_key(key, actor=actor(), grace=moment(grace, 0.0, "grace", ahead=True))
    _print_new(new, text, as_json)


def _state(key: Key) -> str:
    if key.disabled:
        return "disabled"
    return "expired" if key.expires is not None and key.expires <= time.time() else day(key.expires)


def _print_new(key: Key, text: str, as_json: bool) -> None:
    """The text alone on stdout, so that KEY=$(dfastllm keys create NAME) takes it."""
    from dfastllm.tenants.records import key_record

    if as_json:
        print_json({**key_record(key), "key": text})
    else:
        typer.echo(text)
        typer.echo(f"This key is not shown again. Its id is {key.id}.", err=True)
