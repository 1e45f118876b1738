from __future__ import annotations

import pytest
import torch

from ringspan.errors import UnknownName
from ringspan.kvstore.codecs.registry import CODECS, bits_per_element, codec, kv_bytes_per_token
from ringspan.kvstore.testing import check_codec

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


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


@pytest.mark.parametrize(
    ("name", "bits"), [("raw", 16), ("bf16", 16), ("int8", 8.25), ("fp8", 8.25)]
)
def test_bits_per_element_count_the_scales(name, bits):
    assert bits_per_element(codec(name), 8, 128, torch.bfloat16) == bits
    per_token = kv_bytes_per_token(codec(name), 32, 8, 128, torch.bfloat16)
    assert per_token == 65_536 * bits / 8


def test_rotation_keeps_int8_small_errors_under_outlier_channels():
    x = torch.randn(64, 2, 128, generator=torch.Generator().manual_seed(1))
    x[..., 7] *= 100
    into = tuple(
        torch.empty((64, *spec.shape), dtype=spec.dtype)
        for spec in codec("int8").specs(2, 128, torch.float32)
    )
    codec("int8").encode(x, x, into)
    k, v = torch.empty_like(x), torch.empty_like(x)
    codec("int8").decode(into, k, v)
    step = x[..., 7].abs() / 127  # of symmetric int8 without a rotation
    assert ((k - x).abs().mean(-1) < step / 4).float().mean() > 0.9


def test_large_inputs_are_coded_in_slices_with_the_same_bytes(monkeypatch):
    x = torch.randn(50, 2, 64, generator=torch.Generator().manual_seed(2))
    specs = codec("int8").specs(2, 64, torch.float32)
    whole, sliced = (
        tuple(torch.empty((50, *spec.shape), dtype=spec.dtype) for spec in specs) for _ in range(2)
    )
    codec("int8").encode(x, -x, whole)
    monkeypatch.setattr("ringspan.kernels.rotate.SLICE_ELEMENTS", 7 * 2 * 64)
    codec("int8").encode(x, -x, sliced)
    assert all(torch.equal(a, b) for a, b in zip(whole, sliced, strict=True))


def test_an_unknown_codec_is_named_with_the_known_ones():
    with pytest.raises(UnknownName, match=r"'int3'; known: bf16, fp8, int8, raw"):
        codec("int3")
