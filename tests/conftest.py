"""What several tests share."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and golden figures, which only some machines have."""
    if not SHARED.is_dir(): pytest.skip("no ../shared folder here: golden figures and real data are not at hand")
    return SHARED
