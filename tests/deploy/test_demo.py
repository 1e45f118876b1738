from pathlib import Path

import pytest

from ringspan.deploy.jobs import demo
from ringspan.errors import RingspanError


def test_the_planted_sentence_stands_between_two_paragraphs() -> None:
    text = "one\n\ntwo two\n\nthree"
    assert demo.plant(text, "HERE", 6) == "one\n\ntwo two\n\nHERE\n\nthree"
    assert demo.plant("one", "HERE", 0) == "one\n\nHERE\n"


def test_the_document_is_long_enough_and_holds_the_sentence_once() -> None:
    text = demo.reference()
    assert text.count(demo.PLANTED) == 1
    # 4 characters a token and more: what is cut off must not be what was planted
    assert text.index(demo.PLANTED) < 3.5 * demo.DOCUMENT_TOKENS
    assert len(text) > 5 * demo.DOCUMENT_TOKENS


def test_a_step_that_fails_or_hangs_ends_the_demo(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    demo.follow(["sh", "-c", "echo $PYTHONUNBUFFERED"], {"PATH": "/usr/bin:/bin"}, 30.0, "it")
    assert capfd.readouterr().out == "1\n"
    with pytest.raises(RingspanError, match=r"it failed \(status 3\)"):
        demo.follow(["sh", "-c", "exit 3"], {"PATH": "/usr/bin:/bin"}, 30.0, "it")
    with pytest.raises(RingspanError, match="it took longer than 0 s"):
        demo.follow(["sleep", "60"], {"PATH": "/usr/bin:/bin"}, 0.2, "it")
