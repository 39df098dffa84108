"""The short form of support/fuzz_runs.py: damaged run folders and odd settings are named in a line, or make no difference."""

import pytest

from support.fuzz import fuzz
from support.fuzz_runs import TARGETS


@pytest.mark.slow
def test_damaged_run_folders_and_settings_are_named_or_make_no_difference():
    found, odd = fuzz(TARGETS, 3 * len(TARGETS))
    assert not odd
    assert all(sum(ends.values()) == 3 for ends in found.values())
