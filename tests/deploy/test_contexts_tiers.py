"""`ringspan contexts move|pin|rm|list|show|verify` over tiers, as a person types them."""

from __future__ import annotations

import json

import pytest

from ringspan.deploy import cli
from ringspan.kvstore.testing import make_context


@pytest.fixture
def made(tmp_path):
    return make_context(tmp_path / "store")


def run(made, *command):
    return cli.run(["contexts", *command, "--store", str(made.store.root)])


def test_a_context_is_moved_shown_verified_and_moved_back(made, tmp_path, capsys):
    name, remote = made.manifest.context_id, f"remote:file://{tmp_path}/remote"
    assert run(made, "move", name[:6], "--to", remote) == 0
    assert capsys.readouterr().out == f"context {name}: {remote}\n"
    assert run(made, "list") == 0
    assert remote in capsys.readouterr().out
    assert run(made, "verify", name) == 0
    assert run(made, "move", name, "--to", "disk", "--keep") == 0
    capsys.readouterr()
    assert run(made, "show", name, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["tiers"], shown["pinned"]) == ([remote, "disk"], False)
    (pack,) = (tmp_path / "remote/packs").glob("*.pack")
    data = bytearray(pack.read_bytes())
    data[-100] ^= 1
    pack.write_bytes(data)
    assert run(made, "verify", name) == 1
    assert "file://" in capsys.readouterr().out


def test_a_pinned_context_stays_and_so_do_those_named_with_it(made, capsys):
    other = make_context(made.store.root, seed=1).manifest.context_id
    name = made.manifest.context_id
    assert run(made, "pin", name) == 0
    assert run(made, "rm", other, name) == 2
    assert sorted(made.store.ids()) == sorted([name, other])
    assert run(made, "pin", name, "--off") == 0
    assert run(made, "rm", other, name) == 0
    assert made.store.ids() == []


@pytest.mark.parametrize("to", ["tape", "remote:", "remote:nowhere://x"])
def test_a_tier_that_does_not_exist_changes_nothing(made, to):
    assert run(made, "move", made.manifest.context_id, "--to", to) == 2
    assert made.store.verify(made.manifest.context_id).ok
