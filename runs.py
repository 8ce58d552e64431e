"""A training in progress: its state, its steps, its log and its checkpoints.

run = Run(settings, dataset, model, criterion, optimizer, scaler, precision)
losses = [train_step(run, model, batch, rate)]
run.check(losses, batches)
run.save("checkpoint.pth")
"""

import argparse
import dataclasses
import datetime
import functools
import glob
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import time

import numpy as np
import torch
import torchvision
from tqdm import tqdm

from checkpoints import save_checkpoint
from datasets import PascalVOCDataset
from detect import annotate, find_objects
from devices import (
    batches_on,
    gather_over_processes,
    mixed_precision,
    n_processes,
    name_hardware,
    rank,
    sum_over_processes,
)
from drawing import draw_boxes
from eval import MAX_OVERLAP, MIN_SCORE, TOP_K, collect
from files import DivergenceError, InputError, atomic_writer
from model import SSD300, MultiBoxLoss
from utils import calculate_mAP, read_image, upright_rgb
from voc import label_color_map, label_names


@dataclasses.dataclass
class Run:
    """A training in progress: what is trained, on what, and how far it has come."""

    settings: argparse.Namespace
    dataset: PascalVOCDataset
    model: SSD300
    criterion: MultiBoxLoss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    precision: str
    iteration: int = 0  # updates made
    best_loss: float = math.inf  # lowest validation loss
    best_map: float = -1.0  # highest mAP of a validation
    pending: list = dataclasses.field(default_factory=list)  # losses since the last regular record of the log
    validation_due: bool = False  # a validation that was interrupted
    board: object = None  # TensorBoard's writer, if asked for
    test_set: PascalVOCDataset = None  # whose first images it shows

    @functools.cached_property
    def data(self):
        """The digest of the training set, made at the first checkpoint."""
        return fingerprint(self.dataset)

    def path(self, name):
        """Return the path of a file in the output folder."""
        return os.path.join(self.settings.output_folder, name)

    def prepare_log(self, record):
        """Start the log with a record; of a run that is resumed, drop what was logged after its checkpoint."""
        lines = []
        if self.settings.resume and os.path.exists(self.path("log.jsonl")):
            with open(self.path("log.jsonl"), encoding="utf-8", errors="replace") as file:
                lines = [line for line in file if self.has_seen(line)]
        with atomic_writer(self.path("log.jsonl")) as file:
            file.write("".join([*lines, json.dumps(record) + "\n"]).encode())

    def has_seen(self, line):
        """Tell whether a line of the log is whole, and tells of what the run has behind it."""
        try:
            record = json.loads(line)
            event, iteration = record["event"], record.get("iteration", 0)
        except (ValueError, TypeError, KeyError, AttributeError):  # cut off
            return False
        if event == "validation" and self.validation_due:
            return iteration < self.iteration
        at_the_end_only = event == "train" and iteration % self.settings.log_every != 0
        return iteration <= self.iteration and not at_the_end_only

    @property
    def finished(self):
        """Whether nothing is left to do."""
        return self.iteration >= self.settings.iterations and not self.validation_due

    @property
    def n_epochs(self):
        """How often every image is seen in all iterations."""
        return self.settings.iterations * self.settings.batch_size / len(self.dataset)

    def append(self, record):
        """Append a record to the log; a disk that does not take it does not end the training."""
        if rank() > 0:
            return
        try:
            with open(self.path("log.jsonl"), "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            if self.board:
                for name in record.keys() - {"event", "iteration"}:
                    self.board.add_scalar(f"{record['event']}/{name}", record[name], record["iteration"])
                if record["event"] == "validation":
                    self.show_examples()
                self.board.flush()
        except OSError as error:
            warn(f"{self.settings.output_folder}: the log cannot be written ({error})")

    def save(self, name, must=False):
        """Write a checkpoint; a disk that does not take it leaves the previous one whole, and `must` is an error."""
        if rank() > 0:
            return
        progress = {
            "iteration": self.iteration, "best_loss": self.best_loss, "best_map": self.best_map,
            "pending": self.pending, "validation_due": self.validation_due, "data": self.data,
        }  # fmt: skip
        try:
            save_checkpoint(self.path(name), self.model, self.optimizer, self.scaler, progress, vars(self.settings))
        except (OSError, RuntimeError) as error:  # torch.save raises either where the disk is full
            reason = getattr(error, "strerror", None) or "PyTorch could not write it, the disk may be full"
            message = f"{self.path(name)}: iteration {self.iteration} cannot be saved ({reason}); an earlier file stays"
            if must:
                raise InputError(f"{message}; put that right, then go on with --resume") from error
            warn(f"{message}; training goes on")

    def check(self, losses, batches):
        """Take in the losses of the last updates, (3,) tensors; DivergenceError where one is not finite.

        :raises DivergenceError: naming the iteration and its images, also where the weights are not finite
        """
        losses = sum_over_processes(torch.stack(losses)).cpu()  # waits for the GPU
        # With fp16 a gradient that is too large is the scaler's business, which skips the update.
        finite = losses[:, : 2 if self.scaler.is_enabled() else 3].isfinite().all(dim=1)
        for index in (~finite).nonzero().flatten()[:1].tolist():
            broken = self.iteration - len(losses) + index
            images = ", ".join(self.dataset.images[image] for _, image in batches.batch(broken))
            confidence, localization, norm = losses[index].tolist()
            raise DivergenceError(
                f"iteration {broken + 1}: the loss or its gradient is not finite (confidence {confidence:.4g}, "
                f"localization {localization:.4g}, norm of the gradient {norm:.4g}); the last checkpoint stays; lower "
                f"--lr, raise --warmup, use --grad-clip, or look at these images: {images}"
            )
        self.pending += losses.tolist()
        if not torch.stack([weight.isfinite().all() for weight in self.model.parameters()]).all():
            raise DivergenceError(
                f"iteration {self.iteration}: the weights are not finite; the last checkpoint stays; lower --lr, "
                "raise --warmup or use --grad-clip"
            )

    def validate(self, loader, interruption):
        """Validate, log what came of it and keep the best network; do it later where interrupted."""
        self.validation_due = True
        result = validate(loader, self.model, self.criterion, self.precision, self.settings.validate_map, interruption)
        if result is None:
            return
        self.validation_due = False
        self.append({"event": "validation", "iteration": self.iteration, **result})
        if rank() == 0:
            tqdm.write(
                f"iteration {self.iteration}: validation " + ", ".join(f"{k} {v:.4f}" for k, v in result.items())
            )
        mean, loss = result.get("mAP_11_point", -1.0), result["loss"]
        is_best = mean > self.best_map if self.settings.validate_map else loss < self.best_loss
        self.best_map, self.best_loss = max(mean, self.best_map), min(loss, self.best_loss)
        if is_best:
            self.save("best.pth")

    def open_board(self):
        """Have the log go to TensorBoard, too, which hides what a run that is resumed logged after its checkpoint."""
        if not self.settings.resume:
            for events in glob.glob(os.path.join(glob.escape(self.path("tensorboard")), "events.out.tfevents.*")):
                os.remove(events)  # an earlier run's
        self.board = import_tensorboard().SummaryWriter(self.path("tensorboard"), purge_step=self.iteration + 1)

    def show_examples(self, n=4):
        """Show the first test images in TensorBoard: left with their objects, right with what is found."""
        dataset = self.test_set
        names = label_names(dataset.label_map)
        colors = label_color_map(dataset.label_map)
        self.model.eval()
        for number, (path, objects) in enumerate(zip(dataset.images[:n], dataset.objects[:n], strict=True)):
            image = upright_rgb(read_image(path))
            labels = [names[label] for label in objects["labels"]]
            truth = draw_boxes(image, objects["boxes"], labels, [colors[label] for label in labels])
            found = annotate(image, find_objects(image, self.model, 0.2, MAX_OVERLAP, top_k=10), colors)
            picture = np.concatenate([truth, found], axis=1)
            self.board.add_image(f"test image {number}", picture, self.iteration, dataformats="HWC")
        self.model.train()


def import_tensorboard():
    """Return PyTorch's module for TensorBoard; InputError where that is not installed."""
    try:
        import torch.utils.tensorboard as tensorboard  # an optional requirement
    except ImportError as error:
        raise InputError("--tensorboard: its package is not there; pip install tensorboard") from error
    return tensorboard


def warn(message):
    """Print a warning where a progress bar may be."""
    tqdm.write(f"warning: {message}", file=sys.stderr)


def fingerprint(dataset):
    """Return what tells a training set from another: a digest of its images' names and their objects."""
    names = [os.path.basename(path) for path in dataset.images]
    return hashlib.sha256(json.dumps([names, dataset.objects]).encode()).hexdigest()


def train_step(run, network, batch, rate):
    """Update the weights once.

    :return: (3,) tensor left on the device: this process' share of confidence loss, localisation loss and norm of the
        gradient before it is clipped; those of all processes add up to the whole batch's
    """
    images, boxes, labels, _ = batch
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]
    with mixed_precision(run.precision, images.device):
        predictions = network(images)
    confidence, localization, n_positives = run.criterion.parts(*predictions, boxes, labels)  # in fp32
    losses = torch.stack([confidence, localization])
    if n_processes() > 1:  # normalise by the positives of the whole batch
        losses = losses * (n_positives / sum_over_processes(n_positives.clone()).clamp(min=1))
    run.optimizer.zero_grad()
    # DistributedDataParallel takes the mean of the processes' gradients, where the sum is meant.
    run.scaler.scale((losses[0] + run.criterion.alpha * losses[1]) * n_processes()).backward()
    run.scaler.unscale_(run.optimizer)
    parameters = list(network.parameters())
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    if run.settings.grad_clip:
        torch.nn.utils.clip_grads_with_norm_(parameters, run.settings.grad_clip, norm)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    return torch.cat([losses.detach(), norm[None] / n_processes()])


@torch.inference_mode()
def validate(loader, model, criterion, precision, with_map=False, interruption=None):
    """Return the loss over all images of all processes' loaders as over one batch; the model trains again afterwards.

    :param with_map: whether to detect, too, for the mAP
    :param interruption: an Interruption, which ends it once wished for
    :return: {"loss": ...}, and "mAP_11_point" where asked for; None where interrupted
    """
    device = model.priors_cxcy.device
    model.eval()
    total, positives = sums = torch.zeros(2, device=device)
    found = [[] for _ in range(6)]
    batches = tqdm(loader, "validating", unit="batch", leave=False, disable=rank() > 0 or None)
    for images, *objects in batches_on(device, batches):
        if interruption and interruption.wished:
            break
        with mixed_precision(precision, device):
            predictions = model(images)
        confidence, localization, n_positives = criterion.parts(*predictions, *objects[:2])
        total += (confidence + criterion.alpha * localization) * n_positives
        positives += n_positives
        if with_map:
            collect(found, (*model.detect_objects(*predictions, MIN_SCORE, MAX_OVERLAP, TOP_K), *objects))
    model.train()
    if interruption and interruption.agreed():
        return None
    sum_over_processes(sums)
    result = {"loss": (total / positives.clamp(min=1)).item()}
    if with_map:
        found = zip(*gather_over_processes(list(zip(*found, strict=True))), strict=True)
        result["mAP_11_point"] = calculate_mAP(*found, label_map=model.label_map)[1]
    return result


class Interval:
    """The times of the iterations since the last record."""

    def __init__(self, iteration):
        self.first, self.waited = iteration, 0.0
        self.started = self.asked = time.perf_counter()

    def start_waiting(self):
        """Note that a batch is asked for."""
        self.asked = time.perf_counter()

    def stop_waiting(self):
        """Note that it is there."""
        self.waited += time.perf_counter() - self.asked

    def record(self, run, rate, batch_size):
        """Return the log's record up to a run's iteration: the mean of its pending losses, and the times."""
        elapsed = time.perf_counter() - self.started
        losses = torch.tensor(run.pending, dtype=torch.float64)
        taken = losses.isfinite().all(dim=1)  # not those that fp16 skipped
        confidence, localization, norm = losses[taken].mean(dim=0).tolist()
        return {
            "event": "train", "iteration": run.iteration, "loss": confidence + run.criterion.alpha * localization,
            "confidence_loss": confidence, "localization_loss": localization, "gradient_norm": norm,
            "skipped_updates": int((~taken).sum()), "lr": rate,
            "images_per_second": (run.iteration - self.first) * batch_size / elapsed,
            "data_wait": self.waited / elapsed,
        }  # fmt: skip


def show(bar, record):
    """Show a record on the progress bar; print it where there is no bar, as in a file."""
    parts = {
        "loss": f"{record['loss']:.3f}", "conf": f"{record['confidence_loss']:.3f}",
        "loc": f"{record['localization_loss']:.3f}", "lr": f"{record['lr']:.1e}",
        "img/s": f"{record['images_per_second']:.1f}", "waiting": f"{record['data_wait']:.0%}",
    }  # fmt: skip
    bar.set_postfix(parts)
    if bar.disable:
        print(f"iteration {record['iteration']}: " + ", ".join(f"{k} {v}" for k, v in parts.items()), flush=True)


def describe_run(settings, model, precision):
    """Return the first record of a log: settings, versions, hardware, the precision chosen, commit."""
    command = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        commit = None
    return {
        "event": "start",
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "settings": vars(settings),
        "classes": list(model.label_map),
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__
        },
        "hardware": name_hardware(),
        "processes": n_processes(),
        "precision": precision,
        "git_commit": commit,
    }  # fmt: skip
