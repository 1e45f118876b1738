"""A shard written while it grows: the same files as at the end, one error, nothing left."""

from __future__ import annotations

import os
import resource
import threading

import numpy as np
import pytest
import torch

from ringspan.attention.kv import unit_tokens
from ringspan.errors import StoreError
from ringspan.kvstore import batches, write_behind
from ringspan.kvstore.codecs.registry import CODECS
from ringspan.kvstore.keys import PUBLIC_NAMESPACE, page_keys
from ringspan.kvstore.page import Origin
from ringspan.kvstore.segment_reader import read_frame
from ringspan.kvstore.shard import ContextShard
from ringspan.kvstore.write_behind import WriteBehind, save_shard
from ringspan.types import Span

ORIGIN = Origin(fingerprint="ab" * 32, namespace="00" * 8, rope="applied")


class Growing:
    """A shard that takes chunk after chunk."""

    def __init__(self, name="raw", pages=9, extra=5):
        specs = CODECS[name].specs(2, 32, torch.float32)
        self.step = max(16, unit_tokens(specs))
        self.tokens = pages * self.step + extra
        self.shard = ContextShard(
            CODECS[name], 3, 2, 32, torch.float32, "cpu", self.tokens, self.step
        )
        self.keys = page_keys("ab" * 32, PUBLIC_NAMESPACE, np.arange(self.tokens), self.step)
        self.random = torch.Generator().manual_seed(3)

    def chunks(self, pages=2):
        for start in range(0, self.tokens, pages * self.step):
            span = Span(start, min(start + pages * self.step, self.tokens))
            self.shard.reserve((span,))
            for layer in range(3):
                k, v = torch.randn((2, span.tokens, 2, 32), generator=self.random)
                self.shard.write(layer, k, v)
            yield span


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("batch_bytes", [1, 1 << 26])
@pytest.mark.parametrize("name", CODECS)
def test_pages_written_behind_are_those_written_at_the_end(
    tmp_path, monkeypatch, name, batch_bytes
):
    monkeypatch.setattr(batches, "BATCH_BYTES", batch_bytes)
    monkeypatch.setattr(write_behind, "SEGMENT_BYTES", 0)
    made = Growing(name)
    for folder in ("behind", "after"):
        (tmp_path / folder).mkdir()
    saving = WriteBehind(
        made.shard, ORIGIN, made.keys, tmp_path / "behind" / "rank-0.seg", writers=3
    )
    for _ in made.chunks():
        saving.add()
    records = saving.finish()
    again = WriteBehind(made.shard, ORIGIN, made.keys, tmp_path / "after" / "rank-0.seg", writers=3)
    assert again.finish() == records
    assert files(tmp_path / "behind") == files(tmp_path / "after")
    assert sorted(files(tmp_path / "behind")) == ["rank-0.1.seg", "rank-0.2.seg", "rank-0.seg"]
    assert [record.span.start for record in records] == list(range(0, made.tokens, made.step))
    for index, record in enumerate(records):
        page = read_frame(tmp_path / "behind" / record.segment, record)
        assert bytes(page.payload) == bytes(
            made.shard.export_page(index, ORIGIN, made.keys).payload
        )


def test_the_next_chunk_is_computed_while_the_last_is_written(tmp_path, monkeypatch):
    """`add` comes back although no writer can write."""
    gate = threading.Event()
    write = write_behind.SegmentWriter.write

    def held(self, *args):
        assert gate.wait(30)
        return write(self, *args)

    monkeypatch.setattr(write_behind.SegmentWriter, "write", held)
    monkeypatch.setattr(batches, "BATCH_BYTES", 1)
    made = Growing(pages=40)
    saving = WriteBehind(made.shard, ORIGIN, made.keys, tmp_path / "rank-0.seg", writers=2)
    for _ in made.chunks():
        saving.add()
    assert len(saving._buffers) <= write_behind.BUFFERS
    gate.set()
    assert len(saving.finish()) == 41


def test_a_full_disk_is_one_line_at_the_next_chunk_and_leaves_no_file(tmp_path):
    made = Growing(pages=12)
    saving = WriteBehind(made.shard, ORIGIN, made.keys, tmp_path / "rank-0.seg", writers=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))

    def run():
        for _ in made.chunks():
            saving.add()
            saving._fed[-1].exception()  # the disk is as fast as the computing
        saving.finish()

    try:
        with pytest.raises(StoreError, match=r"File too large after 0\.000 GB; .* GB are free"):
            run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StoreError, match="File too large"):
        saving.add()


def test_a_saving_given_up_leaves_no_file_and_no_thread(tmp_path):
    made = Growing()
    before = threading.active_count()
    saving = WriteBehind(made.shard, ORIGIN, made.keys, tmp_path / "rank-0.seg")
    for _ in made.chunks():
        saving.add()
    saving.abort()
    saving.abort()
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == before


def test_a_shard_without_pages_makes_no_file(tmp_path):
    made = Growing(pages=0, extra=1)
    assert save_shard(made.shard, ORIGIN, made.keys, tmp_path / "rank-0.seg") == ()
    assert os.listdir(tmp_path) == []
