"""What an evaluation finds, for others: their files, their scores, tables, and how far chance alone would carry it.

found, seconds = detect_all(loader, model)  # eval.py
write_voc_results("results", found, image_names(paths), image_sizes(paths), model.label_map)
curves = precision_recall_curves(*found, label_map=model.label_map)
low, high = interval(bootstrap(make_evidence(curves), n=1000))

`found` are six lists, a tensor per image: detected boxes (d, 4), fractional xy, labels (d,), scores (d,), true boxes
(n, 4), labels (n,), difficulties (n,).
"""

import contextlib
import io
import itertools
import os

import numpy as np
from PIL import ExifTags
from tqdm import tqdm

from files import InputError, make_folder, read_json, write_files
from utils import average_precision, open_image


def image_names(paths):
    """Return names of images, each another: as VOC has them, without folder and suffix, where that is possible.

    Else they are paths from the folder that holds all; an image that comes again gets a number.
    """
    names = [os.path.splitext(os.path.basename(path))[0] for path in paths]
    if len(set(names)) < len(set(paths)):
        paths = [os.path.abspath(path) for path in paths]
        names = [os.path.relpath(path, os.path.commonpath(paths)) for path in paths]
    unique = {}  # in order
    for name in names:
        numbered = (f"{name} ({number})" for number in itertools.count(2))
        unique[next(new for new in itertools.chain([name], numbered) if new not in unique)] = None
    return list(unique)


def image_ids(names):
    """Return the numbers that COCO's files have for images: their names, where all are numbers; else 1, 2, 3 ..."""
    if all(name.isdecimal() for name in names) and len({int(name) for name in names}) == len(names):
        return [int(name) for name in names]
    return list(range(1, len(names) + 1))


def image_sizes(paths):
    """Return (width, height) of each image, upright."""
    sizes = []
    for path in paths:
        with open_image(path) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            sizes.append(image.size[::-1] if turned else image.size)
    return sizes


def _coco_boxes(boxes, size):
    boxes = pixel_boxes(boxes, size)
    boxes[:, 2:] -= boxes[:, :2]
    return boxes.tolist()


def pixel_boxes(boxes, size):
    """Return boxes (n, 4), fractional xy, as an array of 0-based pixels, xy."""
    return boxes.double().numpy() * (*size, *size)


def name_voc_results(folder, names, label_map):
    """Return label -> path of the file that VOC's evaluations read of a class, comp4_det_test_CLASS.txt.

    :param names: of the images, as `image_names` gives them
    :raises InputError: for a class that no file can be named after, and for images whose names these files cannot hold
    """
    with_spaces = [name for name in names if len(name.split()) != 1]
    if with_spaces:
        raise InputError(f"--voc-results: VOC's files cannot hold the image name {with_spaces[0]!r}; rename the image")
    for name in label_map:
        if os.sep in name or not name.isprintable() or len(name.encode()) > 200:
            raise InputError(f"--voc-results: no file can be named after the class {name!r}; rename the class")
    return {label: os.path.join(folder, f"comp4_det_test_{name}.txt") for name, label in label_map.items() if label}


def write_voc_results(folder, found, names, sizes, label_map):
    """Write a file for each class: image, score, box in 1-based pixels, as VOC's evaluations read it.

    :param names, sizes: of the images, as `image_names` and `image_sizes` give them
    :raises InputError: as `name_voc_results` does
    """
    paths = name_voc_results(folder, names, label_map)
    lines = {label: [] for label in label_map.values() if label}
    for boxes, labels, scores, name, size in zip(*found[:3], names, sizes, strict=True):
        for box, label, score in zip(pixel_boxes(boxes, size) + 1, labels.tolist(), scores.tolist(), strict=True):
            lines[label].append(f"{name} {score:.9g} {box[0]:.6f} {box[1]:.6f} {box[2]:.6f} {box[3]:.6f}\n")
    make_folder(folder)
    write_files({path: "".join(lines[label]) for label, path in paths.items()})


def coco_results(found, names, sizes):
    """Return the detections as COCO's results format has them: a list of plain dicts, boxes x, y, width, height."""
    results = []
    for boxes, labels, scores, image_id, size in zip(*found[:3], image_ids(names), sizes, strict=True):
        for box, label, score in zip(_coco_boxes(boxes, size), labels.tolist(), scores.tolist(), strict=True):
            results.append({"image_id": image_id, "category_id": label, "bbox": box, "score": score})
    return results


def import_pycocotools():
    """Return pycocotools' two classes; InputError where it is not installed."""
    try:
        from pycocotools.coco import COCO  # an optional requirement
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise InputError("--coco: its package is not there; pip install pycocotools") from error
    return COCO, COCOeval


def coco_scores(found, names, sizes, label_map):
    """Return {"AP": ..., "AP50": ..., "AP75": ...} as pycocotools computes them; difficult objects count as crowds.

    They are None where there is no object to be found.

    :raises InputError: where pycocotools is not installed
    """
    make_truth, make_evaluation = import_pycocotools()
    annotations = []
    for boxes, labels, difficulties, image_id, size in zip(*found[3:], image_ids(names), sizes, strict=True):
        for box, label, flag in zip(_coco_boxes(boxes, size), labels.tolist(), difficulties.tolist(), strict=True):
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": label, "bbox": box,
                                "area": box[2] * box[3], "iscrowd": flag})  # fmt: skip
    truth = make_truth()
    truth.dataset = {
        "images": [{"id": image_id} for image_id in image_ids(names)],
        "categories": [{"id": label, "name": name} for name, label in label_map.items() if label],
        "annotations": annotations,
    }
    keys = ("AP", "AP50", "AP75")
    if all(annotation["iscrowd"] for annotation in annotations):
        return dict.fromkeys(keys)
    detections = coco_results(found, names, sizes)
    if not detections:
        return dict.fromkeys(keys, 0.0)
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = make_evaluation(truth, truth.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(keys, evaluation.stats[:3].tolist(), strict=True))


def show_scores(scores):
    """Return names and scores, None among them, as a text."""
    return ", ".join(f"{name} {'none' if value is None else f'{value:.4f}'}" for name, value in scores.items())


def summarize(curve):
    """Return the figures of a class: plain values, by name.

    "objects" to be found and "detections" that count; "recall" of all of these; "precision", "recall_at_best" and
    "score" where the harmonic mean of precision and recall (F1) is the highest.
    """
    figures = {"objects": int(curve.n_objects.sum()), "detections": len(curve.scores), "recall": 0.0}
    figures |= {"precision": 0.0, "recall_at_best": 0.0, "score": 1.0}
    if len(curve.scores):
        best = (2 * curve.precision * curve.recall / (curve.precision + curve.recall).clip(1e-12)).argmax()
        figures |= {
            "recall": float(curve.recall[-1]), "precision": float(curve.precision[best]),
            "recall_at_best": float(curve.recall[best]), "score": float(curve.scores[best]),
        }  # fmt: skip
    return figures


def make_evidence(curves):
    """Return what a mean average precision rests on, in plain values for a file.

    :return: {class name: {"images": index of each detection's image, best first, "right": 0 or 1 of each,
        "objects": to be found in each image}}, of the classes that have objects
    """
    return {
        name: {
            "images": curve.images.tolist(), "right": curve.right.astype(int).tolist(),
            "objects": curve.n_objects.tolist(),
        }
        for name, curve in curves.items() if curve is not None
    }  # fmt: skip


def bootstrap(*evidences, n=1000, seed=0):
    """Return the 11-point mAPs (len(evidences), n) of n samples of the images, drawn with replacement.

    The samples are the same for all evidences, so that their differences are those between pairs.

    :param evidences: as `make_evidence` makes them, of the same images in the same order
    """
    arrays = [
        [tuple(np.asarray(part[key], np.int64) for key in ("images", "right", "objects")) for part in evidence.values()]
        for evidence in evidences
    ]
    n_images = len(arrays[0][0][2])
    rng = np.random.default_rng(seed)
    means = np.zeros((len(evidences), n))
    for column in tqdm(range(n), "resampling", leave=False, disable=None):
        times = np.bincount(rng.integers(n_images, size=n_images), minlength=n_images)
        for row, classes in enumerate(arrays):
            scored = [_resampled_precision(*parts, times) for parts in classes if times @ parts[2]]
            means[row, column] = np.mean(scored) if scored else np.nan
    return means


def _resampled_precision(images, right, objects, times):
    """Return the average precision of a class whose images each occur so many times."""
    weights = times[images]
    found = np.cumsum(weights * right)
    return average_precision(found / np.cumsum(weights).clip(1), found / (times @ objects))


def interval(values, share=0.95):
    """Return the bounds between which that share of values lies."""
    return tuple(np.nanquantile(values, [(1 - share) / 2, (1 + share) / 2]).tolist())


def count_objects(objects, label_map):
    """Return {class name: number of objects to be found in each image}, of the classes that have any.

    :param objects: a dict per image with "labels" and "difficulties"
    """
    counts = {
        name: [sum(pair == (label, 0) for pair in zip(o["labels"], o["difficulties"], strict=True)) for o in objects]
        for name, label in label_map.items() if label
    }  # fmt: skip
    return {name: numbers for name, numbers in counts.items() if any(numbers)}


def read_results(path, names, n_objects):
    """Return the 11-point mAP and the evidence of another evaluation's results, in this one's order of images.

    :param names: of this evaluation's images, as `image_names` gives them
    :param n_objects: what is to be found in them, as `count_objects` returns it
    :raises InputError: where the file is no such results, or of other images or classes
    """
    other = read_json(path, "give a file of eval.py --results")
    try:
        mean = float(other["mAP_11_point"])
        places = {name: index for index, name in enumerate(other["image_names"])}
        theirs = {
            name: {
                "images": np.asarray(part["images"], np.int64), "right": np.asarray(part["right"], np.int64),
                "objects": np.asarray(part["objects"], np.int64)[[places[name] for name in names]],
            }
            for name, part in other["evidence"].items()
        }  # fmt: skip
        order = np.full(len(places), -1)
        order[[places[name] for name in names]] = np.arange(len(names))
        for part in theirs.values():
            part["images"] = order[part["images"]]
            if len(part["images"]) != len(part["right"]):
                raise ValueError("lists that differ in length")
        same = len(places) == len(names) and theirs.keys() == n_objects.keys()
        same = same and all(theirs[name]["objects"].tolist() == counts for name, counts in n_objects.items())
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise InputError(f"{path}: no results of eval.py --results on the same images; give such a file") from error
    if not same:
        raise InputError(f"{path}: has other images, classes or objects; give results on the same data")
    return mean, theirs
