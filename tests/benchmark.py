"""Time the fast functions against the loop versions of reference.py, and training on a GPU against its bounds.

python tests/benchmark.py
python tests/benchmark.py --data-folder data/voc --device cuda --compile
python tests/benchmark.py --inference runs/voc/checkpoint.pth

The figures of a ratio are measured in the same run on the same machine. Ratios differ between machines. It ends within
nine minutes: a part that fails or exceeds its budget loses only its own rows, and the last lines name it.
"""

import argparse
import functools
import gc
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import reference
import torch
import torchvision
from PIL import Image
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from inference import time_inference
from timing import Timetable, print_row, seconds

import eval as eval_script
import train
from datasets import PascalVOCDataset, collate_fn
from model import SSD300, MultiBoxLoss
from support.devices import PRECISIONS, choose_precision, compile_network, count_cores, make_deterministic
from support.files import InputError, run_command
from support.sample import make_sample
from utils import IMAGENET_MEAN, IMAGENET_STD, calculate_mAP

GFLOP_PER_IMAGE = 188.2  # of a training step, 21 classes: 31.37 G multiply-adds forward, x 2 operations, x 3 passes
LONGEST = 510  # seconds of the whole benchmark; a part that must stop then may take some more to end
MATRIX_SIDE = 8192
GRAD_CLIP = 5.0  # without a limit, training from scratch sometimes diverges, which would cost the row


class Mode(NamedTuple):
    """How a training step computes."""

    precision: str
    benchmark: bool = False  # cudnn tries its algorithms and takes the fastest
    deterministic: bool = False
    compiled: bool = False

    def __str__(self):
        return ", ".join([self.precision, *(name for name, value in self._asdict().items() if value is True)])


FAST = Mode("bf16", benchmark=True)
COMPILED = FAST._replace(compiled=True)
# (images per batch, mode), the most telling first. Launching kernels takes longer than running them at batch 1 and 8.
STEPS = [
    *((32, mode) for mode in (FAST, Mode("bf16"), Mode("tf32"), Mode("fp32"), Mode("bf16", deterministic=True))),
    *((n_images, FAST) for n_images in (1, 8, 128)),
]
COMPILED_STEPS = [(n_images, COMPILED) for n_images in (32, 8, 1, 128)]


def random_batch(n_images, device="cpu"):
    """Return locs and scores that require gradients, and boxes and labels of 1 to 7 objects per image."""
    generator = torch.Generator().manual_seed(0)
    shapes = (n_images, 8732, 4), (n_images, 8732, 21)
    predictions = [torch.randn(s, generator=generator).to(device).requires_grad_() for s in shapes]
    boxes, labels = [], []
    for n in torch.randint(1, 8, (n_images,), generator=generator).tolist():
        low = torch.rand(n, 2, generator=generator) * 0.6
        boxes.append(torch.cat([low, low + 0.05 + 0.35 * torch.rand(n, 2, generator=generator)], dim=1))
        labels.append(torch.randint(1, 21, (n,), generator=generator))
    return *predictions, boxes, labels


def time_loading(data_folder):
    """Time loading and transforming images one by one in a single thread, against bare decoding."""
    training = PascalVOCDataset(data_folder, "TRAIN", keep_difficult=True)
    testing = PascalVOCDataset(data_folder, "TRAIN", keep_difficult=True, augment=False)
    indices = range(min(128, len(training)))

    def decode():
        for index in indices:
            with Image.open(training.images[index]) as image:
                image.convert("RGB")

    def resize():
        """Decode with PIL, copy to a tensor, resize with PyTorch: what any such loader does, and nothing else."""
        for index in indices:
            with Image.open(training.images[index]) as image:
                pixels = torch.from_numpy(np.array(image.convert("RGB")))
            F.interpolate(pixels.permute(2, 0, 1)[None], (300, 300), mode="bilinear", antialias=True)

    def step_by_step():
        rng = random.Random(0)
        for index in indices[:16]:
            with Image.open(training.images[index]) as image:
                pixels = np.asarray(image.convert("RGB"))
            pixels = reference.augment(pixels, training.objects[index]["boxes"], rng)[0]
            image = Image.fromarray(np.ascontiguousarray(pixels)).resize((300, 300), Image.Resampling.BILINEAR)
            torch.from_numpy((np.asarray(image) / 255 - IMAGENET_MEAN) / IMAGENET_STD).float().permute(2, 0, 1)

    def load(dataset):
        for index in indices:
            dataset[0, index]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = seconds(decode, resize, lambda: load(training), lambda: load(testing))
    (looping,) = seconds(step_by_step, rounds=1)
    torch.set_num_threads(threads)
    decode_rate, resize_rate, train_rate, test_rate = (len(indices) / taken for taken in times)
    loop_rate = len(indices[:16]) / looping
    print_row("bare decoding, one thread", "", f"{decode_rate:.0f} images/s", "")
    ratio = f"{resize_rate / decode_rate:.2f} of decoding"
    print_row("decoding and resizing alone, one thread", "", f"{resize_rate:.0f} images/s", ratio)
    for name, rate, theirs in (("TRAIN", train_rate, f"{loop_rate:.1f} images/s"), ("TEST", test_rate, "")):
        faster = f", {rate / loop_rate:.0f} x loop" if theirs else ""
        ratio = f"{rate / decode_rate:.2f} of decoding{faster}"
        print_row(f"load + {name} transform, one thread", theirs, f"{rate:.0f} images/s", ratio)
    return decode_rate


def time_loss():
    """Time the loss, forward and backward, at batch size 32."""
    locs, scores, boxes, labels = random_batch(32)
    priors = SSD300(21, pretrained=False).priors_cxcy
    criterion = MultiBoxLoss(priors)

    def run(function):
        locs.grad = scores.grad = None
        function().backward()

    theirs, ours = seconds(
        lambda: run(lambda: sum(reference.multibox_loss(priors, locs, scores, boxes, labels))),
        lambda: run(lambda: criterion(locs, scores, boxes, labels)),
    )
    print_row(
        "loss forward + backward, batch 32", f"{1000 * theirs:.0f} ms", f"{1000 * ours:.0f} ms", f"{ours / theirs:.2f}"
    )


@torch.inference_mode()
def time_detection():
    """Time post-processing of an image with 70% of all candidates above the threshold, against the forward pass."""
    torch.manual_seed(0)
    model = SSD300(21, pretrained=False).eval().to(memory_format=torch.channels_last)
    image, locs, scores = torch.randn(1, 3, 300, 300), torch.randn(1, 8732, 4), torch.randn(1, 8732, 21) * 1.4
    share = (scores.softmax(dim=2)[..., 1:] > 0.01).float().mean()
    limits = 0.01, 0.45, 200
    started = time.perf_counter()
    boxes, labels, _ = reference.detect_objects(model.priors_cxcy, locs[0], scores[0], *limits)
    theirs = time.perf_counter() - started
    detections = model.detect_objects(locs, scores, *limits)
    same = detections[1][0].tolist() == labels and torch.allclose(detections[0][0], boxes, atol=1e-6)
    forward, ours = seconds(lambda: model(image), lambda: model.detect_objects(locs, scores, *limits))
    part = f"detect_objects, {share:.0%} of candidates above 0.01"
    ratio = f"{ours / forward:.1%} of a forward pass"
    print_row(part, f"{theirs:.2f} s", f"{1000 * ours:.1f} ms", ratio if same else "DETECTIONS DIFFER")


def time_map():
    """Time the mAP of 4,952 images with 200 detections each, in a single thread."""
    generator = torch.Generator().manual_seed(0)
    detections, ground_truth = ([], [], []), ([], [], [])
    for _ in range(4952):
        n = int(torch.randint(1, 6, (), generator=generator))
        low = torch.rand(n, 2, generator=generator) * 0.6
        boxes = torch.cat([low, low + 0.05 + 0.35 * torch.rand(n, 2, generator=generator)], dim=1)
        labels = torch.randint(1, 21, (n,), generator=generator)
        near = torch.randint(n, (200,), generator=generator)
        guess = torch.where(torch.rand(200, generator=generator) < 0.3, labels[near], near * 0 + 1 + near % 20)
        parts = (
            (boxes[near] + 0.05 * torch.randn(200, 4, generator=generator), boxes),
            (guess, labels),
            (torch.rand(200, generator=generator), torch.rand(n, generator=generator) < 0.1),
        )
        for all_detected, all_true, (detected, true) in zip(detections, ground_truth, parts, strict=True):
            all_detected.append(detected)
            all_true.append(true)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    (ours,) = seconds(lambda: calculate_mAP(*detections, *ground_truth), rounds=3)
    started = time.perf_counter()
    expected = reference.average_precisions(*detections, *ground_truth, n_classes=21)
    theirs = time.perf_counter() - started
    torch.set_num_threads(threads)
    same = np.allclose(list(calculate_mAP(*detections, *ground_truth)[0].values()), expected, equal_nan=True)
    ratio = f"{ours / theirs:.3f}" if same else "PRECISIONS DIFFER"
    print_row("calculate_mAP, 4,952 x 200, one thread", f"{theirs:.1f} s", f"{ours:.2f} s", ratio)


@torch.inference_mode()
def time_forward():
    """Time the network alone at batch size 8, against torchvision's backbone and head."""
    images = torch.randn(8, 3, 300, 300)
    model = SSD300(21, pretrained=False).eval().to(memory_format=torch.channels_last)
    other = torchvision.models.detection.ssd300_vgg16(weights=None, weights_backbone=None, num_classes=21).eval()
    theirs, ours = seconds(
        lambda: other.head(list(other.backbone(images).values())), lambda: model(images), rounds=3
    )  # fmt: skip
    ratio = f"{ours / theirs:.2f} of torchvision's"
    print_row("forward pass, batch 8", f"{1000 * theirs:.0f} ms", f"{1000 * ours:.0f} ms", ratio)


def gpu_seconds(function, seconds=2.0):
    """Return the GPU time of one call, over about this many seconds of calls, after four warm-up calls."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    torch.cuda.synchronize()
    repeats = min(100, max(5, int(seconds / (time.perf_counter() - started))))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / repeats


def time_matrix_product(precision, device):
    """Time the product of two large matrices; return the operations per second."""
    matrix = torch.randn(MATRIX_SIDE, MATRIX_SIDE, device=device, dtype=PRECISIONS[precision])
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    rate = 2 * MATRIX_SIDE**3 / gpu_seconds(lambda: matrix @ matrix)
    torch.backends.cuda.matmul.allow_tf32 = False
    print_row(f"{precision} matrix product, {MATRIX_SIDE} x {MATRIX_SIDE}", "", f"{rate / 1e12:.0f} TFLOP/s", "")
    return rate


def time_step(n_images, mode, device, matrix_rate):
    """Time training steps on data in GPU memory, against the matrix rate of their precision; return the images/s.

    :param matrix_rate: operations per second, or None if it is unknown
    """
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch._dynamo.reset()  # otherwise a second size compiles a network for any size, and its row is of that
    choose_precision(mode.precision, device)
    torch.manual_seed(0)
    model = SSD300(21, pretrained=False).to(device, memory_format=torch.channels_last)
    images = torch.randint(256, (n_images, 3, 300, 300), dtype=torch.uint8, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    locs, scores, boxes, labels = random_batch(n_images, device)
    criterion = MultiBoxLoss(model.priors_cxcy)
    settings = argparse.Namespace(lr=1e-5, momentum=0.9, weight_decay=5e-4, precision=mode.precision)
    optimizer = train.make_optimizer(model, settings)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    torch.backends.cudnn.benchmark = mode.benchmark
    torch.use_deterministic_algorithms(mode.deterministic)
    try:
        network = compile_network(model, [images.shape], mode.precision) if mode.compiled else model
        batch = images, boxes, labels, None
        step = gpu_seconds(functools.partial(
            train.train_step, network, criterion, optimizer, scaler, batch, 1e-5, mode.precision, GRAD_CLIP
        ))  # fmt: skip
        memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB peak memory"
        share = f"{GFLOP_PER_IMAGE * 1e9 * n_images / step / matrix_rate:.2f} of matrix rate" if matrix_rate else ""
        rate = f"{n_images / step:.0f} images/s, {1000 * step:.1f} ms"
        print_row(f"step, batch {n_images}, {mode}", memory, rate, share)
        if not mode.compiled:
            loss = gpu_seconds(lambda: criterion(locs, scores, boxes, labels).backward(), seconds=0.5)
            print_row("  its loss alone", "", f"{1000 * loss:.2f} ms", f"{loss / step:.1%} of the step")
    finally:
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(False)
    return n_images / step


class Converted(torch.utils.data.Dataset):
    """A data set whose images have another dtype."""

    def __init__(self, dataset, dtype):
        self.dataset, self.dtype = dataset, dtype

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        image, *objects = self.dataset[key]
        return image.to(self.dtype), *objects


def time_loader(data_folder, dtype, device, bound, measured=5.0):
    """Time train.py's loader with images as floats or as bytes, and the joining and pinning of a batch alone.

    :param bound: images/s of bare decoding on all cores, or None if it is unknown
    :param measured: seconds to measure, after the batches that the loading processes have ready at first
    """
    is_pinned = device.type == "cuda"
    settings = train.parse_settings(["--data-folder", str(data_folder), "--iterations", "1000000"])
    dataset = Converted(train.training_set(settings), dtype)
    samples = [dataset[0, index % len(dataset)] for index in range(settings.batch_size)]

    def join():
        images = collate_fn(samples)[0]
        return images.pin_memory() if is_pinned else images

    (joining,) = seconds(join)
    name = f"{settings.batch_size} images as {dtype}".replace("torch.", "") + ", pinned" * is_pinned
    print_row(f"joining {name}", "", f"{1000 * joining:.2f} ms", f"{settings.batch_size / joining:.0f} images/s")
    n_ready, n_batches, started = 2 + 4 * settings.workers, 0, None
    for number, _ in enumerate(train.training_loader(settings, dataset, 0, device)):
        if number == n_ready:
            started = time.perf_counter()
        elif number > n_ready:
            n_batches += 1
            if time.perf_counter() - started >= measured:
                break
    rate = n_batches * settings.batch_size / (time.perf_counter() - started)
    ratio = f"{rate / bound:.2f} of decoding on all cores" if bound else ""
    print_row(f"loading {name}, {settings.workers} processes", "", f"{rate:.0f} images/s", ratio)


def time_training(data_folder, bounds, compiled):
    """Time train.py's own loop on image files, against the smaller of the known bounds.

    :param bounds: images/s of the step alone, and of bare decoding on all cores; those that are unknown are None
    """
    torch._dynamo.reset()
    with tempfile.TemporaryDirectory() as folder:
        settings = ["--data-folder", str(data_folder), "--output-folder", folder, "--no-pretrained"]
        settings += ["--iterations", "400", "--log-every", "50", "--warmup", "400", "--validate-every", "0"]
        settings += ["--grad-clip", str(GRAD_CLIP), "--compile" if compiled else "--no-compile"]
        train.train(train.parse_settings(settings))
        records = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    rates = [record["images_per_second"] for record in records if record["event"] == "train"]
    rate = statistics.median(rates[1:])
    bound = min((known for known in bounds if known), default=None)
    ratio = f"{rate / bound:.2f} of the smaller bound" if bound else ""
    name = f"training from files, batch 32{', compiled' * compiled}"
    print_row(name, f"{bound:.0f} images/s" if bound else "", f"{rate:.0f} images/s", ratio)


def time_evaluation(data_folder, device):
    """Time eval.py's own loop, and the share of it that is not spent waiting for images."""
    dataset = PascalVOCDataset(data_folder, "TEST", keep_difficult=True)
    model = SSD300(len(dataset.label_map), pretrained=False).to(device, memory_format=torch.channels_last)
    model.label_map = dataset.label_map
    repeated = torch.utils.data.ConcatDataset([dataset] * max(1, 4000 // len(dataset)))
    loader = eval_script.evaluation_loader(repeated, 32, count_cores(), device)
    for precision in ("fp32", "bf16"):
        choose_precision(precision, device)
        started = time.perf_counter()
        results, *_ = eval_script.evaluate(loader, model, precision=precision)
        wall = time.perf_counter() - started
        working = sum(results[f"{part}_seconds"] for part in ("network", "post_processing", "scoring"))
        ratio = f"{working / wall:.0%} not waiting for images"
        print_row(f"evaluation from files, {precision}", "", f"{results['images'] / wall:.0f} images/s", ratio)


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-folder", help="folder with the lists of a data set [temporary synthetic images]")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda adds training and evaluation")
    parser.add_argument("--compile", action="store_true", help="also time the compiled network")
    parser.add_argument("--inference", nargs="?", const="untrained", metavar="CHECKPOINT",
        help="time detection on the CPU, and nothing else, with this network [untrained]")  # fmt: skip
    settings = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
          f"PyTorch {torch.__version__}, torchvision {torchvision.__version__}")  # fmt: skip
    if settings.device == "cuda":
        if not torch.cuda.is_available():
            raise InputError("--device cuda: PyTorch finds no GPU; leave it out")
        make_deterministic()  # must precede the first CUDA call
        torch.use_deterministic_algorithms(False)
        print(torch.cuda.get_device_name())
    print_row("part", "PyTorch" if settings.inference else "loop version or bound", "ours", "ratio")
    timetable = Timetable(LONGEST)
    with tempfile.TemporaryDirectory() as folder:
        if not settings.data_folder:
            make_sample(folder, n_train=128, n_test=32)
        data_folder = settings.data_folder or folder
        if settings.inference:
            time_inference(data_folder, settings.inference, timetable)
        else:
            time_all(data_folder, torch.device(settings.device), settings.compile, timetable)
    for skipped in timetable.skipped:
        print(f"skipped: {skipped}")


def time_all(data_folder, device, with_compilation, timetable):
    """Run all parts that the device allows, the most telling first."""
    decode_rate = timetable.run("loading in one thread", time_loading, data_folder)
    bound = decode_rate and decode_rate * count_cores()
    for dtype in (torch.float32, torch.uint8):
        timetable.run(f"loading as {dtype}", time_loader, data_folder, dtype, device, bound)
    if device.type == "cuda":
        precisions = dict.fromkeys(mode.precision for _, mode in STEPS)
        matrix_rates = {
            precision: timetable.run(f"{precision} matrix product", time_matrix_product, precision, device, seconds=10)
            for precision in precisions
        }
        rates = {}
        for n_images, mode in [*STEPS, *(COMPILED_STEPS if with_compilation else ())]:
            rates[n_images, mode] = timetable.run(
                f"step, batch {n_images}, {mode}", time_step, n_images, mode, device, matrix_rates[mode.precision],
                seconds=90 if mode.compiled else 20,
            )  # fmt: skip
            if (n_images, mode) == (32, FAST):
                timetable.run("training from files", time_training, data_folder, [rates[32, FAST], bound], False)
        if with_compilation:
            bounds = [rates[32, COMPILED], bound]
            timetable.run("training from files, compiled", time_training, data_folder, bounds, True, seconds=90)
        timetable.run("evaluation from files", time_evaluation, data_folder, device)
    for part in (time_loss, time_detection, time_map, time_forward):
        timetable.run(part.__name__.replace("time_", ""), part, seconds=90)


if __name__ == "__main__":
    run_command(main)
