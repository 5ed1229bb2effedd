"""The code keeps to its sizes; `python tests/code_numbers.py` prints them."""

import pytest

import code_numbers

NOT_YET = pytest.mark.xfail(reason="the redesign is not merged yet", strict=False)


def test_a_reader_sees_few_rooms_at_the_top():
    assert len(code_numbers.entries()) <= code_numbers.MAX_ENTRIES


@NOT_YET
def test_modules_are_short():
    assert code_numbers.long_modules() == []


@NOT_YET
def test_functions_are_short_and_take_few_parameters():
    assert code_numbers.large_functions() == []
