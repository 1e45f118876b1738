"""A store: a folder in which contexts outlive their ranks.

    ROOT/contexts/<context id>/   manifest.json  tokens.npy  index.copy  rank-0.seg  rank-1.seg ...
    ROOT/staging/<id>-<nonce>/    contexts being written: never listed
    ROOT/trash/<id>-<nonce>/      contexts being removed: never listed

A context appears by one rename of a folder whose files are all on the disk, and goes by one
rename. What a dead process left in staging or trash is removed by the next `Store`, unless it can
be gone on with (`kvstore.staging`).

A store that is told namespaces shows the contexts of these alone, unlocked.
"""

from __future__ import annotations

import os
import secrets
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ringspan.errors import BadInput, StoreError, TooLarge, UnknownName
from ringspan.kvstore import staging
from ringspan.kvstore.audit import Progress, VerifyReport, verify
from ringspan.kvstore.exchange import swap
from ringspan.kvstore.index_copy import write_index_copy
from ringspan.kvstore.keys import namespace_digest
from ringspan.kvstore.manifest import (
    CONTEXT_NAME,
    MANIFEST,
    Manifest,
    encode_manifest,
    read_manifest,
    sealed,
)
from ringspan.kvstore.quota import ROOM, Reservations, evict_contexts, locked
from ringspan.kvstore.segment import room_bytes, store_error
from ringspan.kvstore.tiers.evicting import Evicted, InUse, nobody
from ringspan.kvstore.tokens import TOKENS, encode_tokens, read_tokens

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    import numpy as np

    from ringspan.kvstore.encryption import PageCipher


class Store:
    """The contexts in one folder, which need not exist yet. Raises `StoreError`, `UnknownName`.

    namespaces: whose contexts are seen; None: all, those of tenants locked (`Manifest.locked`).
    quota_bytes: what the files of all contexts, of any namespace, may take; None: all of the disk.
    Where it is short, contexts that the store shows are evicted (`kvstore.quota`).
    """

    def __init__(
        self,
        root: Path | str,
        namespaces: Sequence[bytes] | None = None,
        quota_bytes: int | None = None,
    ) -> None:
        if quota_bytes is not None and quota_bytes < 1:
            raise BadInput(f"quota of {quota_bytes} bytes: wanted 1 or more, or none at all")
        self.namespaces = namespaces
        self.quota_bytes = quota_bytes
        self._digests = None if namespaces is None else {namespace_digest(n) for n in namespaces}
        self.root = Path(os.path.abspath(Path(root).expanduser()))
        staging.remove_stale(self.root / "staging")
        staging.remove_stale(self.root / "trash", stale_s=0.0)
        staging.remove_stale(self.root / "reserved")
        self._reservations = Reservations(self.root)

    # writing

    def check_room(
        self,
        need_bytes: int,
        going_on_with: Path | None = None,
        *,
        keep: Collection[str] = (),
        in_use: InUse = nobody,
    ) -> Evicted:
        """The folder can be made and written and has room for so much within the quota, or
        `StoreError`. What dead processes left, to be gone on with, makes room where it is short;
        then contexts do, for a quota. Gives back what went of these. Within a quota the room is
        the calling thread's until it ends what it stages next, or asks again.

        going_on_with: such a folder that part of `need_bytes` lies in. Its pages are written anew
        before they go, so the room is for these, or for all the others, whichever is more. keep:
        contexts (ids) that stay; in_use: says of a page whether its context must.
        """
        probe = self.root / "staging" / f"probe-{secrets.token_hex(4)}"
        try:
            (self.root / "contexts").mkdir(parents=True, exist_ok=True)
            probe.parent.mkdir(exist_ok=True)
            probe.write_bytes(b"ringspan")
            probe.unlink()
        except OSError as error:
            raise store_error(error, "cannot write to the store folder", self.root) from None
        if going_on_with is not None:
            there = staging.size_bytes(going_on_with)
            need_bytes = max(there, need_bytes - there)
            (going_on_with / ROOM).unlink(missing_ok=True)  # the dead one's, who needs none
        try:
            self._check_free(need_bytes)
        except StoreError:
            if not staging.remove_abandoned(self.root / "staging", going_on_with):
                raise
            self._check_free(need_bytes)
        return self.check_quota(need_bytes, going_on_with, keep=keep, in_use=in_use)

    def _check_free(self, need_bytes: int) -> None:
        free = room_bytes(self.root)
        if need_bytes > free:
            raise StoreError(
                f"the context needs {need_bytes / 1e9:.2f} GB in {self.root}, which has "
                f"{free / 1e9:.2f} GB free: free space, use --codec int8 or another --store"
            )

    def check_quota(
        self,
        need_bytes: int,
        going_on_with: Path | None = None,
        *,
        keep: Collection[str] = (),
        in_use: InUse = nobody,
    ) -> Evicted:
        """So much more stays within the quota, or `StoreError`, and then nothing went; the rest as
        in `check_room`."""
        quota = self.quota_bytes
        if quota is None:
            return Evicted()
        self.root.mkdir(parents=True, exist_ok=True)
        with locked(self.root):
            self._reservations.release()
            used = self.used_bytes()
            if need_bytes <= quota < used + need_bytes:
                staging.remove_abandoned(self.root / "staging", going_on_with)
                used = self.used_bytes()
            gone, excess = Evicted(), used + need_bytes - quota
            if excess > 0:
                try:
                    if need_bytes > quota:
                        raise TooLarge("it is more than all of it")
                    gone = evict_contexts(self, excess, keep, in_use)
                except TooLarge:
                    raise StoreError(
                        f"the context needs {_gb(need_bytes)} in {self.root}, whose contexts take "
                        f"{_gb(used)} of a quota of {_gb(quota)}, and too few of them may go: "
                        "remove or unpin contexts, use --codec int8 or give a larger --quota"
                    ) from None
            self._reservations.reserve(need_bytes)
        return gone

    def used_bytes(self) -> int:
        """The sizes of all files of contexts, published or being written, and of what of these is
        still to come."""
        return self._reservations.used_bytes()

    def stage(
        self, context_id: str, token_ids: np.ndarray, cipher: PageCipher | None = None
    ) -> str:
        """A new folder for ranks to write segments to, with the context's tokens in it.

        token_ids: [n] integers. cipher: of the context's namespace, if that is encrypted. Ends in
        `publish` or `abort`.
        """
        if not CONTEXT_NAME.fullmatch(context_id):
            raise BadInput(f"context id {context_id!r}: wanted 16 hex characters")
        folder: Path | None = None
        try:
            folder = staging.new_folder(self.root / "staging", context_id)
            self._reservations.attach(folder)
            _write_file(folder / TOKENS, encode_tokens(token_ids, context_id, cipher))
        except OSError as error:
            if folder is not None:
                self.abort(str(folder))
            raise store_error(error, "cannot stage in", self.root) from None
        return str(folder)

    @contextmanager
    def staged(
        self, context_id: str, token_ids: np.ndarray, cipher: PageCipher | None = None
    ) -> Iterator[str]:
        """`stage`, and `abort` when the body fails."""
        folder = self.stage(context_id, token_ids, cipher)
        try:
            yield folder
        except BaseException:
            self.abort(folder)
            raise

    def publish(self, staging_folder: str, manifest: Manifest) -> Manifest:
        """Make the staged context visible, durable and whole; gives back the sealed manifest.

        A context of that name that exists already is replaced in one step. Repeating a publish
        that was done does no harm. On any error the staging folder is removed.
        """
        folder = Path(staging_folder)
        manifest = sealed(manifest)
        target = self._folder(manifest.context_id)
        if not folder.exists() and self._is_published(manifest):
            return manifest
        try:
            self._check_staged(folder, manifest)
            _write_file(folder / MANIFEST, encode_manifest(manifest))
            write_index_copy(folder, manifest)
            (folder / ROOM).unlink(missing_ok=True)  # nothing more is to come
            staging.sync_folder(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                trash = self._trash(manifest.context_id)
                swap(folder, target, trash)
                shutil.rmtree(trash, ignore_errors=True)
            else:
                os.rename(folder, target)
            staging.disown(target)
            self._reservations.release()
            staging.sync_folder(target.parent)
        except OSError as error:
            self.abort(staging_folder)
            raise store_error(error, "cannot publish in", self.root) from None
        except BaseException:
            self.abort(staging_folder)
            raise
        return manifest

    def abort(self, staging_folder: str) -> None:
        """Remove a staging folder and all in it. Repeating it does no harm."""
        folder = Path(staging_folder)
        if folder.parent != self.root / "staging":
            raise ValueError(f"{folder} is no staging folder of {self.root}")
        self._reservations.release()
        shutil.rmtree(folder, ignore_errors=True)

    def remove(self, context_id: str) -> None:
        """Remove a context (id or prefix). Once renamed to trash it is not listed any more."""
        name = self.find(context_id)
        try:
            trash = self._trash(name)
            os.rename(self._folder(name), trash)
            staging.sync_folder(self.root / "contexts")
        except OSError as error:
            raise store_error(error, f"cannot remove context {name} in", self.root) from None
        shutil.rmtree(trash, ignore_errors=True)

    # reading

    def ids(self) -> list[str]:
        """Ids of all contexts, damaged ones and those of any namespace too."""
        try:
            names = os.listdir(self.root / "contexts")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise store_error(error, "cannot read the store folder", self.root) from None
        return sorted(name for name in names if CONTEXT_NAME.fullmatch(name))

    def find(self, prefix: str) -> str:
        """The one id that begins with `prefix`; UnknownName, or BadInput when several do. Neither
        tells of contexts that this store does not show."""
        ids = self.ids()
        found = [name for name in ids if prefix and name.startswith(prefix) and self._shows(name)]
        if not found:
            raise UnknownName("context", prefix, [name for name in ids if self._shows(name)])
        if len(found) > 1:
            raise BadInput(f"context {prefix!r} is ambiguous: {', '.join(found)}; give more of it")
        return found[0]

    def manifest(self, context_id: str) -> Manifest:
        """Of an id or its prefix."""
        name = self.find(context_id)
        return read_manifest(self._folder(name), self.namespaces or ())

    def contexts(self) -> tuple[list[Manifest], list[str]]:
        """(manifests, newest first; one line about each context whose manifest is damaged)."""
        good: list[Manifest] = []
        damaged: list[str] = []
        for name in self.ids():
            try:
                good.append(self.manifest(name))
            except UnknownName:
                continue  # removed since it was listed, or another's
            except StoreError as error:
                damaged.append(str(error))
        return sorted(good, key=lambda m: -m.created_unix_s), damaged

    def tokens(self, manifest: Manifest) -> np.ndarray:
        """int32 [num_tokens], checked against the keys of every page."""
        return read_tokens(self._folder(manifest.context_id) / TOKENS, manifest)

    def verify(self, context_id: str, progress: Progress | None = None) -> VerifyReport:
        """Read every frame of a context (id or prefix); see `kvstore.audit`."""
        name = self.find(context_id)
        return verify(self._folder(name), progress, namespaces=self.namespaces or ())

    def folder(self, manifest: Manifest) -> Path:
        """Where the context's segments lie."""
        return self._folder(manifest.context_id)

    def _shows(self, context_id: str) -> bool:
        """A damaged manifest is shown to all: it says nothing, and whoever can must mend it."""
        if self._digests is None:
            return True
        try:
            found = read_manifest(self._folder(context_id))
        except StoreError:
            return True
        return found.origin.namespace in self._digests

    def _folder(self, context_id: str) -> Path:
        return self.root / "contexts" / context_id

    def _trash(self, context_id: str) -> Path:
        folder = self.root / "trash"
        folder.mkdir(exist_ok=True)
        return folder / f"{context_id}-{secrets.token_hex(4)}"

    def _is_published(self, manifest: Manifest) -> bool:
        try:
            return self.manifest(manifest.context_id).checksum == manifest.checksum
        except (StoreError, UnknownName):
            return False

    def _check_staged(self, folder: Path, manifest: Manifest) -> None:
        read_tokens(folder / TOKENS, manifest)
        ends: dict[str, int] = {}
        for page in manifest.pages:
            end = page.offset + page.frame_bytes
            ends[page.segment] = max(end, ends.get(page.segment, 0))
        for segment, end in ends.items():
            try:
                size = (folder / segment).stat().st_size
            except FileNotFoundError:
                raise StoreError(
                    f"{segment} is not in {folder}: every rank must write to the same folder; on "
                    f"several hosts the store must be on a shared file system"
                ) from None
            if size != end:
                raise StoreError(
                    f"{folder.name}/{segment} has {size} bytes, its pages end at {end}: it was "
                    f"not written whole"
                )


def segment_path(staging_folder: str, rank: int) -> Path:
    """The one segment that a rank writes."""
    return Path(staging_folder) / f"rank-{rank}.seg"


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.4g} GB"


def _write_file(path: Path, data: bytes | memoryview) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
