"""The log of a training: JSON lines, TensorBoard, curves, speed.

log = RunLog("runs/voc", describe_run(vars(settings), classes, precision))
stopwatch = Stopwatch()
log.append({"event": "train", "iteration": 20, "loss": 7.5, **stopwatch.figures(batch_size=32)})
"""

import datetime
import glob
import io
import json
import os
import platform
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import version

import numpy as np
import torch
from tqdm import tqdm

from support.devices import n_processes, name_hardware, rank
from support.files import InputError, atomic_writer, import_optional, write_files


class RunLog:
    """The log.jsonl of an output folder and, on request, TensorBoard's. Only process 0 writes.

    :param folder: output folder of the run, which exists
    :param description: first record, as `describe_run` returns it
    :param keep: function of a record that tells whether to keep it of an earlier log; None starts a new log
    :param tensorboard: whether to log to TensorBoard, too
    :param iteration: number of updates made so far
    """

    def __init__(self, folder, description, keep=None, tensorboard=False, iteration=0):
        self.folder, self.path, self.board = folder, os.path.join(folder, "log.jsonl"), None
        earlier = read_log(folder) if keep else []
        self.kept = [record for record in earlier if keep(record)]  # what a resumed run goes on from
        # TensorBoard hides records after `iteration`; one that is logged again at `iteration` would be shown twice.
        self.on_board = {(record["event"], iteration) for record in earlier if record.get("iteration") == iteration}
        if rank() > 0:
            return
        with atomic_writer(self.path) as file:
            file.writelines(json.dumps(record).encode() + b"\n" for record in [*self.kept, description])
        if tensorboard:
            board_folder = os.path.join(folder, "tensorboard")
            if not keep:
                for events in glob.glob(os.path.join(glob.escape(board_folder), "events.out.tfevents.*")):
                    os.remove(events)  # of an earlier run
            self.board = import_tensorboard().SummaryWriter(board_folder, purge_step=iteration + 1)

    def append(self, record, pictures=()):
        """Append a record; a disk that is full does not end the training.

        :param record: plain values by name, "event" and "iteration" among them
        :param pictures: (title, PIL image) of each picture for TensorBoard
        """
        if rank() > 0:
            return
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            if self.board and (record["event"], record["iteration"]) not in self.on_board:
                for name in record.keys() - {"event", "iteration", "split"}:
                    self.board.add_scalar(f"{record['event']}/{name}", record[name], record["iteration"])
                for title, picture in pictures:
                    self.board.add_image(title, np.asarray(picture), record["iteration"], dataformats="HWC")
                self.board.flush()
        except OSError as error:
            warn(f"{self.path}: cannot write the log ({error})")

    def draw_curves(self):
        """Draw losses, learning rate and validations into curves.png, if the matplotlib package is installed."""
        if rank() > 0:
            return
        try:
            (figures,) = import_optional("curves.png", "matplotlib.figure", packages="matplotlib")
            write_files({os.path.join(self.folder, "curves.png"): draw_curves(figures, read_log(self.folder))})
        except InputError:
            return
        except OSError as error:
            warn(f"{self.folder}: cannot write curves.png ({error})")


def read_log(folder):
    """Return the records of the log in an output folder, without a line that was cut off; none if there is no log."""
    path, records = os.path.join(folder, "log.jsonl"), []
    with suppress(FileNotFoundError), open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with suppress(ValueError):
                records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict) and "event" in record]


def import_tensorboard():
    """Return PyTorch's module for TensorBoard; raises InputError if the tensorboard package is not installed."""
    return import_optional("--tensorboard", "torch.utils.tensorboard", packages="tensorboard")[0]


def describe_run(settings, classes, precision):
    """Return the first record of a log: settings, classes, versions, hardware, precision, git commit."""
    command = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or not a repository
        commit = None
    return {
        "event": "start",
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "settings": settings,
        "classes": classes,
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "torchvision": version("torchvision")
        },
        "hardware": name_hardware(),
        "processes": n_processes(),
        "precision": precision,
        "git_commit": commit,
    }  # fmt: skip


def mean_losses(losses, alpha):
    """Return the means of the losses of some updates by name, without those that fp16 skipped.

    :param losses: (confidence loss, localisation loss, norm of the gradient) of each update
    """
    losses = torch.tensor(losses, dtype=torch.float64)
    made = losses.isfinite().all(dim=1)
    confidence, localization, norm = losses[made].mean(dim=0).tolist()
    return {
        "loss": confidence + alpha * localization, "confidence_loss": confidence, "localization_loss": localization,
        "gradient_norm": norm, "skipped_updates": int((~made).sum()),
    }  # fmt: skip


class Stopwatch:
    """Measures the speed of the iterations since the last record of the log."""

    def __init__(self):
        self.waited, self.n_batches = 0.0, 0
        self.started = self.asked = time.perf_counter()

    def start_waiting(self):
        """Note that a batch is requested."""
        self.asked = time.perf_counter()

    def stop_waiting(self):
        """Note that the batch has arrived."""
        self.n_batches += 1
        self.waited += time.perf_counter() - self.asked

    def figures(self, batch_size):
        """Return the speed, and the share of the time spent waiting for batches."""
        elapsed = time.perf_counter() - self.started
        return {"images_per_second": self.n_batches * batch_size / elapsed, "data_wait": self.waited / elapsed}


def show(bar, record, batch_size):
    """Show a record of training on a progress bar; print it with the time left if the bar is off, as in a file."""
    parts = {
        "loss": f"{record['loss']:.3f}", "conf": f"{record['confidence_loss']:.3f}",
        "loc": f"{record['localization_loss']:.3f}", "lr": f"{record['lr']:.1e}",
        "img/s": f"{record['images_per_second']:.1f}", "waiting": f"{record['data_wait']:.0%}",
    }  # fmt: skip
    bar.set_postfix(parts)
    if bar.disable and rank() == 0:
        seconds = (bar.total - record["iteration"]) * batch_size / record["images_per_second"]
        parts["time left"] = tqdm.format_interval(seconds)
        figures = ", ".join(f"{name} {value}" for name, value in parts.items())
        print(f"iteration {record['iteration']} of {bar.total}: {figures}", flush=True)


def draw_curves(figures, records):
    """Return a PNG picture of the losses, the learning rate and the validations in the records of a log.

    :param figures: the module matplotlib.figure
    """
    training = [record for record in records if record["event"] == "train"]
    validations = [record for record in records if record["event"] == "validation"]
    figure = figures.Figure(figsize=(8, 8), layout="constrained")
    losses, rates, scores = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 2))
    for name, label in (("confidence_loss", "confidence"), ("localization_loss", "localization"), ("loss", "sum")):
        losses.plot(*_points(training, name), label=label)
    losses.plot(*_points(validations, "loss"), "o-", markersize=4, label="sum, validation")
    losses.set(ylabel="loss")
    losses.legend()
    rates.plot(*_points(training, "lr"), drawstyle="steps-pre")
    rates.set(ylabel="learning rate")
    for axes in (losses, rates):
        if any((line.get_ydata() > 0).any() for line in axes.lines):  # matplotlib warns of a log scale of zeros alone
            axes.set_yscale("log")
    scores.plot(*_points(validations, "mAP_11_point"), "o-", markersize=4)
    scores.set(xlabel="iteration", ylabel="validation mAP", ylim=(-0.02, 1.02))
    for axes in (losses, rates, scores):
        axes.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    return picture.getvalue()


def _points(records, name):
    """Return the iterations and the values of a figure in the records that have it, as an array (2, n)."""
    return np.array([(record["iteration"], record[name]) for record in records if name in record]).reshape(-1, 2).T


def warn(message):
    """Print a warning without breaking a progress bar."""
    tqdm.write(f"warning: {message}", file=sys.stderr)
