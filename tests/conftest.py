"""Fixtures that several test files share."""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from model import SSD300
from support.sample import make_sample

ROOT = Path(__file__).resolve().parent.parent
LONGEST_WAIT = 1200  # seconds until a process counts as stuck: a hundred times what the longest takes when idle
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train", "eval", "detect", "create_data_lists"])


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


def _execute(script, arguments, cwd, env, outputs):
    """Run a script in this process, from its command line on."""
    multiprocessing.set_start_method("fork", force=True)  # the default of a process that a user starts
    for stream, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


@pytest.fixture
def run(tmp_path_factory):
    """Run a script of the repository as a user would; check its exit status, return its output.

    Each gets a process of its own, forked from one that has already imported PyTorch, which takes four seconds.
    """

    def run_script(script, *arguments, status=0, cwd=None, env=None):
        outputs = [tmp_path_factory.mktemp("output") / name for name in ("stdout", "stderr")]
        process = FORKS.Process(
            target=_execute, args=(str(ROOT / script), [*map(str, arguments)], cwd or os.getcwd(),
                                   dict(os.environ if env is None else env), outputs),
        )  # fmt: skip
        process.start()
        process.join(LONGEST_WAIT)
        if process.is_alive():
            process.kill()
        stdout, stderr = (path.read_text() for path in outputs)
        assert process.exitcode == status, stdout + stderr
        if status:
            message = stderr.strip().splitlines()[-1]
            assert message.startswith("error: ") or ": error: " in message, stderr
            assert "Traceback" not in stderr
            return message
        return stdout + stderr

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
