import pytest

from tests.cli.commands import save_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny model that reads 2048 tokens."""
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_long(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same for 8192 tokens."""
    return save_tiny(tmp_path_factory.mktemp("tiny-long"), tokens=8192)
