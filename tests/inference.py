"""Time detection on a CPU: PyTorch, compiled and not, onnxruntime, and detect.py from its start; see benchmark.py."""

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from timing import print_row, seconds

from datasets import PascalVOCDataset
from model import DETECTION_LIMITS, SSD300, load_model
from support.checkpoints import save_weights
from support.export import export_onnx
from support.files import import_optional
from support.labels import make_label_map
from utils import IMAGENET_MEAN, IMAGENET_STD

ROUNDS = {1: 5, 8: 3}  # images per batch: how often each is measured
# Runs detect.py and prints, as its last line, the times at which the process started and its parts began and ended.
START = """
import json, sys, time
times = [float(sys.argv.pop())]
import model
load = model.load_model
def load_model(*arguments):
    times.append(time.time())
    loaded = load(*arguments)
    times.append(time.time())
    return loaded
model.load_model = load_model
import detect
times.append(time.time())
detect.main()
times.append(time.time())
print(json.dumps(times))
"""


def time_inference(data_folder, checkpoint, timetable):
    """Run all parts.

    :param data_folder: folder with the lists of a data set; its first test images are used
    :param checkpoint: file of a network, or "untrained"
    """
    with tempfile.TemporaryDirectory() as folder:
        if checkpoint == "untrained":
            torch.manual_seed(0)
            untrained = SSD300(21, pretrained=False)
            untrained.label_map = make_label_map(f"class {number}" for number in range(1, 21))
            checkpoint = os.path.join(folder, "untrained.pth")
            save_weights(checkpoint, untrained)
        photo = PascalVOCDataset(data_folder, "TEST").images[0]
        timetable.run("start of detect.py", time_start, photo, checkpoint, folder, seconds=120)
        model = load_model(checkpoint).to(memory_format=torch.channels_last)
        dataset = PascalVOCDataset(data_folder, "TEST", size=model.size)
        images = torch.stack([dataset[index % len(dataset)][0] for index in range(max(ROUNDS))])
        for name, make in {
            "PyTorch": lambda: torch_detector(model, model),  # against itself, which shows how noisy the machine is
            "compiled": lambda: torch_detector(model, torch.compile(model, dynamic=False)),
            "onnxruntime, without NMS": lambda: onnx_detector(model, None, folder),
            "onnxruntime, with NMS": lambda: onnx_detector(model, DETECTION_LIMITS, folder),
        }.items():
            timetable.run(name, time_detector, name, make, model, images, seconds=150)


def time_start(photo, checkpoint, folder, rounds=3):
    """Time detect.py on one photograph in fresh processes, after one that brings the files into memory."""
    runs = [start(photo, checkpoint, folder) for _ in range(rounds + 1)][1:]
    total, *parts = (statistics.median(taken) for taken in zip(*runs, strict=True))
    print_row("detect.py photo.jpg, from its start to its end", "", f"{1000 * total:.0f} ms", "")
    for name, taken in zip(("Python and imports", "loading the network", "the photograph"), parts, strict=True):
        print_row(f"  {name}", "", f"{1000 * taken:.0f} ms", f"{taken / total:.0%}")


def start(photo, checkpoint, folder):
    """Run detect.py once; return the seconds of all, of Python and its imports, of loading, and of the photograph."""
    output = os.path.join(folder, "detected.jpg")
    command = [sys.executable, "-c", START, photo, "--checkpoint", checkpoint, "--output", output, str(time.time())]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    started, imported, load, loaded, ended = json.loads(done.stdout.splitlines()[-1])
    return ended - started, imported - started, loaded - load, ended - loaded + load - imported


@torch.inference_mode()
def time_detector(name, make, model, images):
    """Time a detector against PyTorch, with the first image and with all images at a time.

    :param make: function that returns the detector, which takes images (N, 3, size, size), uint8
    """
    theirs, ours = torch_detector(model, model), make()
    for n_images, rounds in ROUNDS.items():
        batch = images[:n_images]
        eager, taken = seconds(*(functools.partial(detect, batch) for detect in (theirs, ours)), rounds=rounds)
        per_image = (f"{1000 * value / n_images:.0f} ms per image" for value in (eager, taken))
        print_row(f"detection, {name}, batch {n_images}", *per_image, f"{taken / eager:.2f}")


def torch_detector(model, network):
    """Return a function that detects objects with a model's network, which may be compiled."""
    return lambda images: model.detect_objects(*network(images), *DETECTION_LIMITS)


def onnx_detector(model, limits, folder):
    """Return a function that runs an exported model with as many threads as PyTorch, on images that it normalises."""
    (onnxruntime,) = import_optional("this part", "onnxruntime", packages="onnxruntime")
    path = os.path.join(folder, "model.onnx")
    export_onnx(model, model.label_map, path, limits)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return lambda images: session.run(None, {"images": ((images / 255 - mean) / std).numpy()})
