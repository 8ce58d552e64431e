"""Score a trained SSD300 by mean average precision on the test split, as the Pascal VOC development kit does.

python eval.py --data-folder data/voc --checkpoint runs/voc/checkpoint.pth
python eval.py --data-folder data/sample --checkpoint runs/sample/checkpoint.pth --results results.json
"""

import argparse
import math
import time

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from checkpoints import load_model
from datasets import PascalVOCDataset, collate_fn
from devices import PRECISIONS, batches_on, choose_precision, count_cores, find_device, mixed_precision
from utils import InputError, check_target, mean_average_precision, precision_recall_curves, run_command, write_json

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
    parser.add_argument("--results", help="also write the results to this JSON file")
    settings = parser.parse_args(arguments)
    if settings.batch_size < 1 or settings.workers < 0:
        raise InputError("--batch-size must be 1 or more and --workers 0 or more")
    if settings.results:
        check_target(settings.results)
    return settings


@torch.inference_mode()
def evaluate(test_loader, model, min_score=MIN_SCORE, max_overlap=MAX_OVERLAP, top_k=TOP_K, precision="fp32"):
    """Detect objects in all test images and score them.

    :param test_loader: batches as collate_fn makes them, of a data set with difficult objects kept
    :param model: SSD300 with its label_map
    :param min_score, max_overlap, top_k: of `detect_objects`
    :param precision: of the network's arithmetic, a key of PRECISIONS
    :return: dict of plain values: "mAP_11_point" and "mAP_area"; "AP_11_point" and "AP_area", by class name,
        None where a class has no objects; "images", "network_seconds", "post_processing_seconds", "scoring_seconds"
    """
    model.eval()
    device = model.priors_cxcy.device
    found, n_images = [[] for _ in range(6)], 0
    seconds = {"network": 0.0, "post_processing": 0.0}
    for images, *objects in batches_on(device, tqdm(test_loader, "evaluating", unit="batch", disable=None)):
        started = _now(device)
        with mixed_precision(precision, device):
            predictions = model(images)
        predicted = _now(device)
        detected = model.detect_objects(*predictions, min_score, max_overlap, top_k)
        seconds["network"] += predicted - started
        seconds["post_processing"] += _now(device) - predicted
        n_images += len(images)
        collect(found, (*detected, *objects))

    started = time.perf_counter()
    curves = precision_recall_curves(*found, label_map=model.label_map)
    seconds["scoring"] = time.perf_counter() - started
    results = {"images": n_images, **{f"{part}_seconds": spent for part, spent in seconds.items()}}
    for key, method in (("11_point", "11-point"), ("area", "area")):
        average_precisions, mean = mean_average_precision(curves, method)
        results[f"mAP_{key}"] = _none_for_nan(mean)
        results[f"AP_{key}"] = {name: _none_for_nan(value) for name, value in average_precisions.items()}
    return results


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


def print_results(results):
    """Print average precision per class, both mAPs, and the time per image."""

    def cell(value):
        return f"{'-':>10}" if value is None else f"{value:10.4f}"

    name_width = max(len(name) for name in [*results["AP_11_point"], "mAP"])
    print(f"{'class':{name_width}} {'11-point':>10} {'area':>10}")
    for name, value in results["AP_11_point"].items():
        print(f"{name:{name_width}} {cell(value)} {cell(results['AP_area'][name])}")
    print(f"{'mAP':{name_width}} {cell(results['mAP_11_point'])} {cell(results['mAP_area'])}")
    print("11-point: the VOC2007 rule; area: under the precision-recall curve, the rule from VOC2010 on")
    if None in results["AP_11_point"].values():
        print("-: the test split has no object of the class to be found; it is left out of the mean")
    for part in ("network", "post_processing"):
        per_image = 1000 * results[f"{part}_seconds"] / results["images"]
        print(f"{part.replace('_', '-')}: {per_image:.1f} ms per image, over {results['images']} images")


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
    loader = DataLoader(
        dataset, batch_size=settings.batch_size, collate_fn=collate_fn, num_workers=settings.workers,
        pin_memory=device.type == "cuda",
    )  # fmt: skip
    model.to(memory_format=torch.channels_last)  # faster, on a CPU too
    results = evaluate(loader, model, precision=precision)
    print_results(results)
    if settings.results:
        source = {"checkpoint": settings.checkpoint, "data_folder": settings.data_folder, "precision": precision}
        write_json({settings.results: {**source, **results}})


if __name__ == "__main__":
    run_command(main)
