"""Fixtures that all tests share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import tiny  # noqa: E402

from obclip_core.experiments import cache_ablations  # noqa: E402


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
    """A random world in Stable Diffusion's layout: 4 x 8 x 8 latents, pictures of 32 x 32."""
    return tiny.world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def judged_world(tmp_path_factory):
    """The folder of a tiny world of 12 steps with a distilled cloud and a scorer beside it."""
    return tiny.save_judged(tmp_path_factory.mktemp("judged"))


@pytest.fixture(scope="module")
def world(judged_world):
    """That world, as the experiments load it."""
    return cache_ablations.loaded(judged_world)


@pytest.fixture(scope="module")
def shape(world):
    """The shape of its cloud."""
    return cache_ablations.shape_of(world)


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def unet():
    """The smallest U-Net, on its own."""
    torch.manual_seed(0)
    return tiny.unet(**tiny.SMALL).eval()


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory):
    """A random world in SDXL's layout: two text models, pooled embeddings and picture sizes."""
    return tiny.world(tmp_path_factory.mktemp("world-sdxl"), sdxl=True)
