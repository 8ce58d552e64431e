"""Train SSD300 and torchvision's ssd300_vgg16 from scratch on the same images, and compare them.

python tests/proof.py mine --zero-based --output-folder runs/proof
python tests/proof.py mine --zero-based --output-folder runs/proof --systems ours-fp32 ours-compiled
python tests/proof.py mine --zero-based --output-folder runs/proof --compare-losses 200
torchrun --nproc-per-node=4 tests/proof.py mine --zero-based --output-folder runs/proof --systems ours

For a quick trial, add --iterations 8 --batch-size 2 --test-images 8. Trainings whose results are already in the output
folder are skipped, so the same command continues an interrupted proof.
"""

import argparse
import gc
import math
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torchvision
from torch.utils.data import Subset
from torchvision.models.detection import ssd300_vgg16
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import create_data_lists
import train
from datasets import PascalVOCDataset
from eval import detect_all, evaluation_loader, score
from model import MultiBoxLoss, load_model
from support.devices import (
    batches_on,
    choose_precision,
    find_device,
    join_processes,
    leave_processes,
    mixed_precision,
    n_processes,
    name_hardware,
    rank,
    sum_over_processes,
)
from support.files import DivergenceError, InputError, check_outputs, make_folder, read_json, run_command, write_json
from support.images import read_size
from support.results import coco_results, coco_scores, image_names, import_pycocotools, read_coco_ids
from support.runlog import describe_run
from utils import IMAGE_SIZE, IMAGENET_MEAN, IMAGENET_STD

# Training from scratch; it takes some minutes on a large GPU.
RECIPE = (
    "--no-pretrained --batch-size 32 --iterations 6000 --lr 0.001 --warmup 500 --decay-at 4500 5500 --grad-clip 5 "
    "--checkpoint-every 1000000 --validate-every 0"
)
SYSTEMS = {
    "ours": "--precision auto",
    "ours-fp32": "--precision fp32",
    "ours-compiled": "--precision auto --compile",
    "torchvision": "--precision fp32",  # with convolutions in TF32, PyTorch's default on a GPU
    "torchvision-bf16": "--precision bf16",
}
FIGURES = {  # name in the JSON files: (heading, factor and number of digits in the table)
    "mAP_11_point": ("mAP, 11-point", 1, 4),
    "mAP_area": ("mAP, area", 1, 4),
    "coco_AP": ("COCO AP", 1, 4),
    "training_seconds": ("training, s", 1, 1),
    "images_per_second": ("images/s", 1, 1),
    "peak_memory": ("peak memory, GiB", 2**-30, 2),
}
# Options that are passed on to train.py, and settings in which compared trainings may differ.
PASSED_ON = ("--batch-size", "--iterations", "--lr", "--decay-at", "--momentum", "--weight-decay", "--warmup",
             "--grad-clip", "--no-augmentation", "--workers")  # fmt: skip
OWN_SETTINGS = ("data_folder", "output_folder", "seed", "precision", "compile")
TORCHVISION_MEAN, TORCHVISION_STD = (0.48235, 0.45882, 0.40784), 1 / 255  # of its input normalisation, RGB in 0-1


def parse_arguments(arguments=None):
    """Return the settings of this script and the arguments for train.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog=f"Options that are passed on to train.py: {', '.join(PASSED_ON)}.",
    )  # fmt: skip
    add = parser.add_argument
    add("root", help="folder in VOC's layout with the splits trainval and test")
    add("--output-folder", required=True, help="for the lists, a folder and a JSON file per training, and proof.json")
    add("--zero-based", action="store_true", help="the annotations count pixels from 0")
    add("--systems", nargs="+", choices=SYSTEMS, default=["ours", "torchvision"], help="systems [ours torchvision]")
    add("--seeds", nargs="+", type=int, default=[0, 1], help="train each system once per seed [0 1]")
    add("--test-images", type=int, metavar="N", help="evaluate on the first N test images only")
    add("--compare-losses", type=int, metavar="N",
        help="instead, train both networks side by side in fp32 for N iterations, from the same weights")  # fmt: skip
    settings, rest = parser.parse_known_args(arguments)
    for word in rest:
        if word.startswith("--") and word.partition("=")[0] not in PASSED_ON:
            parser.error(f"{word}: only {', '.join(PASSED_ON)} are passed on to train.py")
    if settings.compare_losses is not None and settings.compare_losses < 1:
        parser.error("--compare-losses: must be 1 or more")
    return settings, rest


def make_torchvision(label_map):
    """Return torchvision's unmodified network for these classes and for ImageNet-normalised images."""
    mean, std, their_mean = (
        torch.tensor(values, dtype=torch.float64) for values in (IMAGENET_MEAN, IMAGENET_STD, TORCHVISION_MEAN)
    )
    model = ssd300_vgg16(
        weights=None, weights_backbone=None, num_classes=len(label_map),
        image_mean=((their_mean - mean) / std).tolist(), image_std=(TORCHVISION_STD / std).tolist(),
    )  # fmt: skip
    model.label_map = label_map
    return model


def step_torchvision(model, optimizer, batch, rate, settings):
    """Update torchvision's network once, with its own loss; return the loss."""
    images, boxes, labels, _ = batch
    targets = [
        {"boxes": (IMAGE_SIZE * image_boxes).to(images.device), "labels": image_labels.to(images.device)}
        for image_boxes, image_labels in zip(boxes, labels, strict=True)
    ]
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]
    with mixed_precision(settings.precision, images.device):
        loss = sum(model(list(images), targets).values())
    optimizer.zero_grad()
    loss.backward()
    if settings.grad_clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
    optimizer.step()
    return loss.detach()


def batches_of(settings, dataset, device):
    """Return the batches on which train.py trains with these settings."""
    loader = train.training_loader(settings, dataset, 0, device)
    return batches_on(device, tqdm(loader, "training", unit="it", disable=None))


def train_torchvision(settings):
    """Train torchvision's network on train.py's batches, with its optimizer and schedule; return the network."""
    device = find_device()
    choose_precision(settings.precision, device)
    torch.backends.cudnn.allow_tf32 = True
    dataset = train.training_set(settings)
    torch.manual_seed(settings.seed)
    model = make_torchvision(dataset.label_map).to(device).train()
    optimizer = train.make_optimizer(model, settings)
    for iteration, batch in enumerate(batches_of(settings, dataset, device)):
        loss = step_torchvision(model, optimizer, batch, train.learning_rate(iteration, settings), settings)
        check_loss = iteration % settings.log_every == 0 or iteration + 1 == settings.iterations
        if check_loss and not loss.isfinite():
            raise DivergenceError(f"torchvision's loss at iteration {iteration + 1} is not finite")
    return model


def train_ours(settings):
    """Train our network with train.py; return the network."""
    model, complete = train.train(settings)
    if not complete:
        raise InputError("interrupted; the same command restarts this training")
    return model


@torch.inference_mode()
def detect_by_torchvision(loader, model):
    """Return torchvision's detections, after its own post-processing, and the ground truth, as `detect_all` does."""
    model.eval()
    detections, ground_truth = ([[], [], []] for _ in range(2))
    for images, *objects in batches_on(find_device(), tqdm(loader, "evaluating", unit="batch", disable=None)):
        results = model(list(images))
        boxes, labels, scores = ([result[key] for result in results] for key in ("boxes", "labels", "scores"))
        boxes = [image_boxes / IMAGE_SIZE for image_boxes in boxes]
        for collected, parts in zip([*detections, *ground_truth], [boxes, labels, scores, *objects], strict=True):
            collected.extend(part.cpu() for part in parts)
    return detections, ground_truth


def detect_by_ours(loader, model):
    """Return our network's detections and the ground truth."""
    return detect_all(loader, model)[:2]


def evaluate(model, detect, settings, n_images):
    """Return a trained network's mAPs in fp32 on the first `n_images` test images, or on all if None."""
    dataset = PascalVOCDataset(settings.data_folder, "TEST", keep_difficult=True)
    paths = dataset.images[:n_images]
    loader = evaluation_loader(Subset(dataset, range(len(paths))), 32, settings.workers, find_device())
    choose_precision("fp32", find_device())
    detections, ground_truth = detect(loader, model)
    results, _ = score(detections, ground_truth, model.label_map)
    offsets = dataset.objects.offsets[: len(paths) + 1]
    parts = {name: getattr(dataset.objects, name)[: offsets[-1]] for name in ("boxes", "labels", "difficulties")}
    objects = argparse.Namespace(offsets=offsets, **parts)
    ids = read_coco_ids(settings.data_folder, "TEST", image_names(paths), objects, model.label_map)
    coco = coco_scores(coco_results(detections, [read_size(path) for path in paths], ids), objects, ids)
    return {
        "test_images": len(paths), "mAP_11_point": results["mAP_11_point"], "mAP_area": results["mAP_area"],
        **{f"coco_{name}": coco[name] for name in ("AP", "AP50", "AP75")},
    }  # fmt: skip


def prove(system, settings, common):
    """Train and evaluate a system; return the results as plain values by name, or None on all ranks but 0.

    :param common: the result of `conditions`
    """
    gc.collect()  # free the memory of an earlier training
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    train_system, detect = (train_ours, detect_by_ours)
    if system.startswith("torchvision"):
        train_system, detect = (train_torchvision, detect_by_torchvision)
    started = time.perf_counter()
    model = train_system(settings)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - started
    scores = evaluate(model, detect, settings, common["test_images"])  # all processes share the images
    if rank() > 0:
        return None
    return {
        **describe_run(vars(settings), list(model.label_map), choose_precision(settings.precision, find_device())),
        "event": "proof", "system": system, "seed": settings.seed, "conditions": common,
        "training_seconds": elapsed, "images_per_second": settings.iterations * settings.batch_size / elapsed,
        "peak_memory": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        **scores,
    }  # fmt: skip


def conditions(settings, arguments):
    """Return the conditions that compared trainings must share."""
    common = {name: value for name, value in vars(settings).items() if name not in OWN_SETTINGS}
    return {
        **common, "data": train.training_set(settings).fingerprint, "test_images": arguments.test_images,
        "hardware": name_hardware(), "torch": torch.__version__, "torchvision": torchvision.__version__,
    }  # fmt: skip


def read_runs(folder, expected):
    """Return the results of the trainings in a folder, as `prove` returns them, by the paths of their files.

    :raises InputError: if the conditions of a training differ from the expected ones; names the file
    """
    runs = {}
    for name in sorted(os.listdir(folder)):
        if not re.fullmatch(rf"({'|'.join(SYSTEMS)})(-\d+-processes)?-\d+\.json", name):
            continue
        path = os.path.join(folder, name)
        runs[path] = read_json(path, "remove it")
        differing = [name for name, value in expected.items() if runs[path]["conditions"].get(name) != value]
        if differing:
            raise InputError(f"{path}: differs in {', '.join(differing)}; give another --output-folder")
    return runs


def compare_losses(settings):
    """Train both networks side by side in fp32, from torchvision's initial weights, on the same batches.

    :return: a dict per iteration: torchvision's loss; our loss on torchvision's predictions and matches; the number of
        images in which our matches differ from torchvision's; the loss of our own network
    """
    device = find_device()
    choose_precision("fp32", device)
    dataset = train.training_set(settings)
    torch.manual_seed(settings.seed)
    theirs = make_torchvision(dataset.label_map).to(device).train()
    with tempfile.TemporaryDirectory() as folder:
        torch.save(theirs.state_dict(), os.path.join(folder, "torchvision.pth"))
        ours = load_model(os.path.join(folder, "torchvision.pth"), device, dataset.label_map).train()
    criterion, same_matches = (MultiBoxLoss(ours.priors_cxcy) for _ in range(2))
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    our_optimizer, optimizer = (train.make_optimizer(model, settings) for model in (ours, theirs))
    recorded, compute_loss = {}, theirs.compute_loss

    def record_and_compute_loss(targets, outputs, anchors, matches):
        recorded.update(targets=targets, outputs=outputs, matches=matches)
        return compute_loss(targets, outputs, anchors, matches)

    theirs.compute_loss = record_and_compute_loss
    rows = []
    for iteration, batch in enumerate(batches_of(settings, dataset, device)):
        rate = train.learning_rate(iteration, settings)
        their_loss = step_torchvision(theirs, optimizer, batch, rate, settings).item()
        matches = recorded_matches(recorded)
        with torch.no_grad():
            same_matches.match = lambda *_, matches=matches: matches
            outputs = recorded["outputs"]
            given_loss = same_matches(outputs["bbox_regression"], outputs["cls_logits"], *batch[1:3]).item()
            n_differing = (criterion.match(*batch[1:3])[1] != matches[1]).any(dim=1).sum().item()
        losses = train.train_step(ours, criterion, our_optimizer, scaler, batch, rate, "fp32", settings.grad_clip)
        our_loss = losses[:2].sum().item()
        rows.append(
            {"torchvision": their_loss, "same_matches": given_loss, "matched_otherwise": n_differing, "ours": our_loss}
        )
        if not math.isfinite(their_loss + our_loss):
            raise DivergenceError(f"a loss at iteration {iteration + 1} is not finite: {rows[-1]}")
    return rows


def recorded_matches(recorded):
    """Return torchvision's matches as `MultiBoxLoss.match` does: boxes (N, 8732, 4), labels (N, 8732)."""
    boxes, labels = [], []
    for target, matched in zip(recorded["targets"], recorded["matches"], strict=True):
        if len(target["labels"]):
            boxes.append(target["boxes"][matched.clamp(min=0)] / IMAGE_SIZE)
            labels.append(torch.where(matched >= 0, target["labels"][matched.clamp(min=0)], 0))
        else:
            boxes.append(torch.arange(4, device=matched.device).expand(len(matched), 4) // 2 * 1.0)
            labels.append(torch.zeros_like(matched))
    return torch.stack(boxes), torch.stack(labels)


def print_losses(rows):
    """Print some iterations of `compare_losses`, with the largest relative difference so far."""
    print(f"\n{'':9} {'':12} {'ours, on its matches':>28} {'images matched':>16} {'ours':>28}")
    columns = f"{'loss':>12} {'max. difference':>15}"
    print(f"{'iteration':>9} {'torchvision':>12} {columns} {'differently, sum':>16} {columns}")
    largest, n_differing, differences = {"same_matches": 0.0, "ours": 0.0}, 0, []
    for number, row in enumerate(rows, start=1):
        relative = {name: abs(row[name] - row["torchvision"]) / (row["torchvision"] or 1) for name in largest}
        largest = {name: max(before, relative[name]) for name, before in largest.items()}
        differences.append(relative["ours"])
        n_differing += row["matched_otherwise"]
        if number in (1, 2, 5, 10, 20, 50) or number % 100 == 0 or number == len(rows):
            given, own = (f"{row[name]:12.6f} {difference:15.1e}" for name, difference in largest.items())
            print(f"{number:9} {row['torchvision']:12.6f} {given} {n_differing:16} {own}")
    print(f"median difference of ours over {len(rows)} iterations: {statistics.median(differences):.1e}")


def summarize(runs):
    """Return {system: {figure: {"mean", "low", "high", "seeds"}}} of the results of `prove`."""
    summary = {}
    for system in dict.fromkeys(run["system"] for run in runs):
        for figure in FIGURES:
            values = [run[figure] for run in runs if run["system"] == system and run[figure] is not None]
            if values:
                figures = {"mean": sum(values) / len(values), "low": min(values), "high": max(values)}
                summary.setdefault(system, {})[figure] = {**figures, "seeds": len(values)}
    return summary


def print_summary(summary):
    """Print a table of all figures as mean and range over the seeds, and compare each system with ours."""
    print(f"{'':18}" + "".join(f"{heading:>30}" for heading, _, _ in FIGURES.values()))
    for system, figures in summary.items():
        cells = []
        for figure, (_, factor, digits) in FIGURES.items():
            if figure in figures:
                mean, low, high = (f"{figures[figure][key] * factor:.{digits}f}" for key in ("mean", "low", "high"))
            cells.append(f"{mean} ({low} to {high})" if figure in figures else "-")
        print(f"{system:18}" + "".join(f"{cell:>30}" for cell in cells))
    ours = summary.get("ours", {})
    for system, figures in summary.items():
        if system != "ours" and "mAP_11_point" in ours and "mAP_11_point" in figures:
            difference = ours["mAP_11_point"]["mean"] - figures["mAP_11_point"]["mean"]
            spread = max(each["mAP_11_point"]["high"] - each["mAP_11_point"]["low"] for each in (ours, figures))
            speed = figures["training_seconds"]["mean"] / ours["training_seconds"]["mean"]
            print(f"ours against {system}: mAP {difference:+.4f} (range over seeds: {spread:.4f}), "
                  f"{speed:.2f} times as fast")  # fmt: skip


def main():
    """Run the command line."""
    arguments, rest = parse_arguments()
    folder = arguments.output_folder
    import_pycocotools()
    join_processes()
    try:
        if n_processes() > 1 and (arguments.compare_losses or any("torchvision" in name for name in arguments.systems)):
            raise InputError("torchvision's network trains in a single process; with torchrun, give --systems ours")
        if rank() == 0:
            make_folder(folder)
            lists = ["--train", arguments.root, "--test", arguments.root, "--labels", "auto", "--output-folder", folder]
            lists += ["--zero-based"] * arguments.zero_based
            create_data_lists.make_lists(create_data_lists.parse_arguments(lists))
        sum_over_processes(torch.zeros(1))  # wait for rank 0
        suffix = f"-{n_processes()}-processes" if n_processes() > 1 else ""

        def settings_of(system, seed, *more):
            name = os.path.join(folder, f"{system}{suffix}-{seed}")
            given = ["--data-folder", folder, "--output-folder", name, "--overwrite", "--seed", str(seed)]
            settings = train.parse_settings([*RECIPE.split(), *rest, *SYSTEMS[system].split(), *given, *more])
            choose_precision(settings.precision, find_device())  # raises InputError if the device does not support it
            return settings

        if arguments.compare_losses:
            settings = settings_of("torchvision", arguments.seeds[0], "--iterations", str(arguments.compare_losses))
            path = os.path.join(folder, "losses.json")
            check_outputs(path)
            rows = compare_losses(settings)
            print_losses(rows)
            write_json({path: rows})
            return
        plan = [(system, settings_of(system, seed)) for seed in arguments.seeds for system in arguments.systems]
        common = conditions(plan[0][1], arguments)
        done = read_runs(folder, common)
        for system, settings in plan:
            path = f"{settings.output_folder}.json"
            if path in done:
                continue
            if rank() == 0:
                print(f"\n{system}, seed {settings.seed}", flush=True)
            result = prove(system + suffix, settings, common)
            if rank() == 0:
                done[path] = result
                write_json({path: result})
            sum_over_processes(torch.zeros(1))  # wait for rank 0
        if rank() == 0:
            runs = list(done.values())
            summary = summarize(runs)
            print_summary(summary)
            write_json({os.path.join(folder, "proof.json"): {"summary": summary, "runs": runs}})
    finally:
        leave_processes()


if __name__ == "__main__":
    run_command(main)
