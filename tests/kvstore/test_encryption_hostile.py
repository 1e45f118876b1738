"""Mutated files of encrypted contexts: one clear line each, nothing wrong is ever read."""

from __future__ import annotations

import random

import msgspec
import pytest

from ringspan.errors import BadInput, CorruptPage, RingspanError
from ringspan.kvstore import archive
from ringspan.kvstore.archive import ArchiveReader, ArchiveWriter
from ringspan.kvstore.audit import verify
from ringspan.kvstore.encryption import PageCipher, plain_page
from ringspan.kvstore.export import export_context
from ringspan.kvstore.folder import Store
from ringspan.kvstore.frame import decode_frame, encode_frame
from ringspan.kvstore.importing import import_context
from ringspan.kvstore.journal import Journal, journal_problems
from ringspan.kvstore.keys import namespace_for
from ringspan.kvstore.manifest import read_manifest
from ringspan.kvstore.page import Page, verify_page
from ringspan.kvstore.records import Joined
from ringspan.kvstore.sealing import Sealed
from ringspan.kvstore.segment_reader import read_frame
from ringspan.kvstore.testing import make_context, open_shard
from ringspan.kvstore.transcode import as_is, resealed, stored_pages

SPACE = namespace_for(b"s" * 32, "a", encrypted=True)
OTHER = namespace_for(b"s" * 32, "b", encrypted=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_context(tmp_path_factory.mktemp("store"), namespace=SPACE, num_layers=2)


@pytest.fixture(scope="module")
def page(made):
    record = made.manifest.pages[1]
    return read_frame(made.store.folder(made.manifest) / record.segment, record)


def mutated(data, others, dice):
    """One way of many to spoil a file."""
    out = bytearray(data)
    at = dice.randrange(min(len(data), 2048) if dice.random() < 0.5 else len(data))
    length = 1 + dice.randrange(min(4096, len(data) - at))
    match dice.randrange(7):
        case 0:
            out[at] ^= 1 << dice.randrange(8)
        case 1:
            del out[at:]
        case 2:
            out[at : at + length] = bytes(length)
        case 3:
            out[at:at] = out[at : at + length]
        case 4:
            del out[at : at + length]
        case 5:
            other = dice.choice(others)
            out[at : at + length] = other[at : at + length]
        case _:
            out += dice.randbytes(7)
    return bytes(out)


def test_a_thousand_mutated_frames_are_refused(page):
    frame, dice = encode_frame(page), random.Random(20261124)
    done = 0
    while done < 1000:
        data = mutated(frame, [frame[::-1]], dice)
        if data == frame:
            continue
        with pytest.raises(CorruptPage) as caught:
            decode_frame(memoryview(data))
        assert "\n" not in str(caught.value)
        done += 1


def test_headers_that_lie_under_right_checksums_are_refused(page):
    """Whoever can write the disk can make every checksum right, but no tag."""
    cipher, dice = PageCipher(SPACE), random.Random(7)
    sealed = page.header.sealed
    assert sealed is not None
    for _ in range(400):
        payload = bytearray(page.payload)
        header = page.header
        match dice.randrange(6):
            case 0:
                payload[dice.randrange(len(payload))] ^= 1 << dice.randrange(8)
            case 1:
                salt = bytearray(sealed.salt)
                salt[dice.randrange(32)] ^= 1 << dice.randrange(8)
                header = sealing(header, salt=bytes(salt))
            case 2:
                tags = bytearray(sealed.tags)
                tags[dice.randrange(len(tags))] ^= 1 << dice.randrange(8)
                header = sealing(header, tags=bytes(tags))
            case 3:
                hidden = bytearray(sealed.hidden)
                hidden[dice.randrange(len(hidden))] ^= 1 << dice.randrange(8)
                header = sealing(header, hidden=bytes(hidden))
            case 4:
                header = msgspec.structs.replace(header, key=dice.randbytes(32).hex())
            case _:
                header = msgspec.structs.replace(header, parent_key=dice.randbytes(32).hex())
        forged = resealed(header, memoryview(payload))
        verify_page(forged)
        again = decode_frame(memoryview(encode_frame(forged)))
        with pytest.raises(CorruptPage, match="its encryption does not hold"):
            cipher.open_page(again)


def error_of(call):
    """Its one line; None where it went well."""
    try:
        call()
    except RingspanError as error:
        return str(error)
    return None


def test_ciphertext_never_enters_a_shard(made, page):
    verify_page(page)
    shard = open_shard(made, made.manifest.pages[:1])
    with pytest.raises(BadInput, match="is encrypted: it is opened before it enters a shard"):
        shard.import_page(page)
    with pytest.raises(CorruptPage, match="is encrypted, its context is not"):
        plain_page(page, None)
    with pytest.raises(CorruptPage, match="is not encrypted, its context is"):
        plain_page(plain_page(page, PageCipher(SPACE)), PageCipher(SPACE))


def sealing(header, **fields):
    return msgspec.structs.replace(header, sealed=msgspec.structs.replace(header.sealed, **fields))


@pytest.mark.parametrize(
    "wrong",
    [
        Sealed(b"", b"", b""),
        Sealed(bytes(32), bytes(16), b""),
        Sealed(bytes(31), bytes(16), bytes(48)),
        Sealed(bytes(32), bytes(1 << 20), bytes(48)),
        Sealed(bytes(32), bytes(16), bytes(48), bytes(256)),
    ],
    ids=["empty", "no-sums", "short-salt", "many-tags", "long-pad"],
)
def test_sealings_of_other_lengths_are_refused(page, wrong):
    header = msgspec.structs.replace(page.header, sealed=wrong)
    with pytest.raises(CorruptPage, match="its sealing has"):
        verify_page(Page(header, page.payload))


def test_mutated_export_files_change_nothing(made, tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda fd: None)
    file, store = tmp_path / "c.rsctx", Store(tmp_path / "other", (SPACE,))
    export_context(made.store, made.manifest.context_id, file)
    whole, dice = file.read_bytes(), random.Random(3)
    for number in range(500):
        data = mutated(whole, [whole[::-1]], dice)
        if data == whole:
            continue
        file.write_bytes(data)
        with pytest.raises(RingspanError) as caught:
            import_context(store, file)
        assert "\n" not in str(caught.value)
        assert file.name in str(caught.value), f"mutation {number}: {caught.value}"
        assert store.ids() == []


def record_bodies(file):
    with ArchiveReader(file) as reader:
        found = [(record.kind, bytes(record.body)) for record in reader.records()]
        return found, reader.payload_bytes


def resealed_file(file, records, payload_bytes):
    """The records as a file in which every checksum, count and digest is right."""
    file.unlink(missing_ok=True)
    pages = [body for kind, body in records if kind == archive.PAGE]
    with ArchiveWriter(file) as writer:
        for kind, body in records:
            writer.add(kind, body)
        writer.end(len(pages), payload_bytes, sum(map(len, pages)))


def lying(head, **fields):
    told = msgspec.json.decode(head, type=archive.ArchiveHead)
    manifest = msgspec.structs.replace(told.manifest, **fields)
    return msgspec.json.encode(msgspec.structs.replace(told, manifest=manifest))


def test_export_files_of_consistent_lies_are_refused(made, tmp_path):
    file, store = tmp_path / "c.rsctx", Store(tmp_path / "other", (SPACE, OTHER))
    export_context(made.store, made.manifest.context_id, file)
    records, payload_bytes = record_bodies(file)
    (_, head), (_, tokens), *pages = records
    other = make_context(tmp_path / "b", namespace=OTHER, num_layers=2)
    export_context(other.store, other.manifest.context_id, file, replace=True)
    (_, other_head), (_, other_tokens), *other_pages = record_bodies(file)[0]
    origin = msgspec.json.decode(other_head, type=archive.ArchiveHead).manifest.origin
    flipped = bytearray(tokens)
    flipped[70] ^= 1
    lies = {
        "tokens of another": [(archive.HEAD, head), (archive.TOKENS, other_tokens), *pages],
        "spoilt tokens": [(archive.HEAD, head), (archive.TOKENS, bytes(flipped)), *pages],
        "plain tokens": [
            (archive.HEAD, head),
            (archive.TOKENS, made.token_ids.astype("<i4").tobytes()),
            *pages,
        ],
        "pages of another": [(archive.HEAD, head), (archive.TOKENS, tokens), *other_pages],
        "swapped pages": [
            (archive.HEAD, head), (archive.TOKENS, tokens), pages[1], pages[0], *pages[2:],
        ],
        "another's head": [(archive.HEAD, other_head), (archive.TOKENS, tokens), *pages],
    }  # fmt: skip
    for name, fields in {
        "hides nothing": {"hidden": ""},
        "hides rot": {"hidden": "QUJD"},
        "hides no base64": {"hidden": "\n"},
        "another namespace": {"origin": origin},
        "a plain namespace": {"namespace": "zz"},
        "its own namespace": {"namespace": SPACE.hex(), "hidden": ""},
        "a path": {"context_id": "../../etc\npasswd"},
    }.items():
        lies[name] = [(archive.HEAD, lying(head, **fields)), (archive.TOKENS, tokens), *pages]
    for name, lie in lies.items():
        resealed_file(file, lie, payload_bytes)
        said = error_of(lambda: import_context(store, file))
        assert said is not None, f"{name}: was taken for a context"
        assert "\n" not in said, name
        assert file.name in said, f"{name}: {said}"
        assert store.ids() == [], name
    resealed_file(file, records, payload_bytes)
    assert import_context(store, file).keys == made.manifest.keys


def test_mutated_small_files_are_refused_or_say_the_same(tmp_path):
    made = make_context(tmp_path, namespace=SPACE, num_layers=2)
    folder, dice = made.store.folder(made.manifest), random.Random(5)
    for name in ("manifest.json", "tokens.npy"):
        whole = (folder / name).read_bytes()
        for _ in range(300):
            (folder / name).write_bytes(mutated(whole, [whole[::-1]], dice))
            said = error_of(lambda: made.store.tokens(read_manifest(folder, (SPACE,))))
            if said is None:
                manifest = read_manifest(folder, (SPACE,))
                assert manifest == made.manifest
                assert (made.store.tokens(manifest) == made.token_ids).all()
                assert len(list(stored_pages(tmp_path, manifest, as_is))) == len(manifest.pages)
            else:
                assert "\n" not in said
        (folder / name).write_bytes(whole)
    assert verify(folder, namespaces=(SPACE,)).ok


def test_a_journal_that_rots_is_noted_and_one_that_is_written_is_not(tmp_path):
    made = make_context(tmp_path)
    path = tmp_path / "directory.journal"
    folder = made.store.folder(made.manifest)
    assert journal_problems(path) == []
    journal = Journal(path)
    journal.replay()
    for epoch in range(3):
        journal.append(Joined("gang", epoch))
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])  # as if the last entry were just being written
    assert journal_problems(path) == []
    journal.close()
    (line,) = journal_problems(path)
    assert "an entry is torn at byte" in line
    assert "behind 2 records" in line
    path.write_bytes(whole)
    assert verify(folder).notes == ()
    spoilt = bytearray(whole)
    spoilt[-20] ^= 4
    path.write_bytes(spoilt)
    report = verify(folder)
    assert report.ok
    assert "an entry's checksum differs" in report.notes[0]
    assert path.read_bytes() == bytes(spoilt), "looking changed it"
    path.write_bytes(b"something else")
    assert "is no journal of this version" in journal_problems(path)[0]
