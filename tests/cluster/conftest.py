"""The fixture `cluster`, of 2 nodes; `@pytest.mark.parametrize("cluster", [3], indirect=True)` asks for 3."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.cluster import Cluster, missing


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    with Cluster(getattr(request, "param", 2)) as started:
        yield started
