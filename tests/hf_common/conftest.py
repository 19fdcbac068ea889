"""What the library's tests need of pytest: the named exceptions, and leave to provoke warnings."""

from collections.abc import Iterator

import pytest

from tests.hf_common.exceptions import EXCEPTIONS
from tests.hf_common.library import HAS_TESTS, HOW_TO


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        owner = getattr(item, "cls", None)
        name = f"{owner.__name__ if owner else ''}::{item.name}"
        if name in EXCEPTIONS:
            error, reason = EXCEPTIONS[name]
            item.add_marker(pytest.mark.xfail(raises=error, strict=True, reason=reason))


@pytest.fixture(autouse=True)
def _library_tests_are_here() -> None:
    if not HAS_TESTS:
        pytest.fail(HOW_TO, pytrace=False)


@pytest.fixture(autouse=True)
def _library_deprecations_fail() -> Iterator[None]:
    """Not here: what the library's tests deprecate is no business of ours."""
    yield
