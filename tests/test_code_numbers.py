"""The code keeps to its sizes; `python tests/code_numbers.py` prints them."""

import code_numbers

# Published signatures, an autograd function's, and options that a caller gives by name one by one.
MANY_PARAMETERS = {
    "sample_loop",
    "training_losses",
    "vb_terms_bpd",
    "forward",
    "sample_video",
    "save_run",
    "search_step",
    "make_dataset",
}


def test_a_reader_sees_few_rooms_at_the_top():
    assert len(code_numbers.entries()) <= code_numbers.MAX_ENTRIES


def test_modules_are_short():
    assert code_numbers.long_modules() == []


def test_functions_are_short_and_take_few_parameters():
    found = code_numbers.large_functions()
    assert [line for line in found if line.split()[1].rstrip(":") not in MANY_PARAMETERS] == []
    assert all(int(line.split(": ")[1].split()[0]) <= 40 for line in found), found
