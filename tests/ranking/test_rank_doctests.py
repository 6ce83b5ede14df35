import doctest

import pytest

from entropy_monitor.ranking import labels, reason


@pytest.mark.parametrize("module", [labels, reason], ids=lambda module: module.__name__)
def test_examples_hold(module):
    found = doctest.testmod(module)
    assert found.attempted
    assert not found.failed
