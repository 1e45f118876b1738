from __future__ import annotations

import os

import msgspec
import numpy as np
import pytest
import torch

from ringspan.errors import BadInput, CorruptPage, StoreError, UnknownName
from ringspan.kvstore import archive, importing
from ringspan.kvstore.archive import ArchiveReader, ArchiveWriter, BadArchive
from ringspan.kvstore.codecs import cachegen, cold
from ringspan.kvstore.export import export_context
from ringspan.kvstore.folder import Store
from ringspan.kvstore.importing import import_context
from ringspan.kvstore.testing import make_context, page_tokens_of
from ringspan.kvstore.tiers.moving import move
from ringspan.kvstore.tiers.placement import TierName
from ringspan.types import Span

STORED = (archive.FRAMES, cold.NAME)


def facts(manifest):
    """All that is the same wherever a context lies."""
    pages = tuple((page.key, page.span, page.payload_bytes, page.xxh3) for page in manifest.pages)
    return msgspec.structs.replace(manifest, pages=(), checksum=""), pages


def tree(root):
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None
        for path in root.rglob("*")
    }


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", ["raw", "bf16", "int8", "fp8", "int4"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_context_comes_back_as_it_was(tmp_path, name, stored, world_size):
    tokens = 2 * page_tokens_of(name) + 11
    made = make_context(tmp_path / "a", tokens, world_size, name)
    file = tmp_path / "context.rsctx"
    done = export_context(made.store, made.manifest.context_id[:6], file, stored=stored)
    assert (done.num_pages, done.payload_bytes) == (3, made.manifest.payload_bytes)
    assert done.file_bytes == file.stat().st_size
    back = Store(tmp_path / "b")
    manifest = import_context(back, file)
    assert facts(manifest) == facts(made.manifest)
    assert (back.tokens(manifest) == made.token_ids).all()
    assert back.verify(manifest.context_id).ok
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "context.rsctx"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_cold_file_holds_the_same_bits_of_any_dtype_in_fewer_bytes(tmp_path, dtype):
    made = make_context(tmp_path / "a", 300, 2, "raw", page_tokens=128, head_dim=64, dtype=dtype)
    sizes = [
        export_context(
            made.store, made.manifest.context_id, tmp_path / stored, stored=stored
        ).file_bytes
        for stored in STORED
    ]
    assert sizes[1] < 0.95 * sizes[0]
    manifest = import_context(Store(tmp_path / "b"), tmp_path / cold.NAME)
    assert facts(manifest) == facts(made.manifest)


@pytest.mark.parametrize("name", ["raw", "int8"])
def test_a_lossy_file_says_so_and_comes_back_in_any_codec_below(tmp_path, name):
    made = make_context(tmp_path / "a", 300, 2, name, page_tokens=128, dtype=torch.bfloat16)
    file = tmp_path / "c.rsctx"
    done = export_context(made.store, made.manifest.context_id, file, stored=cachegen.NAME)
    assert done.file_bytes < done.payload_bytes / 3
    back = Store(tmp_path / "b")
    manifest = import_context(back, file)
    assert (manifest.context_id, manifest.keys) == (made.manifest.context_id, made.manifest.keys)
    assert back.verify(manifest.context_id).ok
    assert not manifest.exact
    assert manifest.origin.provenance[-1] == "decoded from cachegen pages"
    assert ("decoded from int8 pages" in manifest.origin.provenance) == (name == "int8")
    assert import_context(Store(tmp_path / "d"), file, codec_name="int4").codec == "int4"
    with pytest.raises(BadInput, match="stored as cachegen, which is lossy"):
        export_context(
            made.store, made.manifest.context_id, file, codec_name="int4", stored="cachegen"
        )


def test_how_many_ranks_wrote_a_context_does_not_show_in_its_pages(tmp_path):
    """The same pages from 1 rank and from 3: files differ in the manifest's world_size alone."""
    (tmp_path / "stores").mkdir()
    made = make_context(tmp_path / "stores" / "a", 75, 3)
    export_context(made.store, made.manifest.context_id, tmp_path / "three.rsctx")
    again = Store(tmp_path / "stores" / "b")
    once = import_context(again, tmp_path / "three.rsctx")  # one segment now
    export_context(again, once.context_id, tmp_path / "one.rsctx")
    assert (tmp_path / "one.rsctx").read_bytes() == (tmp_path / "three.rsctx").read_bytes()


@pytest.mark.parametrize("side", ["out", "in"])
def test_a_context_is_recoded_on_the_way(tmp_path, side):
    made = make_context(tmp_path / "a", 300, 2, "raw", page_tokens=128)
    file, back = tmp_path / "c.rsctx", Store(tmp_path / "b")
    name = made.manifest.context_id
    export_context(made.store, name, file, codec_name="int8" if side == "out" else "")
    manifest = import_context(back, file, codec_name="int8" if side == "in" else "")
    assert (manifest.context_id, manifest.keys) == (name, made.manifest.keys)
    assert (manifest.codec, manifest.fidelity.text) == ("int8", "8-bit")
    assert back.verify(name).ok
    with pytest.raises(BadInput, match="as raw it would claim to be exact"):
        export_context(back, name, tmp_path / "d.rsctx", codec_name="raw")
    assert not (tmp_path / "d.rsctx").exists()


def test_a_context_is_exported_from_another_tier(tmp_path):
    made = make_context(tmp_path / "a")
    move(made.store, made.manifest.context_id, TierName("remote", f"file://{tmp_path}/far"))
    export_context(made.store, made.manifest.context_id, tmp_path / "c.rsctx")
    assert facts(import_context(Store(tmp_path / "b"), tmp_path / "c.rsctx")) == facts(
        made.manifest
    )


def test_a_file_that_is_there_is_kept_unless_it_may_be_replaced(tmp_path):
    made = make_context(tmp_path / "a")
    file = tmp_path / "c.rsctx"
    file.write_text("precious")
    with pytest.raises(BadInput, match=r"exists already: name another file, or pass --force"):
        export_context(made.store, made.manifest.context_id, file)
    assert file.read_text() == "precious"
    export_context(made.store, made.manifest.context_id, file, replace=True)
    assert import_context(Store(tmp_path / "b"), file).context_id == made.manifest.context_id
    with pytest.raises(BadInput, match="exists already"):
        export_context(made.store, made.manifest.context_id, tmp_path, replace=True)


@pytest.mark.parametrize("what", ["page", "no folder"])
def test_an_export_that_fails_leaves_no_file(tmp_path, what):
    made = make_context(tmp_path / "a")
    out = tmp_path / "out"
    out.mkdir()
    file = out / "c.rsctx" if what == "page" else out / "none" / "c.rsctx"
    if what == "page":
        record = made.manifest.pages[3]
        path = made.store.folder(made.manifest) / record.segment
        data = bytearray(path.read_bytes())
        data[record.offset + 5000] ^= 1
        path.write_bytes(data)
    with pytest.raises(CorruptPage if what == "page" else StoreError):
        export_context(made.store, made.manifest.context_id, file)
    assert list(out.iterdir()) == []


def test_a_context_that_the_store_has_is_replaced_only_when_asked(tmp_path):
    made = make_context(tmp_path / "a", 300, 2, "raw", page_tokens=128)
    name, file = made.manifest.context_id, tmp_path / "c.rsctx"
    export_context(made.store, name, file, codec_name="int4")
    before = tree(tmp_path / "a")
    with pytest.raises(BadInput, match=f"has context {name} already"):
        import_context(made.store, file)
    assert tree(tmp_path / "a") == before
    import_context(made.store, file, replace=True)
    assert made.store.manifest(name).codec == "int4"


def test_no_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    made = make_context(tmp_path / "a")
    export_context(made.store, made.manifest.context_id, tmp_path / "c.rsctx")
    monkeypatch.setattr(importing, "room_bytes", lambda path: 10_000)
    with pytest.raises(StoreError, match=r"needs 0\.00 GB in .*, which has 0\.00 GB free"):
        import_context(Store(tmp_path / "b"), tmp_path / "c.rsctx")
    assert not (tmp_path / "b").exists()


def test_unknown_names_are_refused_by_name(tmp_path):
    made = make_context(tmp_path / "a")
    name = made.manifest.context_id
    with pytest.raises(
        UnknownName, match="unknown archive codec 'rar'; known: cachegen, zstd-planes"
    ):
        export_context(made.store, name, tmp_path / "c", stored="rar")
    with pytest.raises(UnknownName, match="unknown codec 'int3'"):
        export_context(made.store, name, tmp_path / "c", codec_name="int3")
    with pytest.raises(BadInput, match="pages of 16 tokens, codec int8 makes pages of 128"):
        export_context(made.store, name, tmp_path / "c", codec_name="int8")
    with pytest.raises(StoreError, match="cannot read"):
        import_context(made.store, tmp_path / "none")
    with pytest.raises(BadInput, match="not a plain file"):
        import_context(made.store, tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadInput, match="not a plain file"):
        import_context(made.store, tmp_path / "pipe")


# files whose checksums are right and whose words are wrong


def records_of(path):
    with ArchiveReader(path) as reader:
        return [(record.kind, bytes(record.body)) for record in reader.records()]


def write(path, records, end=None):
    """A file of these records whose every checksum, count and digest is right."""
    path.unlink(missing_ok=True)
    pages = [body for kind, body in records if kind == archive.PAGE]
    with ArchiveWriter(path) as writer:
        for kind, body in records:
            writer.add(kind, body)
        writer.end(*(end or (len(pages), 0, sum(map(len, pages)))))
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """[(kind, body)] of a context of 5 pages."""
    root = tmp_path_factory.mktemp("exported")
    made = make_context(root / "a", 75, 3)
    export_context(made.store, made.manifest.context_id, root / "c.rsctx")
    return records_of(root / "c.rsctx")


def changed_head(records, change):
    head = msgspec.json.decode(records[0][1])
    change(head)
    return [(archive.HEAD, msgspec.json.encode(head)), *records[1:]]


def refuse(tmp_path, records, said, end=None):
    with pytest.raises(BadArchive, match=said) as caught:
        import_context(Store(tmp_path / "b"), write(tmp_path / "c.rsctx", records, end))
    assert "\n" not in str(caught.value)
    assert "c.rsctx" in str(caught.value)
    staged = tmp_path / "b" / "staging"
    assert Store(tmp_path / "b").ids() == []
    assert not staged.exists() or list(staged.iterdir()) == []


def put(name, value):
    return lambda head: head["manifest"].update({name: value})


def put_form(name, value):
    return lambda head: head["manifest"]["form"].update({name: value})


def put_origin(name, value):
    return lambda head: head["manifest"]["origin"].update({name: value})


HEADS = {
    "format": (put("format", 99), "format 99, this version reads"),
    "path in id": (put("context_id", "../../etc/passwd"), "its tokens and model make"),
    "another id": (put("context_id", "0" * 16), "its tokens and model make"),
    "another model": (put_origin("fingerprint", "cd" * 32), "the model's fingerprint are not"),
    "no model": (put_origin("fingerprint", "zz"), "its pages have no keys"),
    "another namespace": (put("namespace", "00"), "not that of its keys"),
    "no namespace": (put("namespace", "xyz"), "its pages have no keys"),
    "provenance": (put_origin("provenance", ["none"]), "is a page of another context: provenance"),
    "rope": (put_origin("rope", "none"), "is a page of another context: rope"),
    "no tokens": (put("num_tokens", 0), "0 tokens"),
    "many tokens": (put("num_tokens", 1 << 60), "bytes of tokens"),
    "less tokens": (put("num_tokens", 74), r"74 tokens, the document in \[0, 75\)"),
    "more tokens": (put("num_tokens", 76), "300 bytes of tokens, 76 tokens are promised"),
    "document": (put("document_tokens", [0, 76]), r"the document in \[0, 76\)"),
    "span": (put("document_tokens", [9, 2]), "is not 0 <= start <= stop"),
    "page_tokens": (put_form("page_tokens", 0), "make no sense"),
    "long pages": (put_form("page_tokens", 1 << 62), "make no sense"),
    "shorter pages": (put_form("page_tokens", 8), "its tokens and model make"),
    "many layers": (put_form("num_layers", 1 << 23), "bytes are promised, the file has"),
    "more layers": (put_form("num_layers", 1 << 70), "head cannot be read|make no sense"),
    "large heads": (put_form("head_dim", 1 << 24), "form differs: tensors"),
    "codec": (put_form("codec", "../raw"), "unknown codec '../raw'"),
    "other codec": (put_form("codec", "int8"), "form differs|makes pages of"),
    "dtype": (put_form("dtype", "complex64"), "unknown dtype"),
    "tensors": (put_form("tensors", []), "form differs: tensors"),
    "escapes": (put("title", "\x1b[2J"), "cannot be printed"),
    "lines": (put("sources", ["a\nb"]), "cannot be printed"),
    "stored": (lambda head: head.update(stored="rar"), "unknown archive codec 'rar'"),
    "cold": (lambda head: head.update(stored=cold.NAME), "no packed frame"),
    "pages": (put("payload_bytes", 7), "pages of its own"),
    "unknown field": (put("segments", ["../../x.seg"]), "unknown field `segments`"),
    "number": (put("created_unix_s", "now"), "head cannot be read"),
}


@pytest.mark.parametrize("what", HEADS)
def test_a_head_that_lies_is_refused(tmp_path, exported, what):
    change, said = HEADS[what]
    refuse(tmp_path, changed_head(exported, change), said)


def test_heads_that_are_no_heads_are_refused(tmp_path, exported):
    for body in (b"", b"null", b"[]", b"\xff" * 40, b"[" * 100_000, b'{"stored":"frames"}'):
        refuse(tmp_path, [(archive.HEAD, body), *exported[1:]], "head cannot be read")


def test_pages_that_are_missing_double_or_out_of_order_are_refused(tmp_path, exported):
    head, pages = exported[:2], exported[2:]
    refuse(tmp_path, [*head, *pages[:-1]], "4 pages came, 5 are promised")
    refuse(tmp_path, [*head, *pages[1:]], "5 pages of 115200 bytes are promised")
    padded = (archive.PAGE, pages[0][1] + bytes(20_000))
    refuse(tmp_path, [*head, padded, *pages[1:-1]], "bytes of payload, the header says")
    refuse(tmp_path, [*head, *pages, pages[-1]], "a page more than the 5 promised")
    refuse(tmp_path, [*head, *pages[:2], pages[1], *pages[2:]], "holds page .* wanted")
    refuse(tmp_path, [*head, pages[1], pages[0], *pages[2:]], "holds page .* wanted")
    refuse(tmp_path, head, "5 pages of 115200 bytes are promised")


def test_packed_pages_that_are_missing_are_refused(tmp_path):
    made = make_context(tmp_path / "a", 75, 3)
    file = tmp_path / "cold.rsctx"
    export_context(made.store, made.manifest.context_id, file, stored=cold.NAME)
    head, pages = records_of(file)[:2], records_of(file)[2:]
    refuse(tmp_path, [*head, *pages[:-1]], "4 pages came, 5 are promised")
    refuse(tmp_path, [*head, *pages[:3], *pages[4:]], "holds page .* wanted")
    refuse(tmp_path, head, "0 pages came, 5 are promised")
    refuse(tmp_path, [*head, *pages[:2], (archive.PAGE, b""), *pages[3:]], "too short")


def test_records_in_another_order_are_refused(tmp_path, exported):
    head, tokens, *pages = exported
    refuse(tmp_path, [tokens, head, *pages], "a record TOKN, wanted HEAD")
    refuse(tmp_path, [head, *pages], "a record PAGE, wanted TOKN")
    refuse(tmp_path, [head, tokens, tokens, *pages], "a record TOKN, wanted PAGE")
    refuse(tmp_path, [head, tokens, head, *pages], "a record HEAD, wanted PAGE")
    refuse(tmp_path, [], "a record ENDS, wanted HEAD")


def test_ends_that_miscount_are_refused(tmp_path, exported):
    size = sum(len(body) for kind, body in exported if kind == archive.PAGE)
    refuse(tmp_path, exported, "were written", (4, 0, size))
    refuse(tmp_path, exported, "were written", (5, 0, size - 1))
    refuse(tmp_path, exported, "bytes of pages came, its end says 7", (5, 7, size))


def test_pages_of_another_context_are_refused(tmp_path, exported):
    for other in ({"seed": 5}, {"fingerprint": "cd" * 32}):
        made = make_context(tmp_path / "other", **other)
        file = tmp_path / "other.rsctx"
        export_context(made.store, made.manifest.context_id, file, replace=True)
        strange = records_of(file)
        refuse(tmp_path, [*exported[:4], *strange[4:]], "holds page .* wanted")
        refuse(tmp_path, [strange[0], exported[1], *exported[2:]], "its tokens and|holds page")


def test_tokens_that_are_none_are_refused(tmp_path, exported):
    ids = np.frombuffer(exported[1][1], dtype="<i4").copy()
    ids[3] = -1
    refuse(tmp_path, [exported[0], (archive.TOKENS, ids.tobytes()), *exported[2:]], "have no keys")
    ids[3] = 7
    refuse(
        tmp_path, [exported[0], (archive.TOKENS, ids.tobytes()), *exported[2:]], "its tokens and"
    )


def test_spans_that_are_hostile_do_not_reach_the_reader(tmp_path, exported):
    """A page's own header with a right checksum and a wrong place."""
    from ringspan.kvstore.frame import decode_head, encode_head

    header, at = decode_head(memoryview(bytearray(exported[3][1])))
    moved = msgspec.structs.replace(header, span=Span(32, 48))
    records = [*exported]
    records[3] = (archive.PAGE, encode_head(moved) + exported[3][1][at:])
    refuse(tmp_path, records, "holds page .* wanted")
