"""Small files beside a context's pages that must be right: `tiers.json`, `parity.json`.

    NAME, NAME.copy    {"checksum": xxh3-128 of the JSON of body, hex, "body": {...}}

The copy is written first, so that at all times one of the two is whole. A reader takes the file, or
its copy where the file is missing or damaged; where neither is whole it is refused, since what a
default would say may be wrong. Files of before, a bare body without a checksum, are read as such.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Generic, TypeVar

import msgspec
import xxhash

from ringspan.errors import StoreError
from ringspan.kvstore.segment import store_error

if TYPE_CHECKING:
    from pathlib import Path

T = TypeVar("T", bound=msgspec.Struct)
COPY = ".copy"


class _Checked(msgspec.Struct, Generic[T], frozen=True, forbid_unknown_fields=True):
    checksum: str
    body: T


def write_side_file(path: Path, body: msgspec.Struct) -> None:
    """Durable, in one step each: the copy, then the file. Raises `StoreError`."""
    data = msgspec.json.encode(_Checked(_checksum(body), body))
    try:
        for target in (path.with_name(path.name + COPY), path):
            part = target.with_name(f"{target.name}.part")
            with open(part, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, target)
    except OSError as error:
        raise store_error(error, "cannot write", path) from None


def read_side_file(path: Path, kind: type[T]) -> T | None:
    """What the file or its copy says; None where there is neither. Raises `StoreError` naming the
    context where neither is whole."""
    problem = ""
    for target in (path, path.with_name(path.name + COPY)):
        try:
            return _read(target, kind)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise store_error(error, "cannot read", target) from None
        except StoreError as error:
            problem = problem or str(error)
    if problem:
        raise StoreError(problem)
    return None


def side_file_problems(path: Path, kind: type[T]) -> list[str]:
    """A line about the file and its copy, each, that is not whole or missing beside the other."""
    problems: list[str] = []
    found: list[T] = []
    missing: list[Path] = []
    for target in (path, path.with_name(path.name + COPY)):
        try:
            found.append(_read(target, kind))
        except FileNotFoundError:
            missing.append(target)
        except OSError as error:
            problems.append(str(store_error(error, "cannot read", target)))
        except StoreError as error:
            problems.append(str(error))
    if len(missing) == 1 and not _is_bare(path):
        problems.append(f"context {path.parent.name}: {missing[0].name} is missing")
    if len(found) == 2 and found[0] != found[1]:
        problems.append(f"context {path.parent.name}: {path.name} and its copy differ")
    return problems


def mend_side_file(path: Path, kind: type[T]) -> tuple[str, ...]:
    """The file and its copy, each from the other; the name if anything was written. Raises
    `StoreError` where neither is whole."""
    if not side_file_problems(path, kind):
        return ()
    body = read_side_file(path, kind)
    if body is None:
        return ()
    write_side_file(path, body)
    return (path.name,)


def _read(path: Path, kind: type[T]) -> T:
    """Raises OSError, `StoreError`."""
    data = path.read_bytes()
    name = f"context {path.parent.name}: {path.name}"
    try:
        if b'"checksum"' not in data:
            return msgspec.json.decode(data, type=kind)
        checked = msgspec.json.decode(data, type=_Checked[kind])  # type: ignore[valid-type]
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise StoreError(f"{name} cannot be read: {error}") from None
    body: T = checked.body
    if checked.checksum != _checksum(body):
        raise StoreError(f"{name} is damaged: its checksum differs")
    return body


def _is_bare(path: Path) -> bool:
    """Written before there were checksums and copies."""
    try:
        return b'"checksum"' not in path.read_bytes()
    except OSError:
        return False


def _checksum(body: msgspec.Struct) -> str:
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(body))
