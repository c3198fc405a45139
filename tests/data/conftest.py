"""Images for the tests of sources."""

from __future__ import annotations

import pytest
from image_files import ImageFiles


@pytest.fixture(scope="session")
def files() -> ImageFiles:
    """Small sets of images."""
    return ImageFiles()
