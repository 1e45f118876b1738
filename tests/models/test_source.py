"""Names of models."""

from __future__ import annotations

from pathlib import Path

import pytest

from ringspan.attention.models.source import (
    Folder,
    Gguf,
    Hub,
    Random,
    Retriever,
    parse_name,
)
from ringspan.errors import BadInput, UnknownName


def test_each_kind_of_name_means_its_source(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF")
    assert parse_name(str(tmp_path)) == Folder(str(tmp_path))
    assert parse_name(str(gguf)) == Gguf(str(gguf))
    assert parse_name("org/some-model.v1") == Hub("org/some-model.v1")
    assert parse_name("random:tiny-gemma3") == Random("tiny-gemma3")
    assert parse_name("retriever") == Retriever(1, 1, 1.0)
    assert parse_name("retriever:q=32,kv=8,margin=0.25") == Retriever(32, 8, 0.25)


@pytest.mark.parametrize("name", ["smollm3", "random:tinyy", "random:", ""])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(UnknownName, match=r"known: .*tiny"):
        parse_name(name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("/no/such/folder", "no such folder"),
        ("./a/b/c", "no such folder"),
        ("/no/such/file.gguf", "no such file"),
        ("retriever:q=32,kv=5", "multiple"),
        ("retriever:q=x", "not a number"),
        ("retriever:heads=3", "the form is"),
        ("retriever:q=4,q=4", "the form is"),
        ("retriever:margin=0", "margin"),
        ("retriever:margin=nan", "margin"),
        ("retriever:q=128,kv=128", "64"),
        ("retriever:q=0", "q=0"),
    ],
)
def test_a_name_that_cannot_be_used_says_why_in_one_line(name: str, said: str) -> None:
    with pytest.raises(BadInput, match=said) as caught:
        parse_name(name)
    assert "\n" not in str(caught.value)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"config\.json"):
        parse_name(str(tmp_path))
