import io

import pytest

from ringspan.deploy.progress import LineMeter, bytes_words, clock_words, meter


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_log_gets_a_line_every_few_seconds_and_the_last_one() -> None:
    clock, log = Clock(), io.StringIO()
    lines = LineMeter(log, "prefill", 1000, "tokens", clock=clock, every_s=5.0)
    for done in range(100, 1001, 100):
        clock.now_s += 1.0
        lines.update(done, f"KV {done} B")
    assert log.getvalue().splitlines() == [
        "prefill: 100 of 1,000 tokens, 100 tokens/s, 0:09 left, KV 100 B",
        "prefill: 600 of 1,000 tokens, 100 tokens/s, 0:04 left, KV 600 B",
        "prefill: 1,000 of 1,000 tokens, 100 tokens/s, in 0:10, KV 1000 B",
    ]


def test_time_left_follows_the_work_not_the_tokens() -> None:
    clock, log = Clock(), io.StringIO()
    lines = LineMeter(log, "p", 1000, "tokens", work=lambda n: float(n * n), clock=clock)
    clock.now_s = 10.0
    lines.update(500)  # a quarter of the work
    assert "0:30 left" in log.getvalue()


def test_nothing_done_yet_promises_nothing() -> None:
    log = io.StringIO()
    LineMeter(log, "p", 1000, "tokens", clock=Clock()).update(0)
    assert log.getvalue() == "p: 0 of 1,000 tokens\n"


def test_a_terminal_gets_a_bar() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    with meter("prefill", 10, "tokens", stream=screen) as bar:
        bar.update(10, "KV 1 MB")
    assert "prefill" in screen.getvalue()
    assert "10 of 10 tokens" in screen.getvalue()


def test_a_pipe_gets_lines() -> None:
    log = io.StringIO()
    with meter("read", 2, "files", stream=log) as lines:
        lines.update(2)
    assert log.getvalue().startswith("read: 2 of 2 files")


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (377_487_360, "377 MB"), (1.37e11, "137 GB")],
)
def test_bytes_are_told_in_decimal_units(count: float, words: str) -> None:
    assert bytes_words(count) == words


def test_seconds_are_told_as_a_clock() -> None:
    assert [clock_words(s) for s in (0.4, 75, 3675)] == ["0:00", "1:15", "1:01:15"]
