from __future__ import annotations

import os
import resource

import msgspec
import numpy as np
import pytest

from ringspan.errors import CorruptPage, StoreError
from ringspan.kvstore import batches, write_behind
from ringspan.kvstore.keys import PUBLIC_NAMESPACE, page_keys
from ringspan.kvstore.page import Origin
from ringspan.kvstore.segment import SegmentWriter
from ringspan.kvstore.segment_reader import read_frame, scan
from ringspan.kvstore.testing import make_context, make_shards
from ringspan.kvstore.transfer import save_shard

ORIGIN = Origin(fingerprint="ab" * 32, namespace="00" * 8, rope="applied")


def some_pages(tokens=75):
    (shard,) = make_shards(tokens, 1)
    keys = page_keys("ab" * 32, PUBLIC_NAMESPACE, np.arange(tokens), 16)
    return [shard.export_page(i, ORIGIN, keys) for i in range(len(shard.pages()))], shard, keys


def test_pages_are_read_back_as_appended(tmp_path):
    pages, _, _ = some_pages()
    path = tmp_path / "rank-0.seg"
    with SegmentWriter(path) as writer:
        records = [writer.append(page) for page in pages]
    assert path.stat().st_size == records[-1].offset + records[-1].frame_bytes
    for page, record in zip(pages, records, strict=True):
        back = read_frame(path, record)
        assert back.header == page.header
        assert back.payload == page.payload


def test_saving_a_shard_gives_the_frames_of_its_pages(tmp_path):
    pages, shard, keys = some_pages()
    records = save_shard(shard, ORIGIN, keys, tmp_path / "rank-0.seg")
    assert [read_frame(tmp_path / "rank-0.seg", r).header for r in records] == [
        page.header for page in pages
    ]


@pytest.mark.parametrize("batch_bytes", [1, 1 << 26])
def test_direct_writes_leave_the_same_file(tmp_path, monkeypatch, batch_bytes):
    _, shard, keys = some_pages()
    save_shard(shard, ORIGIN, keys, tmp_path / "rank-0.seg")
    monkeypatch.setattr(write_behind, "DIRECT_BYTES", 0)
    monkeypatch.setattr(batches, "BATCH_BYTES", batch_bytes)
    save_shard(shard, ORIGIN, keys, tmp_path / "rank-1.seg")
    assert (tmp_path / "rank-0.seg").read_bytes() == (tmp_path / "rank-1.seg").read_bytes()


def test_records_are_rebuilt_from_frames_alone(tmp_path):
    made = make_context(tmp_path / "store")
    folder = made.store.folder(made.manifest)
    found = [record for rank in range(3) for record in scan(folder / f"rank-{rank}.seg")]
    assert sorted(found, key=lambda r: r.span) == list(made.manifest.pages)


@pytest.mark.parametrize("cut", [1, 4096, 4097, 10_000])
def test_a_torn_tail_ends_the_scan(tmp_path, cut):
    pages, shard, keys = some_pages()
    path = tmp_path / "rank-0.seg"
    records = save_shard(shard, ORIGIN, keys, path)
    os.truncate(path, path.stat().st_size - cut)
    assert list(scan(path)) == list(records[:-1])
    with pytest.raises(CorruptPage, match="ends in the middle of the frame"):
        read_frame(path, records[-1])
    assert read_frame(path, records[-2]).header == pages[-2].header


def test_a_frame_that_is_not_the_one_recorded_is_refused(tmp_path):
    _, shard, keys = some_pages()
    path = tmp_path / "rank-0.seg"
    records = save_shard(shard, ORIGIN, keys, path)
    other = msgspec.structs.replace(records[0], offset=records[1].offset)
    with pytest.raises(CorruptPage, match=r"rank-0\.seg at byte \d+: holds page .* wanted"):
        read_frame(path, other)


def test_a_segment_is_never_written_over(tmp_path):
    _, shard, keys = some_pages()
    save_shard(shard, ORIGIN, keys, tmp_path / "rank-0.seg")
    with pytest.raises(StoreError, match="File exists"):
        save_shard(shard, ORIGIN, keys, tmp_path / "rank-0.seg")


def test_no_room_in_the_midst_is_one_line_and_leaves_no_file(tmp_path):
    _, shard, keys = some_pages()
    path = tmp_path / "rank-0.seg"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(StoreError, match=r"File too large after 0\.000 GB; .* GB are free"):
            save_shard(shard, ORIGIN, keys, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not path.exists()


def test_a_full_device_is_one_line(tmp_path):
    _, shard, keys = some_pages()
    page = shard.export_page(0, ORIGIN, keys)
    writer = SegmentWriter(tmp_path / "rank-0.seg")
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, writer._fd)
    os.close(full)
    with pytest.raises(StoreError, match="No space left on device"):
        writer.append(page)
    writer.discard()
