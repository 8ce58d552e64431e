"""Score a trained network by mean average precision, as the Pascal VOC development kit does.

python eval.py
python eval.py --checkpoint runs/mine/best.pth --split val --results results.json --report report
python eval.py --checkpoint coco --data-folder data/voc --protocol caffe --no-antialias
torchrun --nproc-per-node=2 eval.py
"""

import math
import os
import time
from collections import namedtuple

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from datasets import PascalVOCDataset, collate_fn
from model import EVALUATION_LIMITS, Limits, load_model
from support.devices import (
    PRECISIONS,
    batches_on,
    choose_precision,
    count_cores,
    explain_memory,
    gather_over_processes,
    ignore_signals,
    join_processes,
    leave_processes,
    mixed_precision,
    n_processes,
    name_hardware,
    rank,
    share_workers,
    sum_over_processes,
)
from support.errors import find_errors
from support.files import CommandParser, InputError, check_outputs, run_command, write_json
from support.images import read_size
from support.labels import find_label, keep_classes
from support.lists import SPLITS
from support.report import import_report_packages, write_report
from support.results import (
    NO_LIMIT,
    coco_results,
    coco_scores,
    count_objects,
    image_names,
    import_pycocotools,
    make_evidence,
    name_voc_results,
    print_results,
    read_coco_ids,
    read_evidence,
    show_scores,
    write_voc_results,
)
from support.runs import choose_sources
from utils import MIN_TRUE_OVERLAP, average_precision, best_objects, mean_average_precision, precision_recall_curves

# Which detections count: Limits, and the most candidates of each class before suppression (None: all).
PROTOCOLS = {
    "exact": (EVALUATION_LIMITS, None),
    "caffe": (EVALUATION_LIMITS, 400),  # ssd_pascal.py
    "ssd.pytorch": (EVALUATION_LIMITS._replace(top_k=NO_LIMIT), 200),  # ssd.py, detection.py
    "lufficc": (EVALUATION_LIMITS._replace(top_k=100), None),  # defaults.py
}


def parse_arguments(arguments=None):
    """Return the checked settings of the command line, completed by `choose_sources`."""
    parser = CommandParser(__doc__)
    add = parser.add_argument
    add("--checkpoint", help="of train.py, weights of a known system, or coco for torchvision's "
        "[runs/NAME/checkpoint.pth for a data folder NAME; without one runs/voc/checkpoint.pth]")  # fmt: skip
    add("--data-folder", help="folder with the lists of create_data_lists.py [the one that the checkpoint was trained "
        "on; data/voc for other weights]")  # fmt: skip
    add("--split", type=str.upper, choices=SPLITS, default="TEST", help="lists to score on [%(default)s]")
    add("--batch-size", type=int, default=32, help="images per batch [%(default)s]")
    add("--workers", type=int, default=count_cores(),
        help="processes per machine that load images, 0 for none [number of cores, at most 16 per GPU]")  # fmt: skip
    add("--precision", choices=["auto", *PRECISIONS], default="fp32",
        help="of the network's arithmetic; auto: bf16 on a GPU that supports it [%(default)s]")  # fmt: skip
    add("--protocol", choices=PROTOCOLS, default="exact", help="system whose rules choose detections [%(default)s]")
    add("--no-antialias", dest="antialias", action="store_false", help="resize as OpenCV does, without antialiasing")
    add("--min-score", type=float, help="keep detections with a probability above this [0.01]")
    add("--max-overlap", type=float, help="suppress detections that overlap a better one of their class by more [0.45]")
    add("--top-k", type=int, help="maximum number of detections per image [that of the protocol; exact: 200]")
    add("--results", metavar="FILE", help="write all figures to this JSON file")
    add("--report", metavar="DIR", help="write a page with curves, confusions and examples of errors to this folder")
    add("--voc-results", metavar="DIR", help="write VOC's result files, which its own evaluations read, to this folder")
    add("--detections", metavar="FILE", help="write the detections in COCO's results format")
    add("--coco", action="store_true", help="also print COCO's twelve figures (needs pycocotools)")
    add("--bootstrap", type=int, default=0, metavar="N", help="95%% interval of the mAP from N samples of the images")
    add("--against", metavar="FILE", help="compare with another --results file, with 95%% interval [1000 samples]")
    settings = parser.parse_args(arguments)

    if settings.batch_size < 1 or settings.workers < 0 or settings.bootstrap < 0:
        raise InputError("--batch-size must be 1 or more, --workers and --bootstrap 0 or more")
    given = {name: getattr(settings, name) for name in Limits._fields if getattr(settings, name) is not None}
    settings.limits = limits = PROTOCOLS[settings.protocol][0]._replace(**given)
    if not (0 <= limits.min_score <= 1 and 0 <= limits.max_overlap <= 1 and limits.top_k >= 1):
        raise InputError("--min-score and --max-overlap must be in 0 ... 1, and --top-k 1 or more")
    if settings.against and not os.path.isfile(settings.against):
        raise InputError(f"{settings.against}: no such file; give one that eval.py --results wrote")
    settings.bootstrap = settings.bootstrap or (1000 if settings.against else 0)
    if settings.report:
        import_report_packages()
    if settings.coco:
        import_pycocotools()
    sources = choose_sources(settings.checkpoint, settings.data_folder)
    settings.checkpoint, settings.data_folder, settings.chosen_on = sources
    names = ["label_map.json", *(f"{settings.split}_{part}.json" for part in ("images", "objects", "coco"))]
    lists = [os.path.join(settings.data_folder, name) for name in names]
    inputs = [settings.checkpoint, *lists, *filter(None, [settings.against])]
    check_outputs(settings.results, settings.detections, folders=[settings.report, settings.voc_results], inputs=inputs)
    return settings


# ---------------------------------------------------------------------------------------------------------
# Detecting and scoring
# ---------------------------------------------------------------------------------------------------------


def evaluation_loader(dataset, batch_size, workers, device):
    """Return a DataLoader of a data set in its order, or of this process's share: of n processes every n-th batch."""
    batches = [part.tolist() for part in torch.arange(len(dataset)).split(batch_size) if len(part)]
    return DataLoader(
        dataset, batch_sampler=batches[rank() :: n_processes()], collate_fn=collate_fn, worker_init_fn=ignore_signals,
        num_workers=share_workers(workers), pin_memory=device.type == "cuda",
    )  # fmt: skip


@torch.inference_mode()
def detect_all(loader, model, limits=EVALUATION_LIMITS, precision="fp32", criterion=None, interruption=None):
    """Detect the objects in all images, for evaluation and for validation. Leaves the model in eval mode.

    Several processes call it together, each with its `evaluation_loader`. Each gets the results of the whole data set.

    :param loader: batches of `collate_fn`
    :param limits: Limits, or all arguments of `SSD300.detect_objects` after the predictions
    :param precision: of the network's arithmetic, a key of PRECISIONS
    :param criterion: MultiBoxLoss; with it, the loss is computed, too
    :param interruption: support.devices.Interruption, which ends the work early
    :return: detections (boxes, labels, scores) and ground_truth (boxes, labels, difficulties): three lists each, of one
        tensor per image, boxes fractional xy; and a dict with this process's "waiting_seconds" (for images),
        "network_seconds" and "post_processing_seconds" and, with a criterion, "loss", normalised as if all images were
        one batch. None instead of all three if any process was interrupted.
    """
    model.eval()
    device = model.priors_cxcy.device
    figures = {"waiting_seconds": 0.0, "network_seconds": 0.0, "post_processing_seconds": 0.0}
    loss_sums = torch.zeros(2, device=device)  # loss times positives, positives
    batches = []  # for each batch, six lists with one array per image: arrays travel faster than tensors
    title, wait = ("validating", False) if criterion else ("evaluating", True)
    bar = tqdm(loader, title, unit="batch", leave=criterion is None, disable=rank() > 0 or None)
    requested = time.perf_counter()
    for images, *targets in batches_on(device, bar):
        if interruption and interruption.requested:
            break
        started = _now(device, wait)
        with mixed_precision(precision, device):
            predictions = model(images)
        predicted = _now(device, wait)
        if criterion:
            confidence, localization, n_positives = criterion.parts(*predictions, *targets[:2])
            loss = confidence + criterion.alpha * localization
            loss_sums += torch.stack([loss * n_positives, n_positives])
        results = (*model.detect_objects(*predictions, *limits), *targets)
        batches.append([[tensor.cpu().numpy() for tensor in part] for part in results])
        figures["waiting_seconds"] += started - requested
        figures["network_seconds"] += predicted - started
        requested = _now(device, wait)
        figures["post_processing_seconds"] += requested - predicted
    if interruption and interruption.agreed():
        return None

    batches = gather_over_processes(batches)  # in the order of the data set
    parts = [[torch.from_numpy(array) for batch in batches for array in batch[part]] for part in range(6)]
    if criterion:
        total, n_positives = sum_over_processes(loss_sums)
        figures["loss"] = (total / n_positives.clamp(min=1)).item()
    return parts[:3], parts[3:], figures


def _now(device, wait):
    """Return the time in seconds; with `wait`, first wait until the GPU has finished. Validation does not wait."""
    if wait and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


Evaluation = namedtuple("Evaluation", "results curves detections ground_truth")  # what `evaluate` returns


def evaluate(loader, model, limits=EVALUATION_LIMITS, precision="fp32"):
    """Detect the objects in all images and score the detections.

    :param loader: batches of `collate_fn`, of a data set that keeps difficult objects
    :param model: SSD300 with its label_map
    :param limits, precision: see `detect_all`
    :return: Evaluation: results, plain values by name, those of `detect_all` and `score` and "images", the number of
        images; curves; detections; ground_truth
    """
    detections, ground_truth, figures = detect_all(loader, model, limits, precision)
    results, curves = score(detections, ground_truth, model.label_map)
    return Evaluation({"images": len(detections[0]), **figures, **results}, curves, detections, ground_truth)


def score(detections, ground_truth, label_map):
    """Score detections by both rules of Pascal VOC.

    :param detections, ground_truth: as from `detect_all`
    :return: plain values by name: "mAP_11_point" and "mAP_area"; "AP_11_point" and "AP_area", by class name;
        "scoring_seconds"; None (JSON has no NaN) for a value that does not exist without objects. And the curves.
    """
    started = time.perf_counter()
    curves = precision_recall_curves(*detections, *ground_truth, label_map=label_map)
    results = {}
    for key, method in (("11_point", "11-point"), ("area", "area")):
        by_class, mean = mean_average_precision(curves, method)
        results[f"mAP_{key}"] = None if math.isnan(mean) else mean
        results[f"AP_{key}"] = {name: None if math.isnan(value) else value for name, value in by_class.items()}
    results["scoring_seconds"] = time.perf_counter() - started
    return results, curves


# ---------------------------------------------------------------------------------------------------------
# Confidence intervals
# ---------------------------------------------------------------------------------------------------------


def bootstrap(*evaluations, n=1000, seed=0):
    """Return the 11-point mAPs (len(evaluations), n) of n samples of the images, drawn with replacement.

    All evaluations get the same samples, so that their difference is computed pair by pair.

    :param evaluations: the evidence of each, as from `make_evidence`, of the same images in the same order
    """
    arrays = [_as_arrays(evidence) for evidence in evaluations]
    n_images = len(arrays[0][0][2])  # the length of any class's `objects`
    rng = np.random.default_rng(seed)
    means = np.zeros((len(evaluations), n))
    for sample in tqdm(range(n), "resampling", leave=False, disable=None):
        times = np.bincount(rng.integers(n_images, size=n_images), minlength=n_images)
        means[:, sample] = [_resampled_map(classes, times) for classes in arrays]
    return means


def _as_arrays(evidence):
    """Return (images, right, objects) of each class as arrays."""
    return [[np.asarray(part[key], np.int64) for key in ("images", "right", "objects")] for part in evidence.values()]


def _resampled_map(classes, times=None):
    """Return the 11-point mAP of a test set that holds image i times[i] times (None: once); NaN without objects."""
    times = np.ones_like(classes[0][2]) if times is None else times
    scored = []
    for images, right, objects in classes:
        n_objects = times @ objects
        if n_objects:
            weights = times[images]
            true_positives = np.cumsum(weights * right)
            precision = true_positives / np.cumsum(weights).clip(1)
            scored.append(average_precision(precision, true_positives / n_objects))
    return np.mean(scored) if scored else math.nan


def confidence_interval(values, share=0.95):
    """Return the bounds of the central interval that holds this share of the values."""
    return tuple(np.nanquantile(values, [(1 - share) / 2, (1 + share) / 2]).tolist())


def print_significance(evidence, n, other=None, path=None):
    """Print the 95% interval of the 11-point mAP, and of its difference from another evaluation; return plain values.

    Both mAPs are recomputed here: results files of earlier versions contain an mAP by a slightly different rule.

    :param evidence, other: as from `make_evidence` and `read_evidence`; the other one was read from `path`
    :param n: number of samples
    """
    evaluations = [evidence] if other is None else [evidence, other]
    samples = bootstrap(*evaluations, n=n)
    low, high = confidence_interval(samples[0])
    print(f"\n95% interval of the 11-point mAP: {low:.4f} to {high:.4f}, from {n} samples")
    significance = {"samples": n, "mAP_interval": (low, high)}
    if other is not None:
        ours, theirs = (_resampled_map(_as_arrays(part)) for part in evaluations)
        low, high = confidence_interval(samples[0] - samples[1])
        verdict = "is more than chance" if low > 0 or high < 0 else "may be chance"
        print(f"difference from {path}: {ours - theirs:+.4f}, 95% interval {low:+.4f} to {high:+.4f}: it {verdict}")
        significance |= {"against": path, "difference": float(ours - theirs), "difference_interval": (low, high)}
    return significance


def adopt_classes(model, label_map, settings):
    """Make a model detect the classes of a data set's label map, by name; its other classes count as background.

    :raises InputError: if the model does not know a class of the data
    """
    names = sorted(label_map, key=label_map.get)[1:]  # without background
    classes = [find_label(name, model.label_map) for name in names]
    if None in classes:
        raise InputError(
            f"{settings.checkpoint}: its classes ({', '.join(model.label_map)}) lack {names[classes.index(None)]} of "
            f"{settings.data_folder}; give the --data-folder that it was trained on"
        )
    if classes != list(range(1, len(model.label_map))):
        model.register_forward_hook(lambda _, __, predictions: (predictions[0], keep_classes(predictions[1], classes)))
        n_others = len(model.label_map) - len(label_map)
        if n_others and rank() == 0:
            print(f"{n_others} classes of the network are not in the data; their probability counts as background")
    model.label_map = label_map


def run(settings, device):
    """Evaluate by the settings of the command line, and print and write the results in the first process."""
    # Read and check the inputs before the work.
    if rank() == 0:
        print(f"scoring {settings.checkpoint} on the {settings.split} split of {settings.data_folder}")
        print(f"protocol {settings.protocol}, with{'' if settings.antialias else 'out'} antialiasing", flush=True)
    dataset = PascalVOCDataset(settings.data_folder, settings.split, keep_difficult=True, augment=False)
    precision = choose_precision(settings.precision, device)
    model = load_model(settings.checkpoint, device, dataset.label_map)
    dataset.size, dataset.antialias = model.size, settings.antialias
    adopt_classes(model, dataset.label_map, settings)
    names, objects = image_names(dataset.images), dataset.objects
    n_objects = count_objects(objects, dataset.label_map)
    nothing = f"the {settings.split} split of {settings.data_folder} has no objects to detect"
    if not n_objects and (settings.coco or settings.report or settings.bootstrap):
        raise InputError(f"--coco, --report, --bootstrap, --against: {nothing}; leave these options out")
    if not (n_objects or settings.results or settings.voc_results or settings.detections):
        raise InputError(f"{nothing}; give --results, --voc-results or --detections to write a file")
    other = read_evidence(settings.against, names, n_objects) if settings.against else None
    needs_ids = settings.coco or settings.detections
    ids = read_coco_ids(settings.data_folder, settings.split, names, objects, dataset.label_map) if needs_ids else None
    if settings.voc_results:
        name_voc_results(settings.voc_results, names, dataset.label_map, settings.split)

    # Detect and score.
    model.to(memory_format=torch.channels_last)  # faster, even on a CPU
    loader = evaluation_loader(dataset, settings.batch_size, settings.workers, device)
    evaluation = evaluate(loader, model, (*settings.limits, PROTOCOLS[settings.protocol][1]), precision)
    if rank() > 0:
        return
    results, curves, detections, ground_truth = evaluation
    errors = find_errors(curves, detections, ground_truth, model.label_map, best_objects, MIN_TRUE_OVERLAP)
    results = {
        "checkpoint": settings.checkpoint, "data_folder": settings.data_folder, "split": settings.split,
        "device": name_hardware(), "processes": n_processes(), "precision": precision,
        "batch_size": settings.batch_size, "protocol": settings.protocol, "antialias": settings.antialias,
        **settings.limits._asdict(), **results, "errors": errors.counts,
    }  # fmt: skip
    if settings.chosen_on == settings.split:
        for_test = "make VAL lists with create_data_lists.py --validation, and train with them"
        remedy = for_test if settings.split == "TEST" else "use --split TEST"
        note = "This network was chosen by its score on these very images, so the score is optimistic"
        results["note"] = f"{note}; for an honest one, {remedy}."

    # Print and write. The results file comes first, so that a later failure cannot lose it.
    basis = {"image_names": names, "evidence": make_evidence(curves)}
    if settings.results:
        write_json({settings.results: results | basis})
    print_results(results, curves)
    if settings.bootstrap:
        results["significance"] = print_significance(basis["evidence"], settings.bootstrap, other, settings.against)
    sizes = [read_size(path) for path in dataset.images] if ids or settings.voc_results else None
    if settings.voc_results:
        write_voc_results(settings.voc_results, detections, names, sizes, model.label_map, settings.split)
    in_coco_format = coco_results(detections, sizes, ids) if ids else None
    if settings.detections:
        write_json({settings.detections: in_coco_format})
    if settings.coco:
        results["coco"] = coco_scores(in_coco_format, objects, ids)
        print(f"\nCOCO's rules: {show_scores(results['coco'])}")
    if settings.results:
        write_json({settings.results: results | basis})
    if settings.report:
        write_report(settings.report, evaluation._replace(results=results), errors, dataset)
        print(f"report: {os.path.join(settings.report, 'index.html')}")


def main():
    """Run the command line."""
    settings = parse_arguments()
    device = join_processes()
    try:
        with explain_memory(f"lower --batch-size {settings.batch_size}"):
            run(settings, device)
    finally:
        leave_processes()


if __name__ == "__main__":
    run_command(main)
