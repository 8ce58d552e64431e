"""Looking at a data set before training on it: what is wrong with it, and what the network gets to see of it.

splits = read_annotations(read_split("VOC2007", "trainval"), read_split("VOC2007", "test"))
print_problems(*check(splits, label_map, with_images=True))
preview(PascalVOCDataset("data/voc", "TRAIN"), 8).save("preview.jpg")
"""

import hashlib
import os
from collections import Counter, defaultdict

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from devices import count_cores
from drawing import draw_boxes, tile
from files import InputError
from model import FEATURE_MAPS, SSD300, MultiBoxLoss
from utils import IMAGENET_MEAN, IMAGENET_STD, jaccard_overlap, read_image
from voc import find_outside, label_color_map, label_names

THRESHOLD = 0.5  # jaccard overlap from which a prior matches an object (paper §2.2)
N_SHOWN = 5  # lines of each problem
TILE = 420  # side of a preview's pictures, pixels


def check(splits, label_map, with_images=False, zero_based=False):
    """Look for all that is wrong or odd in a data set.

    :param splits: what `read_annotations` returns; sizes in it become the images' where those are read
    :param label_map: class name -> index
    :param with_images: read every image, too, in as many processes as there are cores
    :param zero_based: whether the annotations were read as such
    :return: two dicts, problem -> lines that name the file: what would break a training, and what is worth a look
    """
    breaking, odd = defaultdict(list), defaultdict(list)
    if with_images:
        _check_images(splits, breaking, odd)
    for split, (images, _) in splits.items():
        odd[f"image twice in {split}"] += [path for path, count in Counter(images).items() if count > 1]
    in_train = set(splits["TRAIN"][0])
    odd["same file in TRAIN and TEST"] += [path for path in splits["TEST"][0] if path in in_train]
    for split, (_, annotations) in splits.items():
        present = Counter()
        for annotation in annotations:
            present.update(annotation["names"])
            for problem, _, line in annotation["problems"] + find_outside(annotation):
                breaking[problem].append(line)
            if annotation["n_below"]:
                title = "0" if zero_based else "1, where VOC begins (0-based? then give --zero-based)"
                line = f"{annotation['path']}: {annotation['n_below']} of {len(annotation['boxes'])}"
                odd[f"box that begins below {title}"].append(line)
            _check_boxes(annotation, odd)
        missing = [name for name in label_map if not present[name] and name != "background"]
        odd[f"class without objects in {split}"] += missing
    return tuple(
        {problem: list(dict.fromkeys(lines)) for problem, lines in found.items() if lines} for found in (breaking, odd)
    )  # an image may be in both splits


def _check_images(splits, breaking, odd):
    paths = sorted({path for images, _ in splits.values() for path in images})
    loader = DataLoader(_Looks(paths), batch_size=None, collate_fn=tuple, num_workers=count_cores())
    try:
        looks = list(tqdm(loader, "images", unit="", leave=False, disable=None))
    except RuntimeError as error:
        raise InputError("--check: a process that reads images was killed; is there memory enough?") from error
    seen = dict(zip(paths, looks, strict=True))
    breaking["image that cannot be read"] += [error for _, _, error in seen.values() if error]
    digests = {seen[path][1]: path for path in splits["TRAIN"][0]}
    for path in splits["TEST"][0]:
        twin = digests.get(seen[path][1])
        if seen[path][1] and twin and twin != path:
            odd["same image in TRAIN and TEST"].append(f"{path}: is {twin}")
    for images, annotations in splits.values():
        for path, annotation in zip(images, annotations, strict=True):
            size, stated = seen[path][0], annotation["size"]
            if size and stated and size != stated:
                line = f"{annotation['path']}: {stated[0]:g} x {stated[1]:g}, the image is {size[0]} x {size[1]}"
                odd["size in the annotation that is not the image's"].append(line)
            annotation["size"] = size or stated


class _Looks(list):
    """Paths of images, of which each gives size and digest, and what is wrong with it."""

    def __getitem__(self, index):
        path = super().__getitem__(index)
        try:
            size = read_image(path).size
            with open(path, "rb") as file:
                return size, hashlib.file_digest(file, "sha256").digest(), None
        except (InputError, OSError) as error:
            return None, None, str(error)


def _check_boxes(annotation, odd):
    """Check one annotation's boxes, against its size, too, where that is known."""
    objects = list(zip(annotation["names"], map(tuple, annotation["boxes"]), strict=True))
    for (name, box), count in Counter(objects).items() if len(set(objects)) < len(objects) else ():
        if count > 1:
            odd["duplicate box"].append(f"{annotation['path']}: {name} {list(box)}, {count} times")
    if not objects or not annotation["size"]:
        return
    width, height = annotation["size"]
    boxes = np.array(annotation["boxes"])
    is_inside = (boxes[:, 0] < width) & (boxes[:, 1] < height)
    reaches_out = ((boxes[:, 2] > width) | (boxes[:, 3] > height)) & is_inside
    shapes = (boxes[:, 2:] - boxes[:, :2]) / (width, height)
    for title, found in (
        ("box that reaches beyond its image", reaches_out),
        ("object too small for any prior to match by itself, at 300 x 300 pixels", _is_too_small(shapes)),
    ):
        for number in found.nonzero()[0]:
            line = f"{annotation['path']}: object {number + 1} ({annotation['names'][number]})"
            odd[title].append(f"{line}, {annotation['boxes'][number]} of {width:g} x {height:g}")


def _is_too_small(shapes, smallest=0.1):
    """Tell for shapes (n, 2), fractional, whether they are so small that a prior on their centre does not match them.

    :param smallest: side of the smallest priors, all of which have that side's square as area
    """
    sides = smallest * np.sqrt([[1, 1], [2, 0.5], [0.5, 2]])  # width and height: ratios 1, 2 and 1/2
    shared = np.minimum(shapes[:, None], sides).prod(axis=2)
    area = shapes.prod(axis=1)
    overlap = (shared / (area[:, None] + smallest**2 - shared)).max(axis=1)
    return (area < smallest**2) & (overlap < THRESHOLD)


def best_prior_overlaps(lists, splits):
    """Return split -> the highest jaccard overlap (n,) with any prior of each object whose image's size is known.

    :param lists: what `label_objects` returns
    :param splits: what `read_annotations` returns, for the sizes
    """
    priors, overlaps = _priors().numpy(), {}
    for split, (_, objects) in lists.items():
        boxes = [
            np.array(entry["boxes"]) / (annotation["size"] * 2)
            for entry, annotation in zip(objects, splits[split][1], strict=True)
            if annotation["size"] and entry["boxes"]
        ]
        boxes = np.concatenate([np.zeros((0, 4)), *boxes]).clip(0, 1)
        parts = np.array_split(boxes, len(boxes) // 10_000 + 1)  # which take less memory
        overlaps[split] = np.concatenate([best_overlap(part, priors) for part in parts])
    return overlaps


def _priors():
    with torch.device("meta"):  # the network's weights are not needed
        network = SSD300(2, pretrained=False)
    return network.create_prior_boxes()


def best_overlap(boxes, priors):
    """Return the highest jaccard overlap (n,) of boxes (n, 4), fractional xy, with the priors (8732, 4), cxcy.

    Of the priors of one shape on one feature map none overlaps a box more than the one whose centre is the nearest
    in both directions: so 30 priors a box are looked at.
    """
    best, first = np.zeros(len(boxes)), 0
    middles = (boxes[:, :2] + boxes[:, 2:]) / 2
    for cells, _, n_priors in FEATURE_MAPS.values():
        grid = priors[first : first + cells * cells * n_priors].reshape(cells, cells, n_priors, 4)
        first += cells * cells * n_priors
        centers = grid[0, :, 0, 0]  # of the columns, and of the rows
        nearest = centers[np.abs(middles[..., None] - centers).argmin(axis=2)]
        for shape in grid[0, 0, :, 2:]:
            prior = np.concatenate([nearest - shape / 2, nearest + shape / 2], axis=1)
            best = np.maximum(best, jaccard_overlap(boxes, prior))
    return best


def print_problems(breaking, odd):
    """Print what `check` found: per problem the count and the first lines."""
    for title, problems in (("This would break a training:", breaking), ("Worth a look:", odd)):
        if problems:
            print(title)
        for problem, lines in problems.items():
            print(f"  {problem}: {len(lines)}")
            for line in lines[:N_SHOWN]:
                print(f"    {line}")
            if len(lines) > N_SHOWN:
                print("    ...")


def preview(dataset, n, seed=0):
    """Return a picture of n training samples: at the left as they are, at the right as the network gets them.

    :param dataset: PascalVOCDataset, whose first epoch's augmentation is shown
    :param seed: of the choice of images, of which those with objects come first
    """
    rng = np.random.default_rng(seed)
    order = sorted(rng.permutation(len(dataset)).tolist(), key=lambda index: not dataset.objects[index]["boxes"])
    return tile([picture for index in order[:n] for picture in _preview_pair(dataset, index)], 4, TILE)


def _preview_pair(dataset, index):
    names = label_names(dataset.label_map)
    colors = label_color_map(dataset.label_map)
    original = read_image(dataset.images[index])
    scale = TILE / max(original.size)
    small = original.resize([max(1, round(side * scale)) for side in original.size])
    labels = [names[label] for label in dataset.objects[index]["labels"]]
    boxes = (np.array(dataset.objects[index]["boxes"]).reshape(-1, 4) * scale).tolist()
    left = draw_boxes(small, boxes, labels, [colors[name] for name in labels])

    image, boxes, labels, _ = dataset[0, index]
    pixels = image * torch.tensor(IMAGENET_STD)[:, None, None] + torch.tensor(IMAGENET_MEAN)[:, None, None]
    pixels = (255 * pixels).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    matched_boxes, matched = MultiBoxLoss(_priors()).match([boxes], [labels])
    counts = [int((matched_boxes[matched > 0] == box).all(dim=1).sum()) for box in boxes]
    labels = [names[label] for label in labels.tolist()]
    captions = [f"{name} {count}" for name, count in zip(labels, counts, strict=True)]
    right = Image.fromarray(pixels).resize((TILE, TILE))
    right = draw_boxes(right, (boxes * TILE).tolist(), captions, [colors[name] for name in labels])

    name = os.path.basename(dataset.images[index])
    return (
        (f"{original.width} x {original.height}: {name}", left),
        (f"augmented; priors matched: {int((matched > 0).sum())}, and by object", right),
    )
