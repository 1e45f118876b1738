import io
import os
from pathlib import Path

import numpy as np
import pytest

from ringspan.deploy.inputs import check_vocabulary, gather, joined, matches
from ringspan.errors import BadInput


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two texts in two folders, and everything a walk must step over."""
    root = tmp_path / "book"
    (root / "part").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / "b.py").write_text("b = 1\n")
    (root / "part" / "a.md").write_text("# naïve\n")
    (root / ".git" / "config").write_text("secret\n")
    (root / ".env").write_text("secret\n")
    (root / "x.bin").write_bytes(b"\x7fELF\0\0")
    (root / "latin.txt").write_bytes("caf\xe9 ".encode("latin-1") * 3)
    (root / "empty.py").write_text("\n")
    return root


def test_a_folder_is_read_in_order_and_what_is_not_text_is_counted(tree: Path) -> None:
    found = gather([str(tree)])
    assert [document.path for document in found.documents] == ["book/b.py", "book/part/a.md"]
    assert (found.skipped_hidden, found.skipped_binary, found.skipped_empty) == (2, 2, 1)
    assert found.describe() == "2 files, 15 bytes (skipped: 2 hidden, 2 binary, 1 empty)"


def test_a_pattern_chooses_by_name_or_by_path(tree: Path) -> None:
    assert [Path(d.path).name for d in gather([str(tree)], ["*.md"]).documents] == ["a.md"]
    assert matches(Path("part/a.md"), ["part/*"])
    assert not matches(Path("part/a.md"), ["*.py", "b*"])


def test_several_files_are_joined_under_their_names_and_one_is_left_alone(tree: Path) -> None:
    both = joined(gather([str(tree / "b.py"), str(tree / "part" / "a.md")]).documents)
    assert both[0] == f"=== {tree / 'b.py'} ===\nb = 1\n\n"
    assert joined(gather([str(tree / "b.py")]).documents) == ("b = 1\n",)


def test_stdin_is_read_and_a_byte_order_mark_is_dropped() -> None:
    found = gather(["-"], stdin=io.BytesIO(b"\xef\xbb\xbfhello"))
    assert found.documents[0].text == "hello"


def test_token_ids_come_as_int32(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(5, dtype=np.uint16))
    ids = gather([str(tmp_path / "ids.npy")]).token_ids
    assert ids is not None
    assert ids.dtype == np.int32
    assert ids.tolist() == [0, 1, 2, 3, 4]


def test_an_id_outside_the_vocabulary_is_named_with_its_place() -> None:
    with pytest.raises(BadInput, match=r"token id 9 at index 2 .* vocabulary of 9"):
        check_vocabulary(np.array([0, 8, 9, 11], dtype=np.int32), 9, "ids.npy")
    check_vocabulary(np.array([0, 8], dtype=np.int32), 9, "ids.npy")


def write_bad(folder: Path, kind: str) -> str:
    """Makes one thing that must be refused; its path."""
    path = folder / kind
    match kind:
        case "empty.txt":
            path.write_bytes(b"")
        case "blank.txt":
            path.write_text(" \n\n")
        case "nul.txt":
            path.write_bytes(b"abc\0def")
        case "latin.txt":
            path.write_bytes(b"caf\xe9!")
        case "bom.txt":
            path.write_bytes(b"\xef\xbb\xbfcaf\xe9!")
        case "hollow":
            path.mkdir()
        case "matrix.npy":
            np.save(path, np.zeros((2, 3), dtype=np.int64))
        case "floats.npy":
            np.save(path, np.zeros(3))
        case "none.npy":
            np.save(path, np.zeros(0, dtype=np.int64))
        case "negative.npy":
            np.save(path, np.array([3, -1]))
        case "junk.npy":
            path.write_bytes(b"not an array")
        case "pickle.npy":
            np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    return str(path)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing.txt", "no such file or folder: .*missing.txt"),
        ("missing.npy", "no such file or folder: .*missing.npy"),
        ("empty.txt", "empty.txt is empty"),
        ("blank.txt", "only white space"),
        ("nul.txt", "nul.txt is binary: a NUL byte at byte 3 of 7"),
        ("latin.txt", "latin.txt is not UTF-8: byte 0xe9 at byte 3 of 5"),
        ("bom.txt", "bom.txt is not UTF-8: byte 0xe9 at byte 6 of 8"),
        ("hollow", r"no file with text in folder .*hollow \(found: nothing\)"),
        ("matrix.npy", "1-D array of integers, found 2-D int64"),
        ("floats.npy", "1-D array of integers, found 1-D float64"),
        ("none.npy", "none.npy is empty"),
        ("negative.npy", "token ids must be 0 to 2147483647, found -1 to 3"),
        ("junk.npy", "junk.npy is not a .npy array"),
        ("pickle.npy", "pickle.npy is not a .npy array"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path: Path, kind: str, says: str) -> None:
    with pytest.raises(BadInput, match=says) as refused:
        gather([write_bad(tmp_path, kind)])
    assert "\n" not in str(refused.value)


def test_a_pattern_that_takes_nothing_says_what_there_was(tree: Path) -> None:
    with pytest.raises(BadInput, match=r"no file matching \*\.rst .*2 hidden, 5 not matching"):
        gather([str(tree)], ["*.rst"])


def test_ids_are_not_joined_with_text(tree: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(5))
    with pytest.raises(BadInput, match="cannot be joined"):
        gather([str(tree), str(tmp_path / "ids.npy")])


def test_nothing_named_is_refused() -> None:
    with pytest.raises(BadInput, match="no input given"):
        gather([])


def test_a_file_without_rights_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "locked.txt"
    path.write_text("text")
    path.chmod(0)
    root = os.geteuid() == 0
    if root:  # root may read everything: be nobody for a moment
        os.seteuid(65534)
    try:
        with pytest.raises(BadInput, match=r"cannot read .*: Permission denied"):
            gather([str(path)])
    finally:
        if root:
            os.seteuid(0)
