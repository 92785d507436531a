"""Fixtures that all tests share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import tiny  # noqa: E402


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
    """A random world in Stable Diffusion's layout: 4 x 8 x 8 latents, pictures of 32 x 32."""
    return tiny.world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory):
    """A random world in SDXL's layout: two text models, pooled embeddings and picture sizes."""
    return tiny.world(tmp_path_factory.mktemp("world-sdxl"), sdxl=True)
