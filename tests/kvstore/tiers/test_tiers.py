"""Every tier keeps the same promises; the host store's with real processes that die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

import ringspan
from ringspan.cluster import host_store
from ringspan.errors import BadInput, CorruptPage, StoreError
from ringspan.kvstore.keys import PUBLIC_NAMESPACE, page_keys
from ringspan.kvstore.page import Origin
from ringspan.kvstore.testing import make_shards
from ringspan.kvstore.tiers import host_wire as wire
from ringspan.kvstore.tiers.base import form_id, page_id
from ringspan.kvstore.tiers.disk import DiskTier
from ringspan.kvstore.tiers.host import HostTier
from ringspan.kvstore.tiers.remote import RemoteTier
from ringspan.kvstore.tiers.testing import check_tier, records_of

ORIGIN = Origin(fingerprint="ab" * 32, namespace="00" * 8, rope="applied")
CAPACITY = 16 << 20


def some_pages(tokens=75, seed=0):
    (shard,) = make_shards(tokens, 1, seed=seed)
    ids = np.arange(tokens) + 1000 * seed
    keys = page_keys("ab" * 32, PUBLIC_NAMESPACE, ids, 16)
    return [shard.export_page(i, ORIGIN, keys) for i in range(len(shard.pages()))]


@pytest.fixture
def folder(tmp_path):
    """Of a host store, which ends with the test."""
    yield tmp_path / "host"
    stop(tmp_path / "host", keep=False)


def stop(folder, keep):
    tier = HostTier(folder, timeout_s=5.0)
    try:
        tier._ask(wire.Stop(keep=keep), wire.Stated)
    except StoreError:
        return
    finally:
        tier.close()
    while (folder / wire.SOCKET).exists():
        time.sleep(0.01)


@pytest.fixture
def s3():
    """A bucket of a local S3-compatible server."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    options = {"key": "x", "secret": "y", "endpoint_url": f"http://127.0.0.1:{port}"}
    import s3fs

    s3fs.S3FileSystem(**options, skip_instance_cache=True).mkdir("contexts")
    yield "s3://contexts/pages", options
    server.stop()


def test_the_disk_keeps_a_tiers_promises(tmp_path):
    check_tier(lambda: DiskTier(tmp_path), some_pages())
    assert list((tmp_path / "staging").iterdir()) == []


def test_the_host_store_keeps_a_tiers_promises(folder):
    host_store.host_tier(folder, CAPACITY).close()
    check_tier(lambda: HostTier(folder), some_pages())


@pytest.mark.parametrize("url", ["file://{}", "memory://tiers{}"])
def test_a_remote_keeps_a_tiers_promises(tmp_path, url):
    check_tier(lambda: RemoteTier(url.format(tmp_path)), some_pages())


@pytest.mark.filterwarnings("default")
def test_an_object_store_keeps_a_tiers_promises(s3):
    url, options = s3
    check_tier(lambda: RemoteTier(url, **options, skip_instance_cache=True), some_pages())


def test_forms_and_provenance_make_different_encodings():
    page = some_pages()[0]
    other = msgspec.structs.replace(ORIGIN, provenance=("sparse:topk",))
    assert form_id(page.header.form, ORIGIN) != form_id(page.header.form, other)
    form = msgspec.structs.replace(page.header.form, num_layers=4)
    assert form_id(page.header.form, ORIGIN) != form_id(form, ORIGIN)


# the disk


def test_a_put_that_dies_leaves_nothing_visible(tmp_path):
    pages = some_pages()

    def failing():
        yield pages[0]
        raise KeyError

    with pytest.raises(KeyError):
        DiskTier(tmp_path).put(failing())
    assert DiskTier(tmp_path).stat().pages == 0
    assert list((tmp_path / "staging").iterdir()) == []


def test_a_torn_segment_serves_what_is_whole_in_it(tmp_path):
    pages = some_pages()
    DiskTier(tmp_path).put(pages)
    (path,) = (tmp_path / "pages").glob("*.seg")
    os.truncate(path, path.stat().st_size - 1)
    names = [page_id(page.header) for page in pages]
    assert DiskTier(tmp_path).holds(names) == [True] * 4 + [False]


# a remote


def test_a_url_that_fsspec_does_not_know_is_refused():
    with pytest.raises(BadInput, match=r"remote 'nowhere://x': .* wanted a URL that fsspec knows"):
        RemoteTier("nowhere://x")


def test_a_pack_without_its_index_is_not_served(tmp_path, monkeypatch):
    tier = RemoteTier(f"file://{tmp_path}")
    monkeypatch.setattr(tier, "_put_index", lambda *args: (_ for _ in ()).throw(KeyError))
    with pytest.raises(KeyError):
        tier.put(some_pages())
    assert RemoteTier(f"file://{tmp_path}").stat().pages == 0


def test_a_damaged_index_hides_its_pack_and_no_other(tmp_path):
    RemoteTier(f"file://{tmp_path}").put(some_pages())
    (index,) = (tmp_path / "packs").glob("*.index")
    others = some_pages(seed=1)
    RemoteTier(f"file://{tmp_path}").put(others)
    data = bytearray(index.read_bytes())
    data[40] ^= 1
    index.write_bytes(data)
    assert RemoteTier(f"file://{tmp_path}").stat().pages == len(others)


# the host store


def test_a_folder_that_nobody_serves_says_what_to_do(tmp_path):
    with pytest.raises(StoreError, match="is it running"):
        HostTier(tmp_path / "none").stat()


def test_a_full_host_store_refuses_with_numbers_and_keeps_what_it_has(folder):
    tier = host_store.host_tier(folder, 1 << 20)
    pages = some_pages(16 * 60)
    tier.put(pages[:10])
    with pytest.raises(StoreError, match=r"is full: .* GB of 0\.001 GB .*; delete pages"):
        tier.put(pages)
    assert tier.stat().pages == 10
    assert all(tier.holds([page_id(page.header) for page in pages[:10]]))
    tier.close()


def run_putter(folder, body):
    """A process that puts pages and stands still in the midst."""
    script = """
        import os, sys, time, pathlib
        sys.path.insert(0, sys.argv[2])
        from test_tiers import *
        tier = HostTier(pathlib.Path(sys.argv[1]))
        pages = some_pages()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script) + textwrap.dedent(body), str(folder),
         str(Path(__file__).parent)],
        env={**os.environ, "PYTHONPATH": str(Path(ringspan.__file__).parents[1])},
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


def settled(tier, pages, until_s=10.0):
    """The store has noticed that the connection ended."""
    names = [page_id(page.header) for page in pages]
    form = form_id(pages[0].header.form, ORIGIN)
    began = time.monotonic()
    while time.monotonic() - began < until_s:
        tier.put(pages)
        if all(tier.holds(names)):
            break
        time.sleep(0.02)
    reader = tier.reading(form, records_of(pages))
    for page, record in zip(pages, records_of(pages), strict=True):
        assert reader.head(record) == page.header
    reader.close()


def test_a_rank_killed_in_the_midst_of_a_put_leaves_nothing_visible(folder):
    tier = host_store.host_tier(folder, CAPACITY)
    body = """
        tier._write = lambda place, head, page: (os.write(1, b"ready\\n"), time.sleep(600))
        tier.put(pages)
    """
    process = run_putter(folder, body)
    pages = some_pages()
    names = [page_id(page.header) for page in pages]
    assert not any(tier.holds(names))
    tier.put(pages)  # reserved by the other: nothing to do
    assert not any(tier.holds(names))
    kill(process)
    settled(tier, pages)  # its slots are free, and the pages may be put by another
    assert tier.stat().pages == len(pages)
    tier.close()


def test_pages_outlive_the_rank_that_put_them(folder):
    tier = host_store.host_tier(folder, CAPACITY)
    kill(run_putter(folder, 'tier.put(pages); os.write(1, b"ready\\n"); time.sleep(600)'))
    settled(tier, some_pages())
    tier.close()


def test_a_leased_page_is_kept_until_its_reader_is_done_or_dead(folder):
    tier = host_store.host_tier(folder, CAPACITY)
    pages = some_pages()
    tier.put(pages)
    form, records = form_id(pages[0].header.form, ORIGIN), records_of(pages)
    body = """
        reader = tier.reading(form_id(pages[0].header.form, ORIGIN), records_of(pages))
        os.write(1, b"ready\\n")
        time.sleep(600)
    """
    process = run_putter(folder, body)
    other = HostTier(folder)
    mine = other.reading(form, records)
    tier.delete([page_id(page.header) for page in pages])
    assert tier.stat().pages == 0
    tier.put(some_pages(seed=1))  # goes to other slots
    assert mine.head(records[0]) == pages[0].header
    room = memoryview(bytearray(pages[0].payload.nbytes))
    mine.payload(records[0], room)
    assert room == pages[0].payload
    kill(process)
    mine.close()
    other.close()
    tier.close()


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_store_started_again_has_every_published_page_and_no_other(folder, how):
    tier = host_store.host_tier(folder, CAPACITY)
    pages = some_pages()
    tier.put(pages[:3])
    names = [page_id(page.header) for page in pages]
    tier._places(wire.Reserve(pages=(names[3],), frame_bytes=(records_of(pages)[3].frame_bytes,)))
    pid = tier._ask(wire.Stat(), wire.Stated).pid
    if how == "killed":
        os.kill(pid, signal.SIGKILL)
        while host_store.is_running(folder):
            time.sleep(0.02)
    else:
        stop(folder, keep=True)
    again = host_store.host_tier(folder, CAPACITY)
    assert again.holds(names) == [True] * 3 + [False] * 2
    settled(tier, pages)  # the old connection is made anew
    assert tier.stat().pages == 5
    tier.close()
    again.close()


def test_a_put_across_a_restart_is_refused_not_half_done(folder):
    tier = host_store.host_tier(folder, CAPACITY)
    pages = some_pages()
    write = tier._write

    def restart(place, head, page):
        write(place, head, page)
        if page is pages[-1]:
            stop(folder, keep=True)
            host_store.host_tier(folder, CAPACITY).close()

    tier._write = restart
    with pytest.raises(StoreError, match="put the pages again"):
        tier.put(pages)
    assert tier.stat().pages == 0
    tier.close()


def test_one_folder_has_one_store(folder):
    tier = host_store.host_tier(folder, CAPACITY)
    pid = tier._ask(wire.Stat(), wire.Stated).pid
    second = host_store.start(folder, CAPACITY)
    assert os.waitstatus_to_exitcode(os.waitpid(second, 0)[1]) == 1
    assert tier._ask(wire.Stat(), wire.Stated).pid == pid
    tier.close()


def test_nonsense_on_the_socket_ends_that_connection_only(folder):
    import socket

    tier = host_store.host_tier(folder, CAPACITY)
    tier.put(some_pages())
    for nonsense in (b"\xff" * 64, wire.LENGTH.pack(3) + b"abc", wire.LENGTH.pack(1) + b"\xc1"):
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(str(folder / wire.SOCKET))
            other.sendall(nonsense)
            other.settimeout(10)
            assert other.recv(1) == b""
    assert tier.stat().pages == 5
    tier.close()


def test_a_slot_that_changed_is_seen(folder):
    tier = host_store.host_tier(folder, CAPACITY)
    pages = some_pages()
    tier.put(pages)
    reader = tier.reading(form_id(pages[0].header.form, ORIGIN), records_of(pages))
    reader._frame(records_of(pages)[2])[60] ^= 1
    with pytest.raises(
        CorruptPage, match=r"host slab-.* at byte .*: the header's checksum differs"
    ):
        reader.head(records_of(pages)[2])
    reader.close()
    tier.close()
