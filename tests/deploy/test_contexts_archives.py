"""`ringspan contexts export|import|recode`, as a person types them."""

from __future__ import annotations

import pytest

from ringspan.deploy import cli
from ringspan.kvstore.folder import Store
from ringspan.kvstore.testing import make_context


@pytest.fixture
def made(tmp_path):
    return make_context(tmp_path / "store", 300, 2, page_tokens=128)


def run(store, *command):
    return cli.run(["contexts", *map(str, command), "--store", str(store.root)])


def test_a_context_goes_through_a_file_to_another_store(made, tmp_path, capsys):
    name, file, back = made.manifest.context_id, tmp_path / "c.rsctx", Store(tmp_path / "back")
    assert run(made.store, "export", name[:6], file, "--cold") == 0
    assert capsys.readouterr().out.startswith(f"{file}: 3 pages, ")
    assert run(back, "import", file) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"context {name}: 300 tokens, codec raw, ")
    assert "verified" in out
    assert back.manifest(name).keys == made.manifest.keys
    assert run(back, "verify", name) == 0
    assert run(back, "import", file) == 2
    assert f"has context {name} already" in capsys.readouterr().err
    assert run(back, "import", file, "--force", "--codec", "int4") == 0
    assert back.manifest(name).codec == "int4"
    assert run(back, "export", name, file) == 2
    assert "--force" in capsys.readouterr().err
    assert run(back, "export", name, file, "--force", "--codec", "raw") == 2
    assert "it would claim to be exact, which it is not" in capsys.readouterr().err


def test_a_file_that_is_damaged_is_one_line_and_status_1(made, tmp_path, capsys):
    file, back = tmp_path / "c.rsctx", Store(tmp_path / "back")
    assert run(made.store, "export", made.manifest.context_id, file) == 0
    data = bytearray(file.read_bytes())
    data[-5000] ^= 1
    file.write_bytes(data)
    capsys.readouterr()
    assert run(back, "import", file) == 1
    err = capsys.readouterr().err
    assert "the record's checksum differs: the file is damaged" in err
    assert "Traceback" not in err
    assert back.ids() == []


def test_a_second_form_is_made_and_removed_with_its_context(made, capsys):
    name = made.manifest.context_id
    assert run(made.store, "recode", name, "--codec", "int8") == 0
    out = capsys.readouterr().out
    assert f"context {name}: codec int8 (8-bit), " in out
    assert str(made.store.root / "forms" / "int8") in out
    assert run(Store(made.store.root / "forms" / "int8"), "verify", name) == 0
    assert made.store.manifest(name).codec == "raw"
    assert run(made.store, "recode", name, "--codec", "raw") == 2
    assert "in codec raw already" in capsys.readouterr().err
    assert run(made.store, "rm", name) == 0
    assert capsys.readouterr().out == f"removed {name} and its form in int8\n"
    assert Store(made.store.root / "forms" / "int8").ids() == []


@pytest.mark.parametrize("device", ["tpu", "cuda:7"])
def test_a_device_that_is_not_there_is_refused_by_name(made, device, capsys):
    name = made.manifest.context_id
    assert run(made.store, "recode", name, "--codec", "int8", "--device", device) == 2
    assert f"--device {device}: wanted cpu" in capsys.readouterr().err
