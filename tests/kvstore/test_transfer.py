from __future__ import annotations

import shutil

import msgspec
import pytest
import torch

from ringspan.attention.kv import unit_tokens
from ringspan.errors import BadInput, CorruptPage, StoreError
from ringspan.kvstore import batches
from ringspan.kvstore.codecs.registry import CODECS
from ringspan.kvstore.host_rows import HostRows
from ringspan.kvstore.manifest import assign_pages
from ringspan.kvstore.page import Origin
from ringspan.kvstore.segment_reader import scan
from ringspan.kvstore.supply import NO_QUARANTINE, Supply
from ringspan.kvstore.testing import make_context, make_shards, open_shard
from ringspan.kvstore.tiers.counters import StoreCounters
from ringspan.kvstore.tiers.disk import SegmentReader
from ringspan.kvstore.tiers.placement import context_supply
from ringspan.kvstore.transfer import load_shard


def page_tokens_of(name):
    """16 where the codec takes any pages: a context of few tokens then has many."""
    return max(unit_tokens(CODECS[name].specs(2, 32, torch.float32)), 16)


def pages_of(shards):
    """{span: payload}, whatever rank holds it."""
    keys = ["00" * 32] * 200
    origin = Origin(fingerprint="ab" * 32, namespace="00" * 8, rope="applied")
    return {
        page.header.span: bytes(page.payload)
        for shard in shards
        for page in (shard.export_page(i, origin, keys) for i in range(len(shard.pages())))
    }


@pytest.mark.parametrize("batch_bytes", [1, 20_000, 1 << 26])
@pytest.mark.parametrize("name", CODECS)
def test_another_number_of_ranks_opens_the_same_bits(tmp_path, monkeypatch, name, batch_bytes):
    monkeypatch.setattr(batches, "BATCH_BYTES", batch_bytes)
    step = page_tokens_of(name)
    num_tokens = 8 * step + 11
    made = make_context(tmp_path, num_tokens, 3, name, page_tokens=step)
    wanted = pages_of(made.shards)
    assert len(wanted) == 9
    for world_size in (1, 2, 4, 11):
        opened = [open_shard(made, records) for records in assign_pages(made.manifest, world_size)]
        assert pages_of(opened) == wanted
        assert sum(shard.num_tokens for shard in opened) == num_tokens


@pytest.mark.gpu
@pytest.mark.parametrize("name", CODECS)
def test_a_gpu_opens_the_bits_that_a_gpu_saved(tmp_path, monkeypatch, name):
    monkeypatch.setattr(batches, "BATCH_BYTES", 100_000)
    step = page_tokens_of(name)
    made = make_context(
        tmp_path, 11 * step + 3, 3, name, page_tokens=step, device="cuda", dtype=torch.bfloat16
    )
    opened = [open_shard(made, r, "cuda") for r in assign_pages(made.manifest, 2)]
    on_cpu = [open_shard(made, r, "cpu") for r in assign_pages(made.manifest, 2)]
    assert pages_of(opened) == pages_of(made.shards)
    assert pages_of(on_cpu) == pages_of(made.shards)


def test_a_context_of_one_token_is_kept(tmp_path):
    made = make_context(tmp_path, 1, 2)
    assert not (made.store.folder(made.manifest) / "rank-1.seg").exists()
    shard = open_shard(made, made.manifest.pages)
    assert pages_of([shard]) == pages_of(made.shards[:1])


REGIONS = {
    "magic": lambda r: r.offset,
    "header length": lambda r: r.offset + 13,
    "header checksum": lambda r: r.offset + 20,
    "header": lambda r: r.offset + 100,
    "header padding": lambda r: r.offset + 4095,
    "first K code": lambda r: r.offset + 4096,
    "a middle code": lambda r: r.offset + 4096 + r.payload_bytes // 2,
    "last V code": lambda r: r.offset + 4096 + r.payload_bytes - 1,
    "payload padding": lambda r: r.offset + r.frame_bytes - 1,
}


@pytest.mark.parametrize("region", REGIONS)
def test_a_changed_byte_of_any_region_is_never_opened(tmp_path, region):
    made = make_context(tmp_path)
    record = made.manifest.pages[3]
    path = made.store.folder(made.manifest) / record.segment
    data = bytearray(path.read_bytes())
    data[REGIONS[region](record)] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(CorruptPage):
        open_shard(made, made.manifest.pages)
    report = made.store.verify(made.manifest.context_id)
    assert [(page.key, page.span, page.segment, page.offset) for page in report.bad_pages] == [
        (record.key, record.span, record.segment, record.offset)
    ]
    assert not report.ok
    assert record.segment in report.bad_pages[0].what or "page" in report.bad_pages[0].what
    others = [page for page in made.manifest.pages if page is not record]
    assert open_shard(made, others).num_tokens == 75 - 16


def test_a_refused_page_leaves_the_shard_as_it_was(tmp_path):
    made = make_context(tmp_path)
    first, *rest = made.manifest.pages
    shard = make_shards(0, 1)[0].__class__(
        made.shards[0].codec, 3, 2, 32, torch.float32, "cpu", 75, 16
    )
    load_shard(made.store.root, made.manifest, [first], shard)
    path = made.store.folder(made.manifest) / rest[0].segment
    data = bytearray(path.read_bytes())
    data[rest[0].offset + 5000] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptPage, match="xxh3-128"):
        load_shard(made.store.root, made.manifest, rest, shard)
    assert shard.spans == (first.span,)
    assert shard.plane_sums(0) == made.shards[0].plane_sums(0)


def damaging(real, times):
    """A copy to the shard that goes wrong so many times: in some page's V of layer 2."""
    calls, left = [0], [times]

    def copy(rows, part_rows, part):
        real(rows, part_rows, part)
        calls[0] += 1
        if left[0] and calls[0] % 6 == 0:
            left[0] -= 1
            part_rows[7] ^= 1

    return copy


def test_bytes_that_change_on_the_way_to_the_shard_are_read_again(tmp_path, monkeypatch):
    """What xxh3 on the host cannot see, the plane sums on the device do."""
    made = make_context(tmp_path)
    monkeypatch.setattr(HostRows, "_copy", damaging(HostRows._copy, 1))
    counters = StoreCounters()
    supply = context_supply(made.store.root, made.manifest, made.manifest.pages, counters)
    (shard,) = make_shards(0, 1)
    shard = type(shard)(shard.codec, 3, 2, 32, torch.float32, "cpu", 75, 16)
    load_shard(made.store.root, made.manifest, made.manifest.pages, shard, supply=supply)
    assert pages_of([shard]) == pages_of(made.shards)
    assert counters.total("quarantined") == 0
    assert counters.snapshot()["verified"] == {"disk": 5}


def test_a_shard_whose_rows_do_not_keep_what_they_are_given_is_never_read(tmp_path, monkeypatch):
    made = make_context(tmp_path)
    monkeypatch.setattr(HostRows, "_copy", damaging(HostRows._copy, 9))
    shard_class = type(made.shards[0])
    fill = shard_class.fill

    def broken(self, row, tokens, payloads):
        fill(self, row, tokens, payloads)
        self._layers[2][1][row + 3, 1, 7] += 1

    monkeypatch.setattr(shard_class, "fill", broken)
    with pytest.raises(CorruptPage, match=r"page .* plane sum differs in layer 2"):
        open_shard(made, made.manifest.pages)


def test_swapped_pages_are_refused(tmp_path):
    made = make_context(tmp_path, 75, 1)
    a, b = made.manifest.pages[1:3]
    path = made.store.folder(made.manifest) / a.segment
    data = bytearray(path.read_bytes())
    frames = [bytes(data[p.offset : p.offset + p.frame_bytes]) for p in (a, b)]
    data[a.offset : b.offset + b.frame_bytes] = frames[1] + frames[0]
    path.write_bytes(data)
    with pytest.raises(CorruptPage, match="holds page"):
        open_shard(made, made.manifest.pages)
    bad = made.store.verify(made.manifest.context_id).bad_pages
    assert [page.span for page in bad] == [a.span, b.span]


@pytest.mark.parametrize("other", [{"seed": 5}, {"fingerprint": "cd" * 32}], ids=str)
def test_segments_of_another_context_of_the_same_shape_are_refused(tmp_path, other):
    made = make_context(tmp_path)
    stranger = make_context(tmp_path, **other)
    for rank in range(3):
        name = f"rank-{rank}.seg"
        shutil.copy(
            stranger.store.folder(stranger.manifest) / name, made.store.folder(made.manifest) / name
        )
    with pytest.raises(CorruptPage, match="holds page"):
        open_shard(made, made.manifest.pages)
    assert len(made.store.verify(made.manifest.context_id).bad_pages) == 5


def test_a_manifest_that_claims_anothers_pages_is_refused(tmp_path):
    """Even records that fit the frames do not make another context's pages this one's."""
    made = make_context(tmp_path)
    stranger = make_context(tmp_path, seed=5)
    folder = made.store.folder(made.manifest)
    for rank in range(3):
        shutil.copy(stranger.store.folder(stranger.manifest) / f"rank-{rank}.seg", folder)
    records = [record for rank in range(3) for record in scan(folder / f"rank-{rank}.seg")]
    forged = msgspec.structs.replace(
        made.manifest, pages=tuple(sorted(records, key=lambda record: record.span))
    )
    with pytest.raises(StoreError, match="is not this context's"):
        open_shard(made._replace(manifest=forged), forged.pages)


def test_a_page_of_other_provenance_is_refused(tmp_path):
    made = make_context(tmp_path)
    origin = msgspec.structs.replace(made.manifest.origin, provenance=("sparse:topk",))
    forged = msgspec.structs.replace(made.manifest, origin=origin)
    with pytest.raises(CorruptPage, match="provenance"):
        open_shard(made._replace(manifest=forged), forged.pages)


def test_a_truncated_or_missing_segment_is_refused(tmp_path):
    made = make_context(tmp_path)
    path = made.store.folder(made.manifest) / "rank-2.seg"
    path.write_bytes(path.read_bytes()[:-4096])
    with pytest.raises(CorruptPage, match="ends in the middle"):
        open_shard(made, made.manifest.pages)
    path.unlink()
    with pytest.raises(StoreError, match="No such file"):
        open_shard(made, made.manifest.pages)
    report = made.store.verify(made.manifest.context_id)
    assert [page.segment for page in report.bad_pages] == ["rank-2.seg"]


@pytest.mark.parametrize("name", ["tokens.npy", "manifest.json"])
def test_damaged_tokens_and_manifests_are_in_the_report(tmp_path, name):
    made = make_context(tmp_path)
    path = made.store.folder(made.manifest) / name
    data = bytearray(path.read_bytes())
    data[-50] ^= 4
    path.write_bytes(data)
    report = made.store.verify(made.manifest.context_id)
    assert len(report.problems) == 1
    assert not report.ok
    if name == "tokens.npy":
        with pytest.raises(StoreError, match="has key"):
            open_shard(made, made.manifest.pages)


def test_a_whole_context_is_reported_whole_with_progress(tmp_path):
    made = make_context(tmp_path, 200, 2)
    seen = []
    report = made.store.verify(made.manifest.context_id, lambda done, of: seen.append((done, of)))
    assert report.ok
    assert (report.num_pages, report.payload_bytes) == (13, made.manifest.payload_bytes)
    assert seen == [(done, 13) for done in range(1, 14)]


def test_a_shard_of_another_codec_is_refused(tmp_path):
    made = make_context(tmp_path)
    (shard,) = make_shards(0, 1, "bf16")
    with pytest.raises(BadInput, match="codec 'raw', wanted 'bf16'"):
        load_shard(made.store.root, made.manifest, made.manifest.pages, shard)


def test_a_supply_is_closed_whatever_the_loading_ends_by(tmp_path):
    made = make_context(tmp_path)
    pages = made.manifest.pages
    tokens = made.store.folder(made.manifest) / "tokens.npy"

    class Counted(Supply):
        closed = 0

        def close(self):
            super().close()
            self.closed += 1

    def opened():
        return Counted(made.manifest, [SegmentReader(tokens.parent)], NO_QUARANTINE)

    def load(supply, codec="raw"):
        like = make_shards(0, 1, codec)[0]
        shard = type(like)(like.codec, 3, 2, 32, torch.float32, "cpu", 75, 16)
        load_shard(made.store.root, made.manifest, pages, shard, supply=supply)

    whole, other, lost = opened(), opened(), opened()
    load(whole)
    with pytest.raises(BadInput, match="wanted 'bf16'"):
        load(other, "bf16")
    tokens.unlink()
    with pytest.raises(StoreError):
        load(lost)
    assert (whole.closed, other.closed, lost.closed) == (1, 1, 1)
