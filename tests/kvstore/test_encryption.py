"""Encryption at rest: what lies anywhere is ciphertext, and only the page it was made of opens."""

from __future__ import annotations

import itertools

import msgspec
import numpy as np
import pytest

from ringspan.errors import BadInput, CorruptPage, StoreError
from ringspan.kvstore.audit import verify
from ringspan.kvstore.codecs import cold
from ringspan.kvstore.codecs.registry import codec
from ringspan.kvstore.dtypes import dtype_of
from ringspan.kvstore.encryption import PageCipher, cipher_of
from ringspan.kvstore.export import export_context
from ringspan.kvstore.folder import Store
from ringspan.kvstore.forms import recode
from ringspan.kvstore.frame import encode_head
from ringspan.kvstore.importing import import_context
from ringspan.kvstore.keys import PUBLIC_NAMESPACE, namespace_for
from ringspan.kvstore.layerwise import LayerGate, load_layers
from ringspan.kvstore.manifest import encode_manifest, read_manifest, sealed
from ringspan.kvstore.page import Page, verify_page
from ringspan.kvstore.repair import mend_parity, mend_stored
from ringspan.kvstore.sealing import CHUNK_BYTES
from ringspan.kvstore.segment_reader import read_frame
from ringspan.kvstore.shard import ContextShard
from ringspan.kvstore.testing import make_context, make_shards, open_shard
from ringspan.kvstore.tiers.moving import move
from ringspan.kvstore.tiers.placement import TierName, context_supply
from ringspan.kvstore.transcode import as_is, resealed, stored_pages

SECRET = b"s" * 32
SPACE = namespace_for(SECRET, "a", encrypted=True)
PLAIN_SPACE = namespace_for(SECRET, "a")
OTHER = namespace_for(SECRET, "b", encrypted=True)


@pytest.fixture
def made(tmp_path):
    return make_context(tmp_path / "store", namespace=SPACE)


def plain_pages(made):
    return list(stored_pages(made.store.root, made.manifest, as_is))


def a_page(tokens=40, layers=3, page_tokens=64, seed=0, tmp=None):
    """A plain page that says it is of the encrypted namespace."""
    made = make_context(
        tmp, tokens, 1, page_tokens=page_tokens, num_layers=layers, seed=seed, namespace=PLAIN_SPACE
    )
    record = made.manifest.pages[0]
    page = read_frame(made.store.folder(made.manifest) / record.segment, record)
    origin = msgspec.structs.replace(page.header.origin, namespace=PageCipher(SPACE).key_id)
    return Page(msgspec.structs.replace(page.header, origin=origin), page.payload)


def test_a_context_is_stored_as_ciphertext_and_opens_as_it_was(made):
    folder, manifest = made.store.folder(made.manifest), made.manifest
    assert manifest.encrypted
    stored = b"".join(path.read_bytes() for path in sorted(folder.iterdir()))
    names = (manifest.title.encode(), SPACE, SPACE.hex().encode(), SECRET)
    for secret in (*names, np.sort(made.token_ids)[:1].tobytes() * 4):
        assert secret not in stored
    tokens = made.token_ids.astype("<i4").tobytes()
    for at in range(0, len(tokens) - 16, 16):
        assert tokens[at : at + 16] not in stored, "tokens lie there in plain"
    for page in plain_pages(made):
        verify_page(page)
        data = bytes(page.payload)
        for at in range(0, len(data) - 32, 997):
            assert data[at : at + 32] not in stored, "KV lies there in plain"
        assert page.header.xxh3.encode() not in stored, "a digest of plain KV tells what it is"
    again = Store(made.store.root, (PLAIN_SPACE, SPACE)).manifest(manifest.context_id)
    assert again == manifest
    assert (made.store.tokens(again) == made.token_ids).all()


def test_a_shard_is_filled_with_what_was_saved(made):
    plain = make_shards(75, 3)
    for rank, shard in enumerate(plain):
        records = made.manifest.pages[rank::3]
        opened = open_shard(made, records)
        for layer in range(shard.num_layers):
            for wanted, found in zip(shard.tensors(layer), opened.tensors(layer), strict=True):
                assert wanted.equal(found)


def test_the_same_pages_make_the_same_files_and_others_other_salts(tmp_path):
    first = make_context(tmp_path / "1", namespace=SPACE)
    again = make_context(tmp_path / "2", namespace=SPACE)
    other = make_context(tmp_path / "3", namespace=SPACE, seed=1)
    data = [
        (made.store.folder(made.manifest) / "rank-0.seg").read_bytes() for made in (first, again)
    ]
    assert data[0] == data[1]
    assert first.manifest.checksum == again.manifest.checksum
    salts = set()
    for made in (first, other):
        with context_supply(made.store.root, made.manifest, made.manifest.pages) as supply:
            for record in made.manifest.pages:
                room = memoryview(bytearray(-(-record.payload_bytes // 4096) * 4096))
                sealed = supply.stored_page(record, room).header.sealed
                assert sealed is not None
                salts.add(sealed.salt)
    assert len(salts) == len(first.manifest.pages) + len(other.manifest.pages)


@pytest.mark.parametrize("tokens", [1, 40, 64], ids="tokens{}".format)
def test_a_page_of_any_length_opens_whole_and_in_parts(tmp_path, tokens):
    page = a_page(tokens, layers=20, page_tokens=64, tmp=tmp_path)
    cipher = PageCipher(SPACE)
    sealed = cipher.seal(page)
    verify_page(sealed)
    assert len(encode_head(sealed.header)) == len(encode_head(cipher.draft(page.header)))
    assert cipher.open_header(sealed.header) == page.header
    whole = memoryview(bytearray(sealed.payload))
    cipher.open_payload(sealed.header, whole)
    assert whole == page.payload
    size, read = page.payload.nbytes, []

    def stored(room, first):
        read.append((first, room.nbytes))
        room[:] = sealed.payload[first : first + room.nbytes]

    cuts = sorted({0, 1, size // 3, size // 2, size - 1, size, CHUNK_BYTES, CHUNK_BYTES - 1})
    for first, stop in itertools.combinations([cut for cut in cuts if cut <= size], 2):
        room = memoryview(bytearray(b"\xff" * (stop - first + 5)))
        cipher.open_part(sealed.header, stored, room, first)
        end = min(size, stop + 5)
        assert room[: end - first] == page.payload[first:end]
        assert not any(room[end - first :])
    assert all(first % CHUNK_BYTES == 0 for first, _ in read)


FIELDS = ("key", "parent_key", "span", "form", "origin")


@pytest.mark.parametrize("field", FIELDS)
def test_a_page_under_another_name_or_place_is_refused(tmp_path, field):
    page = a_page(40, tmp=tmp_path)
    cipher = PageCipher(SPACE)
    header, payload = cipher.seal(page)
    other = {
        "key": "0" * 64,
        "parent_key": "1" * 64,
        "span": type(header.span)(64, 104),
        "form": msgspec.structs.replace(header.form, codec_params="other"),
        "origin": msgspec.structs.replace(header.origin, rope="applied theta=1"),
    }[field]
    moved = msgspec.structs.replace(header, **{field: other})
    with pytest.raises(CorruptPage, match="belongs to another page or place"):
        cipher.open_header(moved)
    with pytest.raises(CorruptPage, match="belongs to another page or place"):
        cipher.open_payload(moved, memoryview(bytearray(payload)))


def test_chunks_that_change_places_are_refused(tmp_path):
    page = a_page(64, layers=20, tmp=tmp_path)
    cipher = PageCipher(SPACE)
    header, payload = cipher.seal(page)
    assert payload.nbytes > 2 * CHUNK_BYTES
    data, tags = bytearray(payload), header.sealed.tags
    data[: 2 * CHUNK_BYTES] = data[CHUNK_BYTES : 2 * CHUNK_BYTES] + data[:CHUNK_BYTES]
    sealing = msgspec.structs.replace(header.sealed, tags=tags[16:32] + tags[:16] + tags[32:])
    with pytest.raises(CorruptPage, match="encryption does not hold"):
        cipher.open_payload(msgspec.structs.replace(header, sealed=sealing), memoryview(data))


def test_without_the_secret_rot_is_found_and_nothing_is_read(made):
    folder, name = made.store.folder(made.manifest), made.manifest.context_id
    report = verify(folder)
    assert report.ok
    assert report.locked
    stranger = Store(made.store.root)
    locked = stranger.manifest(name)
    assert (locked.title, locked.sources, locked.namespace) == ("", (), "")
    for read in (
        lambda: stranger.tokens(locked),
        lambda: list(stored_pages(made.store.root, locked, as_is)),
        lambda: export_context(stranger, name, folder.parent / "file.rsctx"),
    ):
        with pytest.raises(BadInput, match=r"is a tenant's: name the tenant \(--tenant NAME\)"):
            read()
    assert not (folder.parent / "file.rsctx").exists()
    path = folder / "rank-1.seg"
    data = bytearray(path.read_bytes())
    data[-5000] ^= 1
    path.write_bytes(data)
    report = verify(folder)
    assert [page.segment for page in report.bad_pages] == ["rank-1.seg"]
    tokens = bytearray((folder / "tokens.npy").read_bytes())
    tokens[80] ^= 1
    (folder / "tokens.npy").write_bytes(tokens)
    assert "the checksum of what is encrypted differs" in verify(folder).problems[0]


def test_another_tenant_or_secret_sees_no_context(made):
    for spaces in ((OTHER,), (PUBLIC_NAMESPACE,), (namespace_for(b"t" * 32, "a", True),)):
        store = Store(made.store.root, spaces)
        assert store.contexts() == ([], [])
        with pytest.raises(BadInput, match="known: none"):
            store.manifest(made.manifest.context_id)


def test_a_forged_page_with_right_checksums_is_refused(made):
    """Plane sums and xxh3 can be made to fit by anybody; the tags cannot."""
    folder, record = made.store.folder(made.manifest), made.manifest.pages[0]
    path = folder / record.segment
    page = read_frame(path, record)
    assert page.header.sealed is not None
    form = page.header.form
    data = bytearray(page.payload)
    data[7] ^= 1
    forged = resealed(page.header, memoryview(data))
    frame = encode_head(forged.header) + bytes(forged.payload)
    with open(path, "r+b") as file:
        file.seek(record.offset)
        file.write(frame)
    mine = msgspec.structs.replace(record, xxh3=forged.header.xxh3)
    manifest = msgspec.structs.replace(made.manifest, pages=(mine, *made.manifest.pages[1:]))
    assert form == forged.header.form
    with pytest.raises(CorruptPage, match="its encryption does not hold"):
        list(stored_pages(made.store.root, manifest, as_is))


def test_a_plain_page_in_an_encrypted_context_is_refused(tmp_path, made):
    plain = make_context(tmp_path / "plain")
    manifest = msgspec.structs.replace(
        plain.manifest, hidden="x", namespace=SPACE.hex(), origin=plain.manifest.origin
    )
    with pytest.raises(CorruptPage, match="is not encrypted, its context is"):
        list(stored_pages(plain.store.root, manifest, as_is))


def test_layers_are_loaded_from_ciphertext(made):
    form = made.manifest.form
    empty = ContextShard(
        codec(form.codec), form.num_layers, form.num_kv_heads, form.head_dim,
        dtype_of(form.dtype), "cpu", 75, form.page_tokens,
    )  # fmt: skip
    pages = made.manifest.pages
    load_layers(
        context_supply(made.store.root, made.manifest, pages), pages, empty,
        LayerGate(form.num_layers),
    )  # fmt: skip
    whole = open_shard(made, pages)
    for layer in range(form.num_layers):
        for wanted, found in zip(whole.tensors(layer), empty.tensors(layer), strict=True):
            assert wanted.equal(found)


def test_parity_brings_an_encrypted_page_back_without_the_secret(made):
    stranger = Store(made.store.root)
    locked = stranger.manifest(made.manifest.context_id)
    assert mend_parity(stranger, locked, 1) > 0
    before = [bytes(page.payload) for page in plain_pages(made)]
    record = made.manifest.pages[1]
    path = made.store.folder(made.manifest) / record.segment
    with open(path, "r+b") as file:
        file.seek(record.offset + record.frame_bytes - 5000)
        file.write(b"rot")
    report = verify(path.parent)
    assert len(report.bad_pages) == 1
    assert [bytes(page.payload) for page in plain_pages(made)] == before
    mended = mend_stored(stranger, locked, [record])
    assert mended.roads == {"parity": 1}
    assert verify(path.parent, namespaces=(SPACE,)).ok


def test_remote_copies_are_ciphertext_and_open(made, tmp_path):
    before = [bytes(page.payload) for page in plain_pages(made)]
    remote = TierName("remote", f"file://{tmp_path / 'remote'}")
    move(made.store, made.manifest.context_id, remote)
    stored = b"".join(path.read_bytes() for path in (tmp_path / "remote").rglob("*.pack"))
    assert all(data[:64] not in stored for data in before)
    assert not list(made.store.folder(made.manifest).glob("*.seg"))
    assert [bytes(page.payload) for page in plain_pages(made)] == before
    move(made.store, made.manifest.context_id, TierName("disk"))
    manifest = made.store.manifest(made.manifest.context_id)
    assert verify(made.store.folder(manifest), namespaces=(SPACE,)).ok
    assert [bytes(p.payload) for p in stored_pages(made.store.root, manifest, as_is)] == before


def test_a_file_of_an_encrypted_context_is_encrypted(made, tmp_path):
    file, name = tmp_path / "c.rsctx", made.manifest.context_id
    export_context(made.store, name, file)
    data = file.read_bytes()
    assert all(bytes(page.payload[:64]) not in data for page in plain_pages(made))
    assert made.token_ids.astype("<i4").tobytes()[:64] not in data
    assert made.manifest.title.encode() not in data
    assert SPACE.hex().encode() not in data
    for space in (PUBLIC_NAMESPACE, OTHER):
        with pytest.raises(BadInput, match=r"c\.rsctx: context .* is a tenant"):
            import_context(Store(tmp_path / "other", (space,)), file)
    back = import_context(Store(tmp_path / "back", (SPACE,)), file)
    assert back.keys == made.manifest.keys
    assert back.title == made.manifest.title
    assert verify(Store(tmp_path / "back").folder(back), namespaces=(SPACE,)).ok
    with pytest.raises(BadInput, match="is encrypted, and ciphertext cannot be packed"):
        export_context(made.store, name, tmp_path / "cold.rsctx", stored=cold.NAME)


def test_a_second_form_is_encrypted_too(tmp_path):
    made = make_context(tmp_path / "store", 300, 2, page_tokens=128, namespace=SPACE)
    at, manifest = recode(made.store, made.manifest.context_id, "int8")
    assert manifest.encrypted
    assert verify(at.folder(manifest), namespaces=(SPACE,)).ok
    record = manifest.pages[0]
    assert read_frame(at.folder(manifest) / record.segment, record).header.sealed is not None


def test_plain_namespaces_have_no_cipher():
    assert cipher_of(PUBLIC_NAMESPACE) is None
    assert cipher_of(PLAIN_SPACE) is None
    with pytest.raises(BadInput, match="--tenant NAME --encrypt"):
        PageCipher(PLAIN_SPACE)
    assert SPACE.hex() not in repr(PageCipher(SPACE))


def test_blobs_open_under_their_own_name_alone(tmp_path):
    cipher = PageCipher(SPACE)
    data = cipher.seal_blob(b"text", "tokens of context a")
    assert cipher.open_blob(data, "tokens of context a") == b"text"
    with pytest.raises(StoreError, match="tokens of context b: its encryption does not hold"):
        cipher.open_blob(data, "tokens of context b")
    with pytest.raises(StoreError, match="its encryption does not hold"):
        PageCipher(OTHER).open_blob(data, "tokens of context a")
    for at in range(len(data)):
        spoilt = bytearray(data)
        spoilt[at] ^= 1
        with pytest.raises(StoreError, match="tokens of context a: "):
            cipher.open_blob(bytes(spoilt), "tokens of context a")
    for size in range(len(data)):
        with pytest.raises(StoreError, match="tokens of context a: "):
            cipher.open_blob(data[:size], "tokens of context a")


def test_a_manifest_that_was_swapped_hides_nothing_of_the_other(made, tmp_path):
    """Title and sources are bound to their context."""
    other = make_context(tmp_path / "store", seed=1, namespace=SPACE)
    a, b = (m.store.folder(m.manifest) for m in (made, other))
    locked = read_manifest(a)
    forged = msgspec.structs.replace(locked, hidden=read_manifest(b).hidden)
    (a / "manifest.json").write_bytes(encode_manifest(sealed(forged)))
    with pytest.raises(StoreError, match="its encryption does not hold"):
        read_manifest(a, (SPACE,))
