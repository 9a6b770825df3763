"""Which servers answered, and what was measured where."""

from __future__ import annotations

from collections.abc import Mapping

from dfastllm.bench.suite.cells import NONE, Table, Tone, figure, named, number, printable, share, text
from dfastllm.bench.suite.schema import Results

__all__ = ["environment", "server_status"]


def server_status(results: Results) -> Table:
    rows = []
    for server in results.servers:
        tone: Tone = "good" if server.status == "running" else "bad"
        state = server.status.replace("_", " ")
        cells = (
            text(server.name),
            text(server.url),
            text(state.upper() if server.status == "running" else state, tone),
            text(", ".join(server.models) or NONE),
            text(server.software or NONE),
            number(server.latency_ms, "ms"),
        )
        rows.append(cells)
    lines = tuple(
        f"{printable(s.name)}: {printable(s.message)}" for s in results.servers if s.status != "running" and s.message
    )
    return Table("servers", "Server status", named("Server|URL|Status|Models|Software", "Latency"), tuple(rows), lines)


def environment(results: Results) -> Table:
    env, run, target = results.environment, results.run, results.target
    lines = []
    if target is not None:
        kind = f", {target.kind}" if target.kind else ""
        software = f", {printable(target.software)}" if target.software else ""
        lines.append(f"Measured: {printable(target.model)}{kind} at {printable(target.url)}{software}.")
        lines += [f"The server {printable(said)}." for said in _fields(target.fields)]
        lines += [f"Fallback: {printable(said)}" for said in target.fallbacks]
    hardware = ", ".join(f"{k} {_flat(v)}" for k, v in env.hardware.items() if v not in (None, "", [], {}))
    lines.append(printable(f"Machine: {hardware} (profile {env.profile_key})."))
    if env.server_is_local is not True:
        lines.append("The machine is the client's; the server's may be another.")
    versions = ", ".join(f"{k} {v}" for k, v in env.versions.items())
    lines.append(printable(f"Versions: {versions}; commit {env.commit or 'unknown'}."))
    lines.append(
        f"Run: {results.started}, {figure(results.seconds)} s; {run.requests} prompts a type, {run.rounds} rounds, "
        f"{run.concurrency} in flight, max_tokens {run.max_tokens}, temperature {run.temperature:g}, seed {run.seed}"
        f"{', quick' if run.quick else ''}."
    )
    if results.client is not None:
        cost = results.client
        per_chunk = f"{figure(cost.cpu_us_per_chunk)} µs of CPU a chunk, " if cost.cpu_us_per_chunk is not None else ""
        lines.append(
            f"Client: {per_chunk}{share(cost.cpu_share)} of a core; event loop late by "
            f"{figure(cost.loop_lag_p50_ms)} ms (median), {figure(cost.loop_lag_p99_ms)} ms (p99)"
            f"{'' if cost.bounded else ': over its limits, so the figures may be the client’s own'}."
        )
    lines += [f"Skipped {printable(s.part)}: {printable(s.reason)}" for s in results.skipped]
    lines += [f"Note: {printable(note)}" for note in results.notes]
    if results.partial:
        lines.append(f"PARTIAL: {printable(results.partial_reason or 'the run ended early')}")
    return Table("environment", "What was measured, and where", lines=tuple(lines))


def _fields(fields: Mapping[str, str]) -> list[str]:
    """What the server makes of request fields beyond OpenAI's."""
    verbs = {"yes": "honours", "no": "refuses", "ignored": "takes and ignores"}
    by_answer = {answer: [name for name, a in sorted(fields.items()) if a == answer] for answer in verbs}
    return [f"{verbs[answer]} {', '.join(names)}" for answer, names in by_answer.items() if names]


def _flat(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{k} {_flat(v)}" for k, v in value.items())
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
