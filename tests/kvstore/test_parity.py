"""Parity of stored contexts: what is lost comes back bit for bit, or is an error."""

from __future__ import annotations

import itertools

import pytest

from ringspan.attention.kv import unit_tokens
from ringspan.errors import BadInput, CorruptPage, StoreError
from ringspan.kvstore.codecs.registry import CODECS
from ringspan.kvstore.manifest import assign_pages
from ringspan.kvstore.parity import (
    check_parity,
    check_rows,
    dealt_rows,
    parity_path,
    scan_parity,
    stripes,
    write_parity,
    write_parity_rows,
)
from ringspan.kvstore.supply import NO_QUARANTINE, Supply
from ringspan.kvstore.testing import make_context, open_shard
from ringspan.kvstore.tiers.counters import QUARANTINED, REPAIRED, VERIFIED, StoreCounters
from ringspan.kvstore.tiers.disk import SegmentReader
from ringspan.kvstore.tiers.placement import context_supply


def page_tokens(name):
    import torch

    return max(unit_tokens(CODECS[name].specs(2, 32, torch.float32)), 16)


def with_parity(root, ranks, codec="raw", pages=9, rows=1, writers=None):
    """A context of some pages and a short one, with parity as a gang of these ranks writes it."""
    step = page_tokens(codec)
    made = make_context(root, pages * step + 5, ranks, codec, page_tokens=step)
    protect(made, rows, writers or ranks)
    return made


def protect(made, rows, writers):
    folder = made.store.folder(made.manifest)
    found = stripes(made.manifest.pages)
    with Supply(made.manifest, [SegmentReader(folder)], NO_QUARANTINE, StoreCounters()) as supply:
        for writer in range(writers):
            wanted = [(found[s], row) for s, row in dealt_rows(len(found), rows, writer, writers)]
            write_parity(parity_path(folder, writer), supply, wanted)
    write_parity_rows(folder, rows)


def flip(path, at):
    with open(path, "r+b") as file:
        file.seek(at)
        value = file.read(1)
        file.seek(at)
        file.write(bytes([value[0] ^ 0x40]))


def damage(made, index):
    record = made.manifest.pages[index]
    flip(made.store.folder(made.manifest) / record.segment, record.offset + record.frame_bytes // 2)


def pages_of(made, shard):
    origin, keys = made.manifest.origin, made.manifest.keys
    return [bytes(shard.export_page(i, origin, keys).payload) for i in range(len(shard.pages()))]


@pytest.mark.parametrize("name", ["raw", "int8", "int4"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_a_page_that_is_damaged_comes_back(tmp_path, ranks, name):
    made = with_parity(tmp_path, ranks, name, pages=5)
    wanted = pages_of(made, open_shard(made, made.manifest.pages))
    for index in (0, 2, 5):  # the first, one in the middle, the short last one
        damage(made, index)
        counters = StoreCounters()
        shard = open_shard_counting(made, counters)
        assert pages_of(made, shard) == wanted
        counts = counters.snapshot()
        assert counts[REPAIRED] == {"parity": 1}
        assert counts[VERIFIED]["parity"] == 1
        assert counters.total(VERIFIED) == 6
        mend_by_hand(made, index)


def open_shard_counting(made, counters):
    from ringspan.kvstore.codecs.registry import codec
    from ringspan.kvstore.dtypes import dtype_of
    from ringspan.kvstore.shard import ContextShard
    from ringspan.kvstore.transfer import load_shard

    form, pages = made.manifest.form, made.manifest.pages
    shard = ContextShard(
        codec(form.codec), form.num_layers, form.num_kv_heads, form.head_dim,
        dtype_of(form.dtype), "cpu", made.manifest.num_tokens, form.page_tokens,
    )  # fmt: skip
    supply = context_supply(made.store.root, made.manifest, pages, counters)
    load_shard(made.store.root, made.manifest, pages, shard, supply=supply)
    return shard


def mend_by_hand(made, index):
    """The flipped bit back, and no quarantine: the next loss is the only one."""
    import shutil

    damage(made, index)
    shutil.rmtree(made.store.root / "quarantine", ignore_errors=True)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_segment_of_a_rank_that_is_gone_comes_back(tmp_path, ranks):
    made = with_parity(tmp_path, ranks, pages=11)
    wanted = pages_of(made, open_shard(made, made.manifest.pages))
    (made.store.folder(made.manifest) / "rank-1.seg").unlink()
    for world_size in (1, 3):
        opened = [open_shard(made, part) for part in assign_pages(made.manifest, world_size)]
        assert [page for shard in opened for page in pages_of(made, shard)] == wanted


def test_what_is_lost_twice_in_a_stripe_is_an_error_and_nothing_else_is(tmp_path):
    made = with_parity(tmp_path, 3, pages=8)
    damage(made, 0)
    damage(made, 1)
    with pytest.raises(CorruptPage, match="2 of 3 pages of its stripe are lost, 1 of 1 rows"):
        open_shard(made, made.manifest.pages)
    open_shard(made, made.manifest.pages[3:])


def test_a_page_and_its_parity_damaged_is_an_error(tmp_path):
    made = with_parity(tmp_path, 3, pages=8)
    damage(made, 4)
    frames, problems = scan_parity(made.store.folder(made.manifest))
    assert not problems
    key = made.manifest.pages[4].key
    for frame in frames:
        if any(member.key == key for member in frame.header.members):
            flip(frame.path, frame.offset + frame.head_bytes + 9)
    with pytest.raises(CorruptPage, match="0 of 1 rows of parity are whole"):
        open_shard(made, made.manifest.pages)
    assert len(check_parity(made.store.folder(made.manifest), made.manifest.pages)) == 2


@pytest.mark.parametrize("ranks", [1, 3])
def test_two_rows_bring_any_two_pages_of_a_stripe_back(tmp_path, ranks):
    made = with_parity(tmp_path, ranks, pages=5, rows=2)
    wanted = pages_of(made, open_shard(made, made.manifest.pages))
    first = stripes(made.manifest.pages)[0]
    at = [made.manifest.pages.index(record) for record in first]
    for pair in itertools.combinations(at, 2):
        for index in pair:
            damage(made, index)
        assert pages_of(made, open_shard(made, made.manifest.pages)) == wanted
        for index in pair:
            mend_by_hand(made, index)


def test_rows_of_a_stripe_lie_in_different_files_and_no_file_has_all(tmp_path):
    made = with_parity(tmp_path, 3, pages=11, rows=2)
    frames, _ = scan_parity(made.store.folder(made.manifest))
    homes = {}
    for frame in frames:
        homes.setdefault(frame.header.members, []).append(frame.path.name)
    assert all(len(set(names)) == 2 for names in homes.values())
    assert {len([f for f in frames if f.path.name == f"parity-{r}.par"]) for r in range(3)} <= {
        2,
        3,
    }


def test_every_page_is_in_one_stripe_and_no_rank_twice(tmp_path):
    made = make_context(tmp_path, 16 * 10 + 3, 4, page_tokens=16)
    found = stripes(made.manifest.pages)
    assert sorted(r.span for stripe in found for r in stripe) == [
        r.span for r in made.manifest.pages
    ]
    assert all(len({r.segment for r in stripe}) == len(stripe) for stripe in found)


def test_without_parity_damage_is_the_error_it_was(tmp_path):
    made = make_context(tmp_path, 75, 3)
    damage(made, 0)
    with pytest.raises(CorruptPage, match="xxh3-128 differs"):
        open_shard(made, made.manifest.pages)


def test_a_page_sealed_anew_is_not_taken_from_its_old_stripe(tmp_path):
    import msgspec

    made = with_parity(tmp_path, 3, pages=8)
    record = msgspec.structs.replace(made.manifest.pages[4], xxh3="0" * 32)
    counters = StoreCounters()
    with context_supply(tmp_path, made.manifest, [record], counters) as supply:
        room = memoryview(bytearray(1 << 20))[: -(-record.payload_bytes // 4096) * 4096]
        with pytest.raises((CorruptPage, StoreError), match="sealed anew"):
            supply.page(record, room)
    assert counters.total(REPAIRED) == 0
    assert counters.total(QUARANTINED) == 1


@pytest.mark.parametrize("at", [0, 9, 20, 60, 4000], ids=["magic", "version", "sum", "head", "pad"])
def test_a_damaged_head_of_parity_is_seen_and_the_next_frame_is_found(tmp_path, at):
    made = with_parity(tmp_path, 1, pages=20)
    folder = made.store.folder(made.manifest)
    before, _ = scan_parity(folder)
    flip(folder / "parity-0.par", at)
    after, problems = scan_parity(folder)
    assert after == before[1:]
    assert len(problems) == 1
    told = check_parity(folder, made.manifest.pages)
    assert told[-1] == "8 of 21 pages have no parity of row 0"


def test_parity_that_is_gone_is_told(tmp_path):
    made = with_parity(tmp_path, 1, pages=4)
    folder = made.store.folder(made.manifest)
    assert check_parity(folder, made.manifest.pages) == []
    (folder / "parity-0.par").unlink()
    assert check_parity(folder, made.manifest.pages) == ["5 of 5 pages have no parity of row 0"]
    open_shard(made, made.manifest.pages)


def test_no_other_number_of_rows():
    for rows in (-1, 3):
        with pytest.raises(BadInput, match="wanted 0, 1 or 2"):
            check_rows(rows)
