"""What a prefill writes down in its staging folder, so that another controller can go on with it
when this one's process is killed.

    line 0   how it was begun (`Opening`)
    line n   what every rank said of a chunk that was done: [ChunkDone, ...]

The pages lie beside it and describe themselves: a chunk is gone on behind when every rank's pages
of it are there and the journal has its line. So a journal that lost its end costs chunks, and one
that lost its beginning all of them; neither makes a wrong page. The journal knows the namespace by
its digest alone: who goes on brings the namespace.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

import ringspan
from ringspan.cluster.messages import ChunkDone, Message, PrefillBegun, PrefillPlan
from ringspan.cluster.planner import PrefillOptions
from ringspan.cluster.session import Prefix
from ringspan.kvstore import staging
from ringspan.kvstore.folder import Store
from ringspan.kvstore.keys import namespace_digest
from ringspan.kvstore.segment import store_error


class Opening(Message, frozen=True, kw_only=True):
    """controller -> a later controller: what it needs to go on, but tokens and namespace."""

    version: str
    """Of ringspan."""
    plan: PrefillPlan
    """Without the namespace."""
    asked: PrefillOptions
    """What the plan was made from."""
    namespace: str
    """Its digest."""
    world_size: int
    begun: PrefillBegun


def opening_of(
    plan: PrefillPlan,
    asked: PrefillOptions,
    namespace: bytes,
    world_size: int,
    begun: PrefillBegun,
) -> Opening:
    return Opening(
        version=ringspan.__version__,
        plan=msgspec.structs.replace(plan, namespace=""),
        asked=asked,
        namespace=namespace_digest(namespace),
        world_size=world_size,
        begun=begun,
    )


class PrefillJournal:
    """Of one staging folder. One writer. Raises `StoreError`."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._lines = 0

    def begin(self, opening: Opening, chunks: Sequence[Sequence[ChunkDone]] = ()) -> None:
        """In place of what the journal said so far. On the disk when it returns."""
        records = [msgspec.json.encode(opening), *map(msgspec.json.encode, chunks)]
        new = self._folder / f"{staging.JOURNAL}.new"
        try:
            with open(new, "wb") as file:
                for number, record in enumerate(records):
                    file.write(staging.journal_line(number, record))
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, self._folder / staging.JOURNAL)
            staging.sync_folder(self._folder)
        except OSError as error:
            raise store_error(error, "cannot write", new) from None
        self._lines = len(records)

    def done(self, chunk: Sequence[ChunkDone]) -> None:
        """A chunk more. Not synced: it outlives the process, and what a power cut takes of it or of
        its pages is found missing."""
        path = self._folder / staging.JOURNAL
        try:
            with open(path, "ab") as file:
                file.write(staging.journal_line(self._lines, msgspec.json.encode(chunk)))
        except OSError as error:
            raise store_error(error, "cannot write", path) from None
        self._lines += 1


@dataclass(frozen=True)
class LeftBehind:
    """A prefill that a dead process left."""

    folder: Path
    pid: int | None
    """Of that process."""
    opening: Opening
    chunks: tuple[tuple[ChunkDone, ...], ...]
    """What was said of each that was done."""

    @property
    def tokens_done(self) -> int:
        return self.chunks[-1][0].span.stop if self.chunks else self.opening.plan.reused_tokens

    def goes_with(self, prefix: Prefix | None) -> bool:
        """Whether it stands on what is to be reused now; or on nothing, but is further."""
        plan = self.opening.plan
        if not plan.prefix_id:
            return prefix is None or prefix.plan.reused_tokens <= self.tokens_done
        return prefix is not None and (plan.prefix_id, plan.reused_tokens) == (
            prefix.plan.prefix_id,
            prefix.plan.reused_tokens,
        )


def left_behind(
    store: Store, plan: PrefillPlan, asked: PrefillOptions, namespace: bytes, world_size: int
) -> LeftBehind | None:
    """What is furthest of this prefill: the same tokens, model and namespace, as the context's id
    says, asked for alike, on as many ranks, by the same version."""
    wanted = (ringspan.__version__, asked, namespace_digest(namespace), world_size)
    found: list[LeftBehind] = []
    for folder in staging.abandoned(store.root / "staging", plan.context_id):
        left = _read(folder)
        if left is None:
            continue
        opening = left.opening
        same = (opening.version, opening.asked, opening.namespace, opening.world_size) == wanted
        sizes = (opening.plan.context_id, opening.plan.num_tokens, opening.plan.page_tokens)
        if same and sizes == (plan.context_id, plan.num_tokens, plan.page_tokens):
            found.append(left)
    return max(found, key=lambda left: left.tokens_done, default=None)


def _read(folder: Path) -> LeftBehind | None:
    """None where it cannot be read, or is of another version."""
    lines = staging.journal_lines(folder)
    try:
        opening = msgspec.json.decode(lines[0], type=Opening)
    except (IndexError, msgspec.DecodeError):
        return None
    chunks: list[tuple[ChunkDone, ...]] = []
    for line in lines[1:]:
        try:
            chunk = msgspec.json.decode(line, type=tuple[ChunkDone, ...])
        except msgspec.DecodeError:
            break
        index = chunk[0].chunk_index if chunk else -1
        if not 0 <= index <= len(chunks) or len(chunk) != opening.world_size:
            break
        chunks[index:] = [chunk]  # after a fault chunks are done again
    return LeftBehind(folder, staging.owner_pid(folder), opening, tuple(chunks))


def claim(left: LeftBehind) -> str | None:
    """The folder is this process's from now on, under this name; None where another was quicker."""
    mine = staging.claim(left.folder, left.opening.plan.context_id)
    return None if mine is None else str(mine)
