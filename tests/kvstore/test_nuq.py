import pytest
import torch

from ringspan.deploy.bench.codec_loss import Queries, attended, relative_error
from ringspan.kvstore import testing
from ringspan.kvstore.codecs.int4 import Int4Codec
from ringspan.kvstore.codecs.nuq import NuqCodec
from ringspan.kvstore.codecs.registry import CODECS, bits_per_element
from ringspan.kvstore.fidelity import Fidelity, codec_fidelity
from ringspan.kvstore.testing import check_codec, make_context, make_shards, open_shard
from ringspan.types import Span

RELATIVE_RMS = {"nuq4": 0.1, "nuq3": 0.19}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[4, 3], ids=["nuq4", "nuq3"])
def codec(request, monkeypatch):
    """Known by its name to shards, headers and stores."""
    made = NuqCodec(request.param)
    monkeypatch.setitem(CODECS, made.name, made)
    monkeypatch.setitem(testing.RELATIVE_RMS, made.name, RELATIVE_RMS[made.name])
    return made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codec_conforms(codec, dtype):
    check_codec(codec, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codec_conforms_on_a_gpu(codec, dtype):
    check_codec(codec, dtype, "cuda")


def test_bits_per_element_count_all_side_data(codec):
    codes = 4 if codec.name == "nuq4" else 3
    side = {128: 16 / 128 + 16 / 128 + (16 / 128 + 64 / 128**2) / 2}
    side[64] = 16 / 64 + 16 / 128 + (16 / 128 + 64 / (64 * 128)) / 2
    for dim, more in side.items():
        assert bits_per_element(codec, 8, dim, torch.bfloat16) == codes + more
    assert codec_fidelity(codec.name, 8, 128, torch.bfloat16) is (
        Fidelity.FOUR_BIT if codes == 4 else Fidelity.TWO_BIT
    )


def test_bits_counted_are_bytes_measured(codec):
    (shard,) = make_shards(256, 1, codec.name, head_dim=64, dtype=torch.bfloat16)
    held = sum(t.nbytes for layer in range(3) for t in shard.tensors(layer))
    assert held == shard.kv_bytes
    assert 8 * held == bits_per_element(codec, 2, 64, torch.bfloat16) * 256 * 2 * 2 * 64 * 3


def test_a_stored_context_comes_back_to_the_same_keys_and_values(codec, tmp_path):
    """Written by three ranks, read by one: every page states what its decoding needs."""
    made = make_context(tmp_path, 700, 3, codec.name, head_dim=64)
    shard = open_shard(made, made.manifest.pages)
    form = made.manifest.form
    assert "k-turned-back-in-page" in form.codec_params
    for layer in range(form.num_layers):
        k, v = torch.empty(2, 700, form.num_kv_heads, form.head_dim)
        codec.decode(shard.tensors(layer), k, v)
        for written in made.shards:
            k_rank, v_rank = torch.empty(2, written.num_tokens, form.num_kv_heads, form.head_dim)
            codec.decode(written.tensors(layer), k_rank, v_rank)
            row = 0
            for span in written.spans:
                rows = slice(row, row + span.tokens)
                assert torch.equal(k[span.start : span.stop], k_rank[rows])
                assert torch.equal(v[span.start : span.stop], v_rank[rows])
                row += span.tokens


def test_a_prefix_and_what_follows_it_are_encoded_apart(codec):
    """As a reused prefix and new chunks behind it are: the same bytes as in one write."""
    (whole,) = make_shards(384, 1, codec.name, head_dim=64, num_layers=1)
    (again,) = make_shards(384, 1, codec.name, head_dim=64, num_layers=1)
    k, v = torch.empty(2, 384, 2, 64)
    codec.decode(whole.tensors(0), k, v)
    again.cancel()
    for start, stop in ((0, 128), (128, 384)):
        again.reserve((Span(start, stop),))
        again.write(0, k[start:stop], v[start:stop])
    (once,) = make_shards(384, 1, codec.name, head_dim=64, num_layers=1)
    once.cancel()
    once.reserve((Span(0, 384),))
    once.write(0, k, v)
    for one, other in zip(again.tensors(0), once.tensors(0), strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def like_a_model(tokens, seed=0):
    """K with a bias under rotary positions, half of every query's weight on a sink of small V."""
    random = torch.Generator().manual_seed(seed)
    k = 3 * torch.randn(1, 2, 64, generator=random) + torch.randn(tokens, 2, 64, generator=random)
    angle = torch.arange(tokens)[:, None, None] * 1e5 ** (-torch.arange(32) / 32)
    a, b = k.chunk(2, -1)
    k = torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)
    sink = torch.randn(2, 64, generator=random)
    v = torch.randn(tokens, 2, 64, generator=random)
    k[0], v[0] = sink, 0.05 * v[0]
    q = 6 * (sink / sink.norm(dim=-1, keepdim=True)) + torch.randn(16, 2, 64, generator=random)
    return Queries(q, 0.125, 0.0, None), k, v


def test_nuq4_loses_less_than_int4_at_fewer_bits():
    queries, k, v = like_a_model(512)
    exact, errors = attended(queries, k, v), {}
    for codec in (NuqCodec(4), Int4Codec()):
        specs = codec.specs(2, 64, k.dtype)
        into = tuple(
            torch.empty((spec.units(512), *spec.shape), dtype=spec.dtype) for spec in specs
        )
        codec.encode(k, v, into)
        k_back, v_back = torch.empty_like(k), torch.empty_like(v)
        codec.decode(into, k_back, v_back)
        errors[codec.name] = relative_error(attended(queries, k_back, v_back), exact)
    assert errors["nuq4"] < 0.8 * errors["int4"]
    bits = [bits_per_element(c, 2, 64, torch.bfloat16) for c in (NuqCodec(4), Int4Codec())]
    assert bits[0] < bits[1] - 0.1
