"""`dfastllm top`: what a running server does, as it does it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dfastllm.cli.output import console, printable
from dfastllm.settings import Settings

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = ["top"]

PATH = "/admin/v1/view"
ROWS = 10  # requests shown
TRIES = 3  # failed readings in a row before it gives up


def top(
    url: Annotated[
        str | None,
        typer.Argument(help="Of the server. \\[default: the host and port of the settings]", show_default=False),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="A key with the scope admin. \\[DFASTLLM_API_KEY]", show_default=False)
    ] = None,
    interval: Annotated[float, typer.Option(help="Seconds between two readings.", min=0.1, max=3600)] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="One reading, then end.")] = False,
    to_json: Annotated[bool, typer.Option("--json", help="One reading as JSON, then end.")] = False,
) -> None:
    """Show models, adapters, tenants and requests of a running server. Ctrl-C ends it."""
    settings = Settings.load({"api_key": api_key})
    where = (url or f"http://{settings.host}:{settings.port}").rstrip("/")
    read = _reader(where, settings.api_key)
    if to_json:
        typer.echo(json.dumps(read(), indent=2, ensure_ascii=False))
        return
    if once:
        console().print(shown(read(), where))
        return
    from rich.live import Live

    with Live(shown(read(), where), console=console(), refresh_per_second=4, screen=console().is_terminal) as live:
        while True:
            time.sleep(interval)
            live.update(shown(_patient(read, interval), where))


def _patient(read: Any, interval: float) -> dict[str, Any]:
    """A reading; a server that restarts is waited for."""
    from dfastllm.errors import DFastLLMError

    for left in range(TRIES, 0, -1):
        try:
            return read()  # type: ignore[no-any-return]
        except DFastLLMError:
            if left == 1:
                raise
            time.sleep(interval)
    raise AssertionError("not reached")


def _reader(where: str, key: str | None) -> Any:
    """What reads the view. Raises NotReadyError where nobody answers, AuthenticationError and ForbiddenError for the
    key, ValidationError for what is no such server."""
    import httpx2 as httpx

    from dfastllm.errors import AuthenticationError, ForbiddenError, NotReadyError, ValidationError

    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    client = httpx.Client(headers=headers, timeout=10.0)

    def read() -> dict[str, Any]:
        try:
            answer = client.get(where + PATH)
        except httpx.InvalidURL as error:
            raise ValidationError(f"{where} is no address: {error}.", param="url") from error
        except httpx.HTTPError as error:
            raise NotReadyError(
                f"{where} does not answer: {error}.", hint="Start it with dfastllm serve, or name another address."
            ) from error
        if answer.status_code in (401, 403):
            kind = AuthenticationError if answer.status_code == 401 else ForbiddenError
            raise kind(answer.json()["error"]["message"])
        if answer.status_code != 200:
            raise ValidationError(
                f"{where}{PATH} answered {answer.status_code}; it is no dfastllm server.", param="url"
            )
        found: dict[str, Any] = answer.json()
        return found

    return read


def shown(view: dict[str, Any], where: str) -> RenderableType:
    """The view for a terminal of 80 columns or more."""
    from rich.console import Group
    from rich.text import Text

    head = f"dfastllm {view['version']}  {where}  {view['phase']}  up {_span(view['uptime_seconds'])}"
    models = [
        (
            one["name"],
            one["running"],
            one["waiting"],
            f"{one['tokens_per_second']:,.0f}",
            _number(one["tokens_per_forward"]),
            f"{100 * one['pages'] / max(1, one['pages_total']):.0f}%",
            _share(one["prefix_hits"]),
            _share(one["accepted"]),
        )
        for one in view["models"]
    ]
    parts: list[Any] = [
        Text(printable(head)),
        _table(("model", "running", "waiting", "tok/s", "tok/fwd", "K,V", "cached", "drafts"), models),
    ]
    if view["adapters"]:
        adapters = [
            (*(one[name] for name in ("name", "model", "rank")), _bytes(one["bytes"]), _place(one))
            for one in view["adapters"]
        ]
        parts.append(_table(("adapter", "model", "rank", "size", "running"), adapters, names=(30, 20)))
    if len(view["tenants"]) > 1 or any(one["name"] != "default" for one in view["tenants"]):
        tenants = [(one["name"], one["requests"], f"{one['tokens']:,}") for one in view["tenants"]]
        parts.append(_table(("tenant", "requests", "tokens so far"), tenants, names=(40,)))
    if view["requests"]:
        requests = []
        for one in view["requests"][:ROWS]:
            model = one["model"] + (f":{one['adapter']}" if one["adapter"] else "")
            requests.append(
                (one["id"], model, one["tenant"], _span(one["seconds"]), one["prompt_tokens"], one["tokens"])
            )
        columns = ("request", "model", "tenant", "age", "prompt", "tokens")
        parts.append(_table(columns, requests, names=(20, 16, 12)))
        if view["requests_total"] > ROWS:
            parts.append(Text(f"and {view['requests_total'] - ROWS} more"))
    return Group(*parts)


def _table(columns: tuple[str, ...], rows: Sequence[tuple[Any, ...]], names: tuple[int, ...] = (24,)) -> Table:
    """names: widths of the columns from the left that hold names, cut where they are longer; the others are numbers."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0), expand=False)
    for index, column in enumerate(columns):
        width = names[index] if index < len(names) else None
        side: Literal["left", "right"] = "right" if width is None else "left"
        table.add_column(column, justify=side, overflow="ellipsis", no_wrap=True, max_width=width)
    for row in rows:
        table.add_row(*(printable(str(cell)) for cell in row))
    return table


def _place(adapter: dict[str, Any]) -> Any:
    """Requests that run on it, or that it is not in memory."""
    return adapter["running"] if adapter["in_memory"] else "on disk"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"


def _span(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, _ = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("not reached")
