"""The cost model's arithmetic, what is measured on a device, and its cache."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

from ringspan.attention.cost import (
    MACHINES,
    AttentionFit,
    DensePoint,
    Link,
    Sample,
    assumed_speeds,
    fit_attention,
    link_from,
    mlp_width,
    model_shape,
)
from ringspan.cluster import speeds as measuring
from ringspan.cluster.local_gang import LocalGang
from ringspan.cluster.messages import GangSpec, ModelFacts, ModelSpec
from ringspan.cluster.speeds import cached_speeds, keep_speeds, speeds_key
from ringspan.errors import UnknownName
from ringspan.kvstore.codecs.registry import CODECS

CPU = torch.device("cpu")
FACTS = ModelFacts(
    name="random:llama-3.1-8b",
    family="llama",
    num_layers=32,
    num_q_heads=32,
    num_kv_heads=8,
    head_dim=128,
    hidden_size=4096,
    num_params=8_030_000_000,
    flops_per_token=2 * 6_979_321_856.0,
    max_positions=1 << 21,
    dtype="bfloat16",
    fingerprint="",
    windows=(None,) * 32,
)

H200 = (
    (2048, 4096, False, 623), (4096, 2048, False, 588), (4096, 8192, False, 650),
    (8192, 4096, False, 632), (16_384, 8192, False, 652), (16_384, 16_384, False, 638),
    (65_536, 262_144, False, 640), (2048, 1_048_576, False, 644), (8192, 8192, True, 605),
    (32_768, 32_768, True, 648), (131_072, 131_072, True, 655), (4096, 8192, True, 612),
    (2048, 4096, True, 570),
)  # fmt: skip
"""rows, keys, causal, TFLOP/s of FlashAttention 4 on a warm H200: 32 q, 8 kv heads of 128, bf16."""


def pairs(rows: int, keys: int, causal: bool) -> int:
    return rows * keys - (rows * (rows - 1) // 2 if causal else 0)


def h200_samples() -> list[Sample]:
    return [
        Sample(rows, keys, causal, 4 * 32 * 128 * pairs(rows, keys, causal) / rate / 1e12)
        for rows, keys, causal, rate in H200
    ]


def test_the_fit_holds_what_an_h200_did_to_within_four_percent() -> None:
    fit = fit_attention(h200_samples(), 32, units=132, tile_rows=128)
    for rows, keys, causal, seconds in h200_samples():
        got = fit.seconds(rows, keys, pairs(rows, keys, causal), causal, 32)
        assert got == pytest.approx(seconds, rel=0.04), (rows, keys, causal)


def test_the_assumed_h200_is_the_measured_one() -> None:
    speeds = assumed_speeds("h200", FACTS)
    assert speeds.source.startswith("assumed")
    for rows, keys, causal, seconds in h200_samples():
        got = speeds.attend_s(rows, keys, pairs(rows, keys, causal), causal, 32, 8)
        assert got == pytest.approx(seconds, rel=0.06), (rows, keys, causal)


@pytest.mark.parametrize("units", [1, 132], ids=["cpu", "gpu"])
def test_a_fit_finds_the_constants_that_made_its_samples(units: int) -> None:
    true = AttentionFit(
        fixed_s=9e-6, tile_s=1.5e-6, pair_s=7.7e-13, causal_pair_s=8.1e-13, units=units,
        tile_rows=128 if units > 1 else 1,
    )  # fmt: skip
    shapes = [(512, 1024, False), (2048, 2048, False), (4096, 1024, False), (1024, 16_384, False),
              (1024, 1024, True), (8192, 8192, True)]  # fmt: skip
    samples = [
        Sample(*shape, true.seconds(*shape[:2], pairs(*shape), shape[2], 32)) for shape in shapes
    ]
    got = fit_attention(samples, 32, units, true.tile_rows)
    for name in ("fixed_s", "tile_s", "pair_s", "causal_pair_s"):
        assert getattr(got, name) == pytest.approx(getattr(true, name), rel=1e-3), name


def test_a_fit_wants_full_and_causal_samples() -> None:
    with pytest.raises(ValueError, match="wanted at least 4, full and causal"):
        fit_attention([Sample(1, n, False, 1.0) for n in range(1, 6)], 1, 1, 1)


def test_too_few_tiles_leave_processors_idle() -> None:
    fit = AttentionFit(
        fixed_s=0.0, tile_s=0.0, pair_s=1e-12, causal_pair_s=1e-12, units=132, tile_rows=128
    )
    full = fit.seconds(132 * 128, 1000, 132 * 128 * 1000, False, 1)
    assert fit.seconds(66 * 128, 1000, 66 * 128 * 1000, False, 1) == pytest.approx(full)
    assert fit.seconds(133 * 128, 1000, 133 * 128 * 1000, False, 1) == pytest.approx(2 * full)
    assert fit.seconds(0, 1000, 0, False, 1) == 0.0


def test_few_rows_over_many_keys_are_bound_by_reading_them() -> None:
    speeds = assumed_speeds("h100", FACTS)
    keys = 1 << 20
    seconds = speeds.attend_s(1, keys, keys, False, 32, 8)
    assert seconds == pytest.approx(2 * keys * 8 * 128 * 2 / speeds.scan_bytes_per_s, rel=0.01)


def test_a_link_is_the_line_through_two_exchanges() -> None:
    link = link_from(2**20, 1e-4 + 2**20 / 5e10, 2**26, 1e-4 + 2**26 / 5e10)
    assert link.latency_s == pytest.approx(1e-4)
    assert link.bytes_per_s == pytest.approx(5e10)
    flat = link_from(2**20, 1e-3, 2**26, 0.9e-3)  # a noisy machine: the larger took less
    assert flat.bytes_per_s > 0
    assert flat.latency_s >= 0


def test_the_rest_of_a_model_is_measured_or_estimated() -> None:
    speeds = assumed_speeds("h200", FACTS)
    assert mlp_width(FACTS) == pytest.approx(14_336, rel=0.01)
    estimated = speeds.dense_s(FACTS, 16_384)
    assert estimated == pytest.approx(16_384 * FACTS.flops_per_token / 670e12, rel=0.25)
    measured = msgspec.structs.replace(
        speeds,
        dense=(DensePoint(16, 0.02), DensePoint(2048, 0.05), DensePoint(16_384, 0.37)),
        dense_shape=model_shape(FACTS),
    )
    assert measured.dense_s(FACTS, 1) == 0.02  # the host's launches
    assert measured.dense_s(FACTS, 2048) == 0.05
    assert measured.dense_s(FACTS, 9216) == pytest.approx(0.21)
    assert measured.dense_s(FACTS, 2 * 16_384) == pytest.approx(0.37 + 0.32 * 16_384 / 14_336)
    assert measured.dense_host_s(FACTS) == 0.02
    other = msgspec.structs.replace(FACTS, num_layers=16)
    assert measured.dense_s(other, 16_384) == speeds.dense_s(other, 16_384)


def test_machines_of_the_table_have_their_source() -> None:
    for name, found in MACHINES.items():
        assert found.source
        assert assumed_speeds(name.upper(), FACTS).device_name == found.name
    with pytest.raises(UnknownName, match="unknown device 'abacus'; known: a100, h100, h200"):
        assumed_speeds("abacus", FACTS)


def test_a_cache_file_is_found_again_and_a_bad_one_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RINGSPAN_CACHE", str(tmp_path))
    speeds = assumed_speeds("h200", FACTS)
    key = speeds_key(CPU, FACTS, "auto", 2)
    assert cached_speeds(key) is None
    keep_speeds(key, speeds)
    assert cached_speeds(key) == speeds
    (file,) = (tmp_path / "speeds").iterdir()  # no scratch file is left
    for other in (
        speeds_key(CPU, FACTS, "reference", 2),
        speeds_key(CPU, FACTS, "auto", 1),
        speeds_key(CPU, msgspec.structs.replace(FACTS, dtype="float32"), "auto", 2),
    ):
        assert cached_speeds(other) is None
    for damage in (b"", b"{}", file.read_bytes()[:-40], file.read_bytes().replace(b"auto", b"fa4")):
        whole = file.read_bytes()
        file.write_bytes(damage)
        assert cached_speeds(key) is None
        keep_speeds(key, speeds)
        assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RINGSPAN_CACHE", str(tmp_path / "file"))
    key = speeds_key(CPU, FACTS, "auto", 2)
    keep_speeds(key, assumed_speeds("h200", FACTS))
    assert cached_speeds(key) is None


def test_a_gang_measures_once_and_then_remembers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RINGSPAN_CACHE", str(tmp_path))
    monkeypatch.setattr(measuring, "CPU_SHAPE_S", 0.005)
    spec = GangSpec(
        world_size=2, model=ModelSpec(name="random:tiny"), device="cpu", measure=True, threads=1
    )
    with LocalGang(spec) as gang:
        first = gang.ready
    speeds, link = first[0].speeds, first[1].link
    assert speeds is not None
    assert link is not None
    assert speeds.source == "measured"
    assert [rank.speeds for rank in first] == [speeds, speeds]
    assert 0 < speeds.attention.pair_s < 1e-6
    assert speeds.attention.causal_pair_s > 0
    assert len(speeds.dense) >= 2
    assert speeds.dense[0].seconds < speeds.dense[-1].seconds
    assert set(speeds.decode_bytes_per_s) == set(CODECS)
    assert link.shared_device
    assert not link.overlaps
    assert link.bytes_per_s > 1e6

    def again(*args: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(measuring, "measure_speeds", again)
    with LocalGang(spec) as gang:
        assert gang.ready[0].speeds == speeds
    unasked = msgspec.structs.replace(spec, measure=None)
    with LocalGang(unasked) as gang:
        assert gang.ready[0].speeds is None
        assert gang.ready[0].link is None


def test_two_links_of_one_price_take_as_long() -> None:
    assert Link(latency_s=1e-5, bytes_per_s=1e9).seconds(10**6) == pytest.approx(1.01e-3)
