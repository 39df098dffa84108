"""The short form of support/fuzz.py: damaged files end in a line that names them, or in what a plain reader gets."""

import pytest

from support.fuzz import TARGETS, fuzz


@pytest.mark.slow
def test_damaged_files_are_named_or_read_as_a_plain_reader_reads_them():
    found, odd = fuzz(TARGETS, 12 * len(TARGETS))
    assert not odd
    assert all(sum(ends.values()) == 12 for ends in found.values())
    assert all(found[target]["named"] for target in TARGETS)
