"""What a controller knows through a directory: contexts of one namespace on its gang and in its
store, who reads them, who needs them.

The gang is a holder with a shelf for each context; so is the store's folder as this controller sees
it, brought up to date before each look-up, for other processes publish and remove contexts there.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

import msgspec
import xxhash

from ringspan.cluster.page_directory import PageDirectory
from ringspan.cluster.reading import Pulse, Reading
from ringspan.errors import BadInput, RingspanError, StoreError, UnknownName
from ringspan.kvstore.fidelity import ANY, Fidelity
from ringspan.kvstore.folder import Store
from ringspan.kvstore.keys import namespace_digest
from ringspan.kvstore.leases import Lease
from ringspan.kvstore.manifest import MANIFEST, Manifest, read_manifest
from ringspan.kvstore.page import PageForm
from ringspan.kvstore.prefixes import Leading
from ringspan.kvstore.records import PageEntry, Shelf, Tier

SILENCE_S = 60.0
"""A controller that shares a directory and was not heard for so long is dead."""


class Known:
    """One controller's part of the directory, in one namespace."""

    def __init__(self, directory: PageDirectory, namespace: bytes, store: Store | None) -> None:
        self.space = namespace_digest(namespace)
        self._directory, self._namespace, self._store = directory, namespace, store
        name = secrets.token_hex(6)
        self._gang, self._disk = f"gang-{name}", f"store-{name}"
        silence_s = SILENCE_S if directory.shared else 0.0
        self._epochs = {
            holder: directory.join(holder, silence_s) for holder in (self._gang, self._disk)
        }
        self._shelves: dict[str, Shelf] = {}
        """Of the gang, by context."""
        self._stored: dict[str, tuple[object, Manifest | None, str]] = {}
        """By id: stamp of the manifest's file, the manifest if it is of this namespace, and what
        is wrong with it."""
        self._pulse = Pulse(self._beat, SILENCE_S / 4) if directory.shared else None

    # the gang

    def begin(self, context_id: str, keys: Sequence[str], num_tokens: int) -> str:
        """A context is about to come to the gang; the name of that write, which is a reference to
        the context until `arrived` or `failed`."""
        write = f"{context_id} {secrets.token_hex(4)}"
        self._directory.declare(
            self.space,
            context_id,
            keys,
            num_tokens,
            owner=self._gang,
            epoch=self._epochs[self._gang],
            ref=write,
        )
        return write

    def arrived(
        self,
        write: str,
        context_id: str,
        keys: Sequence[str],
        form: PageForm,
        fidelity: Fidelity,
        kv_bytes: int,
    ) -> None:
        """Every rank holds its share: the context can be found and read."""
        shelf = Shelf(Tier.GPU, context_id, form_id(form), int(fidelity))
        share, rest = divmod(kv_bytes, len(keys))
        pages = [PageEntry(key, share + (index < rest)) for index, key in enumerate(keys)]
        self._put(self._gang, write, shelf, pages)
        self._shelves[context_id] = shelf
        self._release(write)

    def failed(self, write: str) -> None:
        """It did not come. Raises nothing: the failure itself is what is told."""
        with suppress(RingspanError):
            self._release(write)
            self._directory.forget_lost(self.space)

    def let_go(self, context_id: str) -> None:
        """The gang is to give its copy up: nobody finds it any more. InUse while it is read."""
        shelf = self._shelves.get(context_id)
        if shelf is not None:
            gang = self._gang
            self._directory.withdraw(gang, self._epochs[gang], self.space, shelf)
            del self._shelves[context_id]
            self._directory.forget_lost(self.space)

    def check_unread(self, context_id: str) -> None:
        """InUse while somebody reads the gang's copy."""
        shelf = self._shelves.get(context_id)
        if shelf is not None:
            gang = self._gang
            self._directory.check_unread(gang, self._epochs[gang], self.space, shelf)

    def lose(self, context_id: str) -> None:
        """The gang's copy is gone, whoever reads it. Raises nothing: something failed before."""
        shelf = self._shelves.pop(context_id, None)
        if shelf is not None:
            gang = self._gang
            with suppress(RingspanError):
                self._directory.discard(
                    gang, self._epochs[gang], self.space, shelf, None, "the gang has lost it"
                )
                self._directory.forget_lost(self.space)

    def reading(self, context_ids: Sequence[str]) -> Reading:
        """Contexts that the gang holds stay until `Reading.end`. StaleHandle where one is gone."""
        leases: list[Lease] = []
        asked_s = time.monotonic()
        with ExitStack() as undo:
            for context_id in dict.fromkeys(context_ids):
                if context_id not in self._shelves:
                    raise UnknownName("context", context_id, tuple(self._shelves))
                lease = self._lease(context_id, self._gang, self._shelves[context_id])
                undo.callback(self._directory.end_lease, lease)
                leases.append(lease)
            undo.pop_all()
        return Reading(self._directory, leases, asked_s=asked_s)

    # sessions

    def session_began(self, session_id: str, context_id: str) -> None:
        """The gang's copy stays until the session has ended."""
        gang = self._gang
        self._directory.refer(
            gang, self._epochs[gang], session_id, self.space, context_id,
            holder=gang, place=context_id,
        )  # fmt: skip

    def sessions_ended(self, session_ids: Sequence[str]) -> None:
        for session_id in session_ids:
            self._release(session_id)

    # the store

    def stored(self) -> list[Manifest]:
        """Contexts of this namespace in the store, by id."""
        self._look()
        return [manifest for _, manifest, _ in self._stored.values() if manifest is not None]

    def find_stored(self, name: str) -> Manifest:
        """Of an id or its beginning. UnknownName (which names none of another namespace),
        BadInput for several, StoreError for a damaged one."""
        manifests = {manifest.context_id: manifest for manifest in self.stored()}
        found = [context_id for context_id in manifests if name and context_id.startswith(name)]
        if len(found) > 1:
            raise BadInput(f"context {name!r} is ambiguous: {', '.join(found)}; give more of it")
        if found:
            return manifests[found[0]]
        for context_id, (_, _, damage) in self._stored.items():
            if damage and name and context_id.startswith(name):
                raise StoreError(damage)
        raise UnknownName("context", name, tuple(manifests))

    def manifest(self, context_id: str) -> Manifest | None:
        """Of a whole id, as of the last look."""
        return self._stored.get(context_id, (None, None, ""))[1]

    # prefixes

    def leading(self, keys: Sequence[str], form: PageForm, lowest: Fidelity = ANY) -> list[Leading]:
        """Contexts (`shelf.place`) on the gang or in the store that begin with these keys, in this
        form and of this fidelity at least, the most pages first. `shelf.tier` says where."""
        self._look()
        rows = self._directory.leading(self.space, keys, form=form_id(form), lowest=int(lowest))
        return [row for row in rows if row.holder in self._epochs]

    @contextmanager
    def prefix(self, context_id: str, held: bool) -> Iterator[Reading]:
        """The first pages of a context stay where they are meanwhile: on the gang, or stored."""
        holder, shelf = self._gang, self._shelves.get(context_id)
        if not held:
            manifest = self.manifest(context_id)
            holder, shelf = self._disk, _disk_shelf(manifest) if manifest is not None else None
        if shelf is None:
            raise UnknownName("context", context_id, tuple(self._shelves))
        asked_s = time.monotonic()
        lease = self._lease(context_id, holder, shelf)
        reading = Reading(self._directory, [lease], asked_s=asked_s)
        try:
            yield reading
        finally:
            reading.end()

    def close(self) -> None:
        """All that is ours goes. May be repeated."""
        if self._pulse is not None:
            self._pulse.stop()
        for holder, epoch in self._epochs.items():
            with suppress(RingspanError):  # it is told apart from the living by its silence
                self._directory.leave(holder, epoch)
        with suppress(RingspanError):
            self._directory.forget_lost(self.space)
        self._shelves.clear()
        self._stored.clear()

    # helpers

    def _look(self) -> None:
        """Make the directory say what the folder says now."""
        if self._store is None:
            return
        ids = self._store.ids()
        for context_id in [gone for gone in self._stored if gone not in ids]:
            self._off_disk(context_id)
            del self._stored[context_id]
        for context_id in ids:
            stamp = self._stamp(context_id)
            before = self._stored.get(context_id)
            if before is not None and stamp is not None and before[0] == stamp:
                continue
            manifest, damage = None, ""
            folder = self._store.root / "contexts" / context_id
            try:
                manifest = read_manifest(folder, (self._namespace,))
            except StoreError as error:
                if not folder.is_dir():
                    continue  # removed since it was listed
                damage = str(error)
            self._off_disk(context_id)
            if manifest is not None and manifest.origin.namespace != self.space:
                manifest = None
            self._stored[context_id] = (stamp, manifest, damage)
            if manifest is not None:
                self._on_disk(manifest)

    def _stamp(self, context_id: str) -> object:
        """Changes when a context is replaced; None: look each time."""
        assert self._store is not None
        try:
            found = os.stat(self._store.root / "contexts" / context_id / MANIFEST)
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    def _on_disk(self, manifest: Manifest) -> None:
        name, epoch = manifest.context_id, self._epochs[self._disk]
        write = f"{name} {secrets.token_hex(4)}"
        self._directory.declare(
            self.space, name, manifest.keys, manifest.num_tokens,
            owner=self._disk, epoch=epoch, ref=write,
        )  # fmt: skip
        pages = [PageEntry(page.key, page.payload_bytes, page.xxh3) for page in manifest.pages]
        self._put(self._disk, write, _disk_shelf(manifest), pages)
        self._directory.release(self._disk, epoch, write)

    def _off_disk(self, context_id: str) -> None:
        manifest = self.manifest(context_id)
        if manifest is not None:
            self._directory.discard(
                self._disk,
                self._epochs[self._disk],
                self.space,
                _disk_shelf(manifest),
                manifest.keys,
                f"context {context_id} was removed from the store or replaced",
            )
            self._directory.forget_lost(self.space)

    def _put(self, holder: str, write: str, shelf: Shelf, pages: Sequence[PageEntry]) -> None:
        epoch = self._epochs[holder]
        self._directory.stage(holder, epoch, write, self.space, shelf, pages)
        self._directory.publish(holder, epoch, write, len(pages))

    def _lease(self, context_id: str, holder: str, shelf: Shelf) -> Lease:
        return self._directory.lease(self.space, context_id, holder, self._epochs[holder], shelf)

    def _release(self, ref: str) -> None:
        self._directory.release(self._gang, self._epochs[self._gang], ref)

    def _beat(self) -> None:
        for holder, epoch in self._epochs.items():
            self._directory.beat(holder, epoch)


def form_id(form: PageForm) -> str:
    """Equal for pages whose bytes are laid out alike."""
    return f"{form.codec}-{xxhash.xxh3_64_hexdigest(msgspec.msgpack.encode(form))}"


def _disk_shelf(manifest: Manifest) -> Shelf:
    return Shelf(Tier.DISK, manifest.context_id, form_id(manifest.form), int(manifest.fidelity))
