"""One model and processor of each family for all cases of a file, and a good call on them after every case."""

import contextlib

import pytest

from families import FAMILIES
from fed import open_bench


@pytest.fixture(scope="module")
def benches():
    with contextlib.ExitStack() as stack:
        yield {family: stack.enter_context(open_bench(family)) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def bench(benches, request):
    """Every test that asks for it runs for each family, unless it names one (`fed.ONLY`, `fed.cases_by_family`)."""
    return benches[request.param]


@pytest.fixture(autouse=True)
def good_call_afterwards(bench):
    yield
    bench.check_unchanged()
