from __future__ import annotations

import numpy as np
import pytest
import torch

from ringspan.errors import UnknownName
from ringspan.kvstore.codecs.registry import CODECS, bits_per_element, codec, encoded_bytes
from ringspan.kvstore.keys import PUBLIC_NAMESPACE, page_keys
from ringspan.kvstore.page import Origin
from ringspan.kvstore.testing import RELATIVE_RMS, check_codec, make_shards
from ringspan.types import Span

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IN_PLACE = ["int8", "fp8", "int4", "k4v2", "int2"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CODECS)
def test_codec_conforms(name, dtype):
    check_codec(codec(name), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CODECS)
def test_codec_conforms_on_a_gpu(name, dtype):
    check_codec(codec(name), dtype, "cuda")


def test_only_raw_is_exact():
    assert [name for name in CODECS if codec(name).exact] == ["raw"]


BITS = [
    ("raw", 16), ("bf16", 16), ("int8", 8.25), ("fp8", 8.25), ("int4", 4.5625),
    ("nuq4", 4.314453125), ("k4v2", 3.40625), ("int2", 2.21875),
]  # fmt: skip


@pytest.mark.parametrize(("name", "bits"), BITS)
def test_bits_per_element_count_all_side_data(name, bits):
    assert bits_per_element(codec(name), 8, 128, torch.bfloat16) == bits
    page_bytes = encoded_bytes(codec(name), 32, 8, 128, torch.bfloat16, 128)
    assert page_bytes == 128 * 65_536 * bits / 8


def test_the_list_of_bits_is_complete():
    assert [name for name, _ in BITS] == list(CODECS) == list(RELATIVE_RMS)


@pytest.mark.parametrize("name", CODECS)
def test_bits_counted_are_bytes_measured(name):
    (shard,) = make_shards(256, 1, name, head_dim=64, dtype=torch.bfloat16)
    held = sum(t.nbytes for layer in range(3) for t in shard.tensors(layer))
    assert held == shard.kv_bytes == shard.capacity_bytes
    bits = bits_per_element(codec(name), 2, 64, torch.bfloat16)
    assert 8 * held == bits * 256 * 2 * 2 * 64 * 3
    keys = page_keys("ab" * 32, PUBLIC_NAMESPACE, np.arange(256), shard.page_tokens)
    origin = Origin(fingerprint="ab" * 32, namespace="00" * 8, rope="applied")
    pages = [shard.export_page(i, origin, keys) for i in range(len(shard.pages()))]
    assert sum(page.payload.nbytes for page in pages) == held


def test_a_page_has_the_same_key_in_every_codec():
    origin = Origin(fingerprint="ab" * 32, namespace="00" * 8, rope="applied")
    keys = page_keys("ab" * 32, PUBLIC_NAMESPACE, np.arange(200), 128)
    headers = []
    for name in CODECS:
        (shard,) = make_shards(200, 1, name, page_tokens=128)
        headers += [shard.export_page(1, origin, keys).header]
    assert {header.key for header in headers} == {keys[1]}
    assert {header.span for header in headers} == {Span(128, 200)}
    assert len({header.xxh3 for header in headers}) == len(CODECS)  # raw of fp32: not bf16's


def encoded(name, k, v):
    specs = codec(name).specs(k.shape[1], k.shape[2], k.dtype)
    into = tuple(torch.empty((s.units(len(k)), *s.shape), dtype=s.dtype) for s in specs)
    codec(name).encode(k, v, into)
    return into


def there_and_back(name, k, v):
    back = torch.empty_like(k), torch.empty_like(v)
    codec(name).decode(encoded(name, k, v), *back)
    return back


def test_rotation_keeps_int8_small_errors_under_outlier_channels():
    x = torch.randn(64, 2, 128, generator=torch.Generator().manual_seed(1))
    x[..., 7] *= 100
    k, _ = there_and_back("int8", x, x)
    step = x[..., 7].abs() / 127  # of symmetric int8 without a rotation
    assert ((k - x).abs().mean(-1) < step / 4).float().mean() > 0.9


def test_the_mean_takes_off_what_keys_have_in_common():
    """Large biases of few channels cost K of int4 nothing, and V, which has no mean, much."""
    x = torch.randn(256, 2, 128, generator=torch.Generator().manual_seed(3))
    biased = x.clone()
    biased[..., [3, 40, 41]] += torch.tensor([60.0, -45.0, 30.0])
    k, v = there_and_back("int4", biased, biased)
    k_error, v_error = ((back - biased).pow(2).mean().sqrt() for back in (k, v))
    assert k_error < 1.1 * RELATIVE_RMS["int4"]
    assert v_error > 3 * k_error


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize(("first", "stop"), [(0, 300), (17, 290), (256, 300)])
def test_attention_in_place_is_attention_over_what_is_decoded(name, first, stop):
    random = torch.Generator().manual_seed(5)
    k, v = torch.randn((2, 300, 2, 64), generator=random)
    q = torch.randn((3, 8, 64), generator=random)
    tensors = encoded(name, k, v)
    chosen = codec(name)
    assert chosen.serves(q, tensors)
    out, lse = chosen.attend(q, tensors, first=first, stop=stop, scale=0.2, softcap=5.0)
    k_back, v_back = torch.empty_like(k), torch.empty_like(v)
    chosen.decode(tensors, k_back, v_back)
    keys, values = (x[first:stop].repeat_interleave(4, 1) for x in (k_back, v_back))
    scores = 5.0 * torch.tanh(0.2 * torch.einsum("thd,shd->ths", q, keys) / 5.0)
    assert torch.allclose(lse, scores.logsumexp(-1), atol=2e-5)
    assert torch.allclose(out, torch.einsum("ths,shd->thd", scores.softmax(-1), values), atol=2e-5)


def test_many_rows_are_not_attended_to_in_place():
    tensors = encoded("int8", *torch.randn(2, 128, 2, 64))
    assert codec("int8").serves(torch.empty(32, 8, 64), tensors)
    assert not codec("int8").serves(torch.empty(33, 8, 64), tensors)
    assert not codec("int8").serves(torch.empty(0, 8, 64), tensors)


def test_an_unknown_codec_is_named_with_the_known_ones():
    with pytest.raises(
        UnknownName, match=r"'int3'; known: bf16, fp8, int2, int4, int8, k4v2, nuq4, raw"
    ):
        codec("int3")
