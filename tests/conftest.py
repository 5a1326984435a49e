"""What several tests share."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# In CI the same examples every time: what fuzzing finds is for a developer's run, not for an unlucky landing.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"): settings.load_profile("ci")

# Two test processes share two cores: one thread each, before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and golden figures, which only some machines have."""
    if not SHARED.is_dir(): pytest.skip("no ../shared folder here: golden figures and real data are not at hand")
    return SHARED
