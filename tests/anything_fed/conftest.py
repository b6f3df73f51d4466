"""One model and processor for all cases of a file, and a good call on them after every case."""

import pytest

from fed import open_bench


@pytest.fixture(scope="module")
def bench():
    with open_bench() as bench:
        yield bench


@pytest.fixture(autouse=True)
def good_call_afterwards(bench):
    yield
    bench.check_unchanged()
