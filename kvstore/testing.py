"""What tests of stores and codecs share: conformance of a codec, and contexts to work on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ringspan.attention.kv import cut_units, unit_tokens
from ringspan.cluster.messages import ModelSpec
from ringspan.kvstore.codecs.registry import bits_per_element, codec
from ringspan.kvstore.dtypes import dtype_of
from ringspan.kvstore.encryption import cipher_of
from ringspan.kvstore.folder import Store, segment_path
from ringspan.kvstore.keys import PUBLIC_NAMESPACE, context_id, namespace_digest, page_keys
from ringspan.kvstore.manifest import Manifest
from ringspan.kvstore.page import EXACT, Origin
from ringspan.kvstore.shard import ContextShard
from ringspan.kvstore.transfer import load_shard, save_shard
from ringspan.types import Span, coalesce, page_tokens_for, total_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ringspan.attention.kv import TensorSpec
    from ringspan.cluster.messages import PageRecord
    from ringspan.kvstore.codecs.registry import PageCodec

SHAPES = ((1, 1, 64), (37, 3, 64), (130, 2, 128), (300, 2, 80), (70, 1, 256))
"""T, Hkv, D; odd on purpose: a lone token, short and whole pages, a D that is no power of two, and
one with smaller pages."""

RELATIVE_RMS = {
    "raw": 0.0, "bf16": 2.0**-8, "int8": 0.012, "fp8": 0.04, "int4": 0.1, "nuq4": 0.1, "k4v2": 0.36,
    "int2": 0.36,
}  # fmt: skip
"""Root mean square of the error over that of the input, Gaussian rows: the codec's promise. As a
signal-to-noise ratio -20 log10 of it: 38 dB for int8, 28 for fp8, 20 for int4, 9
for V of k4v2 and for int2."""


def check_codec(codec: PageCodec, dtype: torch.dtype, device: str = "cpu") -> None:
    """AssertionError that says which promise of `attention.kv.Codec` the codec breaks."""
    for tokens, heads, head_dim in SHAPES:
        specs = codec.specs(heads, head_dim, dtype)
        _check_specs(codec, specs, heads, head_dim, dtype)
        k, v = _gaussian(tokens, heads, head_dim, dtype, device)
        v[tokens // 2] = 0
        if not _shares(specs):
            k[tokens // 2] = 0
        encoded = _encode(codec, specs, k, v)
        k_back, v_back = torch.full_like(k, torch.nan), torch.full_like(v, torch.nan)
        codec.decode(encoded, k_back, v_back)
        allowed = RELATIVE_RMS[codec.name]
        for name, x, back in (("k", k, k_back), ("v", v, v_back)):
            error = (back.float() - x.float()).pow(2).mean().sqrt()
            size = x.float().pow(2).mean().sqrt()
            assert error <= allowed * size, f"{name}: error {error / size:.4g} > {allowed}"
            if codec.exact:
                assert torch.equal(back, x), f"{name}: not exact, though the codec says so"
        for x, back in ((k, k_back), (v, v_back)):
            zero = not x[tokens // 2].any()
            assert not (zero and back[tokens // 2].any()), "a row of zeros does not come back so"
        _check_cuts(codec, specs, k, v, encoded)
        _check_short(codec, specs, k, v, encoded)
        _check_scaling(codec, specs, k, v)
        _check_nan(codec, specs, k, v)
    nothing = _gaussian(0, 2, 64, dtype, device)
    specs = codec.specs(2, 64, dtype)
    codec.decode(_encode(codec, specs, *nothing), *nothing)


def _shares(specs: tuple[TensorSpec, ...]) -> bool:
    """K's tokens of a page have a statistic in common, so that they depend on each other."""
    return any(spec.name == "k_mean" for spec in specs)


def _check_specs(
    codec: PageCodec,
    specs: tuple[TensorSpec, ...],
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
) -> None:
    assert specs == codec.specs(heads, head_dim, dtype), "specs change between calls"
    assert len({spec.name for spec in specs}) == len(specs), "two tensors have one name"
    names = [spec.name for spec in specs]
    assert names == sorted(names, key=lambda name: name[0]), "K's tensors do not come first"
    assert all(spec.shape[0] == heads for spec in specs), "kv heads are not the first axis"
    tokens = {spec.tokens for spec in specs}
    assert tokens in ({1}, {page_tokens_for(head_dim)}), "a unit is neither a token nor a page"
    assert not any(codec.cut_tokens % one for one in tokens), "a cut that may lie within a unit"
    bits = bits_per_element(codec, heads, head_dim, dtype)
    assert bits <= 8 * max(2, dtype.itemsize), f"{bits} bits per element: larger than the input"


def _check_cuts(
    codec: PageCodec,
    specs: tuple[TensorSpec, ...],
    k: torch.Tensor,
    v: torch.Tensor,
    whole: tuple[torch.Tensor, ...],
) -> None:
    """Any cut at units gives the same bytes, and the same values back."""
    unit = unit_tokens(specs)
    cut = max(k.shape[0] // 3, 1) // unit * unit or unit
    if cut >= k.shape[0]:
        return
    pieces = _empty(specs, k.shape[0], k.device)
    for first, stop in ((0, cut), (cut, k.shape[0])):
        codec.encode(k[first:stop], v[first:stop], cut_units(pieces, specs, first, stop))
    _assert_same(specs, whole, pieces, "bytes depend on how tokens were cut into writes")
    k_part, v_part = torch.empty_like(k[cut:]), torch.empty_like(v[cut:])
    k_whole, v_whole = torch.empty_like(k), torch.empty_like(v)
    codec.decode(cut_units(whole, specs, cut, k.shape[0]), k_part, v_part)
    codec.decode(whole, k_whole, v_whole)
    assert torch.equal(k_part, k_whole[cut:]), "decoding a part differs from decoding all"
    assert torch.equal(v_part, v_whole[cut:]), "decoding a part differs from decoding all"


def _check_short(
    codec: PageCodec,
    specs: tuple[TensorSpec, ...],
    k: torch.Tensor,
    v: torch.Tensor,
    whole: tuple[torch.Tensor, ...],
) -> None:
    """What a short page lacks is zero, whatever lay there before: the same tokens, the same bytes;
    and a prefix of whole pages has the bytes of a context that ends with it."""
    again = tuple(tensor.clone() for tensor in whole)
    for tensor in again:
        tensor.view(torch.uint8).fill_(0x5A)
    codec.encode(k, v, again)
    _assert_same(specs, whole, again, "bytes depend on what lay in memory")
    full = k.shape[0] // unit_tokens(specs) * unit_tokens(specs)
    prefix = _encode(codec, specs, k[:full], v[:full])
    _assert_same(specs, cut_units(whole, specs, 0, full), prefix, "a prefix has other bytes")


def _check_scaling(
    codec: PageCodec, specs: tuple[TensorSpec, ...], k: torch.Tensor, v: torch.Tensor
) -> None:
    """Tokens of very different size in one write do not disturb each other; where a page's keys
    have a mean in common, pages do not."""
    sizes = torch.logspace(-3, 3, k.shape[0], device=k.device)[:, None, None].to(k.dtype)
    unit = unit_tokens(specs)
    by_page = sizes[torch.arange(k.shape[0], device=k.device) // unit * unit]
    k, v = k * (by_page if _shares(specs) else sizes), v * sizes
    k_back, v_back = torch.empty_like(k), torch.empty_like(v)
    codec.decode(_encode(codec, specs, k, v), k_back, v_back)
    for x, back in ((k, k_back), (v, v_back)):
        error = (back.float() - x.float()).pow(2).mean(-1).sqrt()
        size = x.float().pow(2).mean(-1).sqrt()
        worst = 2 * RELATIVE_RMS[codec.name]
        assert (error <= worst * size).all(), "a token's error depends on its neighbours"


def _check_nan(
    codec: PageCodec, specs: tuple[TensorSpec, ...], k: torch.Tensor, v: torch.Tensor
) -> None:
    """A value that is not a number is there to be seen, in its row and in no other."""
    k, v = k.clone(), v.clone()
    row = k.shape[0] // 3
    k[row, 0, 5] = v[row, 0, 5] = torch.nan
    k_back, v_back = torch.empty_like(k), torch.empty_like(v)
    codec.decode(_encode(codec, specs, k, v), k_back, v_back)
    for back in (k_back, v_back):
        assert not back[row, 0].isfinite().all(), "nan is not there to be seen"
        back[row, 0] = 0
        assert back.isfinite().all(), "nan in one row spoils others"


def _assert_same(
    specs: tuple[TensorSpec, ...],
    a: tuple[torch.Tensor, ...],
    b: tuple[torch.Tensor, ...],
    what: str,
) -> None:
    for spec, one, two in zip(specs, a, b, strict=True):
        assert torch.equal(one.view(torch.uint8), two.view(torch.uint8)), f"{spec.name}: {what}"


def _encode(
    codec: PageCodec, specs: tuple[TensorSpec, ...], k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    into = _empty(specs, k.shape[0], k.device)
    codec.encode(k, v, into)
    return into


def _empty(
    specs: tuple[TensorSpec, ...], tokens: int, device: torch.device
) -> tuple[torch.Tensor, ...]:
    return tuple(
        torch.empty((spec.units(tokens), *spec.shape), dtype=spec.dtype, device=device)
        for spec in specs
    )


def _gaussian(
    tokens: int, heads: int, head_dim: int, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(tokens * 1000 + head_dim)
    k, v = torch.randn((2, tokens, heads, head_dim), generator=random).to(device, dtype)
    return k, v


def page_tokens_of(codec_name: str, head_dim: int = 32) -> int:
    """The codec's page, or 16 where it takes any: a context of few tokens then has many."""
    specs = codec(codec_name).specs(2, head_dim, torch.float32)
    return unit_tokens(specs) if unit_tokens(specs) > 1 else 16


class Made(NamedTuple):
    """A stored context and what it was made from."""

    store: Store
    manifest: Manifest
    token_ids: np.ndarray
    shards: tuple[ContextShard, ...]
    """One per rank that wrote it; pages dealt one by one, so that positions interleave."""


def make_shards(
    num_tokens: int,
    world_size: int,
    codec_name: str = "raw",
    *,
    page_tokens: int | None = None,
    num_layers: int = 3,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[ContextShard, ...]:
    """Shards of random KV; page i lies on rank i % world_size. page_tokens None: the codec's."""
    page_tokens = page_tokens or page_tokens_of(codec_name, head_dim)
    random = torch.Generator().manual_seed(seed)
    shards = []
    pages = [
        Span(start, min(start + page_tokens, num_tokens))
        for start in range(0, num_tokens, page_tokens)
    ]
    for rank in range(world_size):
        spans = coalesce(pages[rank::world_size])
        tokens = total_tokens(spans)
        shard = ContextShard(
            codec(codec_name),
            num_layers,
            num_kv_heads,
            head_dim,
            dtype,
            device,
            tokens,
            page_tokens,
        )
        shard.reserve(spans)
        for layer in range(num_layers):
            shape = (2, tokens, num_kv_heads, head_dim)
            k, v = torch.randn(shape, generator=random).to(device, dtype)
            shard.write(layer, k, v)
        shards.append(shard)
    return tuple(shards)


def make_context(
    root: Path,
    num_tokens: int = 75,
    world_size: int = 3,
    codec_name: str = "raw",
    *,
    fingerprint: str = "ab" * 32,
    seed: int = 0,
    page_tokens: int | None = None,
    namespace: bytes = PUBLIC_NAMESPACE,
    **form: Any,
) -> Made:
    """A published context of random KV under random tokens; `form` goes to `make_shards`."""
    page_tokens = page_tokens or page_tokens_of(codec_name, form.get("head_dim", 32))
    shards = make_shards(
        num_tokens, world_size, codec_name, seed=seed, page_tokens=page_tokens, **form
    )
    token_ids = np.random.default_rng(seed).integers(0, 50_000, num_tokens, dtype=np.int32)
    keys = page_keys(fingerprint, namespace, token_ids, page_tokens)
    origin = Origin(
        fingerprint=fingerprint,
        namespace=namespace_digest(namespace),
        rope="applied theta=10000",
        provenance=EXACT,
    )
    store = Store(root, None if namespace == PUBLIC_NAMESPACE else (namespace,))
    cipher = cipher_of(namespace)
    with store.staged(context_id(keys), token_ids, cipher) as staging:
        records = [
            record
            for rank, shard in enumerate(shards)
            for record in save_shard(shard, origin, keys, segment_path(staging, rank), cipher)
        ]
        manifest = store.publish(
            staging,
            Manifest(
                context_id=context_id(keys),
                model=ModelSpec(name="random:tiny"),
                origin=origin,
                form=shards[0].form,
                namespace=namespace.hex(),
                num_tokens=num_tokens,
                layout="striped",
                chunk_tokens=page_tokens * world_size,
                world_size=world_size,
                created_unix_s=1.7e9 + seed,
                title=f"random tokens {seed}",
                document_tokens=Span(0, num_tokens),
                payload_bytes=sum(record.payload_bytes for record in records),
                pages=tuple(sorted(records, key=lambda record: record.span)),
            ),
        )
    return Made(store, manifest, token_ids, shards)


def open_shard(made: Made, records: Sequence[PageRecord], device: str = "cpu") -> ContextShard:
    """A new shard with these pages of the context, read from its folder."""
    form = made.manifest.form
    shard = ContextShard(
        codec(form.codec),
        form.num_layers,
        form.num_kv_heads,
        form.head_dim,
        dtype_of(form.dtype),
        device,
        sum(record.span.tokens for record in records),
        form.page_tokens,
    )
    load_shard(made.store.root, made.manifest, records, shard)
    return shard
