"""Files are written whole or not at all, and errors end in one line."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import LONGEST_WAIT, launch
from torch.utils.data import DataLoader

from model import SSD300
from support.checkpoints import save_weights
from support.files import InputError, atomic_writer, check_outputs, encode_json, run_command
from support.labels import make_label_map
from support.sample import SAMPLE_LABELS

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def signal_handlers():
    """Restore what `run_command` changes in this process."""
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGCHLD
    earlier = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, earlier, strict=True):
        signal.signal(number, handler)


def test_a_failed_write_leaves_the_earlier_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"earlier")
    with pytest.raises(TypeError), atomic_writer(path) as file:
        file.writelines([b"half", None])
    assert path.read_bytes() == b"earlier"
    (tmp_path / "link").symlink_to(path)
    with atomic_writer(tmp_path / "link") as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["a.json", "link"]


@pytest.mark.parametrize("name", ["a", "猫 🙂", "caf\udce9", '\\udce9 \\ "', "\ud83d\udce9 é", "\x00\n"])
def test_any_name_survives_json(name):
    """Names of files in other encodings are strings that UTF-8 cannot encode."""
    assert json.loads(encode_json([name, {name: 1}])) == json.loads(json.dumps([name, {name: 1}]))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "{path}: No space left on device; put that right"),
        (OSError(errno.ENOENT, "No such file", "b.jpg"), "b.jpg: No such file; put that right and try again"),
        (OSError("broken data stream"), "broken data stream; put that right"),
        (InputError("b.jpg: cannot be read"), "b.jpg: cannot be read"),
    ],
)
def test_an_error_while_writing_ends_in_one_line_that_names_the_file(error, expected, tmp_path, capsys):
    path = tmp_path / "a.json"

    def main():
        with atomic_writer(path):
            raise error

    with pytest.raises(SystemExit) as ended:
        run_command(main)
    printed = capsys.readouterr().err
    assert ended.value.code == 2
    assert printed.startswith("error: " + expected.format(path=path))
    assert printed.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_files_to_write_must_be_writable_and_different_from_each_other_and_from_the_inputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").write_text("")
    os.mkfifo(tmp_path / "pipe")
    check_outputs("old", None, "new", folders=[None, ".", "a/b/c"], inputs=["other"])
    for files, inputs, message in (
        (["nowhere/x"], [], "nowhere/x: cannot write to .*/nowhere, which is not a writable folder"),
        (["."], [], r"\.: exists and is not a regular file"),
        (["pipe"], [], "pipe: exists and is not a regular file"),
        (["old", "./old"], [], r"\./old: is also read, or written"),
        (["new"], ["../" + tmp_path.name + "/new"], "new: is also read, or written"),
    ):
        with pytest.raises(InputError, match=f"^{message}"):
            check_outputs(*files, inputs=inputs)
    for path in ("old", "old/x"):
        with pytest.raises(InputError, match=f"^{path}: cannot write to .*/old, which is not a writable folder"):
            check_outputs(folders=[path])
    assert sorted(os.listdir()) == ["old", "pipe"]


# Run a script whose loading processes read the first image and stop at each other one, until they are ended.
STUCK = """
import os, runpy, signal, sys
from PIL import Image

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if the tests run in the background of a shell
open_image, opened = Image.open, []

def stop_at_second(path):
    opened.append(path)
    if len(opened) > 1:
        open(os.environ["FIFO"], "rb").read()
    return open_image(path)

Image.open = stop_at_second
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def until_opened(path, process):
    """Wait until a process reads a fifo, and return its other end."""
    deadline = time.monotonic() + LONGEST_WAIT
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(OSError):  # nobody reads it yet
            return os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.01)
    raise AssertionError("the process does not read the fifo")


@pytest.mark.parametrize(
    ("number", "status", "script"),
    [
        (signal.SIGINT, 130, "create_data_lists.py"),
        (signal.SIGTERM, 143, "create_data_lists.py"),
        (signal.SIGTERM, 143, "detect.py"),
    ],
)
def test_a_signal_ends_a_script_and_its_processes_at_once_in_one_line(number, status, script, sample, tmp_path):
    """The signal reaches all processes of the group, as one from a terminal does, while they read images."""
    root, fifo, checkpoint = sample / "VOCsample", tmp_path / "fifo", tmp_path / "model.pth"
    model = SSD300(6, pretrained=False)
    model.label_map = make_label_map(SAMPLE_LABELS)
    save_weights(checkpoint, model)
    os.mkfifo(fifo)
    lists = ["--train", root, "--split", 0.5, "--labels", "auto", "--output-folder", tmp_path / "lists"]
    arguments = {
        "create_data_lists.py": [*lists, "--check"],
        "detect.py": [root / "JPEGImages", "--checkpoint", checkpoint],
    }[script]
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, str(ROOT / script), *map(str, arguments)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "FIFO": str(fifo)},
    )  # fmt: skip
    try:
        other_end = until_opened(fifo, process)
        os.killpg(process.pid, number)
        _, printed = process.communicate(timeout=LONGEST_WAIT)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode, printed) == (status, "error: interrupted\n")
    with pytest.raises(BrokenPipeError):
        os.write(other_end, b"to a process that should have ended")
    os.close(other_end)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "model.pth"]


def test_what_a_killed_process_left_half_written_is_removed_by_the_next_writer_of_that_file(tmp_path):
    """The path is one with special characters; other files, also those of a process that still writes, stay."""
    folder = tmp_path / "[a]*"
    folder.mkdir()
    ended, living = 10**8, os.getppid()  # no process has a number as high as the first
    others = ["x", f"x.json.{ended}.tmp2", "x.json.old.tmp", f"x.json.gz.{ended}.tmp", f"ax.json.{ended}.tmp"]
    others.append(f"x.json.{living}.tmp")
    for name in [*others, f"x.json.{ended}.tmp", f"x.json.{ended + 1}.tmp"]:
        (folder / name).write_text("")
    with atomic_writer(folder / "x.json") as file:
        file.write(b"new")
    assert sorted(os.listdir(folder)) == sorted([*others, "x.json"])


def test_a_killed_writer_leaves_the_earlier_file_and_the_next_one_clears_up(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("earlier")
    half = f"import os, support.files as f\nwith f.atomic_writer({str(path)!r}) as file:\n    os.kill(os.getpid(), 9)"
    launch("-c", half, status=-signal.SIGKILL, cwd=ROOT)
    assert path.read_text() == "earlier"
    assert len(os.listdir(tmp_path)) == 2
    with atomic_writer(path) as file:
        file.write(b"new")
    assert os.listdir(tmp_path) == ["a.json"]
    assert path.read_text() == "new"


def test_a_loading_process_that_is_killed_ends_a_script_in_one_line(capsys):
    def main():
        list(DataLoader([0], batch_size=None, num_workers=1, collate_fn=lambda _: os.kill(os.getpid(), signal.SIGKILL)))

    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: a process that reads images was killed; check that memory suffices\n"


def test_another_runtime_error_keeps_its_traceback():
    def main():
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run_command(main)


def test_signals_that_are_ignored_stay_ignored():
    """As Ctrl-C is for a process that a shell script starts in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run_command(lambda: os.kill(os.getpid(), signal.SIGINT))
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
