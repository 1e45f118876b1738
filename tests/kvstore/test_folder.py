from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from ringspan.errors import BadInput, StoreError, UnknownName
from ringspan.kvstore import folder as folder_module
from ringspan.kvstore.exchange import swap
from ringspan.kvstore.folder import Store
from ringspan.kvstore.manifest import (
    assign_pages,
    check_manifest,
    decode_manifest,
    encode_manifest,
)
from ringspan.kvstore.page import TensorForm
from ringspan.kvstore.testing import make_context
from ringspan.types import Span

IDS = np.arange(9, dtype=np.int32)
NAME = "0123456789abcdef"


def replaced(manifest, **fields):
    return msgspec.structs.replace(manifest, **fields)


def test_a_published_context_is_listed_with_all_its_facts(tmp_path):
    made = make_context(tmp_path / "store")
    good, damaged = Store(tmp_path / "store").contexts()
    assert (good, damaged) == ([made.manifest], [])
    assert (made.store.tokens(made.manifest) == made.token_ids).all()
    assert sorted(path.name for path in made.store.folder(made.manifest).iterdir()) == [
        "index.copy",
        "manifest.json",
        "rank-0.seg",
        "rank-1.seg",
        "rank-2.seg",
        "tokens.npy",
    ]
    assert list((tmp_path / "store" / "staging").iterdir()) == []


def test_a_store_that_does_not_exist_yet_is_empty(tmp_path):
    store = Store(tmp_path / "none")
    assert store.ids() == []
    assert store.contexts() == ([], [])
    with pytest.raises(UnknownName, match="unknown context 'x'; known: none"):
        store.manifest("x")
    assert not (tmp_path / "none").exists()


def test_contexts_are_found_by_prefix(tmp_path):
    a = make_context(tmp_path, seed=1)
    b = make_context(tmp_path, seed=2)
    assert [m.context_id for m in a.store.contexts()[0]] == [
        b.manifest.context_id,
        a.manifest.context_id,
    ]
    assert a.store.manifest(a.manifest.context_id[:5]) == a.manifest
    with pytest.raises(UnknownName, match=a.manifest.context_id):
        a.store.find("")
    with pytest.raises(UnknownName, match=b.manifest.context_id):
        a.store.find("../" + a.manifest.context_id)


def test_an_ambiguous_prefix_lists_its_contexts(tmp_path):
    made = make_context(tmp_path)
    name = made.manifest.context_id
    twin = name[:-1] + ("0" if name[-1] != "0" else "1")
    (tmp_path / "contexts" / twin).mkdir()
    with pytest.raises(BadInput, match=f"ambiguous: .*{twin}"):
        made.store.find(name[:3])
    assert made.store.find(name) == name


def test_one_damaged_manifest_does_not_hide_the_others(tmp_path):
    a = make_context(tmp_path, seed=1)
    b = make_context(tmp_path, seed=2)
    (b.store.folder(b.manifest) / "manifest.json").write_bytes(b"{}")
    good, damaged = a.store.contexts()
    assert good == [a.manifest]
    assert len(damaged) == 1
    assert b.manifest.context_id in damaged[0]


def test_publishing_again_replaces_the_context_in_one_step(tmp_path):
    first = make_context(tmp_path, world_size=3)
    second = make_context(tmp_path, world_size=2)
    assert second.manifest.context_id == first.manifest.context_id
    assert first.store.contexts()[0] == [second.manifest]
    assert first.store.verify(second.manifest.context_id).ok
    assert list((tmp_path / "trash").iterdir()) == []


def test_a_swap_without_renameat2_still_ends_with_the_new_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("ringspan.kvstore.exchange._exchange", lambda a, b: False)
    for name in ("new", "target"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    swap(tmp_path / "new", tmp_path / "target", tmp_path / "old")
    assert (tmp_path / "target" / "new").exists()
    assert (tmp_path / "old" / "target").exists()
    assert not (tmp_path / "new").exists()


def test_publishing_what_is_published_does_no_harm(tmp_path):
    made = make_context(tmp_path)
    gone = str(tmp_path / "staging" / f"{made.manifest.context_id}-00000000")
    assert made.store.publish(gone, made.manifest) == made.manifest


@pytest.mark.parametrize("what", ["short segment", "no segment", "other tokens", "no tokens"])
def test_an_incomplete_context_is_not_published_and_leaves_nothing(tmp_path, what):
    made = make_context(tmp_path)
    staging = Path(made.store.stage(made.manifest.context_id, made.token_ids))
    for segment in made.store.folder(made.manifest).glob("*.seg"):
        shutil.copy(segment, staging)
    made.store.remove(made.manifest.context_id)
    if what == "short segment":
        os.truncate(staging / "rank-1.seg", 4096)
    elif what == "no segment":
        (staging / "rank-1.seg").unlink()
    elif what == "other tokens":
        np.save(staging / "tokens.npy", made.token_ids[::-1])
    else:
        (staging / "tokens.npy").unlink()
    with pytest.raises(StoreError):
        made.store.publish(str(staging), made.manifest)
    assert made.store.ids() == []
    assert not staging.exists()


def test_a_body_that_fails_leaves_no_staging_folder(tmp_path):
    store = Store(tmp_path)

    def fail() -> None:
        with store.staged(NAME, IDS) as staging:
            (Path(staging) / "rank-0.seg").write_bytes(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list((tmp_path / "staging").iterdir()) == []
    with pytest.raises(ValueError, match="no staging folder"):
        store.abort(str(tmp_path / "contexts"))


def test_a_context_id_cannot_leave_the_store(tmp_path):
    with pytest.raises(BadInput, match="16 hex characters"):
        Store(tmp_path).stage("../../../etc/abc", IDS)


def test_staging_of_a_dead_process_is_removed_and_of_a_living_one_kept(tmp_path):
    mine = Store(tmp_path).stage(NAME, IDS)
    script = (
        "import sys, numpy, pathlib; from ringspan.kvstore import staging; "
        "print(staging.new_folder(pathlib.Path(sys.argv[1]), sys.argv[2]))"
    )
    dead = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "staging"), NAME],
        env={**os.environ, "PYTHONPATH": str(Path(folder_module.__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout.strip()
    assert Path(dead).exists()
    Store(tmp_path)
    assert Path(mine).exists()
    assert not Path(dead).exists()


def test_staging_of_another_host_goes_by_its_age(tmp_path):
    staging = Path(Store(tmp_path).stage(NAME, IDS))
    (staging / "owner.json").write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    Store(tmp_path)
    assert staging.exists()
    old = time.time() - 2 * 24 * 3600
    for path in (*staging.iterdir(), staging):
        os.utime(path, (old, old))
    Store(tmp_path)
    assert not staging.exists()


def test_a_removed_context_is_gone_even_where_its_files_are_not(tmp_path, monkeypatch):
    made = make_context(tmp_path)
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # as if killed there
    made.store.remove(made.manifest.context_id[:6])
    assert made.store.ids() == []
    assert len(list((tmp_path / "trash").iterdir())) == 1
    monkeypatch.undo()
    Store(tmp_path)
    assert list((tmp_path / "trash").iterdir()) == []
    with pytest.raises(UnknownName):
        made.store.remove(made.manifest.context_id)


def test_no_room_is_refused_in_advance_with_numbers(tmp_path):
    with pytest.raises(StoreError, match=r"needs 1000000\.00 GB in .* which has .* GB free"):
        Store(tmp_path).check_room(10**15)
    Store(tmp_path).check_room(1000)
    assert list((tmp_path / "staging").iterdir()) == []


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError, match="cannot write to the store folder"):
            Store(root).check_room(1)
        with pytest.raises(StoreError, match="cannot stage in"):
            Store(root).stage(NAME, IDS)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_rights_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="Permission denied: use a folder"):
        Store(tmp_path).check_room(1)


def test_a_read_only_file_system_is_refused():
    if not Path("/proc/sys").is_dir():
        pytest.skip("no /proc")
    with pytest.raises(StoreError, match="cannot write to the store folder /proc"):
        Store("/proc/ringspan").check_room(1)


# the manifest


def test_any_changed_byte_of_a_manifest_is_refused(tmp_path):
    made = make_context(tmp_path)
    data = encode_manifest(made.manifest)
    assert decode_manifest(data, "m") == made.manifest
    random = np.random.default_rng(0)
    for at in random.integers(0, len(data), 200):
        changed = bytearray(data)
        changed[at] ^= 1 << int(random.integers(0, 8))
        with pytest.raises(StoreError, match=r"^m: "):
            decode_manifest(bytes(changed), "m")
    with pytest.raises(StoreError, match="cannot be read"):
        decode_manifest(data[:-10], "m")


def test_manifests_that_cannot_be_are_refused(tmp_path):
    manifest = make_context(tmp_path).manifest
    pages = manifest.pages

    def page(index, **fields):
        changed = (*pages[:index], replaced(pages[index], **fields), *pages[index + 1 :])
        return replaced(manifest, pages=changed)

    wrong = {
        "plain": page(1, segment="../other/rank-0.seg"),
        "segment name": page(1, segment="/etc/passwd"),
        r"page \[32, 48\) where \[16, 32\)": replaced(manifest, pages=(pages[0], *pages[2:])),
        "hold 64 of 75": replaced(manifest, pages=pages[:-1]),
        "hold 0 of 75": replaced(manifest, pages=()),
        r"page \[17, 32\)": page(1, span=Span(17, 32)),
        "its form makes": page(1, payload_bytes=1),
        "no frame can have": page(1, offset=5),
        "frame of 4096": page(1, frame_bytes=4096),
        "last page's key": page(4, key="00" * 32),
        "not its pages' sum": replaced(manifest, payload_bytes=3),
        "0 tokens in pages of 16": replaced(manifest, num_tokens=0),
        "unknown dtype 'int4'": replaced(
            manifest,
            form=replaced(manifest.form, tensors=(TensorForm("k", (2, 32), "int4"),)),
        ),
        "format 9": replaced(manifest, format=9),
        "16 hex": replaced(manifest, context_id="../../x"),
    }
    check_manifest(manifest)
    for said, bad in wrong.items():
        with pytest.raises(StoreError, match=said):
            check_manifest(bad)


def test_a_manifest_in_the_wrong_folder_is_refused(tmp_path):
    a = make_context(tmp_path, seed=1)
    b = make_context(tmp_path, seed=2)
    shutil.copy(a.store.folder(a.manifest) / "manifest.json", b.store.folder(b.manifest))
    with pytest.raises(StoreError, match=f"its manifest is that of {a.manifest.context_id}"):
        b.store.manifest(b.manifest.context_id)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_pages_are_dealt_in_contiguous_balanced_blocks(tmp_path, world_size):
    manifest = make_context(tmp_path).manifest
    dealt = assign_pages(manifest, world_size)
    assert [page for block in dealt for page in block] == list(manifest.pages)
    sizes = [len(block) for block in dealt]
    assert len(dealt) == world_size
    assert max(sizes) - min(sizes) <= 1
