"""The servers that tests have in common."""

import pytest
import server as servers


@pytest.fixture(scope="session")
def minisgl():
    """The real server with the real small model."""
    with servers.minisgl() as server:
        yield server


@pytest.fixture(scope="session")
def fake():
    """The real server on an engine that always says the same, where only the wire matters."""
    with servers.fake() as server:
        yield server
