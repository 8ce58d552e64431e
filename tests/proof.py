"""Train SSD300 and torchvision's ssd300_vgg16 from scratch on the same images, and compare them.

python tests/proof.py mine --zero-based --output-folder runs/proof
python tests/proof.py mine --zero-based --output-folder runs/proof --systems ours-tf32 ours-from-torchvision torchvision
python tests/proof.py mine --zero-based --output-folder runs/proof --compare-losses 200
torchrun --nproc-per-node=4 tests/proof.py mine --zero-based --output-folder runs/proof --systems ours

For a quick trial, add --iterations 8 --batch-size 2 --test-images 8. The same command continues a proof that was
interrupted or killed: trainings whose results are in the output folder are skipped, others go on from their checkpoint.
"""

import argparse
import gc
import itertools
import math
import os
import re
import statistics
import sys
import tempfile
from contextlib import suppress
from functools import partial
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
from support import runs
from support.checkpoints import load_optimizer, save_weights
from support.devices import (
    PRECISIONS,
    Interruption,
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
from support.files import (
    DivergenceError,
    InputError,
    atomic_writer,
    check_outputs,
    make_folder,
    read_json,
    run_command,
    write_json,
)
from support.images import read_size
from support.results import coco_results, coco_scores, image_names, import_pycocotools, read_coco_ids
from support.runlog import RunLog, Stopwatch, describe_run, read_log
from utils import IMAGE_SIZE

# Training from scratch; it takes some minutes on a large GPU. A training that is killed repeats at most 200 iterations.
RECIPE = (
    "--batch-size 32 --iterations 6000 --lr 0.001 --warmup 500 --decay-at 4500 5500 --grad-clip 5 "
    "--checkpoint-every 200 --validate-every 0"
)
SYSTEMS = {  # on a CPU, tf32 becomes fp32
    "ours": "--precision auto --no-pretrained",  # as train.py trains by default
    "ours-eager": "--precision auto --no-compile --no-pretrained",
    "ours-fp32": "--precision fp32 --no-compile --no-pretrained",
    "ours-tf32": "--precision tf32 --no-compile --no-pretrained",
    "ours-coco-priors": "--precision tf32 --no-compile --no-pretrained --priors coco",
    # Starts as the same network as torchvision's; the difference is in matching, loss and post-processing.
    "ours-from-torchvision": "--precision tf32 --no-compile --init-from torchvision-{seed}.pth",
    "torchvision": "--precision tf32 --no-pretrained",  # PyTorch's default on a GPU
    "torchvision-bf16": "--precision bf16 --no-pretrained",
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
             "--grad-clip", "--no-augmentation", "--workers", "--checkpoint-every")  # fmt: skip
OWN_SETTINGS = ("data_folder", "output_folder", "seed", "precision", "compile", "no_pretrained", "init_from", "priors",
                "checkpoint_every", "workers")  # fmt: skip
INTERRUPTED = "interrupted and saved; the same command continues this training"


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
    add("--precision", choices=PRECISIONS, help="of all systems [that of the system]")
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
    """Return torchvision's unmodified network for these classes; it takes a list of float RGB images of 0-1."""
    model = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=len(label_map))
    model.label_map = label_map
    return model


def step_torchvision(model, optimizer, batch, rate, settings):
    """Update torchvision's network once, with its own loss; return the loss. The images are bytes."""
    images, boxes, labels, _ = batch
    targets = [
        {"boxes": (IMAGE_SIZE * image_boxes).to(images.device), "labels": image_labels.to(images.device)}
        for image_boxes, image_labels in zip(boxes, labels, strict=True)
    ]
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]
    with mixed_precision(settings.precision, images.device):
        loss = sum(model(list(images / 255), targets).values())
    optimizer.zero_grad()
    loss.backward()
    if settings.grad_clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
    optimizer.step()
    return loss.detach()


def batches_of(settings, dataset, device, iteration=0):
    """Return the batches on which train.py trains with these settings, from an iteration on."""
    loader = train.training_loader(settings, dataset, iteration, device)
    return batches_on(device, tqdm(loader, "training", unit="it", disable=None))


def checkpoint_path(settings):
    """Return the path of a training's checkpoint."""
    return os.path.join(settings.output_folder, "checkpoint.pth")


def updates_made(settings):
    """Return the number of updates that the checkpoint of a training holds, 0 if there is none."""
    path = checkpoint_path(settings)
    return torch.load(path, weights_only=True, mmap=True)["iteration"] if os.path.exists(path) else 0


def train_torchvision(settings):
    """Train torchvision's network on train.py's batches, with its optimizer, schedule and log; return the network.

    It goes on from the checkpoint in the output folder, if there is one.
    """
    device = find_device()
    precision = choose_precision(settings.precision, device)
    torch.backends.cudnn.benchmark = True  # as train.py does
    dataset = train.training_set(settings)
    torch.manual_seed(settings.seed)
    model = make_torchvision(dataset.label_map).to(device).train()
    optimizer = train.make_optimizer(model, settings)
    path, iteration = checkpoint_path(settings), updates_made(settings)
    make_folder(settings.output_folder)
    if iteration:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(checkpoint["model"])
        load_optimizer(optimizer, torch.amp.GradScaler(device.type, enabled=False), checkpoint, path)
    keep = partial(runs.is_still_true, iteration, settings.log_every, False)
    log = RunLog(settings.output_folder, describe_run(vars(settings), list(dataset.label_map), precision), keep)
    stopwatch = Stopwatch()
    with Interruption() as interruption:
        for batch in batches_of(settings, dataset, device, iteration):
            stopwatch.stop_waiting()
            loss = step_torchvision(model, optimizer, batch, train.learning_rate(iteration, settings), settings)
            iteration += 1
            log_now = runs.is_due(iteration, settings.log_every, settings.iterations)
            save_now = runs.is_due(iteration, settings.checkpoint_every, settings.iterations) or interruption.requested
            if (log_now or save_now) and not loss.isfinite():
                raise DivergenceError(f"torchvision's loss at iteration {iteration} is not finite")
            if log_now:
                figures = stopwatch.figures(settings.batch_size)
                log.append({"event": "train", "iteration": iteration, "loss": loss.item(), **figures})
            if save_now:
                with atomic_writer(path) as file:
                    parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "iteration": iteration}
                    torch.save(parts, file)
            if interruption.requested and iteration < settings.iterations:
                raise InputError(INTERRUPTED)
            if log_now:
                stopwatch = Stopwatch()  # saving does not count, as in train.py
            stopwatch.start_waiting()
    return model


def with_weights_of(theirs, device="cpu"):
    """Return our network with the weights, the priors and the input of torchvision's."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "torchvision.pth")
        torch.save(theirs.state_dict(), path)
        model = load_model(path, device, theirs.label_map)
    model.label_map = theirs.label_map  # 21 classes would be taken for VOC's
    return model


def train_ours(settings):
    """Train our network with train.py, from the checkpoint in the output folder if there is one; return the network."""
    n_updates = updates_made(settings)
    if n_updates >= settings.iterations:
        return load_model(checkpoint_path(settings), find_device())
    if n_updates:
        settings.resume = checkpoint_path(settings)
    elif settings.init_from and rank() == 0:
        torch.manual_seed(settings.seed)
        save_weights(settings.init_from, with_weights_of(make_torchvision(train.training_set(settings).label_map)))
    sum_over_processes(torch.zeros(1))  # wait for rank 0
    model, complete = train.train(settings)
    if not complete:
        raise InputError(INTERRUPTED)
    return model


def training_seconds(settings):
    """Return the duration of all iterations by the log of a training, without starting, compiling and saving."""
    seconds, iteration = 0.0, 0
    for record in read_log(settings.output_folder):
        if record["event"] == "train":
            seconds += (record["iteration"] - iteration) * settings.batch_size / record["images_per_second"]
            iteration = record["iteration"]
    return seconds


@torch.inference_mode()
def detect_by_torchvision(loader, model):
    """Return torchvision's detections, after its own post-processing, and the ground truth, as `detect_all` does."""
    model.eval()
    detections, ground_truth = ([[], [], []] for _ in range(2))
    for images, *objects in batches_on(find_device(), tqdm(loader, "evaluating", unit="batch", disable=None)):
        results = model(list(images / 255))
        boxes, labels, scores = ([result[key] for result in results] for key in ("boxes", "labels", "scores"))
        boxes = [image_boxes / IMAGE_SIZE for image_boxes in boxes]
        for collected, parts in zip([*detections, *ground_truth], [boxes, labels, scores, *objects], strict=True):
            collected.extend(part.cpu() for part in parts)
    return detections, ground_truth


def detect_by_ours(loader, model):
    """Return our network's detections and the ground truth."""
    return detect_all(loader, model)[:2]


def evaluate(model, detect, settings, n_images):
    """Return a trained network's mAPs in fp32 on the first `n_images` test images, or on all if None.

    COCO's are None if pycocotools is not installed.
    """
    dataset = PascalVOCDataset(settings.data_folder, "TEST", keep_difficult=True)
    paths = dataset.images[:n_images]
    loader = evaluation_loader(Subset(dataset, range(len(paths))), 32, settings.workers, find_device())
    choose_precision("fp32", find_device())
    detections, ground_truth = detect(loader, model)
    results, _ = score(detections, ground_truth, model.label_map)
    coco = dict.fromkeys(("AP", "AP50", "AP75"))
    with suppress(InputError):
        import_pycocotools()
        offsets = dataset.objects.offsets[: len(paths) + 1]
        parts = {name: getattr(dataset.objects, name)[: offsets[-1]] for name in ("boxes", "labels", "difficulties")}
        objects = argparse.Namespace(offsets=offsets, **parts)
        ids = read_coco_ids(settings.data_folder, "TEST", image_names(paths), objects, model.label_map)
        coco = coco_scores(coco_results(detections, [read_size(path) for path in paths], ids), objects, ids)
    return {
        "test_images": len(paths), "mAP_11_point": results["mAP_11_point"], "mAP_area": results["mAP_area"],
        **{f"coco_{name}": coco[name] for name in ("AP", "AP50", "AP75")},
    }  # fmt: skip


def prove(system, settings, n_images):
    """Train and evaluate a system; return the results as plain values by name, or None on all ranks but 0.

    The peak memory is that of the last call that trained; None if all updates were made by an earlier call.

    :param n_images: as for `evaluate`
    """
    gc.collect()  # free the memory of an earlier training
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    train_system, detect = (train_ours, detect_by_ours)
    if system.startswith("torchvision"):
        train_system, detect = (train_torchvision, detect_by_torchvision)
    measures_memory = torch.cuda.is_available() and updates_made(settings) < settings.iterations
    model = train_system(settings)
    peak_memory = torch.cuda.max_memory_allocated() if measures_memory else None
    scores = evaluate(model, detect, settings, n_images)  # all processes share the images
    if rank() > 0:
        return None
    seconds = training_seconds(settings)
    return {
        **describe_run(vars(settings), list(model.label_map), choose_precision(settings.precision, find_device())),
        "event": "proof", "system": system, "seed": settings.seed, "training_seconds": seconds,
        "images_per_second": settings.iterations * settings.batch_size / seconds, "peak_memory": peak_memory, **scores,
    }  # fmt: skip


def conditions(settings, arguments):
    """Return the conditions that compared trainings must share."""
    common = {name: value for name, value in vars(settings).items() if name not in OWN_SETTINGS}
    return {
        **common, "data": train.training_set(settings).fingerprint, "test_images": arguments.test_images,
        "precision": arguments.precision,
        "hardware": name_hardware(), "torch": torch.__version__, "torchvision": torchvision.__version__,
    }  # fmt: skip


def check_conditions(folder, expected):
    """Write the conditions of the trainings in a folder, or compare them with those of earlier calls.

    :raises InputError: if they differ
    """
    path = os.path.join(folder, "conditions.json")
    if not os.path.exists(path):
        write_json({path: expected})
    earlier = read_json(path, "give another --output-folder")
    differing = [name for name, value in expected.items() if earlier.get(name) != value]
    if differing:
        raise InputError(f"{path}: differs in {', '.join(differing)}; give another --output-folder")


def read_runs(folder):
    """Return the results of the trainings in a folder, as `prove` returns them, by the paths of their files."""
    pattern = rf"({'|'.join(SYSTEMS)})(-\d+-processes)?-\d+\.json"
    paths = [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if re.fullmatch(pattern, name)]
    return {path: read_json(path, "remove it") for path in paths}


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
    ours = with_weights_of(theirs, device).train()
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
    """Print a table of all figures as mean and range over the seeds, and compare our systems with torchvision's."""
    print(f"{'':24}" + "".join(f"{heading:>30}" for heading, _, _ in FIGURES.values()))
    for system, figures in summary.items():
        cells = []
        for figure, (_, factor, digits) in FIGURES.items():
            if figure in figures:
                mean, low, high = (f"{figures[figure][key] * factor:.{digits}f}" for key in ("mean", "low", "high"))
            cells.append(f"{mean} ({low} to {high})" if figure in figures else "-")
        print(f"{system:24}" + "".join(f"{cell:>30}" for cell in cells))
    scored = {system: figures for system, figures in summary.items() if "mAP_11_point" in figures}
    theirs = [system for system in scored if system.startswith("torchvision")]
    for system, other in itertools.product([system for system in scored if system not in theirs], theirs):
        pair = scored[system], scored[other]
        our_map, their_map = (figures["mAP_11_point"] for figures in pair)
        our_seconds, their_seconds = (figures["training_seconds"]["mean"] for figures in pair)
        spread = max(figure["high"] - figure["low"] for figure in (our_map, their_map))
        print(f"{system} against {other}: mAP {our_map['mean'] - their_map['mean']:+.4f} (range over seeds: "
              f"{spread:.4f}), {their_seconds / our_seconds:.2f} times as fast")  # fmt: skip


def main():
    """Run the command line."""
    arguments, rest = parse_arguments()
    folder = arguments.output_folder
    join_processes()
    try:
        has_theirs = any(system.startswith("torchvision") for system in arguments.systems)
        if n_processes() > 1 and (arguments.compare_losses or has_theirs):
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
            more += ("--precision", arguments.precision) if arguments.precision else ()
            given = ["--data-folder", folder, "--output-folder", name, "--overwrite", "--seed", str(seed)]
            settings = train.parse_settings([*RECIPE.split(), *rest, *SYSTEMS[system].split(), *given, *more])
            if settings.init_from:
                settings.init_from = os.path.join(folder, settings.init_from.format(seed=seed))
            if settings.precision == "tf32" and find_device().type == "cpu":
                settings.precision = "fp32"
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
        if rank() == 0:
            check_conditions(folder, conditions(plan[0][1], arguments))
        sum_over_processes(torch.zeros(1))  # wait for rank 0
        done = read_runs(folder)
        for system, settings in plan:
            path = f"{settings.output_folder}.json"
            if path in done:
                continue
            if rank() == 0:
                print(f"\n{system}, seed {settings.seed}, from iteration {updates_made(settings)} on", flush=True)
            result = prove(system + suffix, settings, arguments.test_images)
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
