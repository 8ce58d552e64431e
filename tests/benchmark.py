"""Time the fast functions against the loop versions of reference.py, and training on a GPU against its bounds.

python tests/benchmark.py
python tests/benchmark.py --data-folder data/voc --device cuda --compile

The figures of a ratio are measured in turn, in the same run on the same machine. Ratios differ between machines.
"""

import argparse
import functools
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import reference
import torch
import torchvision
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import eval as eval_script
import train
from datasets import PascalVOCDataset
from model import SSD300, MultiBoxLoss
from support.devices import choose_precision, compile_network, count_cores, make_deterministic
from support.files import run_command
from support.sample import make_sample
from utils import IMAGENET_MEAN, IMAGENET_STD, calculate_mAP

GFLOP_PER_IMAGE = 188.2  # of a training step, 21 classes: 31.37 G multiply-adds forward, x 2 operations, x 3 passes
STEP_BATCHES = (32, 128)


def seconds(*functions, rounds=7):
    """Return the median time of each function; they run in turn, after one warm-up round."""
    times = [[] for _ in functions]
    for number in range(rounds + 1):
        for function, taken in zip(functions, times, strict=True):
            started = time.perf_counter()
            function()
            if number:
                taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in times]


def print_row(part, theirs, ours, ratio):
    """Print a row of the table."""
    print(f"{part:58} {theirs:>26} {ours:>22} {ratio:>26}", flush=True)


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
    decoding, train_time, test_time = seconds(decode, lambda: load(training), lambda: load(testing))
    (looping,) = seconds(step_by_step, rounds=1)
    torch.set_num_threads(threads)
    decode_rate, train_rate, test_rate = (len(indices) / taken for taken in (decoding, train_time, test_time))
    loop_rate = len(indices[:16]) / looping
    print_row("bare decoding, one thread", "", f"{decode_rate:.0f} images/s", "")
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


def gpu_seconds(function, repeats=20):
    """Return the GPU time of one call, after three warm-up calls."""
    for _ in range(3):
        function()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / repeats


def time_steps(device, with_compilation):
    """Time training steps on data in GPU memory, against the bf16 matrix rate; return the best images/s at batch 32."""
    matrix = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    matrix_rate = 2 * 8192**3 / gpu_seconds(lambda: matrix @ matrix)
    print_row("bf16 matrix product, 8192 x 8192", "", f"{matrix_rate / 1e12:.0f} TFLOP/s", "")
    modes = {
        "fp32": ("fp32", False, False),
        "bf16, channels last": ("bf16", True, False),
        "bf16, channels last, deterministic": ("bf16", True, False),
    }
    if with_compilation:
        modes["bf16, channels last, compiled"] = ("bf16", True, True)
    rates = {}
    for n_images in STEP_BATCHES:
        for name, (precision, channels_last, compiled) in modes.items():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            choose_precision(precision, device)
            torch.use_deterministic_algorithms(name.endswith("deterministic"))
            torch.manual_seed(0)
            model = SSD300(21, pretrained=False).to(device)
            images = torch.randn(n_images, 3, 300, 300, device=device)
            if channels_last:
                model.to(memory_format=torch.channels_last)
                images = images.contiguous(memory_format=torch.channels_last)
            network = compile_network(model, images.shape, precision) if compiled else model
            criterion = MultiBoxLoss(model.priors_cxcy)
            settings = argparse.Namespace(lr=1e-5, momentum=0.9, weight_decay=5e-4, grad_clip=0, precision=precision)
            optimizer = train.make_optimizer(model, settings)
            scaler = torch.amp.GradScaler(device.type, enabled=False)
            locs, scores, boxes, labels = random_batch(n_images, device)
            batch = images, boxes, labels, None
            step = gpu_seconds(functools.partial(
                train.train_step, network, criterion, optimizer, scaler, batch, 1e-5, precision
            ))  # fmt: skip
            rates[n_images, name] = n_images / step
            share = GFLOP_PER_IMAGE * 1e9 * n_images / step / matrix_rate
            ratio = f"{share:.2f} of matrix rate, {rates[n_images, name] / rates[n_images, 'fp32']:.1f} x fp32"
            memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB peak memory"
            print_row(f"step, batch {n_images}, {name}", memory, f"{n_images / step:.0f} images/s", ratio)
            if precision == "bf16" and not compiled:
                loss = gpu_seconds(lambda c=criterion, b=(locs, scores, boxes, labels): c(*b).backward())
                print_row(
                    f"loss alone, batch {n_images}", "", f"{1000 * loss:.2f} ms", f"{loss / step:.1%} of the step"
                )
    torch.use_deterministic_algorithms(False)
    return max(rate for (n_images, _), rate in rates.items() if n_images == STEP_BATCHES[0])


def time_training(data_folder, step_rate, decode_rate, with_compilation):
    """Time train.py's own loop on image files, against the step alone and against decoding on all cores."""
    with tempfile.TemporaryDirectory() as folder:
        settings = ["--data-folder", str(data_folder), "--output-folder", folder, "--no-pretrained"]
        settings += ["--iterations", "400", "--log-every", "100", "--warmup", "400", "--validate-every", "0"]
        settings += ["--compile"] * with_compilation
        train.train(train.parse_settings(settings))
        records = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    rate = statistics.median(record["images_per_second"] for record in records[2:] if record["event"] == "train")
    bound = min(step_rate, decode_rate * count_cores())
    ratio = f"{rate / bound:.2f} of the smaller bound"
    print_row("training from files, batch 32", f"{bound:.0f} images/s", f"{rate:.0f} images/s", ratio)


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
    settings = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
          f"PyTorch {torch.__version__}, torchvision {torchvision.__version__}")  # fmt: skip
    if settings.device == "cuda":
        make_deterministic()  # must precede the first CUDA call
        torch.use_deterministic_algorithms(False)
        print(torch.cuda.get_device_name())
    print_row("part", "loop version or bound", "ours", "ratio")
    with tempfile.TemporaryDirectory() as folder:
        if not settings.data_folder:
            make_sample(folder, n_train=128, n_test=32)
        data_folder = settings.data_folder or folder
        decode_rate = time_loading(data_folder)
        time_loss()
        time_detection()
        time_map()
        time_forward()
        if settings.device == "cuda":
            device = torch.device("cuda")
            step_rate = time_steps(device, settings.compile)
            time_training(data_folder, step_rate, decode_rate, settings.compile)
            time_evaluation(data_folder, device)


if __name__ == "__main__":
    run_command(main)
