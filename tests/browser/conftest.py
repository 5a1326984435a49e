"""One JupyterLab for all browser tests."""

import os
from collections.abc import Iterator

import pytest
from lab import Lab
from lab import missing


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    if lacks := missing():
        if os.environ.get("CI"): pytest.fail(lacks)
        pytest.skip(lacks)
    with Lab(tmp_path_factory.mktemp("lab")) as lab: yield lab
