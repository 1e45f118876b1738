"""Parity over the pages of a stored context: what is lost in every tier comes back bit for bit.

    CONTEXT/parity.json         how many rows of parity there are
    CONTEXT/parity-0.par ...    frames of parity

Page i of each rank's segments makes stripe i; a gang of one rank has stripes of eight pages that
follow each other. A stripe's parity is as long as its longest payload, so of P ranks it takes 1/P
of the context. Who writes it goes around from stripe to stripe, so that no file has all of it; the
rows of one stripe never lie in one file where there are two.

A frame of parity describes itself: which pages, how long, their digests and plane sums. So there is
no index, and a page that was sealed anew since is seen not to belong to its old stripe any more.

    0   magic 8 bytes | version u32 | header bytes u32 | checksum 16 bytes      (little-endian)
    32  header (msgpack of `ParityHeader`), zeros up to a multiple of 4 KiB
    ..  payload, zeros up to a multiple of 4 KiB
"""

from __future__ import annotations

import os
import struct
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np
import xxhash

from ringspan.errors import BadInput, CorruptPage, StoreError
from ringspan.kvstore.erasure import MOST_MEMBERS, MOST_ROWS, add_member
from ringspan.kvstore.frame import ALIGN, aligned, is_zero
from ringspan.kvstore.page import payload_digest
from ringspan.kvstore.sealing import Sealed
from ringspan.kvstore.segment import store_error
from ringspan.kvstore.segment_reader import read_into
from ringspan.kvstore.side_file import mend_side_file, read_side_file, write_side_file

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from ringspan.cluster.messages import PageRecord
    from ringspan.kvstore.supply import Supply
    from ringspan.types import Span

FILE = "parity.json"
SUFFIX = ".par"
VERSION = 1
MAGIC = b"RSPANPY\n"
GROUP_PAGES = 8
"""Of a stripe where one rank holds everything: parity takes an eighth."""
WRITERS = min(8, os.cpu_count() or 1)
"""Threads; each reads, verifies and sums a stripe at a time, at 1 to 2 GB/s."""

_PREFIX = struct.Struct("<8sII")
_HEAD_BYTES = _PREFIX.size + 16


class ParityMember(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A page that a stripe's parity was made of."""

    key: str
    payload_bytes: int
    xxh3: str
    plane_sums: tuple[int, ...]
    provenance: tuple[str, ...]
    sealed: Sealed | None = None
    """Of an encrypted page: parity is over what is stored, and tells nothing else."""


class ParityHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What stands before a row of parity."""

    context_id: str
    row: int
    """0: the plain sum; 1: the weighted one; see `kvstore.erasure`."""
    members: tuple[ParityMember, ...]
    payload_bytes: int
    xxh3: str


class ParityRows(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The context has so many rows of parity."""

    rows: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rows <= MOST_ROWS:
            raise ValueError(f"{self.rows} rows of parity: 0 to {MOST_ROWS} can be")


class ParityFrame(NamedTuple):
    """Where a frame of parity lies."""

    path: Path
    offset: int
    head_bytes: int
    header: ParityHeader

    @property
    def where(self) -> str:
        return f"{self.path.parent.name}/{self.path.name} at byte {self.offset}"


Stripe = tuple["PageRecord", ...]
_Parts = tuple[bytes, memoryview, bytes]
"""Of a frame: head, payload, zeros."""


def check_rows(rows: int) -> None:
    """BadInput unless there can be so many rows of parity."""
    if not 0 <= rows <= MOST_ROWS:
        raise BadInput(f"--parity {rows}: wanted 0, 1 or {MOST_ROWS} pages of parity to a stripe")


def stripes(records: Sequence[PageRecord]) -> list[Stripe]:
    """The pages of a context, each in one stripe; those of a stripe lie with different ranks."""
    homes: dict[str, list[PageRecord]] = {}
    for record in records:
        homes.setdefault(record.segment.split(".")[0], []).append(record)
    if len(homes) <= 1:
        return [tuple(records[at : at + GROUP_PAGES]) for at in range(0, len(records), GROUP_PAGES)]
    found: list[Stripe] = []
    for row in zip_longest(*homes.values()):
        members = tuple(record for record in row if record is not None)
        cuts = range(0, len(members), MOST_MEMBERS)
        found += [members[at : at + MOST_MEMBERS] for at in cuts]
    return found


def parity_path(folder: Path, writer: int | str) -> Path:
    return folder / f"parity-{writer}{SUFFIX}"


def dealt_rows(num_stripes: int, rows: int, writer: int, writers: int) -> list[tuple[int, int]]:
    """(stripe, row) that one of the writers keeps."""
    return [
        (stripe, row)
        for stripe in range(num_stripes)
        for row in range(rows)
        if (stripe + row) % writers == writer
    ]


def write_parity(path: Path, supply: Supply, wanted: Iterable[tuple[Stripe, int]]) -> int:
    """Parity of (stripe, row) to a new file, durable; the bytes written, 0 where nothing is wanted.

    Every member is read by `supply` and verified. Raises `CorruptPage`, `StoreError`; the file is
    then gone.
    """
    written = 0
    pool = ThreadPoolExecutor(WRITERS, "parity")
    try:
        with open(path, "xb") as file:
            pending: deque[Future[_Parts]] = deque()
            for job in (*wanted, None):
                while pending and (job is None or len(pending) >= WRITERS):
                    written += sum(file.write(part) for part in pending.popleft().result())
                if job is not None:
                    pending.append(pool.submit(_frame, supply, *job))
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise store_error(error, "cannot write parity to", path, written) from None
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    if not written:
        path.unlink()
    return written


def _frame(supply: Supply, stripe: Stripe, row: int) -> _Parts:
    size = max(record.payload_bytes for record in stripe)
    room = memoryview(bytearray(aligned(size)))
    total = np.zeros(size, dtype=np.uint8)
    members: list[ParityMember] = []
    for index, record in enumerate(stripe):
        page = room[: aligned(record.payload_bytes)]
        header = supply.stored_page(record, page).header
        add_member(total, row, index, np.frombuffer(page, dtype=np.uint8)[: record.payload_bytes])
        members.append(
            ParityMember(
                header.key,
                header.payload_bytes,
                header.xxh3,
                header.plane_sums,
                header.origin.provenance,
                header.sealed,
            )
        )
    head = ParityHeader(
        context_id=supply.manifest.context_id,
        row=row,
        members=tuple(members),
        payload_bytes=size,
        xxh3=payload_digest(total.data),
    )
    return encode_parity_head(head), total.data, bytes(aligned(size) - size)


def encode_parity_head(header: ParityHeader) -> bytes:
    """Everything before the payload, padded to ALIGN."""
    data = msgspec.msgpack.encode(header)
    prefix = _PREFIX.pack(MAGIC, VERSION, len(data))
    head = prefix + xxhash.xxh3_128_digest(prefix + data) + data
    return head.ljust(aligned(len(head)), b"\0")


def _decode_head(data: memoryview, where: str) -> tuple[ParityHeader, int]:
    """(header, bytes before the payload), or the bytes wanted to see it. Raises `CorruptPage`."""
    if data.nbytes < _HEAD_BYTES:
        raise CorruptPage(f"{where}: {data.nbytes} bytes, too short for a frame of parity")
    magic, version, size = _PREFIX.unpack_from(data)
    if (magic, version) != (MAGIC, VERSION):
        raise CorruptPage(f"{where}: no frame of parity of version {VERSION} begins here")
    end = _HEAD_BYTES + size
    if data.nbytes < aligned(end):
        raise CorruptPage(f"{where}: a header of {size} bytes reaches beyond the file's end")
    body = data[_HEAD_BYTES:end]
    digest = xxhash.xxh3_128(data[: _PREFIX.size])
    digest.update(body)
    if digest.digest() != bytes(data[_PREFIX.size : _HEAD_BYTES]):
        raise CorruptPage(f"{where}: the header's checksum differs")
    if not is_zero(data[end : aligned(end)]):
        raise CorruptPage(f"{where}: bytes behind the header are not zero")
    try:
        header = msgspec.msgpack.decode(body, type=ParityHeader)
    except (msgspec.DecodeError, ValueError) as error:
        raise CorruptPage(f"{where}: the header cannot be read: {error}") from None
    longest = max((member.payload_bytes for member in header.members), default=0)
    if not 0 <= header.row < MOST_ROWS or header.payload_bytes != longest:
        raise CorruptPage(f"{where}: row {header.row} of {header.payload_bytes} bytes makes none")
    if not 0 < len(header.members) <= MOST_MEMBERS:
        raise CorruptPage(f"{where}: {len(header.members)} members make no stripe")
    return header, aligned(end)


def scan_parity(folder: Path) -> tuple[list[ParityFrame], list[str]]:
    """(frames whose headers are whole, in file order; a line about each file that is not whole).

    Behind a damaged header the next one that begins at a multiple of 4 KiB is taken up. Payloads
    are not read.
    """
    frames: list[ParityFrame] = []
    damage: list[str] = []
    for path in sorted(folder.glob(f"parity-*{SUFFIX}")):
        try:
            with open(path, "rb", buffering=0) as file:
                frames += _scan(path, file.fileno(), damage)
        except OSError as error:
            damage.append(str(store_error(error, "cannot read", path)))
    return frames, damage


def _scan(path: Path, fd: int, damage: list[str]) -> Iterator[ParityFrame]:
    size = os.fstat(fd).st_size
    offset, lost = 0, False
    while offset < size:
        where = f"{path.parent.name}/{path.name} at byte {offset}"
        try:
            header, head_bytes = _read_head(fd, offset, where)
            end = offset + head_bytes + aligned(header.payload_bytes)
            if end > size:
                raise CorruptPage(f"{where}: the file ends in the middle of the frame")
        except CorruptPage as error:
            if not lost:
                damage.append(str(error))
            lost = True
            offset += ALIGN
            continue
        lost = False
        yield ParityFrame(path, offset, head_bytes, header)
        offset = end


def _read_head(fd: int, offset: int, where: str) -> tuple[ParityHeader, int]:
    data = os.pread(fd, ALIGN, offset)
    if len(data) == ALIGN:
        magic, _, header_bytes = _PREFIX.unpack_from(data)
        if magic == MAGIC and header_bytes + _HEAD_BYTES > ALIGN and header_bytes < 1 << 24:
            data = os.pread(fd, aligned(_HEAD_BYTES + header_bytes), offset)
    return _decode_head(memoryview(data), where)


def read_parity(frame: ParityFrame) -> np.ndarray:
    """The frame's payload, verified, uint8 [n]. Raises `CorruptPage`, `StoreError`."""
    header = frame.header
    data = memoryview(bytearray(aligned(header.payload_bytes)))
    try:
        with open(frame.path, "rb", buffering=0) as file:
            read_into(file.fileno(), [data], frame.offset + frame.head_bytes, frame.where)
    except OSError as error:
        raise store_error(error, "cannot read", frame.path) from None
    payload = data[: header.payload_bytes]
    if payload_digest(payload) != header.xxh3:
        raise CorruptPage(f"{frame.where}: the parity's xxh3-128 differs from its header's")
    if not is_zero(data[header.payload_bytes :]):
        raise CorruptPage(f"{frame.where}: bytes behind the parity are not zero")
    return np.frombuffer(payload, dtype=np.uint8)


def parity_rows(folder: Path) -> int:
    """How many rows of parity the context in `folder` should have. Raises `StoreError`."""
    found = read_side_file(folder / FILE, ParityRows)
    if found is not None:
        return found.rows
    return 0


def write_parity_rows(folder: Path, rows: int) -> None:
    """Says that there is parity; in one step, after it is there."""
    write_side_file(folder / FILE, ParityRows(rows))


def mend_parity_rows(folder: Path) -> tuple[str, ...]:
    """`parity.json` from its copy, else from the frames of parity that lie there; the name if it
    was written. Raises `StoreError` where it cannot be written."""
    try:
        mended = mend_side_file(folder / FILE, ParityRows)
        if mended or read_side_file(folder / FILE, ParityRows) is not None:
            return mended
    except StoreError:
        pass  # neither is whole: what the frames say is left
    rows = max((frame.header.row + 1 for frame in scan_parity(folder)[0]), default=0)
    if not rows and not (folder / FILE).exists():
        return ()
    write_parity_rows(folder, rows)
    return (FILE,)


def covered_pages(
    folder: Path, records: Sequence[PageRecord]
) -> tuple[dict[int, set[tuple[str, str]]], list[str]]:
    """(by row, the (key, xxh3) of the pages that its whole frames bring back; a line about each
    frame that is damaged). Reads all of the context's parity."""
    frames, problems = scan_parity(folder)
    current = {(record.key, record.xxh3) for record in records}
    covered: dict[int, set[tuple[str, str]]] = {row: set() for row in range(MOST_ROWS)}
    for frame in frames:
        members = {(member.key, member.xxh3) for member in frame.header.members}
        try:
            read_parity(frame)
        except (CorruptPage, StoreError) as error:
            problems.append(str(error))
        else:
            if members <= current:  # or a page was sealed anew: nothing comes back from it
                covered[frame.header.row] |= members
    return covered, problems


def stripe_widths(
    folder: Path, records: Sequence[PageRecord], bad: Collection[str]
) -> dict[str, int]:
    """By key, of pages that parity can bring back while the pages `bad` are lost: how many pages
    are read for it. Headers alone are looked at."""
    current = {(record.key, record.xxh3) for record in records}
    rows: dict[tuple[ParityMember, ...], int] = {}
    for frame in scan_parity(folder)[0]:
        rows[frame.header.members] = rows.get(frame.header.members, 0) + 1
    found: dict[str, int] = {}
    for members, count in rows.items():
        lost = [m for m in members if m.key in bad or (m.key, m.xxh3) not in current]
        if len(lost) <= count:
            width = len(members) - len(lost) + min(count, len(lost))
            found |= {m.key: width for m in lost}
    return found


def check_parity(folder: Path, records: Sequence[PageRecord]) -> list[str]:
    """A line about each frame of parity that is damaged and whose pages no other one covers."""
    rows = parity_rows(folder)
    if not rows:
        found = next(folder.glob(f"parity-*{SUFFIX}"), None)
        lost = found is not None and not (folder / FILE).exists()
        return [f"context {folder.name}: {FILE} is missing, and there is parity"] if lost else []
    covered, damage = covered_pages(folder, records)
    problems: list[str] = []
    for row in range(rows):
        bare = sum((record.key, record.xxh3) not in covered[row] for record in records)
        if bare:
            problems.append(f"{bare} of {len(records)} pages have no parity of row {row}")
    return [*damage, *problems] if problems else []


def spans_words(spans: Sequence[Span]) -> str:
    """`[0, 128), [512, 640)`, the first few of them."""
    shown = ", ".join(f"[{span.start}, {span.stop})" for span in spans[:4])
    return shown + (f" and {len(spans) - 4} more" if len(spans) > 4 else "")
