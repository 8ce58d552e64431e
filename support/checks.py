"""Checks of a data set before training, and a preview of its training samples.

pairs = {"TRAIN": read_split("VOC2007", "trainval"), "TEST": read_split("VOC2007", "test")}
splits = read_annotations(pairs)
breaking, odd, objects = check(splits, label_map, priors, jaccard_overlap, with_images=True)
print_problems(breaking, odd)
preview(PascalVOCDataset("data/voc", "TRAIN"), 8, criterion, IMAGENET_MEAN, IMAGENET_STD).save("preview.jpg")
"""

import hashlib
import itertools
import os
from collections import Counter, defaultdict

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from support.devices import count_cores
from support.files import InputError
from support.images import draw_boxes, read_image, tile
from support.labels import label_color_map, label_names
from support.lists import UNREADABLE_IMAGE, find_problems

N_SHOWN = 5  # lines to print of each problem
TILE = 420  # side of a preview's pictures, pixels
CHUNK = 10_000  # boxes to compare with the priors at a time, which bounds the memory


def check(splits, label_map, priors, jaccard_overlap, threshold=0.5, with_images=False, zero_based=False):
    """Look for everything that is wrong or odd in a data set.

    :param splits: what `read_annotations` returns; if images are read, their sizes and problems are entered in it
    :param label_map: class name -> index
    :param priors: arrays (rows, columns, shapes, 4), fractional cxcy, one per feature map
    :param jaccard_overlap: function of boxes (n, 4) and (n, 4), xy, that returns their overlaps (n,)
    :param threshold: jaccard overlap from which a prior matches an object
    :param with_images: read every image too, with one process per core
    :param zero_based: whether the annotations were read as counting pixels from 0
    :return: two dicts, problem -> lines that name the file: what makes training impossible, and what is worth a look;
        and split -> boxes (n, 4), fractional xy, of the objects inside images of known size, and the highest overlap
        (n,) of each with any prior
    """
    breaking, odd, objects = defaultdict(list), defaultdict(list), {}
    if with_images:
        _check_images(splits, odd)
    for split, (images, _) in splits.items():
        odd[f"image twice in {split}"] += [path for path, count in Counter(images).items() if count > 1]
    for one, other in itertools.combinations(splits, 2):
        shared = set(splits[one][0]) & set(splits[other][0])
        odd[f"same file in {one} and {other}"] += [path for path in splits[other][0] if path in shared]
    for split, (_, annotations) in splits.items():
        present = Counter()
        for annotation in annotations:
            present.update(annotation["names"])
            for problem, line in find_problems(annotation):
                breaking[problem].append(line)
            _check_boxes(annotation, zero_based, odd)
        objects[split] = _check_overlaps(annotations, priors, jaccard_overlap, threshold, odd)
        missing = [name for name in label_map if not present[name] and name != "background"]
        odd[f"class without objects in {split}"] += missing
    return _without_duplicates(breaking), _without_duplicates(odd), objects


def _without_duplicates(problems):
    """Return the problems that have lines, with each line once: an image may be in several splits."""
    return {problem: list(dict.fromkeys(lines)) for problem, lines in problems.items() if lines}


def _check_images(splits, odd):
    """Read all images; enter their sizes and problems in their annotations, and compare them with each other."""
    paths = sorted({path for images, _ in splits.values() for path in images})
    loader = DataLoader(_ImageFacts(paths), batch_size=None, collate_fn=tuple, num_workers=count_cores())
    try:
        facts = list(tqdm(loader, "images", unit="", leave=False, disable=None))
    except RuntimeError as error:
        raise InputError("--check: a process that reads images was killed; check that memory suffices") from error
    facts = dict(zip(paths, facts, strict=True))
    for images, annotations in splits.values():
        for path, annotation in zip(images, annotations, strict=True):
            size, _, problem = facts[path]
            stated = annotation["size"]
            if problem:
                annotation["problems"].append((UNREADABLE_IMAGE, problem))
                continue
            if stated and size != stated:
                line = f"{annotation['path']}: {stated[0]:g} x {stated[1]:g}, the image is {size[0]} x {size[1]}"
                odd["size in the annotation that is not the image's"].append(line)
            annotation["size"] = size
    for one, other in itertools.combinations(splits, 2):
        digests = {facts[path][1]: path for path in splits[one][0] if facts[path][1]}
        for path in splits[other][0]:
            twin = digests.get(facts[path][1])
            if twin and twin != path:
                odd[f"same image in {one} and {other}"].append(f"{path}: same as {twin}")


class _ImageFacts(list):
    """A data set of image paths. Item i is (size, digest, problem) of image i; unknown values are None.

    As a data set it is read by a DataLoader, in several processes.
    """

    def __getitem__(self, index):
        path = super().__getitem__(index)
        try:
            size = read_image(path).size
            with open(path, "rb") as file:
                return size, hashlib.file_digest(file, "sha256").digest(), None
        except (InputError, OSError) as error:
            return None, None, str(error)


def _check_boxes(annotation, zero_based, odd):
    """Check one annotation's boxes: whether they count pixels otherwise, are given twice, or reach out of the image."""
    path, names, boxes = annotation["path"], annotation["names"], annotation["boxes"]
    if annotation["n_below"]:
        first_pixel = "0" if zero_based else "1, where VOC begins (0-based? then give --zero-based)"
        odd[f"box that begins below {first_pixel}"].append(f"{path}: {annotation['n_below']} of {len(boxes)}")
    for (name, *box), count in Counter((name, *box) for name, box in zip(names, boxes, strict=True)).items():
        if count > 1:
            odd["duplicate box"].append(f"{path}: {name} {box}, {count} times")
    if annotation["size"]:
        width, height = annotation["size"]
        for number, (x_min, y_min, x_max, y_max) in enumerate(boxes, start=1):
            if (x_max > width or y_max > height) and x_min < width and y_min < height:
                odd["box that reaches beyond its image"].append(_describe_object(annotation, number))


def _describe_object(annotation, number):
    width, height = annotation["size"]
    name, box = annotation["names"][number - 1], annotation["boxes"][number - 1]
    return f"{annotation['path']}: object {number} ({name}), {box} of {width:g} x {height:g}"


def _check_overlaps(annotations, priors, jaccard_overlap, threshold, odd):
    """Report small objects; return boxes and highest overlaps of all objects, as `check` does for a split."""
    annotations = [annotation for annotation in annotations if annotation["size"] and annotation["boxes"]]
    boxes = [np.array(annotation["boxes"]) / (annotation["size"] * 2) for annotation in annotations]
    boxes = np.concatenate([np.zeros((0, 4)), *boxes]).clip(0, 1)
    overlaps = best_prior_overlaps(boxes, priors, jaccard_overlap)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)  # 0 for boxes outside the image
    smallest = min(feature_map[..., 2:].prod(axis=-1).min() for feature_map in priors)
    is_too_small = (overlaps < threshold) & (areas < smallest) & (areas > 0)
    first = 0
    for annotation in annotations:
        n_objects = len(annotation["boxes"])
        for index in is_too_small[first : first + n_objects].nonzero()[0]:
            odd["object too small for any prior to match by itself"].append(_describe_object(annotation, index + 1))
        first += n_objects
    return boxes[areas > 0], overlaps[areas > 0]


def best_prior_overlaps(boxes, priors, jaccard_overlap):
    """Return the highest jaccard overlap (n,) of each box with any prior.

    Of the priors of one shape on one feature map, none overlaps a box more than the one whose centre is nearest in both
    directions. So about 30 priors per box are enough.

    :param boxes: (n, 4) array, fractional xy
    :param priors, jaccard_overlap: see `check`
    """
    best = np.zeros(len(boxes))
    for first in range(0, len(boxes), CHUNK):
        chunk = boxes[first : first + CHUNK]
        middles_x, middles_y = (chunk[:, 0] + chunk[:, 2]) / 2, (chunk[:, 1] + chunk[:, 3]) / 2
        for feature_map in priors:
            centers_x, centers_y = feature_map[0, :, 0, 0], feature_map[:, 0, 0, 1]
            nearest_x = centers_x[np.abs(middles_x[:, None] - centers_x).argmin(axis=1)]
            nearest_y = centers_y[np.abs(middles_y[:, None] - centers_y).argmin(axis=1)]
            nearest = np.stack([nearest_x, nearest_y], axis=1)
            for sides in feature_map[0, 0, :, 2:]:
                prior = np.concatenate([nearest - sides / 2, nearest + sides / 2], axis=1)
                overlaps = jaccard_overlap(chunk, prior)
                best[first : first + CHUNK] = np.maximum(best[first : first + CHUNK], overlaps)
    return best


def print_problems(breaking, odd):
    """Print what `check` returns: each problem with its count and its first lines."""
    for title, problems in (
        ("This makes training impossible, so no lists are written:", breaking),
        ("Worth a look:", odd),
    ):
        if problems:
            print(title)
        for problem, lines in problems.items():
            print(f"  {problem}: {len(lines)}")
            for line in lines[:N_SHOWN]:
                print(f"    {line}")
            if len(lines) > N_SHOWN:
                print("    ...")


def preview(dataset, n, criterion, mean, std, seed=0):
    """Return a picture of n training samples: on the left as they are, on the right as the network gets them.

    :param dataset: PascalVOCDataset; the augmentation of its first epoch is shown
    :param criterion: MultiBoxLoss, which matches priors with objects
    :param mean, std: of the normalised images, 3 values each, RGB of 0-1
    :param seed: of the choice of images, which prefers those with objects
    """
    order = np.random.default_rng(seed).permutation(len(dataset)).tolist()
    order.sort(key=lambda index: not dataset.objects[index]["boxes"])
    pairs = [_preview_pair(dataset, index, criterion, mean, std) for index in order[:n]]
    return tile([picture for pair in pairs for picture in pair], 4, TILE)


def _preview_pair(dataset, index, criterion, mean, std):
    """Return (title, picture) of an image as it is, and of the augmented image with the priors of each object."""
    names = label_names(dataset.label_map)
    colors = label_color_map(dataset.label_map)

    # Draw the image as it is, at the preview's size: boxes of a large image would be too thin.
    original = read_image(dataset.images[index])
    scale = TILE / max(original.size)
    small = original.resize([max(1, round(side * scale)) for side in original.size])
    labels = [names[label] for label in dataset.objects[index]["labels"]]
    boxes = (np.array(dataset.objects[index]["boxes"]).reshape(-1, 4) * scale).tolist()
    left = draw_boxes(small, boxes, labels, [colors[name] for name in labels])

    # Draw what the network gets in the first epoch.
    image, boxes, labels, _ = dataset[0, index]
    pixels = image * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    pixels = (255 * pixels).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    matched_boxes, matched_labels = criterion.match([boxes], [labels])
    is_matched = matched_labels > 0
    counts = [int((matched_boxes[is_matched] == box).all(dim=1).sum()) for box in boxes]
    labels = [names[label] for label in labels.tolist()]
    captions = [f"{name} {count}" for name, count in zip(labels, counts, strict=True)]
    right = Image.fromarray(pixels).resize((TILE, TILE))
    right = draw_boxes(right, (boxes * TILE).tolist(), captions, [colors[name] for name in labels])

    file_name = os.path.basename(dataset.images[index])
    return (
        (f"{original.width} x {original.height}: {file_name}", left),
        (f"augmented; {int(is_matched.sum())} matched priors, counted per object", right),
    )
