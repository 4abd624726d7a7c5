import pytest


@pytest.fixture(scope="module", autouse=True)
def data_directory(tmp_path_factory):
    """A data directory of the tests' own: the user's is neither read nor written."""
    with pytest.MonkeyPatch.context() as patch:
        directory = tmp_path_factory.mktemp("datasets")
        patch.setenv("RLIB_DATA_DIR", str(directory))
        yield directory


@pytest.fixture
def fresh_directory(tmp_path, monkeypatch):
    """An empty data directory for one test, in which nothing is in memory either."""
    monkeypatch.setenv("RLIB_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"
