"""Fixtures that several test files share."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from create_data_lists import make_sample
from model import SSD300

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def model():
    """An untrained SSD300 with VOC's 21 classes, in eval mode."""
    torch.manual_seed(0)
    return SSD300(21, pretrained=False).eval()


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """Folder of a tiny sample set: 6 training and 3 test images."""
    folder = tmp_path_factory.mktemp("sample")
    make_sample(folder, n_train=6, n_test=3, seed=1)
    return folder


@pytest.fixture
def run():
    """Run a script of the repository as a user would; check its exit status, return its output."""

    def run_script(script, *arguments, status=0, cwd=None, env=None):
        command = [sys.executable, str(ROOT / script), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, check=False, timeout=300)
        assert done.returncode == status, done.stdout + done.stderr
        if status:
            message = done.stderr.strip().splitlines()[-1]
            assert message.startswith("error: ") or ": error: " in message, done.stderr
            assert "Traceback" not in done.stderr
            return message
        return done.stdout + done.stderr

    return run_script


@pytest.fixture
def random_objects():
    """Make (boxes (n, 4), fractional xy, labels (n,)) from a numpy RandomState."""

    def make(rng, n, n_classes=21):
        low = rng.uniform(0, 0.6, (n, 2))
        high = low + 0.02 + rng.uniform(0, 1, (n, 2)) ** 2 * 0.38
        boxes = torch.tensor(np.concatenate([low, high], axis=1), dtype=torch.float32)
        return boxes, torch.tensor(rng.randint(1, n_classes, n), dtype=torch.long)

    return make
