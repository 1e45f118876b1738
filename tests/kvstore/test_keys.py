from __future__ import annotations

import struct
import time

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from ringspan.errors import BadInput
from ringspan.kvstore.keys import (
    PUBLIC_NAMESPACE,
    context_id,
    namespace_digest,
    namespace_for,
    page_keys,
)

PRINT = "0a" * 32


def keys_of(tokens, fingerprint=PRINT, namespace=PUBLIC_NAMESPACE, page_tokens=4):
    return page_keys(fingerprint, namespace, np.array(tokens, dtype=np.int64), page_tokens)


def test_keys_are_those_of_the_written_formula():
    parent, wanted = bytes(32), []
    for page in ([1, 2, 3, 4], [5]):
        text = b"ringspan page v1"
        for field in (bytes.fromhex(PRINT), PUBLIC_NAMESPACE):
            text += struct.pack("<Q", len(field)) + field
        text += parent + struct.pack("<Q", len(page)) + struct.pack(f"<{len(page)}i", *page)
        parent = blake3(text).digest()
        wanted.append(parent.hex())
    assert keys_of([1, 2, 3, 4, 5]) == wanted


def test_a_common_prefix_has_common_keys_and_no_more():
    a, b = keys_of([1, 2, 3, 4, 5, 6, 7, 8, 9]), keys_of([1, 2, 3, 4, 5, 6, 7, 9, 9])
    assert [x == y for x, y in zip(a, b, strict=True)] == [True, False, False]


def test_a_short_last_page_has_a_key_of_its_length():
    assert len({*keys_of([0]), *keys_of([0, 0]), *keys_of([0, 0, 0]), *keys_of([0, 0, 0, 0])}) == 4


def test_the_same_page_after_another_parent_has_another_key():
    assert keys_of([1, 2, 3, 4, 9, 9])[1] != keys_of([1, 2, 3, 5, 9, 9])[1]


def test_model_and_namespace_change_every_key():
    tokens = list(range(9))
    sets = [
        keys_of(tokens),
        keys_of(tokens, fingerprint="0b" * 32),
        keys_of(tokens, namespace=namespace_for(b"secret", "a")),
        keys_of(tokens, namespace=namespace_for(b"secret", "b")),
        keys_of(tokens, namespace=namespace_for(b"other", "a")),
    ]
    assert len({key for keys in sets for key in keys}) == 15


@settings(max_examples=200, deadline=None)
@given(
    st.tuples(st.binary(max_size=6), st.binary(max_size=6)),
    st.tuples(st.binary(max_size=6), st.binary(max_size=6)),
)
def test_fields_cannot_flow_into_each_other(a, b):
    keys = [page_keys(f.hex(), n, np.array([1, 2]), 2) for f, n in (a, b)]
    assert (keys[0] == keys[1]) == (a == b)


def test_dtype_of_the_ids_does_not_matter():
    assert keys_of([7, 8]) == page_keys(PRINT, PUBLIC_NAMESPACE, np.array([7, 8], np.uint16), 4)


@pytest.mark.parametrize(
    "ids",
    [np.array([-1]), np.array([2**31]), np.array([0.5]), np.zeros((2, 2), int)],
    ids=["negative", "large", "float", "2-d"],
)
def test_what_is_no_row_of_token_ids_is_refused(ids):
    with pytest.raises(BadInput, match="token ids"):
        page_keys(PRINT, PUBLIC_NAMESPACE, ids, 4)


def test_a_context_is_named_by_its_last_key():
    keys = keys_of([1, 2, 3, 4, 5])
    assert context_id(keys) == keys[-1][:16]
    with pytest.raises(BadInput, match="0 tokens"):
        context_id([])


def test_a_namespace_is_not_shown_by_its_digest():
    namespace = namespace_for(b"secret", "tenant")
    assert namespace.hex()[:16] != namespace_digest(namespace)
    assert len(namespace_digest(namespace)) == 16


def test_a_million_tokens_take_no_noticeable_time():
    ids = np.arange(1 << 20, dtype=np.int32)
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        assert len(page_keys(PRINT, PUBLIC_NAMESPACE, ids, 128)) == 8192
        best = min(best, time.perf_counter() - began)
    assert best < 1.0  # 0.02 s on an idle core; a loaded one must not fail
