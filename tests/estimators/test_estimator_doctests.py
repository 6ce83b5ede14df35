import doctest
import importlib

import pytest

from entropy_monitor import estimators

FUNCTIONS = [name for name in estimators.__all__ if name[0].islower()]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_has_an_example_that_holds(name):
    function = getattr(estimators, name)
    module = importlib.import_module(function.__module__)
    (example,) = doctest.DocTestFinder(recurse=False).find(function, name, module=module)
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0
