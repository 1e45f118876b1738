from __future__ import annotations

import tracemalloc

import msgspec
import numpy as np
import pytest
import torch
import xxhash
import zstandard

from ringspan.errors import CorruptPage, UnknownName
from ringspan.kvstore import packed
from ringspan.kvstore.codecs import cold
from ringspan.kvstore.codecs.registry import CODECS
from ringspan.kvstore.page import Origin, Page, verify_page
from ringspan.kvstore.testing import make_shards, page_tokens_of

ORIGIN = Origin(fingerprint="ab" * 32, namespace="00" * 8, rope="applied")


def make_page(name="raw", *, short=False, **form):
    (shard,) = make_shards(page_tokens_of(name, form.get("head_dim", 32)) + 11, 1, name, **form)
    return shard.export_page(int(short), ORIGIN, ["00" * 32] * 2)


def refitted(head, data, **fields):
    """A packed frame with these fields in its head, and checksums that fit."""
    head = msgspec.structs.replace(
        head, stored_bytes=len(data), xxh3=xxhash.xxh3_128_hexdigest(data), **fields
    )
    body = msgspec.msgpack.encode(head)
    prefix = packed._PREFIX.pack(packed.MAGIC, packed.VERSION, len(body))
    return b"".join((prefix, xxhash.xxh3_128_digest(prefix + body), body, data))


def parts_of(page):
    """(head, stored bytes) of the page's packed frame."""
    head, data = packed.encode_packed(page, cold.NAME)
    return packed._decode_head(memoryview(head + data), "frame")[0], data


@pytest.mark.parametrize("short", [False, True], ids=["full", "short"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CODECS)
def test_a_packed_page_is_the_same_page(name, dtype, short):
    page = make_page(name, short=short, dtype=dtype)
    head, data = packed.encode_packed(page, cold.NAME)
    back = packed.decode_packed(memoryview(head + data), cold.NAME)
    assert back.header == page.header
    assert back.payload == page.payload
    verify_page(back)


def test_values_of_every_kind_come_back_bit_for_bit():
    """nan with a payload, infinities, subnormals, both zeros: bits, not numbers, are kept."""
    page = make_page(dtype=torch.float32)
    bits = np.frombuffer(page.payload, dtype="<u4").copy()
    bits[:8] = (0x7FC00001, 0xFF800000, 0x7F800000, 1, 0x80000000, 0, 0xFFFFFFFF, 0x007FFFFF)
    payload = memoryview(bits.view(np.uint8)).cast("B")
    form, tokens = page.header.form, page.header.span.tokens
    stored = cold.pack(form, tokens, payload)
    assert cold.unpack(form, tokens, memoryview(stored)) == payload


def test_exponents_that_repeat_are_packed_and_noise_is_not_made_larger():
    page = make_page(dtype=torch.bfloat16, head_dim=64, page_tokens=128)
    form, tokens, size = page.header.form, page.header.span.tokens, page.payload.nbytes
    assert len(cold.pack(form, tokens, page.payload)) < 0.8 * size
    noise = memoryview(np.random.default_rng(0).bytes(size))
    assert len(cold.pack(form, tokens, noise)) <= size + 64
    assert len(cold.pack(form, tokens, memoryview(bytes(size)))) < size / 100


def test_stored_bytes_and_payload_are_both_verified():
    page = make_page()
    head, data = parts_of(page)
    frame = bytearray(b"".join(packed.encode_packed(page, cold.NAME)))
    frame[-1] ^= 1
    with pytest.raises(CorruptPage, match="its stored bytes differs"):
        packed.decode_packed(memoryview(frame), cold.NAME)
    other = bytearray(page.payload)
    other[100] ^= 1
    form, tokens = page.header.form, page.header.span.tokens
    with pytest.raises(CorruptPage, match="payload's xxh3-128 differs"):
        packed.decode_packed(
            memoryview(refitted(head, cold.pack(form, tokens, memoryview(other)))), cold.NAME
        )
    with pytest.raises(CorruptPage, match="stored as 'rar', wanted 'zstd-planes'"):
        packed.decode_packed(memoryview(refitted(head, data, stored="rar")), cold.NAME)
    with pytest.raises(UnknownName, match="unknown archive codec 'rar'"):
        packed.encode_packed(page, "rar")
    assert Page(page.header, page.payload) == page


def sized(plane):
    return cold._SIZE.pack(len(plane)) + plane


def bombs(page):
    """Stored bytes that would become more, or less, than the page's payload."""
    form, tokens = page.header.form, page.header.span.tokens
    stored = cold.pack(form, tokens, page.payload)
    (first,) = cold._SIZE.unpack_from(stored)
    rest = stored[cold._SIZE.size + first :]
    plane = page.payload.nbytes // 8  # two tensors of four bytes an element
    zeros = zstandard.ZstdCompressor(level=19).compress(bytes(64 << 20))
    streamed = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    unsized = streamed.compress(bytes(64 << 20)) + streamed.flush()
    fitting = zstandard.ZstdCompressor().compress(bytes(plane))
    huge = bytes.fromhex("28b52ffd") + b"\xe0" + (1 << 60).to_bytes(8, "little") + b"\x01\x00\x00"
    return {
        "a bomb": (sized(zeros) + rest, f"zstd claims {64 << 20} bytes, the form makes {plane}"),
        "a bomb that does not say so": (sized(unsized) + rest, "zstd claims"),
        "an exabyte": (sized(huge) + rest, f"zstd claims {1 << 60} bytes"),
        "two frames": (sized(fitting + fitting) + rest, "plane 0 of k"),
        "no frame": (sized(b"RSPANPZ\n" * 4) + rest, "plane 0 of k"),
        "an empty plane": (sized(b"") + rest, "0 bytes stored"),
        "a plane of 4 GiB": (b"\xff" * 4 + stored[4:], "bytes stored for"),
        "a plane less": (stored[: -len(stored) // 2], "bytes stored for|plane"),
        "a plane more": (stored + sized(fitting), "bytes behind the last plane"),
        "nothing": (b"", "0 bytes stored"),
    }


@pytest.mark.parametrize("what", list(bombs(make_page())))
def test_what_zstd_would_make_is_checked_before_it_is_made(what):
    page = make_page()
    stored, said = bombs(page)[what]
    head, _ = parts_of(page)
    frame = memoryview(refitted(head, stored))
    tracemalloc.start()
    try:
        with pytest.raises(CorruptPage, match=said):
            packed.decode_packed(frame, cold.NAME)
        assert tracemalloc.get_traced_memory()[1] < 4 * page.payload.nbytes + (1 << 20)
    finally:
        tracemalloc.stop()


def test_a_page_larger_than_any_is_not_unpacked(monkeypatch):
    page = make_page()
    monkeypatch.setattr(packed, "MAX_PAYLOAD_BYTES", page.payload.nbytes - 1)
    data = b"".join(packed.encode_packed(page, cold.NAME))
    with pytest.raises(CorruptPage, match=r"would become \d+ bytes, at most"):
        packed.decode_packed(memoryview(data), cold.NAME)


def test_flipped_bits_anywhere_in_a_packed_frame_are_refused():
    frame = b"".join(packed.encode_packed(make_page(), cold.NAME))
    random = np.random.default_rng(1)
    for at in (*range(64), *random.integers(0, len(frame), 300).tolist()):
        data = bytearray(frame)
        data[at] ^= 1 << int(random.integers(8))
        with pytest.raises(CorruptPage):
            packed.decode_packed(memoryview(data), cold.NAME)
    for size in (0, 5, 31, 32, 200, len(frame) - 1):
        with pytest.raises(CorruptPage):
            packed.decode_packed(memoryview(frame)[:size], cold.NAME)
    with pytest.raises(CorruptPage):
        packed.decode_packed(memoryview(frame + b"x"), cold.NAME)
