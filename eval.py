"""Score a trained SSD300 by mean average precision on the test split, as the Pascal VOC development kit does.

python eval.py --data-folder data/voc --checkpoint runs/voc/checkpoint.pth
python eval.py --data-folder data/sample --checkpoint runs/sample/checkpoint.pth --results results.json
"""

import argparse
import math
import os
import time

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from checkpoints import load_model
from datasets import PascalVOCDataset, collate_fn
from devices import PRECISIONS, batches_on, choose_precision, count_cores, find_device, mixed_precision, name_hardware
from files import InputError, check_folder, check_targets, run_command, write_json
from report import import_matplotlib, write_report
from results import (
    bootstrap,
    coco_results,
    coco_scores,
    count_objects,
    image_names,
    image_sizes,
    import_pycocotools,
    interval,
    make_evidence,
    name_voc_results,
    read_results,
    show_scores,
    summarize,
    write_voc_results,
)
from utils import mean_average_precision, precision_recall_curves

MIN_SCORE = 0.01  # probability; Caffe's confidence_threshold at test time (ssd_pascal.py)
MAX_OVERLAP = 0.45  # jaccard overlap; Caffe's nms_threshold
TOP_K = 200  # detections an image; Caffe's keep_top_k


def parse_arguments(arguments=None):
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data-folder", required=True, help="folder with the lists of create_data_lists.py")
    parser.add_argument("--checkpoint", default="coco", help="of train.py or a known system [torchvision's coco]")
    parser.add_argument("--batch-size", type=int, default=32, help="images at a time")
    parser.add_argument("--workers", type=int, default=count_cores(),
                        help="processes that load images, 0 for none [the processor's cores, 16 at most]")  # fmt: skip
    parser.add_argument("--precision", choices=["auto", *PRECISIONS], default="fp32",
                        help="of the network's arithmetic; auto: bf16 on a GPU made for it [%(default)s]")  # fmt: skip
    parser.add_argument("--results", metavar="FILE", help="write all figures to this JSON file")
    parser.add_argument("--report", metavar="DIR", help="write a page with curves, confusions and worst mistakes there")
    parser.add_argument("--voc-results", metavar="DIR", help="write the files that VOC's own evaluations read there")
    parser.add_argument("--detections", metavar="FILE", help="write the detections in COCO's results format")
    parser.add_argument("--coco", action="store_true", help="print COCO's average precision, too (pycocotools)")
    parser.add_argument("--bootstrap", type=int, default=0, metavar="N",
                        help="95%% interval of the mAP by N samples of the images")  # fmt: skip
    parser.add_argument("--against", metavar="FILE",
                        help="difference to another --results file, with its interval [1000 samples]")  # fmt: skip
    settings = parser.parse_args(arguments)
    if settings.batch_size < 1 or settings.workers < 0 or settings.bootstrap < 0:
        raise InputError("--batch-size must be 1 or more, --workers and --bootstrap 0 or more")
    if settings.against and not os.path.isfile(settings.against):
        raise InputError(f"{settings.against}: no such file; give one of an earlier --results")
    settings.bootstrap = settings.bootstrap or (1000 if settings.against else 0)
    if settings.report:
        import_matplotlib()
    if settings.coco:
        import_pycocotools()
    lists = [os.path.join(settings.data_folder, f"TEST_{part}.json") for part in ("images", "objects")]
    inputs = [*lists, os.path.join(settings.data_folder, "label_map.json"), settings.checkpoint]
    inputs += [settings.against] if settings.against else []
    check_targets(settings.results, settings.detections, inputs=inputs)
    for folder in (settings.report, settings.voc_results):
        if folder:
            check_folder(folder)
    return settings


@torch.inference_mode()
def detect_all(test_loader, model, min_score=MIN_SCORE, max_overlap=MAX_OVERLAP, top_k=TOP_K, precision="fp32"):
    """Detect objects in all test images; parameters as for `evaluate`.

    :return: six lists, a tensor per image (detected boxes, labels, scores, true boxes, labels, difficulties), and
        {"waiting", "network", "post_processing": seconds}; waiting is for images to be loaded
    """
    model.eval()
    device = model.priors_cxcy.device
    found = [[] for _ in range(6)]
    seconds = {"waiting": 0.0, "network": 0.0, "post_processing": 0.0}
    asked = time.perf_counter()
    for images, *objects in batches_on(device, tqdm(test_loader, "evaluating", unit="batch", disable=None)):
        started = _now(device)
        with mixed_precision(precision, device):
            predictions = model(images)
        predicted = _now(device)
        detected = model.detect_objects(*predictions, min_score, max_overlap, top_k)
        collect(found, (*detected, *objects))
        seconds["waiting"] += started - asked
        seconds["network"] += predicted - started
        asked = _now(device)
        seconds["post_processing"] += asked - predicted
    return found, seconds


def score(found, label_map):
    """Score detections; parameters as for `precision_recall_curves`, in one.

    :return: dict of plain values as for `evaluate`, and the curves
    """
    started = time.perf_counter()
    curves = precision_recall_curves(*found, label_map=label_map)
    results = {}
    for key, method in (("11_point", "11-point"), ("area", "area")):
        average_precisions, mean = mean_average_precision(curves, method)
        results[f"mAP_{key}"] = _none_for_nan(mean)
        results[f"AP_{key}"] = {name: _none_for_nan(value) for name, value in average_precisions.items()}
    results["scoring_seconds"] = time.perf_counter() - started
    return results, curves


def evaluate(test_loader, model, min_score=MIN_SCORE, max_overlap=MAX_OVERLAP, top_k=TOP_K, precision="fp32"):
    """Detect objects in all test images and score them.

    :param test_loader: batches as collate_fn makes them, of a data set with difficult objects kept
    :param model: SSD300 with its label_map
    :param min_score, max_overlap, top_k: of `detect_objects`
    :param precision: of the network's arithmetic, a key of PRECISIONS
    :return: dict of plain values: "mAP_11_point" and "mAP_area"; "AP_11_point" and "AP_area", by class name, None
        where a class has no objects; seconds in all: "waiting_seconds" for images, "network_seconds",
        "post_processing_seconds", "scoring_seconds"; "images", their number
    """
    found, seconds = detect_all(test_loader, model, min_score, max_overlap, top_k, precision)
    results, _ = score(found, model.label_map)
    return {"images": len(found[0]), **{f"{part}_seconds": spent for part, spent in seconds.items()}, **results}


def collect(found, batch):
    """Append a batch's detected boxes, labels and scores and its true boxes, labels and difficulties to six lists."""
    for collected, tensors in zip(found, batch, strict=True):
        collected.extend(tensor.cpu() for tensor in tensors)


def _now(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _none_for_nan(value):
    return None if math.isnan(value) else value


def print_results(results, curves):
    """Print both mAPs, the table of classes, and where the time went."""
    mean, area = (results[f"mAP_{key}"] for key in ("11_point", "area"))
    if mean is None:
        print("mAP: none, for the test split has no object to be found")
    else:
        print(f"mAP {mean:.4f} by the 11-point rule of VOC2007")
        print(
            f"    {area:.4f} by the area under the curve, the rule from VOC2010 on: not to be compared with the first"
        )
    width = max(len(name) for name in [*curves, "class"])
    columns = ("objects", "detections", "11-point", "area", "recall", "precision", "recall", "score")
    print(f"\n{'':{width}} {'':>9} {'':>10}      average precision   of all          at the best F1")
    print(f"{'class':{width}} " + " ".join(f"{column:>10}" for column in columns))
    for name, curve in curves.items():
        if curve is None:
            print(f"{name:{width}} {0:10}   no object to be found: left out of the mean")
            continue
        figures = summarize(curve)
        values = (results["AP_11_point"][name], results["AP_area"][name],
                  *(figures[key] for key in ("recall", "precision", "recall_at_best", "score")))  # fmt: skip
        counts = f"{figures['objects']:10} {figures['detections']:10} "
        print(f"{name:{width}} {counts}" + " ".join(f"{value:10.4f}" for value in values))
    n_images = results["images"]
    parts = ("waiting", "network", "post_processing", "scoring")
    total = sum(results[f"{part}_seconds"] for part in parts)
    print(f"\n{n_images / total:.1f} images/s over {n_images} images on {results['device']}, {results['precision']}, "
          f"batches of {results['batch_size']}; in ms per image:")  # fmt: skip
    shares = (f"{name} {1000 * results[f'{part}_seconds'] / n_images:.1f}" for name, part in zip(
        ("waiting for images to be decoded", "network", "post-processing", "scoring"), parts, strict=True))  # fmt: skip
    print("  " + ", ".join(shares))


def print_significance(results, evidence, settings, other=None):
    """Print the interval of the mAP, and of its difference to another evaluation; return both as plain values.

    :param other: what `read_results` returns of the other evaluation
    """
    samples = bootstrap(evidence, *([other[1]] if other else []), n=settings.bootstrap)
    bounds = interval(samples[0])
    print(f"\n95% interval of the 11-point mAP: {bounds[0]:.4f} to {bounds[1]:.4f}, by {settings.bootstrap} samples")
    significance = {"samples": settings.bootstrap, "mAP_interval": bounds}
    if other:
        difference, bounds = results["mAP_11_point"] - other[0], interval(samples[0] - samples[1])
        verdict = "is more than chance" if bounds[0] > 0 or bounds[1] < 0 else "may be chance"
        print(f"difference to {settings.against}: {difference:+.4f}, 95% interval "
              f"{bounds[0]:+.4f} to {bounds[1]:+.4f}: it {verdict}")  # fmt: skip
        significance |= {"against": settings.against, "difference": difference, "difference_interval": bounds}
    return significance


def write_results(path, results, names, evidence):
    """Write the figures and what they rest on as JSON, if a path is given."""
    if path:
        write_json({path: {**results, "image_names": names, "evidence": evidence}})


def main():
    """Run the command line."""
    settings = parse_arguments()
    dataset = PascalVOCDataset(settings.data_folder, "TEST", keep_difficult=True)
    device = find_device()
    precision = choose_precision(settings.precision, device)
    model = load_model(settings.checkpoint, device, dataset.label_map)
    if model.label_map != dataset.label_map:
        raise InputError(
            f"{settings.checkpoint}: its classes ({', '.join(model.label_map)}) are not those of "
            f"{settings.data_folder} ({', '.join(dataset.label_map)}); give a checkpoint trained on this data"
        )
    names, other = image_names(dataset.images), None
    if settings.bootstrap:
        n_objects = count_objects(dataset.objects, dataset.label_map)
        if not n_objects:
            folder = settings.data_folder
            raise InputError(f"--bootstrap, --against: the test split of {folder} has no object to be found")
        other = read_results(settings.against, names, n_objects) if settings.against else None
    if settings.voc_results:
        name_voc_results(settings.voc_results, names, dataset.label_map)
    loader = DataLoader(
        dataset, batch_size=settings.batch_size, collate_fn=collate_fn, num_workers=settings.workers,
        pin_memory=device.type == "cuda",
    )  # fmt: skip
    model.to(memory_format=torch.channels_last)  # faster, on a CPU too
    found, seconds = detect_all(loader, model, precision=precision)
    results, curves = score(found, model.label_map)
    results = {
        "checkpoint": settings.checkpoint, "data_folder": settings.data_folder, "images": len(dataset),
        "device": name_hardware(),
        "precision": precision, "batch_size": settings.batch_size,
        **{f"{part}_seconds": spent for part, spent in seconds.items()}, **results,
    }  # fmt: skip
    evidence = make_evidence(curves)
    write_results(settings.results, results, names, evidence)  # whatever becomes of the rest
    print_results(results, curves)
    if settings.bootstrap:
        results["significance"] = print_significance(results, evidence, settings, other)
    sizes = image_sizes(dataset.images) if settings.coco or settings.voc_results or settings.detections else None
    if settings.coco:
        results["coco"] = coco_scores(found, names, sizes, model.label_map)
        print(f"\nCOCO's rules: {show_scores(results['coco'])}")
    write_results(settings.results, results, names, evidence)
    if settings.voc_results:
        write_voc_results(settings.voc_results, found, names, sizes, model.label_map)
    if settings.detections:
        write_json({settings.detections: coco_results(found, names, sizes)})
    if settings.report:
        write_report(settings.report, results, curves, found, dataset)
        print(f"report: {os.path.join(settings.report, 'index.html')}")


if __name__ == "__main__":
    run_command(main)
