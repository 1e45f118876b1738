"""From what a person names (files, folders, stdin, token ids) to documents ready to tokenise.

Everything here happens before a model or a Ray is started, so that bad input costs nothing. A file
named by itself must be readable text; a file met in a folder that is hidden, empty or binary is
skipped and counted. Several files are joined with one header line each, so that a code base reads
as one.
"""

from __future__ import annotations

import fnmatch
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np

from ringspan.errors import BadInput

STDIN = "-"
SNIFF_BYTES = 8192
"""A binary file met in a folder mostly shows a NUL byte this early; it is then not read whole."""


class Document(msgspec.Struct, frozen=True, kw_only=True):
    """One text, and what it is called."""

    path: str
    """As it was named (`-` for stdin); in a folder, from the folder's own name on, so that the
    same folder reads the same wherever it lies."""
    text: str


class Inputs(msgspec.Struct, frozen=True, kw_only=True):
    """What was found. Either `documents` or `token_ids`, never both."""

    documents: tuple[Document, ...] = ()
    token_ids: np.ndarray | None = None
    """int32 [n]: a `.npy` file's ids, not yet checked against a vocabulary."""
    num_bytes: int = 0
    skipped_hidden: int = 0
    skipped_binary: int = 0
    skipped_empty: int = 0

    def describe(self) -> str:
        """One line for the person who asked."""
        if self.token_ids is not None:
            return f"{len(self.token_ids):,} token ids"
        files = "1 file" if len(self.documents) == 1 else f"{len(self.documents):,} files"
        skipped = ", ".join(
            f"{count:,} {kind}"
            for kind, count in (
                ("hidden", self.skipped_hidden),
                ("binary", self.skipped_binary),
                ("empty", self.skipped_empty),
            )
            if count
        )
        return f"{files}, {self.num_bytes:,} bytes" + (f" (skipped: {skipped})" if skipped else "")


def gather(
    paths: Sequence[str], patterns: Sequence[str] = (), stdin: BinaryIO | None = None
) -> Inputs:
    """Read every path in the order given; folders recursively, their files sorted by path.

    `patterns` are globs that a file of a folder must match, by name or by its path within the
    folder. Raises BadInput with one line for whatever cannot be used.
    """
    if not paths:
        raise BadInput("no input given; name files, folders, a .npy of token ids, or - for stdin")
    if any(path.endswith(".npy") for path in paths):
        if len(paths) > 1:
            raise BadInput(
                f"a .npy of token ids cannot be joined with other inputs ({len(paths)} were given);"
                " give it alone"
            )
        ids = _read_token_ids(paths[0])
        return Inputs(token_ids=ids, num_bytes=ids.nbytes)
    documents: list[Document] = []
    num_bytes = hidden = binary = empty = 0
    for path in paths:
        if path != STDIN and _is_folder(path):
            before = len(documents)
            folder_counts = {"hidden": 0, "binary": 0, "empty": 0, "other": 0}
            for file in _walk(Path(path), patterns, folder_counts):
                data = _read(file, sniff=True)
                text = None if data is None else _text_or_none(data)
                if data is None or text is None:
                    folder_counts["binary"] += 1
                elif not text.strip():
                    folder_counts["empty"] += 1
                else:
                    documents.append(Document(path=label(Path(path), file), text=text))
                    num_bytes += len(data)
            if len(documents) == before:
                raise BadInput(_nothing_in(path, patterns, folder_counts))
            hidden += folder_counts["hidden"]
            binary += folder_counts["binary"]
            empty += folder_counts["empty"]
        else:
            name = "stdin" if path == STDIN else path
            data = (stdin or sys.stdin.buffer).read() if path == STDIN else _read(Path(path))
            assert data is not None
            documents.append(Document(path=path, text=decode_text(data, name)))
            num_bytes += len(data)
    return Inputs(
        documents=tuple(documents),
        num_bytes=num_bytes,
        skipped_hidden=hidden,
        skipped_binary=binary,
        skipped_empty=empty,
    )


def label(folder: Path, file: Path) -> str:
    """`/data/book`, `/data/book/part/a.md` -> `book/part/a.md`."""
    return (Path(folder.resolve().name) / file.relative_to(folder)).as_posix()


def joined(documents: Sequence[Document]) -> tuple[str, ...]:
    """The texts in order. With several, each opens with a line that names its file."""
    if len(documents) == 1:
        return (documents[0].text,)
    return tuple(
        f"=== {document.path} ===\n{document.text.removesuffix(chr(10))}\n\n"
        for document in documents
    )


def decode_text(data: bytes, name: str) -> str:
    """UTF-8 text (a byte order mark is dropped), or BadInput naming the first byte that is not."""
    if not data:
        raise BadInput(f"{name} is empty; wanted a text with at least one word")
    nul = data.find(b"\0")
    if nul >= 0:
        raise BadInput(
            f"{name} is binary: a NUL byte at byte {nul:,} of {len(data):,}; wanted UTF-8 text"
            " (or a .npy of token ids)"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # with a byte order mark the codec counts from behind it
        at = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)
        raise BadInput(
            f"{name} is not UTF-8: byte 0x{data[at]:02x} at byte {at:,} of {len(data):,};"
            " convert it first (iconv -t UTF-8)"
        ) from None
    if not text.strip():
        raise BadInput(f"{name} holds only white space; wanted a text with at least one word")
    return text


def check_vocabulary(token_ids: np.ndarray, vocab_size: int, path: str) -> None:
    """Refuse ids outside [0, vocab_size), naming the first."""
    outside = np.flatnonzero((token_ids < 0) | (token_ids >= vocab_size))
    if outside.size:
        at = int(outside[0])
        raise BadInput(
            f"{path}: token id {int(token_ids[at])} at index {at:,} is outside the model's"
            f" vocabulary of {vocab_size:,}; was it made with another tokenizer?"
        )


def _is_folder(path: str) -> bool:
    try:
        return Path(path).is_dir() if os.stat(path) else False
    except FileNotFoundError:
        raise BadInput(f"no such file or folder: {path}") from None
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from None


def _walk(folder: Path, patterns: Sequence[str], counts: dict[str, int]) -> Iterator[Path]:
    """Regular, visible files that match, sorted by path. Links to folders are not followed."""

    def refuse(error: OSError) -> None:
        raise BadInput(f"cannot read {error.filename}: {error.strerror}")

    for root, folders, files in os.walk(folder, onerror=refuse):
        counts["hidden"] += sum(name.startswith(".") for name in folders)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            file = Path(root) / name
            if name.startswith("."):
                counts["hidden"] += 1
            elif not matches(file.relative_to(folder), patterns) or not file.is_file():
                counts["other"] += 1
            else:
                yield file


def matches(relative: Path, patterns: Sequence[str]) -> bool:
    """True if one of the globs takes the file's name or its path in the folder (no globs: all)."""
    return not patterns or any(
        fnmatch.fnmatch(relative.name, glob) or fnmatch.fnmatch(relative.as_posix(), glob)
        for glob in patterns
    )


def _read(path: Path, sniff: bool = False) -> bytes | None:
    """The file's bytes; None for one that shows a NUL byte early, if `sniff`."""
    try:
        with path.open("rb") as file:
            head = file.read(SNIFF_BYTES)
            if sniff and b"\0" in head:
                return None
            return head + file.read()
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from None


def _text_or_none(data: bytes) -> str | None:
    if b"\0" in data:
        return None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def _nothing_in(path: str, patterns: Sequence[str], counts: dict[str, int]) -> str:
    wanted = f"matching {' or '.join(patterns)}" if patterns else "with text"
    found = ", ".join(
        f"{count:,} {'not matching' if kind == 'other' else kind}"
        for kind, count in counts.items()
        if count
    )
    return f"no file {wanted} in folder {path} (found: {found or 'nothing'}); see --pattern"


def _read_token_ids(path: str) -> np.ndarray:
    try:
        with open(path, "rb") as file:
            array = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        raise BadInput(f"no such file or folder: {path}") from None
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, EOFError) as error:
        raise BadInput(
            f"{path} is not a .npy array ({str(error).splitlines()[0]});"
            " wanted 1-D integers, as np.save writes"
        ) from None
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "iu":
        found = f"{array.ndim}-D {array.dtype}" if isinstance(array, np.ndarray) else "an archive"
        raise BadInput(f"{path}: wanted a 1-D array of integers, found {found}")
    if not array.size:
        raise BadInput(f"{path} is empty; wanted at least one token id")
    if array.min() < 0 or array.max() > np.iinfo(np.int32).max:
        raise BadInput(
            f"{path}: token ids must be 0 to {np.iinfo(np.int32).max},"
            f" found {array.min()} to {array.max()}"
        )
    return array.astype(np.int32)
