"""Fixtures shared by several test files."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from model import SSD300
from support.sample import make_sample

ROOT = Path(__file__).resolve().parent.parent
LONGEST_WAIT = 1200  # seconds before a process counts as stuck: 100 times the longest run on an idle machine
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train", "eval", "detect", "create_data_lists"])


@pytest.fixture(scope="session")
def model():
    """An untrained SSD300 with VOC's 21 classes, in eval mode."""
    torch.manual_seed(0)
    return SSD300(21, pretrained=False).eval()


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """Folder of a tiny sample data set: 6 training and 3 test images."""
    folder = tmp_path_factory.mktemp("sample")
    make_sample(folder, n_train=6, n_test=3, seed=1)
    return folder


def _execute(script, arguments, cwd, env, outputs):
    """Run a script in this process as `__main__`, with its arguments, environment and output files."""
    multiprocessing.set_start_method("fork", force=True)  # as in a process that a user starts
    for stream, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


class Script:
    """A script of the repository that runs in its own process with `arguments`, as a user starts it.

    The process is forked from one that has already imported PyTorch, which saves some seconds.
    """

    def __init__(self, script, *arguments, cwd=None, env=None):
        self.folder = tempfile.TemporaryDirectory()
        self.outputs = [os.path.join(self.folder.name, name) for name in ("stdout", "stderr")]
        env = dict(os.environ if env is None else env)
        command = (str(ROOT / script), [*map(str, arguments)], cwd or os.getcwd(), env, self.outputs)
        self.process = FORKS.Process(target=_execute, args=command)
        self.process.start()

    def is_running(self):
        """Tell whether the process is still running."""
        return self.process.is_alive()

    def kill(self):
        """Kill the process with SIGKILL, which it cannot handle."""
        self.process.kill()
        self.process.join()

    def finish(self, status=0):
        """Wait for the process to end, check its exit status, and return its standard output and standard error."""
        self.process.join(LONGEST_WAIT)
        self.kill()
        stdout, stderr = (Path(path).read_text() for path in self.outputs)
        assert self.process.exitcode == status, stdout + stderr
        return stdout, stderr


TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", 2, "--standalone")


def launch(*command, status=0, **options):
    """Run Python with a command line; check its exit status, return what it prints on standard output and error."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        timeout=LONGEST_WAIT,
        **options,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout, done.stderr


@pytest.fixture
def run():
    """Return a function that runs a script as a user would, checks its exit status and returns its output or error."""

    def run_script(script, *arguments, status=0, cwd=None, env=None):
        stdout, stderr = Script(script, *arguments, cwd=cwd, env=env).finish(status)
        if status:
            message = stderr.strip().splitlines()[-1]
            assert message.startswith("error: ") or ": error: " in message, stderr
            assert "Traceback" not in stderr
            return message
        return stdout + stderr

    return run_script


@pytest.fixture
def random_objects():
    """Return a function that draws n boxes (n, 4), in fractional xy, and labels (n,) from a numpy RandomState."""

    def make(rng, n, n_classes=21):
        low = rng.uniform(0, 0.6, (n, 2))
        high = low + 0.02 + rng.uniform(0, 1, (n, 2)) ** 2 * 0.38
        boxes = torch.tensor(np.concatenate([low, high], axis=1), dtype=torch.float32)
        return boxes, torch.tensor(rng.randint(1, n_classes, n), dtype=torch.long)

    return make
