"""Decoded keys lie in two places: which is filled when, and that nobody reads what is not there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ringspan.attention import compute as compute_module
from ringspan.attention.buffers import Buffers
from ringspan.attention.compute import Compute, Rules
from ringspan.attention.kv import PLAIN
from ringspan.attention.layer import Layer
from ringspan.attention.layout import deal, positions
from ringspan.attention.loopback import LoopbackWorld
from ringspan.attention.problem import Problem, Source
from ringspan.attention.schemes.table import SCHEMES
from ringspan.kernels.flash import flash_ref
from ringspan.kvstore.codecs.int8 import Int8Codec
from ringspan.types import Part, Span

HEADS, KV_HEADS, DIM, SCALE = 4, 2, 64, 0.125


class Followed(Compute):
    """Writes down what is asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, int]] = []

    def decode(self, codec: Any, tensors: Any, k: Any, v: Any, place: int) -> None:
        self.log.append(("decode", place))
        super().decode(codec, tensors, k, v, place)

    def decoded(self, place: int) -> None:
        self.log.append(("attend", place))
        super().decoded(place)

    def has_read(self, place: int) -> None:
        self.log.append(("done", place))
        super().has_read(place)


def layers(
    world_size: int, cached: int, new: int, device: torch.device, compute: Any
) -> tuple[list[Layer], list[Part], LoopbackWorld]:
    """A chunk over int8 pages, dealt to loopback ranks, and what each one's rows must give."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    random = torch.Generator().manual_seed(cached)
    q, k, v = (
        torch.randn(cached + new, heads, DIM, generator=random).to(device, dtype)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    codec = Int8Codec()
    held = deal("striped", Span(0, cached), world_size, 128)
    dealt = deal("zigzag", Span(cached, cached + new), world_size, 128)
    problem = Problem([dealt], [Source(held, codec), Source(dealt, PLAIN)])
    world = LoopbackWorld(world_size, timeout_s=60.0)
    found = []
    for rank in range(world_size):
        at = positions(held[rank], device)
        specs = codec.specs(KV_HEADS, DIM, dtype)
        own = tuple(
            torch.empty((s.units(len(at)), *s.shape), dtype=s.dtype, device=device) for s in specs
        )
        codec.encode(k[at], v[at], own)
        back = torch.empty_like(k[at]), torch.empty_like(k[at])
        codec.decode(own, *back)
        k[at], v[at] = back
        mine = positions(dealt[rank], device)
        found.append((own, q[mine], (k[mine], v[mine])))
    whole = flash_ref(q.float(), k.float(), v.float(), causal=True, offset=0, scale=SCALE)
    made, exact = [], []
    for rank, (own, rows, fresh) in enumerate(found):
        made.append(
            Layer(
                world.transport(rank, device), Buffers(device), compute(), problem,
                Rules(0, SCALE), rows, (*own, *fresh), (KV_HEADS, DIM),
            )
        )  # fmt: skip
        mine = positions(dealt[rank], device)
        exact.append(Part(whole.out[mine], whole.lse[mine]))
    return made, exact, world


def test_one_stretch_is_decoded_ahead_and_never_where_the_last_one_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ringspan.attention.layer.STAGING_TOKENS", 256)
    monkeypatch.setattr("ringspan.kvstore.codecs.paged.SWEEP_ROWS", 0)
    [layer], [exact], _ = layers(1, 1024, 128, torch.device("cpu"), Followed)
    part = SCHEMES["ring"](layer)
    assert torch.allclose(part.out, exact.out, atol=2e-5)
    assert isinstance(layer.compute, Followed)
    assert layer.compute.log == [
        ("decode", 0),
        ("decode", 1), ("attend", 0), ("done", 0),
        ("decode", 0), ("attend", 1), ("done", 1),
        ("decode", 1), ("attend", 0), ("done", 0),
        ("attend", 1), ("done", 1),
    ]  # fmt: skip


def test_staging_is_taken_once_whatever_the_layers_and_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ringspan.attention.layer.STAGING_TOKENS", 256)
    monkeypatch.setattr("ringspan.kvstore.codecs.paged.SWEEP_ROWS", 0)
    made, exact, world = layers(3, 1024, 700, torch.device("cpu"), Compute)
    taken = []
    for _ in range(2):
        parts = world.run([lambda layer=layer: SCHEMES["ring"](layer) for layer in made])  # type: ignore[misc]
        for part, wanted in zip(parts, exact, strict=True):
            assert torch.allclose(part.out, wanted.out, atol=2e-5)
        places = [layer.buffers._flat["staging"] for layer in made]
        assert [flat.numel() for flat in places] == [2 * 2 * 256 * KV_HEADS * DIM * 4] * 3
        taken.append([flat.data_ptr() for flat in places])
    assert taken[0] == taken[1]


@pytest.mark.gpu
@pytest.mark.parametrize("slow", ["decoding", "attending"])
@pytest.mark.parametrize("alternate", [False, True])
@pytest.mark.parametrize("scheme", ["ring", "pass-q", "all-gather", "ulysses"])
def test_streams_keep_their_order_on_a_gpu(
    scheme: str, alternate: bool, slow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either side held up for milliseconds: a missing wait shows as another stretch's keys."""
    monkeypatch.setattr("ringspan.attention.layer.STAGING_TOKENS", 512)
    monkeypatch.setattr("ringspan.kvstore.codecs.paged.SWEEP_ROWS", 0)
    if slow == "decoding":
        decode = Int8Codec.decode

        def late(self: Int8Codec, tensors: Any, k: torch.Tensor, v: torch.Tensor) -> None:
            torch.cuda._sleep(3_000_000)
            decode(self, tensors, k, v)
            torch.cuda._sleep(1_000_000)

        monkeypatch.setattr(Int8Codec, "decode", late)
    else:
        attend = compute_module.attend

        def held_up(*args: Any, **options: Any) -> Any:
            torch.cuda._sleep(2_000_000)
            return attend(*args, **options)

        monkeypatch.setattr(compute_module, "attend", held_up)
    device = torch.device("cuda")
    made, exact, world = layers(2, 4096, 1024, device, lambda: Compute("auto", alternate))
    for _ in range(3):
        parts = world.run([lambda layer=layer: SCHEMES[scheme](layer) for layer in made])  # type: ignore[misc]
        torch.cuda.synchronize()
        for part, wanted in zip(parts, exact, strict=True):
            off = (part.out.float() - wanted.out).norm() / wanted.out.norm()
            assert off < 2e-2
