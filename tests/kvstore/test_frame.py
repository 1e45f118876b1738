from __future__ import annotations

import msgspec
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from ringspan.errors import CorruptPage
from ringspan.kvstore import frame
from ringspan.kvstore.frame import ALIGN, decode_frame, decode_head, encode_frame, encode_head
from ringspan.kvstore.keys import PUBLIC_NAMESPACE, page_keys
from ringspan.kvstore.page import Origin, verify_page
from ringspan.kvstore.testing import make_shards
from ringspan.types import Span


def make_page(codec="int8", tokens=149):
    (shard,) = make_shards(tokens, 1, codec)
    keys = page_keys("ab" * 32, PUBLIC_NAMESPACE, np.arange(tokens), 128)
    origin = Origin(fingerprint="ab" * 32, namespace="00" * 8, rope="applied")
    return shard.export_page(len(keys) - 1, origin, keys)


PAGE = make_page()
FRAME = encode_frame(PAGE)


def test_a_frame_gives_the_page_back_and_is_aligned():
    back = decode_frame(memoryview(FRAME))
    assert back.header == PAGE.header
    assert back.payload == PAGE.payload
    assert len(FRAME) % ALIGN == 0
    assert len(encode_head(PAGE.header)) % ALIGN == 0
    verify_page(back)


def test_a_header_of_very_many_layers_takes_more_than_one_block():
    header = msgspec.structs.replace(
        PAGE.header,
        form=msgspec.structs.replace(PAGE.header.form, num_layers=1000),
        plane_sums=(2**64 - 1,) * 1000,
        payload_bytes=PAGE.header.payload_bytes // 3 * 1000,
    )
    head = encode_head(header)
    assert len(head) > ALIGN
    assert decode_head(memoryview(head)) == (header, len(head))


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(FRAME) * 8 - 1)), min_size=1, max_size=4, unique=True))
def test_flipped_bits_anywhere_are_refused(bits):
    data = bytearray(FRAME)
    for (bit,) in bits:
        data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CorruptPage):
        decode_frame(memoryview(data))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(FRAME) - 1))
def test_a_cut_frame_is_refused(size):
    with pytest.raises(CorruptPage):
        decode_frame(memoryview(FRAME)[:size])


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_other_bytes_are_refused(data):
    for text in (data, FRAME[:32] + data, FRAME + data * 21 + b"x"):
        with pytest.raises(CorruptPage):
            decode_frame(memoryview(text))


def reframed(body):
    """A frame with this header body and a checksum that fits it."""
    prefix = frame._PREFIX.pack(frame.MAGIC, frame.VERSION, len(body))
    head = prefix + xxhash.xxh3_128_digest(prefix + body) + body
    return (
        head.ljust(frame.aligned(len(head)), b"\0") + FRAME[-frame.aligned(PAGE.payload.nbytes) :]
    )


BODY = msgspec.msgpack.encode(PAGE.header)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(BODY) - 1), st.integers(0, 255))
def test_a_changed_header_with_a_fitting_checksum_never_gives_wrong_bytes(at, value):
    """Whoever makes a header makes one that decodes to other facts, or is refused; no crash."""
    body = bytearray(BODY)
    body[at] = value
    try:
        page = decode_frame(memoryview(reframed(bytes(body))))
    except CorruptPage:
        return
    assert page.payload == PAGE.payload
    assert page.header.form == PAGE.header.form


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 9}, "format 9"),
        ({"key": "zz"}, "no BLAKE3 key"),
        ({"span": Span(128, 280)}, "not a page of 128 tokens"),
        ({"span": Span(3, 8)}, "not a page of 128 tokens"),
        ({"span": Span(128, 128)}, "not a page of 128 tokens"),
        ({"plane_sums": (1, 2)}, "2 plane sums for 3 layers"),
        ({"payload_bytes": 7}, "payload of 7 bytes"),
        ({"xxh3": "00" * 16}, "xxh3-128 differs"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_headers_that_contradict_themselves_are_refused(change, said):
    header = msgspec.structs.replace(PAGE.header, **change)
    with pytest.raises(CorruptPage, match=said):
        decode_frame(memoryview(reframed(msgspec.msgpack.encode(header))))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"codec": "int3"}, "unknown codec 'int3'"),
        ({"dtype": "complex64"}, "unknown dtype"),
        ({"codec_params": "plain"}, "codec_params 'plain', wanted 'hadamard'"),
        ({"num_layers": 0}, "make no sense"),
        ({"page_tokens": 64}, "pages of 64 tokens, codec int8 makes pages of 128"),
        ({"head_dim": 16}, "form differs: tensors"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_forms_that_no_codec_makes_are_refused(change, said):
    form = msgspec.structs.replace(PAGE.header.form, **change)
    header = msgspec.structs.replace(PAGE.header, form=form)
    with pytest.raises(CorruptPage, match=said):
        decode_frame(memoryview(reframed(msgspec.msgpack.encode(header))))
