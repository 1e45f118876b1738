"""Tenants and encryption, as a person types them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ringspan.deploy import cli
from ringspan.kvstore.folder import Store
from ringspan.kvstore.keys import namespace_for
from ringspan.kvstore.testing import make_context

SECRET = "s" * 40
PREFILL = ("prefill", "--model", "random:tiny", "--local", "--ranks", "2", "--device", "cpu")


@pytest.fixture(autouse=True)
def secret(monkeypatch, tmp_path):
    monkeypatch.delenv("RINGSPAN_SECRET", raising=False)
    path = tmp_path / "secret"
    path.write_text(SECRET + "\n")
    path.chmod(0o600)
    monkeypatch.setenv("RINGSPAN_SECRET_FILE", str(path))
    return path


@pytest.fixture
def text(tmp_path):
    """Two pages and a short one, as token ids."""
    path = tmp_path / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(0, 90, 300, dtype=np.int32))
    return path


def space(tenant, encrypted=False, secret=SECRET):
    return namespace_for(secret.encode(), tenant, encrypted)


@pytest.fixture
def made(tmp_path):
    return make_context(tmp_path / "store", 300, 2, page_tokens=128, namespace=space("a", True))


def run(*command):
    return cli.run(list(map(str, command)))


def contexts(store, *command):
    return run("contexts", *command, "--store", store)


def test_the_same_text_of_two_tenants_and_of_none_shares_nothing(tmp_path, text, capsys):
    store = tmp_path / "store"
    made: dict[str, str] = {}
    whose = {
        "public": (),
        "a": ("--tenant", "a"),
        "b": ("--tenant", "b"),
        "a encrypted": ("--tenant", "a", "--encrypt"),
    }
    for name, options in whose.items():
        record = tmp_path / "record.json"
        asked = (*PREFILL, "--input", text, "--store", store, *options)
        assert run(*asked, "--json", record) == 0
        out, err = capsys.readouterr()
        made[name] = out.strip()
        assert "took over" not in err, "a page of another tenant was used"
        assert "has context" not in err
        said = record.read_bytes() + out.encode() + err.encode()
        for namespace in (space("a"), space("b"), space("a", True)):
            assert namespace.hex().encode() not in said
        assert SECRET.encode() not in said
    assert len(set(made.values())) == 4
    stored = b"".join(p.read_bytes() for p in store.rglob("*") if p.is_file())
    for namespace in (space("a"), space("b"), space("a", True)):
        assert namespace.hex().encode() not in stored, "a manifest tells a tenant's namespace"
        assert namespace not in stored
    keys = [set(m.keys) for m in Store(store).contexts()[0]]
    assert len(set.union(*keys)) == sum(map(len, keys))
    shown = {}
    for name in ("a", "b", "c", None):
        options = ("--tenant", name) if name else ()
        assert contexts(store, "list", "--json", *options) == 0
        out = capsys.readouterr().out
        shown[name] = {row["context_id"] for row in json.loads(out)["contexts"]}
    assert shown["a"] == {made["a"], made["a encrypted"]}
    assert (shown["b"], shown["c"], shown[None]) == ({made["b"]}, set(), {made["public"]})
    ask = ("ask", "--store", store, "--local", "--ranks", 1, "--device", "cpu", "--max-tokens", 3)
    answers = []
    for name, options in whose.items():
        options = tuple(option for option in options if option != "--encrypt")
        assert run(*ask, made[name], "5 17 9", *options) == 0
        answers.append(capsys.readouterr().out)
        assert contexts(store, "verify", made[name], *options) == 0
        assert "all whole, read" in capsys.readouterr().out
        assert contexts(store, "verify", made[name]) == 0
        wanted = "all whole, read" if name == "public" else "as stored (it is a tenant's)"
        assert wanted in capsys.readouterr().out
    assert len(set(answers)) == 1
    for options in ((), ("--tenant", "b")):
        assert run(*ask, made["a"], "5 17 9", *options) == 2
        err = capsys.readouterr().err
        assert f"unknown context '{made['a']}'" in err
        assert "Traceback" not in err
        known = err.split("known:")[1]
        assert made["a"] not in known
        assert made["a encrypted"] not in known


COMMANDS = ("show", "export", "recode", "rekey", "repair", "rm", "move", "pin")


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_another_tenants_is_not_there(made, tmp_path, capsys, command):
    more = {
        "export": (tmp_path / "f.rsctx",),
        "recode": ("--codec", "int8"),
        "move": ("--to", "disk"),
    }
    name = made.manifest.context_id
    for options in ((), ("--tenant", "b")):
        assert contexts(made.store.root, command, name, *more.get(command, ()), *options) == 2
        assert capsys.readouterr().err.endswith(f"unknown context '{name}'; known: none\n")
    assert made.store.ids() == [name]
    assert made.store.verify(name).ok


def test_a_wrong_or_missing_secret_is_one_line(made, tmp_path, capsys, monkeypatch, secret):
    name = made.manifest.context_id
    secret.write_text("t" * 40)
    assert contexts(made.store.root, "show", name, "--tenant", "a") == 2
    assert f"unknown context '{name}'; known: none" in capsys.readouterr().err
    gone = tmp_path / "gone"
    assert contexts(made.store.root, "show", name, "--tenant", "a", "--secret-file", gone) == 2
    err = capsys.readouterr().err
    assert f"RINGSPAN_SECRET is not set and {gone} is not there" in err
    assert not gone.exists(), "reading made a secret"
    monkeypatch.setenv("RINGSPAN_SECRET", "short")
    assert contexts(made.store.root, "show", name, "--tenant", "a") == 2
    assert "RINGSPAN_SECRET has 5 characters" in capsys.readouterr().err
    monkeypatch.setenv("RINGSPAN_SECRET", SECRET)
    assert contexts(made.store.root, "show", name, "--tenant", "a") == 0
    out = capsys.readouterr().out
    assert "pages, tokens and title, at rest" in out
    assert made.manifest.title in out
    assert contexts(made.store.root, "show", name, "--tenant", "a", "--json") == 0
    out = capsys.readouterr().out
    assert json.loads(out)["encrypted"] is True
    assert space("a", True).hex() not in out


def test_encryption_wants_a_tenant_and_a_bad_name_makes_no_secret(tmp_path, text, capsys):
    gone = tmp_path / "new" / "secret"
    prefill = (*PREFILL, "--input", text, "--store", tmp_path / "s")
    assert run(*prefill, "--encrypt") == 2
    assert "--encrypt wants --tenant NAME" in capsys.readouterr().err
    assert run(*prefill, "--tenant", "../a", "--secret-file", gone) == 2
    assert "tenant '../a': wanted 1 to 128 letters" in capsys.readouterr().err
    assert not gone.exists()
    assert run(*prefill, "--tenant", "a", "--secret-file", gone) == 0
    assert gone.stat().st_mode & 0o777 == 0o600


def test_an_export_goes_to_the_same_tenant_alone(made, tmp_path, capsys):
    file, name = tmp_path / "c.rsctx", made.manifest.context_id
    a = ("--tenant", "a")
    assert contexts(made.store.root, "export", name, file, *a) == 0
    back = tmp_path / "back"
    for options in ((), ("--tenant", "b")):
        assert contexts(back, "import", file, *options) == 2
        assert "is a tenant's: name the tenant (--tenant NAME)" in capsys.readouterr().err
    assert contexts(back, "import", file, *a) == 0
    assert contexts(back, "verify", name, *a) == 0
    public = make_context(tmp_path / "public", 40, 1)
    assert contexts(public.store.root, "export", public.manifest.context_id, file, "--force") == 0
    capsys.readouterr()
    assert contexts(back, "import", file, *a) == 2
    assert "leave --tenant out" in capsys.readouterr().err


def test_a_context_is_rekeyed_to_a_new_secret_and_to_the_public(made, tmp_path, capsys):
    name, root = made.manifest.context_id, made.store.root
    new = tmp_path / "new secret"
    a, to_a = ("--tenant", "a"), ("--to-tenant", "a", "--encrypt")
    assert contexts(root, "rekey", name, *a, *to_a) == 2
    assert "is under that tenant, secret and encryption already" in capsys.readouterr().err
    assert contexts(root, "rekey", name, *a, *to_a, "--to-secret-file", new, "--replace") == 0
    out = capsys.readouterr().out
    assert f"removed {name}" in out
    (other,) = made.store.ids()
    assert contexts(root, "show", other, *a) == 2
    assert contexts(root, "show", other, *a, "--secret-file", new) == 0
    assert contexts(root, "verify", other, *a, "--secret-file", new) == 0
    assert contexts(root, "rekey", other, *a, "--secret-file", new) == 0
    public = (set(made.store.ids()) - {other}).pop()
    capsys.readouterr()
    assert contexts(root, "verify", public) == 0
    assert "all whole, read" in capsys.readouterr().out
    manifest = Store(root).manifest(public)
    assert (manifest.title, manifest.encrypted) == (made.manifest.title, False)
    assert (Store(root).tokens(manifest) == made.token_ids).all()
    assert contexts(root, "rekey", public, "--to-secret-file", new) == 2
    assert "wanted with --to-tenant NAME" in capsys.readouterr().err
