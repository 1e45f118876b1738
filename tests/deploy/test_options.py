import pytest

from ringspan.deploy.commands.options import default_ranks, fill_needles, spread_inputs
from ringspan.deploy.machine import usable_cores


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--input a", "--input a"),
        ("--input a b --ranks 2", "--input a --input b --ranks 2"),
        ("-i a b c", "-i a --input b --input c"),
        ("--input - a --input b", "--input - --input a --input b"),
        ("ask CONTEXT question", "ask CONTEXT question"),
    ],
)
def test_an_input_takes_all_paths_up_to_the_next_option(typed: str, meant: str) -> None:
    assert spread_inputs(typed.split()) == meant.split()


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("doctor --needles", "doctor --needles 8192"),
        ("doctor --needles --ranks 2", "doctor --needles 8192 --ranks 2"),
        ("doctor --needles 32 --ranks 2", "doctor --needles 32 --ranks 2"),
        ("doctor --needles -5", "doctor --needles -5"),
    ],
)
def test_needles_may_stand_without_a_number(typed: str, meant: str) -> None:
    assert fill_needles(typed.split()) == meant.split()


def test_on_a_cpu_there_are_two_ranks_if_there_are_two_cores() -> None:
    assert default_ranks("cpu") == min(2, usable_cores())
