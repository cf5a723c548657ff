"""One service for the tests that leave it as they found it, and one of its own for each that ends it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.services import OwnService, own_service


@pytest.fixture(scope="package")
def shared() -> Iterator[OwnService]:
    with own_service() as service:
        yield service


@pytest.fixture
def own() -> Iterator[OwnService]:
    with own_service() as service:
        yield service
