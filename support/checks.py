"""Checks of a data set before training, and a preview of its training samples.

splits = {"TRAIN": read_sources(["VOC2007"], "TRAIN"), "TEST": read_sources(["VOC2007"], "TEST")}
odd_images, near_copies = check_images(splits)
problems = find_problems(splits)
odd, objects = check(splits, label_map, priors, jaccard_overlap)
print_problems("Worth a look:", odd_images + odd)
preview(PascalVOCDataset("data/voc", "TRAIN"), 8, criterion).save("preview.jpg")
"""

import hashlib
import itertools
import os
from collections import Counter, defaultdict

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from support.annotations import UNREADABLE_IMAGE
from support.devices import count_cores, ignore_signals
from support.files import InputError
from support.images import draw_boxes, read_image, tile
from support.labels import label_color_map, label_names
from support.leaks import find_near_copies, perceptual_hash
from support.lists import SharedPaths

N_SHOWN = 5  # lines to print of each problem
TILE = 420  # side of a preview's pictures, pixels


def check(splits, label_map, priors, jaccard_overlap, threshold=0.5):
    """Look for everything that is odd in annotations, after `find_problems`.

    :param splits: as in `support.annotations`
    :param label_map: class name -> index
    :param priors: arrays (rows, columns, shapes, 4), fractional cxcy, one per feature map
    :param jaccard_overlap: function of boxes (n, 4) and (n, 4), xy, that returns their overlaps (n,)
    :param threshold: jaccard overlap from which a prior matches an object
    :return: what is worth a look, (kind, line that names the file) of each; and split -> boxes (n, 4), fractional xy,
        of the objects in images of known size, and the highest overlap (n,) of each with any prior
    """
    odd, objects = [], {}
    images = {split: [annotation.image for annotation in annotations] for split, annotations in splits.items()}
    for split, paths in images.items():
        odd += [(f"image twice in {split}", path) for path, count in Counter(paths).items() if count > 1]
    for one, other in itertools.combinations(splits, 2):
        shared = set(images[one]) & set(images[other])
        odd += [(f"same file in {one} and {other}", path) for path in images[other] if path in shared]
    for split, annotations in splits.items():
        for annotation in annotations:
            odd += _check_boxes(annotation)
        boxes, overlaps, too_small = _check_overlaps(annotations, priors, jaccard_overlap, threshold)
        objects[split] = boxes, overlaps
        odd += [("object too small for any prior to match by itself", line) for line in too_small]
        present = {item.name for annotation in annotations for item in annotation.objects}
        missing = [name for name in label_map if present and name not in present and name != "background"]
        odd += [(f"class without objects in {split}", name) for name in missing]
    return odd, objects


def check_images(splits):
    """Read all images, with one process per core; enter their sizes and problems in their annotations.

    :return: what is worth a look, (kind, line that names the file) of each; and images that are nearly the same, the
        closest first, as `leaks.draw_near_copies` takes them
    """
    paths = SharedPaths(sorted({annotation.image for annotations in splits.values() for annotation in annotations}))
    loader = DataLoader(
        paths, batch_size=None, collate_fn=_read_facts, num_workers=count_cores(), worker_init_fn=ignore_signals
    )
    facts = dict(zip(paths, tqdm(loader, "images", unit="", leave=False, disable=None), strict=True))
    odd, near_copies, readable = [], [], {split: {} for split in splits}  # a dict has each image once
    for split, annotations in splits.items():
        for annotation in annotations:
            stated, (size, digest, image_hash, problem) = annotation.size, facts[annotation.image]
            if problem is None:
                readable[split][annotation.image] = digest, image_hash
                annotation.size = size
                if stated not in (None, size):
                    line = f"{annotation.path}: {stated[0]:g} x {stated[1]:g}, the image is {size[0]} x {size[1]}"
                    odd.append(("size in the annotation that is not the image's", line))
            elif UNREADABLE_IMAGE not in dict(annotation.problems):
                annotation.problems.append((UNREADABLE_IMAGE, problem))
    for one, other in itertools.combinations(splits, 2):
        originals = {digest: path for path, (digest, _) in readable[one].items()}
        rest = {}  # of the other split: images of which there is no exact copy
        for path, (digest, image_hash) in readable[other].items():
            if digest not in originals:
                rest[path] = image_hash
            elif originals[digest] != path:
                odd.append((f"same image in {one} and {other}", f"{path}: same as {originals[digest]}"))
        pairs = find_near_copies([image_hash for _, image_hash in readable[one].values()], list(rest.values()))
        share = len(pairs) / max(1, len(readable[other]))
        paths_1, paths_2 = list(readable[one]), list(rest)
        for index_2, index_1, distance in pairs:
            path, twin = paths_2[index_2], paths_1[index_1]
            kind = f"nearly the same image in {one} and {other}, {share:.1%} of {other}"
            odd.append((kind, f"{path}: like {twin}"))
            near_copies.append((other, path, one, twin, distance))
    near_copies.sort(key=lambda pair: pair[-1])
    return odd, near_copies


def _read_facts(path):
    """Return (size, digest, perceptual hash, problem) of an image; None for what is unknown."""
    try:
        image = read_image(path)
        with open(path, "rb") as file:
            return image.size, hashlib.file_digest(file, "sha256").digest(), perceptual_hash(image), None
    except (InputError, OSError) as error:
        return None, None, None, str(error)


def _check_boxes(annotation):
    """Yield what is odd: boxes that count pixels otherwise, are given twice, or reach out of the image."""
    path, size = annotation.path, annotation.size
    if annotation.n_below:
        hint = ", where VOC begins (0-based? then give --zero-based)" if annotation.first_pixel else ""
        line = f"{path}: {annotation.n_below} of {len(annotation.objects)}"
        yield f"box that begins below {annotation.first_pixel}{hint}", line
    for (name, *box), count in Counter((item.name, *item.box) for item in annotation.objects).items():
        if count > 1:
            yield "duplicate box", f"{path}: {name} {box}, {count} times"
    for item in annotation.objects if size else ():
        if item.box[2] > size[0] or item.box[3] > size[1]:
            yield "box that reaches beyond its image", _describe_object(annotation, item)


def _describe_object(annotation, item):
    width, height = annotation.size
    return f"{annotation.path}: {annotation.unit} {item.number} ({item.name}), {item.box} of {width:g} x {height:g}"


def _check_overlaps(annotations, priors, jaccard_overlap, threshold):
    """Return boxes and highest overlaps of all objects, as `check` does for a split, and lines on small objects."""
    pairs = [(annotation, item) for annotation in annotations if annotation.size for item in annotation.objects]
    pixels = np.array([item.box for _, item in pairs], float).reshape(-1, 4)
    sizes = np.array([annotation.size * 2 for annotation, _ in pairs], float).reshape(-1, 4)
    boxes = (pixels / sizes).clip(0, 1)
    overlaps = best_prior_overlaps(boxes, priors, jaccard_overlap)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    smallest = min(feature_map[..., 2:].prod(axis=-1).min() for feature_map in priors)
    is_too_small = (overlaps < threshold) & (areas < smallest)
    too_small = [_describe_object(*pairs[index]) for index in is_too_small.nonzero()[0]]
    return boxes, overlaps, too_small


def best_prior_overlaps(boxes, priors, jaccard_overlap):
    """Return the highest jaccard overlap (n,) of each box with any prior.

    Of the priors of one shape on one feature map, none overlaps a box more than the one whose centre is nearest in both
    directions. So about 30 priors per box are enough.

    :param boxes: (n, 4) array, fractional xy
    :param priors, jaccard_overlap: see `check`
    """
    best = np.zeros(len(boxes))
    middles = (boxes[:, :2] + boxes[:, 2:]) / 2
    for feature_map in priors:
        nearest = np.empty_like(middles, dtype=feature_map.dtype)
        for axis, centers in enumerate((feature_map[0, :, 0, 0], feature_map[:, 0, 0, 1])):  # x, y; ascending
            borders = (centers[:-1] + centers[1:]) / 2
            nearest[:, axis] = centers[np.searchsorted(borders, middles[:, axis])]
        for sides in feature_map[0, 0, :, 2:]:
            prior = np.concatenate([nearest - sides / 2, nearest + sides / 2], axis=1)
            best = np.maximum(best, jaccard_overlap(boxes, prior))
    return best


def print_problems(title, problems):
    """Print problems, (kind, line): each kind with its count and its first lines."""
    kinds = defaultdict(list)
    for kind, line in dict.fromkeys(problems):  # each once: an image may be in several splits
        kinds[kind].append(line)
    if kinds:
        print(title)
    for kind, lines in kinds.items():
        shown = [*lines[:N_SHOWN], "..."] if len(lines) > N_SHOWN else lines
        print(f"  {kind}: {len(lines)}", *shown, sep="\n    ")


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
    left = draw_boxes(small, boxes, labels, [colors[name] for name in labels])

    # Draw what the network gets in the first epoch.
    image, boxes, labels, _ = dataset[0, index]
    matched_boxes, matched_labels = criterion.match([boxes], [labels])
    is_matched = matched_labels > 0
    counts = [int((matched_boxes[is_matched] == box).all(dim=1).sum()) for box in boxes]
    labels = [names[label] for label in labels.tolist()]
    captions = [f"{name} {count}" for name, count in zip(labels, counts, strict=True)]
    right = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((TILE, TILE))
    right = draw_boxes(right, (boxes * TILE).tolist(), captions, [colors[name] for name in labels])

    file_name = os.path.basename(dataset.images[index])
    return (
        (f"{original.width} x {original.height}: {file_name}", left),
        (f"augmented; {int(is_matched.sum())} matched priors, counted per object", right),
    )
