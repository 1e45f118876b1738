from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch

from ringspan.errors import CorruptPage, TooLarge
from ringspan.kernels.sum64 import sum64_ref
from ringspan.kvstore import planes
from ringspan.kvstore.codecs.registry import CODECS, codec
from ringspan.kvstore.keys import PUBLIC_NAMESPACE, page_keys
from ringspan.kvstore.page import Origin, payload_digest, verify_page
from ringspan.kvstore.pool import Pool, free_bytes
from ringspan.kvstore.shard import ContextShard
from ringspan.kvstore.testing import make_shards, page_tokens_of
from ringspan.types import Span

ORIGIN = Origin(fingerprint="ab" * 32, namespace="00" * 8, rope="applied")


def shard_of(name="raw", capacity=40, page_tokens=None, layers=2, head_dim=32):
    page_tokens = page_tokens or page_tokens_of(name)
    return ContextShard(
        codec(name), layers, 2, head_dim, torch.float32, "cpu", capacity, page_tokens
    )


def some(tokens, head_dim=32, seed=0):
    return torch.randn(
        (2, tokens, 2, head_dim), generator=torch.Generator().manual_seed(seed)
    ).unbind(0)


def keys_for(num_tokens, page_tokens=16):
    return page_keys("ab" * 32, PUBLIC_NAMESPACE, np.arange(num_tokens), page_tokens)


@pytest.mark.parametrize("name", CODECS)
def test_what_is_written_in_two_pieces_reads_back_as_one(name):
    step = page_tokens_of(name)
    tokens = 2 * step + 5
    k, v = some(tokens)
    whole, pieces = shard_of(name, tokens), shard_of(name, tokens)
    whole.reserve((Span(0, tokens),))
    pieces.reserve((Span(0, step),))
    for layer in range(2):
        whole.write(layer, k, v)
        pieces.write(layer, k[:step], v[:step])
    pieces.reserve((Span(step, tokens),))
    for layer in range(2):
        pieces.write(layer, k[step:], v[step:])
        for a, b in zip(whole.tensors(layer), pieces.tensors(layer), strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
            assert a.is_contiguous()
    assert pieces.spans == (Span(0, tokens),)
    assert pieces.num_tokens == tokens
    assert pieces.kv_bytes == pieces.bytes_of(tokens) == pieces.capacity_bytes
    spec = pieces.specs[0]
    assert pieces.tensors(0, step)[0].shape[0] == spec.units(step)
    assert pieces.tensors(0, tokens, step)[0].shape[0] == spec.units(step + 5)


def test_pages_that_are_encoded_whole_come_whole():
    shard = shard_of("int8", 512)
    with pytest.raises(ValueError, match=r"span \[16, 144\) is not cut at pages of 128, in which"):
        shard.reserve((Span(16, 144),))
    with pytest.raises(ValueError, match=r"span \[0, 100\) is not cut at pages of 128"):
        shard.reserve((Span(0, 100), Span(128, 256)))
    shard.reserve((Span(0, 128), Span(256, 300)))
    for layer in range(2):
        shard.write(layer, *some(172))
    with pytest.raises(ValueError, match="172 rows end within a page of 128, which codec int8"):
        shard.reserve((Span(300, 301),))
    with pytest.raises(ValueError, match="row 5 lies within a unit of 128"):
        shard.tensors(0, None, 5)
    with pytest.raises(ValueError, match="in pages of 16 tokens, codec int4 makes pages of 128"):
        shard_of("int4", page_tokens=16)


def test_a_layer_cannot_be_read_before_it_is_written():
    shard = shard_of()
    shard.reserve((Span(0, 16),))
    shard.write(0, *some(16))
    assert shard.tensors(0)[0].shape[0] == 16
    with pytest.raises(ValueError, match="layer 1, which has written 0 of 16"):
        shard.tensors(1)
    assert shard.tensors(1, 0)[0].shape[0] == 0


def test_misuse_is_told():
    shard = shard_of()
    with pytest.raises(ValueError, match=r"reserved were \[T, Hkv, D\] = \(0, 2, 32\)"):
        shard.write(0, *some(3))
    shard.reserve((Span(16, 32),))
    with pytest.raises(ValueError, match="layer 0 has written 0 of 16"):
        shard.reserve((Span(32, 33),))
    with pytest.raises(ValueError, match="float64"):
        shard.write(0, *(x.double() for x in some(16)))
    for layer in range(2):
        shard.write(layer, *some(16))
    with pytest.raises(ValueError, match="write once"):
        shard.write(0, *some(16))
    with pytest.raises(ValueError, match=r"span \[0, 16\) is not behind position 32"):
        shard.reserve((Span(0, 16),))
    with pytest.raises(ValueError, match="ascending"):
        shard.reserve((Span(48, 50), Span(40, 42)))
    with pytest.raises(TooLarge, match=r"25 more tokens in a shard that holds 16 of 40"):
        shard.reserve((Span(32, 57),))
    assert shard.spans == (Span(16, 32),)


def test_a_cancelled_reservation_leaves_what_was_before():
    shard = shard_of()
    k, v = some(16)
    shard.reserve((Span(0, 16),))
    for layer in range(2):
        shard.write(layer, k, v)
    shard.reserve((Span(16, 40),))
    shard.write(0, *some(24, seed=1))
    shard.cancel()
    shard.cancel()
    assert shard.spans == (Span(0, 16),)
    assert shard.is_complete
    assert torch.equal(shard.tensors(0)[0], k)


def test_pages_are_cut_by_absolute_position():
    (shard, _) = make_shards(75, 2)
    assert shard.pages() == (
        (Span(0, 16), 0),
        (Span(32, 48), 16),
        (Span(64, 75), 32),
    )
    tail = shard_of()
    tail.reserve((Span(75, 80),))
    with pytest.raises(ValueError, match="not cut at pages of 16"):
        tail.pages()


@pytest.mark.parametrize("name", CODECS)
def test_plane_sums_are_those_of_the_written_formula(name):
    step = page_tokens_of(name)
    (shard,) = make_shards(step + 5, 1, name)
    wanted = [
        sum(
            sum64_ref(tensor.contiguous().view(torch.uint8).numpy().tobytes(), t + 1)
            for t, tensor in enumerate(shard.tensors(layer, None, step))
        )
        % 2**64
        for layer in range(3)
    ]
    assert shard.plane_sums(1) == wanted
    assert shard.all_plane_sums() == [shard.plane_sums(0), wanted]


@pytest.mark.parametrize("name", CODECS)
def test_pages_go_to_another_shard_bit_for_bit(name):
    step = page_tokens_of(name)
    tokens = 4 * step + 11
    (source,) = make_shards(tokens, 1, name)
    target = ContextShard(codec(name), 3, 2, 32, torch.float32, "cpu", tokens, step)
    for index in range(5):
        page = source.export_page(index, ORIGIN, keys_for(tokens, step))
        assert list(page.header.plane_sums) == source.plane_sums(index)
        assert page.header.key == keys_for(tokens, step)[index]
        assert page.payload.nbytes == source.bytes_of(page.header.span.tokens)
        target.import_page(page)
    assert target.spans == source.spans
    for layer in range(3):
        for a, b in zip(source.tensors(layer), target.tensors(layer), strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_a_changed_page_is_not_imported_and_the_layer_is_named():
    (source,) = make_shards(32, 1)
    target = shard_of(layers=3)
    page = source.export_page(1, ORIGIN, keys_for(32))
    page.payload[page.payload.nbytes // 2] ^= 1
    with pytest.raises(CorruptPage, match="xxh3-128"):
        target.import_page(page)
    digest = source.export_page(1, ORIGIN, keys_for(32)).header
    forged = page._replace(
        header=msgspec.structs.replace(digest, xxh3=payload_digest(page.payload))
    )
    with pytest.raises(CorruptPage, match="plane sum differs in layer 1"):
        target.import_page(forged)
    assert target.num_tokens == 0


def test_a_page_of_another_form_is_not_imported():
    (source,) = make_shards(16, 1)
    with pytest.raises(CorruptPage, match=r"does not fit the shard: num_layers 3, wanted 2"):
        shard_of().import_page(source.export_page(0, ORIGIN, keys_for(16)))


def test_planes_of_two_layers_swapped_are_seen():
    (source,) = make_shards(16, 1)
    page = source.export_page(0, ORIGIN, keys_for(16))
    verify_page(page)
    plane = page.payload.nbytes // 3
    data = bytes(page.payload)
    swapped = memoryview(data[plane : 2 * plane] + data[:plane] + data[2 * plane :])
    sums = planes.payload_sums(swapped, page.header.form.specs, 3, 16)
    assert [a == b for a, b in zip(sums, page.header.plane_sums, strict=True)] == [
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("page_tokens", [3, 4])
def test_odd_payloads_are_copied_bytewise(page_tokens):
    """An odd number of tokens of few values leaves planes that are no multiple of 8 bytes."""
    form = {"num_kv_heads": 1, "head_dim": 2, "num_layers": 2, "page_tokens": page_tokens}
    (source,) = make_shards(5, 1, "bf16", **form)
    target = ContextShard(codec("bf16"), 2, 1, 2, torch.float32, "cpu", 5, page_tokens)
    for index in range(2):
        target.import_page(source.export_page(index, ORIGIN, keys_for(5, page_tokens)))
    for layer in range(2):
        for a, b in zip(source.tensors(layer), target.tensors(layer), strict=True):
            assert torch.equal(a, b)


def test_the_pool_refuses_with_numbers_what_does_not_fit():
    pool = Pool("cpu", budget_bytes=3 * 2**20)
    size = (2, 2, 64, torch.float32)  # 2 KiB a token
    pool.allocate("a", codec("raw"), *size, 1024, 128)
    assert pool.in_use_bytes == 2 * 2**20
    with pytest.raises(
        TooLarge, match=r"b needs 0\.00 GiB of KV on cpu, 0\.00 GiB are free .* --codec int8"
    ):
        pool.allocate("b", codec("raw"), *size, 1024, 128)
    pool.allocate("b", codec("int8"), *size, 1024, 128)
    with pytest.raises(ValueError, match="free it first"):
        pool.allocate("a", codec("raw"), *size, 1, 128)
    pool.free("a")
    pool.free("a")
    assert list(pool.shards) == ["b"]


def test_the_pool_knows_this_machines_memory():
    assert 0 < Pool("cpu").budget_bytes < free_bytes("cpu") + 2**30


def test_more_than_the_machine_has_is_too_large_not_a_crash():
    with pytest.raises(TooLarge, match="GiB on cpu"):
        shard_of(capacity=2**50)
