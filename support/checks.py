"""Checks of a data set before training, and a preview of its training samples.

splits = {"TRAIN": read_sources(["VOC2007"], "TRAIN"), "TEST": read_sources(["VOC2007"], "TEST")}
odd_images, near_copies = check_images(splits)
breaking, odd, objects = check(splits, label_map, priors, jaccard_overlap)
print_problems(breaking, odd_images | odd)
preview(PascalVOCDataset("data/voc", "TRAIN"), 8, criterion).save("preview.jpg")
"""

import hashlib
import itertools
import os
from collections import Counter, defaultdict, namedtuple

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from support.annotations import UNREADABLE_IMAGE, find_problems
from support.devices import count_cores, ignore_signals
from support.files import InputError
from support.images import draw_boxes, read_image, tile
from support.labels import label_color_map, label_names
from support.leaks import find_near_copies, perceptual_hash
from support.lists import SharedPaths

N_SHOWN = 5  # lines to print of each problem
TILE = 420  # side of a preview's pictures, pixels
REFUSED = "These problems make training impossible, so no lists are written (--drop-invalid leaves out what has them):"
DROPPED = "These problems make training impossible. What has them is left out; dropped.json names all of it:"
CHUNK = 10_000  # boxes to compare with the priors at a time, which bounds the memory


def check(splits, label_map, priors, jaccard_overlap, threshold=0.5):
    """Look for everything that is wrong or odd in annotations.

    :param splits: {"TRAIN": annotations, "TEST": the same ...}
    :param label_map: class name -> index
    :param priors: arrays (rows, columns, shapes, 4), fractional cxcy, one per feature map
    :param jaccard_overlap: function of boxes (n, 4) and (n, 4), xy, that returns their overlaps (n,)
    :param threshold: jaccard overlap from which a prior matches an object
    :return: two dicts, kind -> lines that name the file: what makes training impossible, and what is worth a look;
        and split -> boxes (n, 4), fractional xy, of the objects inside images of known size, and the highest overlap
        (n,) of each with any prior
    """
    breaking, odd, objects = defaultdict(list), defaultdict(list), {}
    images = {split: [annotation.image for annotation in annotations] for split, annotations in splits.items()}
    for split, paths in images.items():
        odd[f"image twice in {split}"] += [path for path, count in Counter(paths).items() if count > 1]
    for one, other in itertools.combinations(splits, 2):
        shared = set(images[one]) & set(images[other])
        odd[f"same file in {one} and {other}"] += [path for path in images[other] if path in shared]
    for split, annotations in splits.items():
        present = set()
        for annotation in annotations:
            present.update(item.name for item in annotation.objects)
            for kind, line in find_problems(annotation):
                breaking[kind].append(line)
            _check_boxes(annotation, odd)
        objects[split] = _check_overlaps(annotations, priors, jaccard_overlap, threshold, odd)
        if present or split != "TEST":  # test images may have no annotations at all
            present.add("background")
            odd[f"class without objects in {split}"] += [name for name in label_map if name not in present]
    return _without_duplicates(breaking), _without_duplicates(odd), objects


def _without_duplicates(problems):
    """Return the kinds of problems that have lines, with each line once: an image may be in several splits."""
    return {kind: list(dict.fromkeys(lines)) for kind, lines in problems.items() if lines}


def check_images(splits):
    """Read all images, with one process per core; enter their sizes and problems in their annotations.

    :param splits: {"TRAIN": annotations, "TEST": the same ...}
    :return: a dict, kind -> lines that name the file, of what is worth a look; and images that are nearly the same,
        the closest first, as `leaks.draw_near_copies` takes them
    """
    paths = SharedPaths(sorted({annotation.image for annotations in splits.values() for annotation in annotations}))
    loader = DataLoader(
        paths, batch_size=None, collate_fn=_read_facts, num_workers=count_cores(), worker_init_fn=ignore_signals
    )
    facts = dict(zip(paths, tqdm(loader, "images", unit="", leave=False, disable=None), strict=True))
    odd, near_copies = defaultdict(list), []
    for annotations in splits.values():
        for annotation in annotations:
            stated, (size, _, _, problem) = annotation.size, facts[annotation.image]
            if problem:
                if UNREADABLE_IMAGE not in dict(annotation.problems):
                    annotation.problems.append((UNREADABLE_IMAGE, problem))
                continue
            if stated and size != stated:
                line = f"{annotation.path}: {stated[0]:g} x {stated[1]:g}, the image is {size[0]} x {size[1]}"
                odd["size in the annotation that is not the image's"].append(line)
            annotation.size = size
    readable = {
        split: [path for path in dict.fromkeys(annotation.image for annotation in annotations) if facts[path].size]
        for split, annotations in splits.items()
    }
    for one, other in itertools.combinations(splits, 2):
        digests = {facts[path].digest: path for path in readable[one]}
        copies = {path: digests[facts[path].digest] for path in readable[other] if facts[path].digest in digests}
        odd[f"same image in {one} and {other}"] += [
            f"{path}: same as {twin}" for path, twin in copies.items() if path != twin
        ]
        rest = [path for path in readable[other] if path not in copies]
        pairs = find_near_copies([facts[path].hash for path in readable[one]], [facts[path].hash for path in rest])
        share = len(pairs) / max(1, len(readable[other]))
        kind = f"nearly the same image in {one} and {other}, {share:.1%} of {other}"
        for index, twin_index, distance in pairs:
            path, twin = rest[index], readable[one][twin_index]
            odd[kind].append(f"{path}: like {twin}")
            near_copies.append((other, path, one, twin, distance))
    near_copies.sort(key=lambda pair: pair[-1])
    return _without_duplicates(odd), near_copies


Facts = namedtuple("Facts", "size digest hash problem")  # of an image file; None for what is unknown


def _read_facts(path):
    """Return the Facts of an image file."""
    try:
        image = read_image(path)
        with open(path, "rb") as file:
            return Facts(image.size, hashlib.file_digest(file, "sha256").digest(), perceptual_hash(image), None)
    except (InputError, OSError) as error:
        return Facts(None, None, None, str(error))


def _check_boxes(annotation, odd):
    """Check one annotation's boxes: whether they count pixels otherwise, are given twice, or reach out of the image."""
    path, size = annotation.path, annotation.size
    if annotation.n_below:
        hint = ", where VOC begins (0-based? then give --zero-based)" if annotation.first_pixel else ""
        n_boxes = len(annotation.objects)
        odd[f"box that begins below {annotation.first_pixel}{hint}"].append(
            f"{path}: {annotation.n_below} of {n_boxes}"
        )
    for (name, *box), count in Counter((item.name, *item.box) for item in annotation.objects).items():
        if count > 1:
            odd["duplicate box"].append(f"{path}: {name} {box}, {count} times")
    for item in annotation.objects if size else ():
        x_min, y_min, x_max, y_max = item.box
        if (x_max > size[0] or y_max > size[1]) and x_min < size[0] and y_min < size[1]:
            odd["box that reaches beyond its image"].append(_describe_object(annotation, item))


def _describe_object(annotation, item):
    width, height = annotation.size
    return f"{annotation.path}: {annotation.unit} {item.number} ({item.name}), {item.box} of {width:g} x {height:g}"


def _check_overlaps(annotations, priors, jaccard_overlap, threshold, odd):
    """Report small objects; return boxes and highest overlaps of all objects, as `check` does for a split."""
    pairs = [(annotation, item) for annotation in annotations if annotation.size for item in annotation.objects]
    pixels = np.array([item.box for _, item in pairs], np.float64).reshape(-1, 4)
    sizes = np.array([annotation.size for annotation, _ in pairs], np.float64).reshape(-1, 2)
    boxes = (pixels / np.tile(sizes, 2)).clip(0, 1)
    overlaps = best_prior_overlaps(boxes, priors, jaccard_overlap)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)  # 0 for boxes outside the image
    smallest = min(feature_map[..., 2:].prod(axis=-1).min() for feature_map in priors)
    is_too_small = (overlaps < threshold) & (areas < smallest) & (areas > 0)
    for index in is_too_small.nonzero()[0]:
        odd[f"object too small for any prior to overlap it by {threshold:g}"].append(_describe_object(*pairs[index]))
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


def print_problems(breaking, odd, dropped=()):
    """Print what `check` returns and `annotations.drop_invalid` left out: each problem, its count, its first lines."""
    left_out = defaultdict(list)
    for kind, line in dropped:
        left_out[kind].append(line)
    for title, problems in ((DROPPED, left_out), (REFUSED, breaking), ("Worth a look:", odd)):
        if problems:
            print(title)
        for kind, lines in problems.items():
            print(f"  {kind}: {len(lines)}")
            for line in lines[:N_SHOWN]:
                print(f"    {line}")
            if len(lines) > N_SHOWN:
                print("    ...")


def preview(dataset, n, criterion, seed=0):
    """Return a picture of n training samples: on the left as they are, on the right as the network gets them.

    :param dataset: PascalVOCDataset; the augmentation of its first epoch is shown
    :param criterion: MultiBoxLoss, which matches priors with objects
    :param seed: of the choice of images, which prefers those with objects
    """
    order = np.random.default_rng(seed).permutation(len(dataset)).tolist()
    order.sort(key=lambda index: not dataset.objects[index]["labels"])
    pairs = [_preview_pair(dataset, index, criterion) for index in order[:n]]
    return tile([picture for pair in pairs for picture in pair], 4, TILE)


def _preview_pair(dataset, index, criterion):
    """Return (title, picture) of an image as it is, and of the augmented image with the priors of each object."""
    names = label_names(dataset.label_map)
    colors = label_color_map(dataset.label_map)

    # Draw the image as it is, at the preview's size: boxes of a large image would be too thin.
    original = read_image(dataset.images[index])
    scale = TILE / max(original.size)
    small = original.resize([max(1, round(side * scale)) for side in original.size])
    labels = [names[label] for label in dataset.objects[index]["labels"]]
    boxes = (np.array(dataset.objects[index]["boxes"]).reshape(-1, 4) * scale).tolist()
    left = draw_boxes(small, boxes, labels, [colors[name] for name in labels], legend=True)

    # Draw what the network gets in the first epoch.
    image, boxes, labels, _ = dataset[0, index]
    matched_boxes, matched_labels = criterion.match([boxes], [labels])
    is_matched = matched_labels > 0
    counts = [int((matched_boxes[is_matched] == box).all(dim=1).sum()) for box in boxes]
    labels = [names[label] for label in labels.tolist()]
    captions = [f"{name} {count}" for name, count in zip(labels, counts, strict=True)]
    right = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((TILE, TILE))
    right = draw_boxes(right, (boxes * TILE).tolist(), captions, [colors[name] for name in labels], legend=True)

    file_name = os.path.basename(dataset.images[index])
    return (
        (f"{original.width} x {original.height}: {file_name}", left),
        (f"augmented; {int(is_matched.sum())} matched priors, counted per object", right),
    )
