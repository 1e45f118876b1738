from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringspan.errors import BadInput, CorruptPage
from ringspan.kvstore import packed
from ringspan.kvstore.codecs import cachegen, rans
from ringspan.kvstore.dtypes import dtype_of
from ringspan.kvstore.fidelity import decoded_from
from ringspan.kvstore.page import Origin, verify_page
from ringspan.kvstore.planes import bytes_tensor
from ringspan.kvstore.testing import make_shards

ORIGIN = Origin(
    fingerprint="ab" * 32,
    namespace="00" * 8,
    rope="applied",
    provenance=(decoded_from(cachegen.NAME),),
)


def make_page(tokens=128, dtype=torch.float32, origin=ORIGIN, change=None):
    (shard,) = make_shards(tokens, 1, "raw", page_tokens=128, dtype=dtype, num_layers=6)
    for layer in range(shard.num_layers):
        for tensor in shard.tensors(layer):
            if change is not None:
                change(tensor)
    return shard.export_page(0, origin, ["00" * 32])


def values(page, payload):
    kind = dtype_of(page.header.form.dtype)
    return bytes_tensor(payload).view(kind).view(6, 2, page.header.span.tokens, 2, 32).float()


def through(page):
    """(values, values as they come back, bits of an element)."""
    form, tokens = page.header.form, page.header.span.tokens
    data = cachegen.pack(form, tokens, page.payload)
    back = cachegen.unpack(form, tokens, memoryview(data))
    before = values(page, page.payload)
    return before, values(page, back), 8 * len(data) / before.numel()


def rms(x):
    return x.double().square().mean().sqrt()


# rANS


def test_frequencies_are_whole_and_every_value_has_a_symbol():
    family = rans.models()
    assert (family.freq.sum(axis=1) == 1 << rans.BITS).all()
    for reach, freq in zip(family.reach, family.freq, strict=True):
        assert (freq[: 2 * reach + 2] >= 1).all()
        assert (freq[2 * reach + 2 :] == 0).all()
        assert (freq[:reach] == freq[reach + 1 : 2 * reach + 1][::-1]).all()
    assert family.freq[:, :3].tolist()[0] == [4095, 1, 0]


def test_frequencies_are_those_that_files_were_written_with():
    """A change of one of them makes every file unreadable: raise packed.VERSION with it."""
    family = rans.models()
    assert family.freq.shape == (35, 254)
    weights = np.arange(1, family.freq.size + 1, dtype=np.uint64).reshape(family.freq.shape)
    assert int((family.freq.astype(np.uint64) * weights).sum()) == 622859175


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 40),
    count=st.integers(1, 200),
    size=st.floats(0, 300),
    seed=st.integers(0, 1000),
)
def test_any_values_come_back(rows, count, size, seed):
    random = np.random.default_rng(seed)
    found = np.rint(random.standard_normal((rows, count)) * size * random.random((rows, 1)))
    found = found.astype(np.int64)
    model = np.repeat(rans.choose(np.abs(found)), count)
    coded = rans.encode(found.ravel(), model)
    assert (rans.decode(coded, model) == found.ravel()).all()


def test_bits_are_near_the_entropy():
    random = np.random.default_rng(0)
    for sigma in (0.5, 1.0, 3.0, 10.0):
        found = np.rint(random.standard_normal((100, 1000)) * sigma).astype(np.int64)
        _, counts = np.unique(found, return_counts=True)
        share = counts / counts.sum()
        entropy = -(share * np.log2(share)).sum()
        coded = rans.encode(found.ravel(), np.repeat(rans.choose(np.abs(found)), 1000))
        bits = 8 * (coded.words.nbytes + coded.states.nbytes) + 32 * len(coded.escaped)
        assert entropy < bits / found.size < entropy + 0.06


def test_words_and_states_that_do_not_fit_are_refused():
    random = np.random.default_rng(0)
    found = np.rint(random.standard_normal((10, 1000)) * 3).astype(np.int64)
    found[0, 0] = 4000
    model = np.repeat(rans.choose(np.abs(found)), 1000)
    good = rans.encode(found.ravel(), model)
    flipped = good.words.copy()
    flipped[len(flipped) // 2] ^= 4
    for bad in (
        good._replace(words=good.words[:-1]),
        good._replace(words=np.append(good.words, np.uint16(0))),
        good._replace(words=flipped),
        good._replace(states=good.states[:-1]),
        good._replace(states=np.zeros_like(good.states)),
        good._replace(states=good.states + np.uint32(1)),
        good._replace(escaped=good.escaped[:0]),
    ):
        with pytest.raises(CorruptPage):
            rans.decode(bad, model)


# pages


@pytest.mark.parametrize("tokens", [128, 11, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_page_comes_back_within_half_a_step(tokens, dtype):
    before, back, _ = through(make_page(tokens, dtype))
    assert torch.isfinite(back).all()
    left = before - before.mean(dim=2, keepdim=True)
    for layer in range(6):
        depth = cachegen.DEPTH[layer // 2]
        for which in range(2):
            step = cachegen.Q * depth * left[layer, which].square().mean(dim=(0, 2)).sqrt()
            least = before[layer, which].abs().amax(dim=(0, 2)) / cachegen.COARSEST
            allowed = torch.maximum(step, least) * 0.51 + before[layer, which].abs().max() * 2**-8
            error = (back - before)[layer, which].abs().amax(dim=(0, 2))
            assert (error <= allowed).all()


def test_early_layers_lose_less():
    before, back, bits = through(make_page())
    errors = [float(rms((back - before)[layer]) / rms(before[layer])) for layer in range(6)]
    assert errors[0] < 0.8 * errors[2] < 0.8 * 0.85 * errors[4]
    assert max(errors) < 0.13
    assert bits < 4.3  # Gaussian, where entropy coding has nothing but the shape to win by


def test_what_channels_have_in_common_costs_nothing():
    """A channel far from 0 takes the bits, and has the noise, of what varies in it."""
    offset = torch.linspace(-40, 40, 32)
    plain, _, bits = through(make_page())
    before, back, more = through(make_page(change=lambda x: x.add_(offset)))
    assert more < bits + 0.1
    assert rms(back - before) < 0.13 * rms(plain)


def test_a_token_whose_values_are_small_has_little_noise():
    """A sink's, on which much of the attention rests."""

    def change(tensor):
        tensor[0] *= 1 / 50

    before, back, bits = through(make_page(change=change))
    k, v = (back - before)[:, 0, 0], (back - before)[:, 1, 0]
    assert rms(v) < 0.2 * rms(before[:, 1, 0])
    assert rms(v) < 0.05 * rms((back - before)[:, 1, 1:])
    assert rms(k) > 0.2 * rms((back - before)[:, 0, 1:])  # K's noise is that of its head
    assert bits < 4.4


def test_zeros_constants_and_outliers():
    before, back, bits = through(make_page(change=lambda x: x.zero_()))
    assert torch.equal(before, back)
    assert bits < 0.3
    before, back, _ = through(make_page(change=lambda x: x.fill_(3.0)))
    assert (before - back).abs().max() <= 3.0 / cachegen.COARSEST
    before, back, _ = through(make_page(change=lambda x: x[5, 1, 7].fill_(1e4)))
    assert (back[:, :, 5, 1, 7] - 1e4).abs().max() < 1e4 * 0.05
    assert rms((back - before)[:, :, :, 0]) < 0.13  # the other head's steps are its own


def test_values_that_are_not_finite_are_refused():
    for value in (torch.nan, torch.inf):
        page = make_page(change=lambda x, value=value: x[3, 0, 2].fill_(value))
        with pytest.raises(BadInput, match="not finite cannot be kept by cachegen: use zstd"):
            packed.encode_packed(page, cachegen.NAME)


def test_a_packed_page_is_sealed_over_what_comes_out():
    page = make_page(dtype=torch.bfloat16)
    data = b"".join(packed.encode_packed(page, cachegen.NAME))
    assert len(data) < page.payload.nbytes / 3
    back = packed.decode_packed(memoryview(data), cachegen.NAME)
    verify_page(back)
    assert back.header.key == page.header.key
    assert back.header.xxh3 != page.header.xxh3
    again = packed.decode_packed(memoryview(data), cachegen.NAME)
    assert (again.header, again.payload) == (back.header, back.payload)


def test_a_page_that_claims_to_be_exact_is_neither_packed_nor_unpacked(monkeypatch):
    exact = msgspec.structs.replace(ORIGIN, provenance=("exact",))
    page = make_page(origin=exact)
    with pytest.raises(ValueError, match="does not say that it went through cachegen"):
        packed.encode_packed(page, cachegen.NAME)
    with monkeypatch.context() as patch:
        patch.setattr(packed, "_may_lose", lambda header, stored: True)
        data = b"".join(packed.encode_packed(page, cachegen.NAME))
    with pytest.raises(CorruptPage, match="and exact, which no page stored as cachegen is"):
        packed.decode_packed(memoryview(data), cachegen.NAME)


def test_stored_bytes_of_any_kind_are_refused_or_of_the_right_size():
    """Whatever is stored, no crash: an error of ours, or a payload that its xxh3 would refuse."""
    page = make_page(37)
    form, tokens = page.header.form, page.header.span.tokens
    data = cachegen.pack(form, tokens, page.payload)
    random = np.random.default_rng(3)
    refused = 0
    for at in (*range(40), *random.integers(0, len(data), 250).tolist()):
        spoilt = bytearray(data)
        spoilt[at] ^= 1 << int(random.integers(8))
        try:
            back = cachegen.unpack(form, tokens, memoryview(spoilt))
        except CorruptPage:
            refused += 1
        else:
            assert back.nbytes == page.payload.nbytes
    assert refused > 100
    for size in (0, 3, 8, 100, len(data) - 1):
        with pytest.raises(CorruptPage):
            cachegen.unpack(form, tokens, memoryview(data)[:size])
    with pytest.raises(CorruptPage):
        cachegen.unpack(form, tokens, memoryview(data + b"xx"))
