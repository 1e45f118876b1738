"""Mutated export files: one clear error each, and the store is as it was."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ringspan.errors import RingspanError
from ringspan.kvstore import archive
from ringspan.kvstore.archive import ArchiveReader, ArchiveWriter, BadArchive
from ringspan.kvstore.codecs import cachegen, cold
from ringspan.kvstore.export import export_context
from ringspan.kvstore.importing import import_context
from ringspan.kvstore.testing import make_context

MUTATIONS = 2100
ABSURD = (0, 1, 0x7F, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)
MOST_BYTES = 8 << 20
"""What an import of these small files may allocate, whatever they say of themselves."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Exports of two contexts, plain and packed, and of an encoded one."""
    root = tmp_path_factory.mktemp("files")
    found = []
    for seed, name, stored in (
        (0, "raw", archive.FRAMES),
        (0, "raw", cold.NAME),
        (1, "raw", archive.FRAMES),
        (0, "int4", cold.NAME),
        (0, "raw", cachegen.NAME),
    ):
        tokens = 37 if name == "raw" else 130
        made = make_context(root / f"{seed}{name}", tokens, 2, name, seed=seed, num_layers=2)
        file = root / f"{seed}{name}{stored}.rsctx"
        export_context(made.store, made.manifest.context_id, file, stored=stored)
        found.append(file.read_bytes())
    return found


@pytest.fixture
def store(tmp_path):
    """One that has another context, which must stay as it is."""
    return make_context(tmp_path / "store", seed=9).store


def state(store):
    """Every file and folder, with size and time of change."""
    return {
        str(path): (found.st_size, found.st_mtime_ns, found.st_ino)
        for path in sorted(store.root.rglob("*"))
        if path.parent == store.root or path.is_file()
        for found in (path.stat(),)
        if path.name != "staging"
    }


def mutated(data, others, dice):
    """One way of many to spoil a file."""
    out, size = bytearray(data), len(data)
    at = dice.randrange(size)
    if dice.random() < 0.3:
        at = dice.randrange(min(size, 2048))  # lengths, names and the head lie in front
    length = 1 + dice.randrange(min(4096, size - at))
    match dice.randrange(10):
        case 0:
            for _ in range(dice.randrange(1, 5)):
                out[dice.randrange(size)] ^= 1 << dice.randrange(8)
        case 1:
            out[at] ^= 1 << dice.randrange(8)
        case 2:
            del out[at:]
        case 3:
            out += dice.randbytes(1 + dice.randrange(200))
        case 4:
            out[at : at + length] = bytes(length)
        case 5:
            out[at:at] = out[at : at + length]
        case 6:
            del out[at : at + length]
        case 7:
            word = struct.pack("<Q", dice.choice(ABSURD))[: dice.choice((4, 8))]
            out[at : at + len(word)] = word
        case 8:
            other = dice.choice(others)
            out[at : at + length] = other[at : at + length]
        case _:
            to = dice.randrange(size)
            piece = bytes(out[at : at + length])
            out[at : at + length] = out[to : to + length]
            out[to : to + length] = piece
    return bytes(out)


def refused(store, file):
    """The one line that an import of this file fails by; None where it does not."""
    try:
        import_context(store, file)
    except RingspanError as error:
        text = str(error)
    else:
        return None
    assert "\n" not in text
    assert file.name in text, text
    return text


@pytest.mark.parametrize(
    "mutations", [MUTATIONS // 4, pytest.param(MUTATIONS, marks=pytest.mark.slow)]
)
def test_mutated_files_change_nothing(tmp_path, store, files, monkeypatch, mutations):
    monkeypatch.setattr("os.fsync", lambda fd: None)  # thousands of them take minutes
    dice = random.Random(20261123)
    file = tmp_path / "mutated.rsctx"
    before = state(store)
    done, said = 0, set()
    tracemalloc.start()
    while done < mutations:
        data = mutated(dice.choice(files), files, dice)
        if data in files:
            continue
        file.write_bytes(data)
        text = refused(store, file)
        assert text is not None, f"mutation {done} was taken for a context"
        said.add(text.split(": ", 1)[1][:20])
        assert state(store) == before, f"mutation {done} changed the store"
        done += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert list((store.root / "staging").iterdir()) == []
    assert len(said) > 10, f"only {said} was ever found: the mutations miss most checks"
    assert peak < MOST_BYTES


def resealed(file, records, payload_bytes):
    """The records as a file in which every checksum, count and digest is right."""
    file.unlink(missing_ok=True)
    pages = [body for kind, body in records if kind == archive.PAGE]
    with ArchiveWriter(file) as writer:
        for kind, body in records:
            writer.add(kind, body)
        writer.end(len(pages), payload_bytes, sum(map(len, pages)))


def records_of(file):
    with ArchiveReader(file) as reader:
        found = [(record.kind, bytes(record.body)) for record in reader.records()]
        return found, reader.payload_bytes


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(
    which=st.integers(0, 4),
    record=st.integers(0, 4),
    at=st.integers(0, 1 << 20),
    value=st.binary(min_size=1, max_size=8),
)
def test_a_maker_of_right_checksums_gets_in_nothing_but_the_same_pages(
    tmp_path, store, files, which, record, at, value
):
    """Bytes of head, tokens or a page are changed and all sums of the file made anew."""
    file = tmp_path / "resealed.rsctx"
    file.write_bytes(files[which])
    records, payload_bytes = records_of(file)
    kind, body = records[record % len(records)]
    at %= len(body)
    spoilt = body[:at] + value + body[at + len(value) :]
    records[record % len(records)] = (kind, spoilt[: len(body)])
    resealed(file, records, payload_bytes)
    before = state(store)
    if refused(store, file) is not None:
        assert state(store) == before
        return
    # what may be changed so is said of the context, not its identity: a title, a time
    (name,) = set(store.ids()) - {Path(path).parent.name for path in before}
    manifest = store.manifest(name)
    assert store.verify(name).ok
    file.write_bytes(files[which])
    store.remove(name)
    wanted = import_context(store, file)
    assert wanted.context_id == name
    assert [page.xxh3 for page in manifest.pages] == [page.xxh3 for page in wanted.pages]
    store.remove(name)


FIELDS = ("num_tokens", "chunk_tokens", "world_size", "payload_bytes", "format")
FORM_FIELDS = ("page_tokens", "num_layers", "num_kv_heads", "head_dim")


@pytest.mark.parametrize("value", [0, -1, 1 << 24, 1 << 31, (1 << 63) - 1], ids=str)
@pytest.mark.parametrize("field", FIELDS + FORM_FIELDS)
def test_absurd_numbers_in_a_head_allocate_nothing(tmp_path, store, files, field, value):
    file = tmp_path / "absurd.rsctx"
    for data in files[:2]:
        file.write_bytes(data)
        records, payload_bytes = records_of(file)
        head = msgspec.json.decode(records[0][1])
        (head["manifest"]["form"] if field in FORM_FIELDS else head["manifest"])[field] = value
        records[0] = (archive.HEAD, msgspec.json.encode(head))
        resealed(file, records, payload_bytes)
        tracemalloc.start()
        began = time.perf_counter()
        text = refused(store, file)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert time.perf_counter() - began < 5.0
        assert peak < MOST_BYTES
        if field not in ("chunk_tokens", "world_size"):
            assert text is not None or head["manifest"]["payload_bytes"] == value == 0
        for name in set(store.ids()) & {head["manifest"]["context_id"]}:
            store.remove(name)


@pytest.mark.parametrize("size", [1 << 20, 1 << 40, (1 << 64) - 1], ids=str)
@pytest.mark.parametrize("kind", [archive.HEAD, archive.TOKENS, archive.PAGE, archive.END])
def test_a_record_that_claims_more_than_the_file_has_is_not_read(
    tmp_path, store, files, kind, size
):
    file = tmp_path / "long.rsctx"
    data = bytearray(files[0])
    at = data.index(kind) if kind != archive.END else data.rindex(kind)
    data[at + 8 : at + 16] = size.to_bytes(8, "little")
    file.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(BadArchive, match=r"the file ends after|at most"):
        import_context(store, file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MOST_BYTES
