"""Where a server's pipelines are kept: in the database of tenants where there is one, else in memory; and those of the
server's owner, from files, which every tenant may run."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dfastllm.errors import PipelineNotFoundError, ValidationError
from dfastllm.server.bounds import read_json
from dfastllm.server.pipelines.pipeline import Pipeline, understood
from dfastllm.server.pipelines.schema import PipelineBody
from dfastllm.server.reading import validated
from dfastllm.server.yaml_text import read_yaml

if TYPE_CHECKING:
    from dfastllm.tenants import Identity
    from dfastllm.tenants.store import Store

__all__ = ["Pipelines"]

MOST = 64  # pipelines of a tenant
COMPILED = 256  # kept ready, of all tenants


class Pipelines:
    """files: pipelines of the owner, YAML or JSON. store: the database of tenants, None where there is none (yet).
    Raises ValidationError for a file that is no pipeline."""

    def __init__(self, files: Sequence[str] = (), store: Callable[[], Store | None] = lambda: None) -> None:
        self._store = store
        self._own: dict[str, Pipeline] = {}
        self._memory: dict[str, dict[str, str]] = {}  # documents by tenant and name
        self._ready: OrderedDict[str, Pipeline] = OrderedDict()  # by document, the one used last at the end
        for file in files:
            pipeline = _of_file(Path(file))
            if pipeline.name in self._own:
                raise ValidationError(f"two files hold a pipeline {pipeline.name!r}.", param="pipelines")
            self._own[pipeline.name] = pipeline

    async def save(self, who: Identity, body: PipelineBody) -> Pipeline:
        """Keep a pipeline of a tenant, in place of one of that name. Raises ValidationError for one that cannot be, and
        for one too many."""
        if body.name in self._own:
            raise ValidationError(f"{body.name!r} is a pipeline of the server's owner.", param="name")
        pipeline = await asyncio.to_thread(understood, body)
        document = body.model_dump_json(exclude_none=True)
        kept = await self._documents(who)
        if body.name not in kept and len(kept) >= MOST:
            raise ValidationError(f"a tenant may keep {MOST} pipelines.", param="name", hint="Delete one first.")
        store = self._store()
        if store is None:
            self._memory.setdefault(who.tenant.id, {})[body.name] = document
        else:
            actor = f"key:{who.key.id}"
            await asyncio.to_thread(store.save_pipeline, who.tenant.id, body.name, document, actor=actor)
        self._remember(document, pipeline)
        return pipeline

    async def get(self, who: Identity, name: str) -> Pipeline:
        """Raises PipelineNotFoundError."""
        if name in self._own:
            return self._own[name]
        documents = await self._documents(who)
        if name not in documents:
            known = ", ".join(sorted({*documents, *self._own})) or "none"
            raise PipelineNotFoundError(f"There is no pipeline {name[:80]!r}; there are: {known}.", param="name")
        return await self._compiled(documents[name])

    async def all(self, who: Identity) -> list[Pipeline]:
        """By name."""
        documents = await self._documents(who)
        found = [await self._compiled(document) for document in documents.values()]
        return sorted([*found, *self._own.values()], key=lambda one: one.name)

    async def delete(self, who: Identity, name: str) -> None:
        """Raises PipelineNotFoundError, and ValidationError for one of the owner's."""
        if name in self._own:
            raise ValidationError(f"{name!r} is a pipeline of the server's owner.", param="name")
        store = self._store()
        if store is None:
            there = self._memory.get(who.tenant.id, {}).pop(name, None) is not None
        else:
            there = await asyncio.to_thread(store.delete_pipeline, who.tenant.id, name, actor=f"key:{who.key.id}")
        if not there:
            raise PipelineNotFoundError(f"There is no pipeline {name[:80]!r}.", param="name")

    async def _documents(self, who: Identity) -> Mapping[str, str]:
        store = self._store()
        if store is None:
            return self._memory.get(who.tenant.id, {})
        return await asyncio.to_thread(store.pipelines, who.tenant.id)

    async def _compiled(self, document: str) -> Pipeline:
        """Of a document, which another process may have written: what is ready is found by its text."""
        if document in self._ready:
            self._ready.move_to_end(document)
            return self._ready[document]
        body = validated(PipelineBody, read_json(document.encode(), what="pipeline"))
        pipeline = await asyncio.to_thread(understood, body)
        self._remember(document, pipeline)
        return pipeline

    def _remember(self, document: str, pipeline: Pipeline) -> None:
        self._ready[document] = pipeline
        self._ready.move_to_end(document)
        while len(self._ready) > COMPILED:
            self._ready.popitem(last=False)


def _of_file(path: Path) -> Pipeline:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValidationError(f"the pipeline {path} cannot be read: {error.strerror}.", param="pipelines") from error
    given = read_json(data, what="file") if path.suffix == ".json" else read_yaml(data)
    try:
        return understood(validated(PipelineBody, given))
    except ValidationError as error:
        raise ValidationError(f"{path}: {error.message}", param="pipelines") from error
