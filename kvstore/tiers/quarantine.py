"""Frames that are not what they should be: kept aside for a person, never served again.

    ROOT/quarantine/<key>-<place>.json    which page, on what road, where, what is wrong, when
    ROOT/quarantine/<key>-<place>.frame   the payload as it was read

place: a digest of `Reader.place`, which names these very bytes; the same page written anew is
another place, and is served.
"""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    from pathlib import Path

    from ringspan.cluster.messages import PageRecord
    from ringspan.errors import RingspanError
    from ringspan.kvstore.tiers.base import Reader

FOLDER = "quarantine"
FRAMES_BYTES = 1 << 30
"""Of frames that are kept; beyond that only the reasons are."""


class Quarantine:
    """The quarantine of one store folder, which need not exist."""

    def __init__(self, root: Path) -> None:
        self._folder = root / FOLDER
        try:
            names = os.listdir(self._folder)
        except OSError:
            names = []
        self._held = {name.removesuffix(".json") for name in names if name.endswith(".json")}

    def __len__(self) -> int:
        return len(self._held)

    def holds(self, reader: Reader, record: PageRecord) -> bool:
        return bool(self._held) and self._name(reader, record) in self._held

    def keep(self, reader: Reader, record: PageRecord, why: RingspanError) -> None:
        """Never served again by this process; by later ones if the folder can be written."""
        name = self._name(reader, record)
        if name in self._held:
            return
        self._held.add(name)
        reason = {
            "key": record.key,
            "span": [record.span.start, record.span.stop],
            "road": reader.road,
            "where": reader.where(record),
            "what": str(why),
            "unix_s": time.time(),
        }
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._keep_bytes(name, reader, record)
            part = self._folder / f"{name}.part"
            part.write_text(json.dumps(reason, indent=1) + "\n")
            os.replace(part, self._folder / f"{name}.json")
        except OSError:
            return  # a store that cannot be written still does not serve the page from here

    def _keep_bytes(self, name: str, reader: Reader, record: PageRecord) -> None:
        used = sum(path.stat().st_size for path in self._folder.glob("*.frame"))
        if used + record.payload_bytes > FRAMES_BYTES:
            return
        room = memoryview(bytearray(record.payload_bytes))
        try:
            reader.payload(record, room)
        except Exception:  # whatever is wrong with the frame: the reason is kept anyway
            return
        (self._folder / f"{name}.frame").write_bytes(room)

    def _name(self, reader: Reader, record: PageRecord) -> str:
        place = f"{reader.road} {reader.place(record)} {record.key}"
        return f"{record.key[:16]}-{xxhash.xxh3_64_hexdigest(place.encode())}"
