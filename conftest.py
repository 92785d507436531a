"""Tests run notebooks with the preset smoke, and write results to a temporary folder, never into results/."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from obclip_core.notebooks import UNUSED

ROOT = Path(__file__).parent


def pytest_configure(config):
    folder = tempfile.mkdtemp(prefix="obclip-results-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ.update(OBCLIP_PRESET="smoke", OBCLIP_RESULTS=folder, OBCLIP_OUT="", OBCLIP_TERMINAL="")
    os.environ["PYTHONWARNINGS"] = UNUSED
    # so that kernels find obclip_core where the project is not installed
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
