"""Contexts as a tenant sees them: on the gang, in the store, or on their way."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from ringspan.cluster.controller import Controller
from ringspan.cluster.messages import RankReady
from ringspan.cluster.service_held import Held, Place
from ringspan.cluster.service_jobs import Job
from ringspan.cluster.service_types import ContextView, ShardView
from ringspan.errors import StoreError
from ringspan.kvstore.manifest import MANIFEST, Manifest, read_manifest
from ringspan.types import page_tokens_for


class StoredContexts:
    """What the store has, as its folder has it now: a manifest, megabytes of a long context, is
    read again only when its file is another one. Any thread may ask."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], tuple[tuple[int, int, int], ContextView | None]] = {}

    def views(self, controller: Controller, namespace: bytes, space: str) -> list[ContextView]:
        """Of one namespace; damaged ones are left out."""
        store = controller.store
        if store is None:
            return []
        names = store.ids()
        found = [self._view(store.root / "contexts" / name, namespace, space) for name in names]
        for key in [key for key in list(self._known) if key[0] == space and key[1] not in names]:
            self._known.pop(key, None)
        return [view for view in found if view is not None]

    def _view(self, folder: Path, namespace: bytes, space: str) -> ContextView | None:
        try:
            file = (folder / MANIFEST).stat()
        except OSError:
            return None  # removed since it was listed
        now = file.st_ino, file.st_size, file.st_mtime_ns
        known = self._known.get((space, folder.name))
        if known is not None and known[0] == now:
            return known[1]
        view = None
        try:
            manifest = read_manifest(folder, (namespace,))
            if manifest.origin.namespace == space:
                view = _stored_view(manifest)
        except StoreError:
            pass  # damaged, of another namespace, or removed
        self._known[space, folder.name] = now, view
        return view


def context_views(
    controller: Controller,
    held: Held,
    stored: Iterable[ContextView],
    jobs: Iterable[Job],
    ready: tuple[RankReady, ...],
) -> list[ContextView]:
    """The newest first; contexts of plain prompts are nobody's and left out."""
    views: dict[str, ContextView] = {}
    for job in jobs:
        if not job.is_answer and job.controller is controller:
            about = job.description
            views[job.context_id] = ContextView(
                context_id=job.context_id,
                state=str(job.state),
                num_tokens=job.context_tokens,
                codec=job.options.codec,
                fidelity="",
                kv_bytes=0 if job.progress is None else job.progress.kv_bytes,
                chat=about is not None and about.chat,
                title="" if about is None else about.title,
                created_unix_s=job.created_unix_s,
            )
    views.update((view.context_id, view) for view in stored)
    for place in held.of(controller):
        if not place.plain:
            name = place.handle.context_id
            views[name] = _held_view(place, views.get(name), ready)
    return sorted(views.values(), key=lambda view: -view.created_unix_s)


def _stored_view(manifest: Manifest) -> ContextView:
    shards = []
    for rank, (_, some) in enumerate(
        groupby(sorted(manifest.pages, key=lambda page: page.segment), key=lambda p: p.segment)
    ):
        pages = list(some)
        shards.append(
            ShardView(
                rank=rank,
                host="",
                device="",
                pages=len(pages),
                tokens=sum(page.span.tokens for page in pages),
                bytes=sum(page.payload_bytes for page in pages),
                tier="disk",
                codec=manifest.codec,
            )
        )
    return ContextView(
        context_id=manifest.context_id,
        state="ready",
        num_tokens=manifest.num_tokens,
        codec=manifest.codec,
        fidelity=manifest.fidelity.text,
        kv_bytes=manifest.payload_bytes,
        chat=manifest.chat,
        title=manifest.title,
        created_unix_s=manifest.created_unix_s,
        stored=True,
        shards=tuple(shards),
    )


def _held_view(
    place: Place, stored: ContextView | None, ready: tuple[RankReady, ...]
) -> ContextView:
    handle, about = place.handle, place.description
    in_store = stored is not None and stored.stored
    return ContextView(
        context_id=handle.context_id,
        state="ready",
        num_tokens=handle.num_tokens,
        codec=handle.codec,
        fidelity=handle.fidelity.text,
        kv_bytes=handle.kv_bytes,
        chat=stored.chat if in_store and stored is not None else about.chat,
        title=stored.title if in_store and stored is not None else about.title,
        created_unix_s=stored.created_unix_s if stored is not None else place.created_unix_s,
        on_gang=True,
        stored=in_store,
        shards=_shares(place, ready),
    )


def _shares(place: Place, ready: tuple[RankReady, ...]) -> tuple[ShardView, ...]:
    """Of the ranks, who have as many pages each as can be."""
    if not ready:
        return ()
    handle = place.handle
    page_tokens = page_tokens_for(ready[0].facts.head_dim)
    pages = -(-handle.num_tokens // page_tokens)
    cuts = [pages * rank // len(ready) for rank in range(len(ready) + 1)]
    shards = []
    for one, start, stop in zip(ready, cuts, cuts[1:], strict=False):
        tokens = min(stop * page_tokens, handle.num_tokens) - start * page_tokens
        shards.append(
            ShardView(
                rank=one.rank,
                host=one.host,
                device=one.device,
                pages=stop - start,
                tokens=tokens,
                bytes=handle.kv_bytes * tokens // handle.num_tokens,
                tier="gpu",
                codec=handle.codec,
            )
        )
    return tuple(shards)
