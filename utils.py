"""Boxes, transforms of images with their boxes, mean average precision; and, from voc.py, labels and lists.

from utils import parse_annotation, find_jaccard_overlap, transform, calculate_mAP
"""

import math
import warnings
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch.nn import functional as F

from files import InputError
from voc import create_data_lists, label_color_map, label_map, make_label_map, parse_annotation, voc_labels  # noqa: F401

# ---------------------------------------------------------------------------------------------------------
# Boxes: xy is (x_min, y_min, x_max, y_max), cxcy is (c_x, c_y, w, h), gcxgcy are offsets from priors
# ---------------------------------------------------------------------------------------------------------


def xy_to_cxcy(xy):
    """Convert boxes (..., 4) from xy to cxcy."""
    return torch.cat([(xy[..., 2:] + xy[..., :2]) / 2, xy[..., 2:] - xy[..., :2]], dim=-1)


def cxcy_to_xy(cxcy):
    """Convert boxes (..., 4) from cxcy to xy."""
    return torch.cat([cxcy[..., :2] - cxcy[..., 2:] / 2, cxcy[..., :2] + cxcy[..., 2:] / 2], dim=-1)


def cxcy_to_gcxgcy(cxcy, priors_cxcy):
    """Encode boxes (..., 4), cxcy, as offsets from the priors (..., 4), cxcy, that they belong to.

    Paper §2.2, equation 2, with Caffe's variances (ssd_pascal.py, `prior_variance: 0.1, 0.1, 0.2, 0.2`):
    offsets of centres are divided by 0.1, logarithms of side ratios by 0.2.
    """
    centers = (cxcy[..., :2] - priors_cxcy[..., :2]) / (priors_cxcy[..., 2:] / 10)
    return torch.cat([centers, torch.log(cxcy[..., 2:] / priors_cxcy[..., 2:]) * 5], dim=-1)


def gcxgcy_to_cxcy(gcxgcy, priors_cxcy):
    """Decode offsets (..., 4) against their priors (..., 4), cxcy, into boxes, cxcy: the inverse of encoding."""
    centers = gcxgcy[..., :2] * priors_cxcy[..., 2:] / 10 + priors_cxcy[..., :2]
    return torch.cat([centers, torch.exp(gcxgcy[..., 2:] / 5) * priors_cxcy[..., 2:]], dim=-1)


def jaccard_overlap(boxes_1, boxes_2):
    """Return the jaccard overlap (IoU) of boxes (..., 4), xy, element by element, with broadcasting.

    Tensors and arrays alike: on few boxes arrays are several times faster.
    """
    library = np if isinstance(boxes_1, np.ndarray) else torch
    sides = []
    for low, high in ((0, 2), (1, 3)):
        side = library.minimum(boxes_1[..., high], boxes_2[..., high])
        side -= library.maximum(boxes_1[..., low], boxes_2[..., low])
        sides.append(side.clip(min=0))
    intersection = sides[0] * sides[1]
    area_1, area_2 = ((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1]) for boxes in (boxes_1, boxes_2))
    return intersection / (area_1 + area_2 - intersection)


def find_jaccard_overlap(set_1, set_2):
    """Return the jaccard overlap (n1, n2) of every box in set_1 (n1, 4) with every box in set_2 (n2, 4), xy."""
    return jaccard_overlap(set_1[:, None], set_2[None])


def decimate(tensor, m):
    """Keep every m-th value along each dimension.

    With it the fully connected layers of VGG-16 become convolutions of fewer weights (paper §3.1).

    :param tensor: any shape
    :param m: one factor per dimension, None to keep all
    """
    if tensor.dim() != len(m):
        raise ValueError(f"{len(m)} factors for a tensor of {tensor.dim()} dimensions")
    return tensor[tuple(slice(None, None, factor) for factor in m)]


# ---------------------------------------------------------------------------------------------------------
# Image-and-box transforms
# ---------------------------------------------------------------------------------------------------------

IMAGE_SIZE = 300  # side of the network's input, pixels
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in 0-1: torchvision's VGG-16 was trained with these
IMAGENET_STD = (0.229, 0.224, 0.225)
_PIXEL_MEAN, _PIXEL_STD = (255 * torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))

# Paper §2.2, "Data augmentation"; figures from Caffe's ssd_pascal.py and data_transformer.cpp.
BRIGHTNESS_DELTA = 32  # of 255, added
CONTRAST_RANGE = (0.5, 1.5)  # factor
SATURATION_RANGE = (0.5, 1.5)  # factor
HUE_DELTA = 0.1  # of the colour circle: 18 of OpenCV's 180 steps
MAX_ZOOM_OUT = 4  # sides of the canvas, in sides of the image
MIN_OVERLAPS = (None, 0.0, 0.1, 0.3, 0.5, 0.7, 0.9)  # None leaves the image whole
CROP_SIDES = (0.3, 1.0)  # of the image's sides
CROP_ASPECTS = (0.5, 2.0)  # height over width, both in pixels
CROP_TRIALS = 50


@contextmanager
def open_image(path):
    """Open the picture at `path`, not decoded yet; what goes wrong, then or later, is an InputError that names it."""
    try:
        with _decoding(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large pictures are welcome
            image = Image.open(path)
        with image:
            yield image
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


@contextmanager
def _decoding():
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # decoders raise whatever they like on a broken file
        raise InputError(f"cannot read this image ({error}); replace it or take it out of the data") from error


def read_image(path):
    """Return the picture at `path` as upright RGB; InputError that names it where it cannot be read."""
    with open_image(path) as image, _decoding():
        image = upright_rgb(image)
        image.load()
        return image


def upright_rgb(image):
    """Return a PIL image of any mode as RGB, turned as its EXIF orientation says; itself where it is that already."""
    with _decoding():
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # grayscale of more than 8 bits, which PIL would clip rather than scale
            levels = np.asarray(image)
            image = Image.fromarray((levels / (257 if levels.max() > 255 else 1)).clip(0, 255).astype(np.uint8))
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return image if image.mode == "RGB" else image.convert("RGB")


def transform(image, boxes, labels, difficulties, split, rng=None):
    """Turn an image and its objects into what the network takes; augment for training (paper §2.2).

    The geometry (zoom-out, crop, flip) is drawn on the boxes alone, then the pixels are sampled once from the image
    into 300x300, then the colours of those are distorted. Nothing given is changed, except that a JPEG file that is
    open and not yet decoded is decoded at a half, a quarter or an eighth of its size where training needs no more.

    :param image: PIL image of any mode and size
    :param boxes: (n, 4) float tensor, pixel xy of the upright image; n may be 0
    :param labels, difficulties: (n,) tensors
    :param split: 'TRAIN' augments, 'TEST' resizes and normalises only
    :param rng: numpy.random.Generator of all random choices; None draws one from torch's random state
    :return: image (3, 300, 300), ImageNet-normalised; boxes (m, 4), fractional xy inside [0, 1]; labels (m,);
        difficulties (m,); m < n only where a training crop leaves an object's centre out, and m = 0 only if n = 0
    :raises InputError: for a box without area inside the image, and where the image cannot be decoded
    """
    if split not in ("TRAIN", "TEST"):
        raise ValueError(f"split must be 'TRAIN' or 'TEST', not {split!r}")
    image = upright_rgb(image)
    width, height = image.size
    window, boxes = np.array([0, 0, width, height]), boxes.double().numpy()
    boxes = _clip(boxes, window)
    without_area = boxes[:, 2:] <= boxes[:, :2]
    if without_area.any():
        number = without_area.any(1).argmax() + 1
        raise InputError(f"object {number} has no area inside the {width}x{height} image; correct or remove it")

    flip = False
    if split == "TRAIN":
        rng = rng or np.random.default_rng(int(torch.randint(2**62, ())))
        window = zoom_out(window, rng)
        window, kept = crop_around_objects(window, boxes, rng)
        flip = rng.random() < 0.5
        boxes, kept = _clip(boxes[kept], window), torch.from_numpy(kept)
        labels, difficulties = labels[kept], difficulties[kept]
    pixels, boxes = _sample_window(image, window, boxes, flip, rng if split == "TRAIN" else None)
    return pixels, torch.from_numpy(boxes).float().clamp_(0, 1), labels.clone(), difficulties.clone()


def _clip(boxes, window):
    """Cut boxes (n, 4), xy, off at the borders of a window (4,), xy."""
    return np.minimum(np.maximum(boxes.reshape(-1, 2, 2), window[:2]), window[2:]).reshape(-1, 4)


def zoom_out(window, rng):
    """With probability 0.5 place a window (4,), pixel xy, at random in one of 1 to 4 times its sides."""
    if rng.random() < 0.5:
        return window
    sides = window[2:] - window[:2]
    canvas = np.floor(rng.uniform(1, MAX_ZOOM_OUT) * sides).astype(int)
    corner = window[:2] - np.floor(rng.random(2) * (canvas - sides + 1)).astype(int)
    return np.concatenate([corner, corner + canvas])


def crop_around_objects(window, boxes, rng):
    """Draw the paper's crop: one that overlaps an object by a random minimum.

    :param window: (4,) array of integers, pixel xy: what is there to crop from
    :param boxes: (n, 4) array, pixel xy
    :return: the crop (4,), whole pixels, xy, and a boolean (n,) array of the objects whose centre it holds, never
        all False where there are objects
    """
    corner, sides = window[:2], window[2:] - window[:2]
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    while True:
        min_overlap = MIN_OVERLAPS[rng.integers(len(MIN_OVERLAPS))]
        if min_overlap is None:
            return window, np.ones(len(boxes), bool)
        crop_sides = np.ceil(rng.uniform(*CROP_SIDES, (CROP_TRIALS, 2)) * sides)
        low = corner + np.floor(rng.random((CROP_TRIALS, 2)) * (sides - crop_sides + 1))
        crops = np.concatenate([low, low + crop_sides], axis=1)
        aspects = crop_sides[:, 1] / crop_sides[:, 0]
        fits = (CROP_ASPECTS[0] <= aspects) & (aspects <= CROP_ASPECTS[1])
        holds = ((low[:, None] < centers) & (centers < crops[:, None, 2:])).all(2)  # (trials, n)
        if len(boxes):
            fits &= holds.any(1) & (find_jaccard_overlap(crops, boxes).max(1) >= min_overlap)
        if fits.any():
            first = fits.argmax()
            return crops[first].astype(int), holds[first]


def _sample_window(image, window, boxes, flip=False, rng=None):
    """Resize a window of an RGB image to 300x300; where the window leaves the image is ImageNet's mean.

    :param window: (4,) array of integers, pixel xy
    :param boxes: (n, 4) array, pixel xy, inside both image and window
    :param flip: whether to mirror the result
    :param rng: with it the colours of the image's part, not of the filling, are distorted, and JPEGs decoded small
    :return: pixels (3, 300, 300), ImageNet-normalised, and the boxes, fractional xy
    """
    axes = [_place(*window[axis::2].tolist(), image.size[axis]) for axis in (0, 1)]
    low, high, place, size = zip(*axes, strict=True)  # x, y of each
    if min(size) == 0:  # a crop of the filling alone
        return torch.zeros(3, IMAGE_SIZE, IMAGE_SIZE), boxes

    # Decode the image; where that loses nothing, small: libjpeg offers 1/2, 1/4 and 1/8, sides rounded up.
    reduction = 8 if rng else 1
    while reduction > 1 and any(high[axis] - low[axis] < reduction * size[axis] for axis in (0, 1)):
        reduction //= 2
    with _decoding(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PIL, of large crops, and of PyTorch, of bytes not to be written to
        if reduction > 1 and not image.draft("RGB", [side // reduction for side in image.size]):
            reduction = 1
        low, high = [edge // reduction for edge in low], [-(-edge // reduction) for edge in high]
        # PIL keeps four bytes a pixel, three of them used; so they are copied and resized fastest.
        if (low, high) != ([0, 0], [*image.size]):
            image = image.crop((*low, *high))
        pixels = torch.frombuffer(image.tobytes("raw", "RGBX"), dtype=torch.uint8).view(1, image.height, image.width, 4)

    # Sample from exactly those pixels, so that the boxes fit to them.
    pixels = F.interpolate(pixels.permute(0, 3, 1, 2), size[::-1], mode="bilinear", antialias=True)[0, :3]
    scale = [size[axis] / (high[axis] - low[axis]) / reduction for axis in (0, 1)]
    shift = [place[axis] - low[axis] * reduction * scale[axis] for axis in (0, 1)]
    boxes = ((boxes.reshape(-1, 2, 2) * scale + shift) / IMAGE_SIZE).reshape(-1, 4)
    (x, y), (width, height) = place, size
    if flip:
        boxes, x = (
            np.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], axis=1),
            IMAGE_SIZE - x - width,
        )

    # Separate the colours, mirrored or not, and change them.
    pixels = torch.from_numpy(np.array(pixels.numpy()[:, :, :: -1 if flip else 1], np.float32, order="C"))
    if rng:
        photometric_distort(pixels, rng)
    pixels.sub_(_PIXEL_MEAN).div_(_PIXEL_STD)
    if min(size) < IMAGE_SIZE:
        pixels = F.pad(pixels, (x, IMAGE_SIZE - x - width, y, IMAGE_SIZE - y - height))
    return pixels, boxes


def _place(window_low, window_high, image_size):
    """Return where a window holds an image, along one axis: from and to in the image, place and size in the output.

    Place and size are rounded to whole pixels, one at least; the size is 0 where the window holds none of the image.
    """
    low, high = max(window_low, 0), min(window_high, image_size)
    if low >= high:
        return 0, 0, 0, 0
    scale = IMAGE_SIZE / (window_high - window_low)
    place = min(round((low - window_low) * scale), IMAGE_SIZE - 1)
    return low, high, place, max(round((high - window_low) * scale) - place, 1)


def photometric_distort(pixels, rng):
    """Change brightness, contrast, saturation and hue in place, each with probability 0.5, in random order.

    :param pixels: (3, height, width) float tensor, RGB of 0-255
    """
    for distortion in rng.permutation(4):
        if rng.random() < 0.5:
            continue
        if distortion == 0:
            pixels.add_(rng.uniform(-BRIGHTNESS_DELTA, BRIGHTNESS_DELTA)).clamp_(0, 255)
        elif distortion == 1:
            pixels.mul_(rng.uniform(*CONTRAST_RANGE)).clamp_(max=255)
        elif distortion == 2:
            _scale_saturation(pixels, rng.uniform(*SATURATION_RANGE))
        else:
            turn = rng.uniform(-HUE_DELTA, HUE_DELTA)
            for rows in pixels.split(100, dim=1):  # in parts, for the processor's cache and the allocator
                _turn_hue(rows, turn)


def _scale_saturation(pixels, factor):
    """Multiply HSV's saturation, (max - min) / max, by a factor, as far as 1: hue and value stay."""
    value = pixels.amax(dim=0)
    if factor > 1:
        factor = (value / (value - pixels.amin(dim=0)).clamp_(min=1e-6)).clamp_(max=factor)
    torch.lerp(value, pixels, factor, out=pixels)


def _turn_hue(pixels, turn):
    """Turn HSV's hue by a share of the colour circle, at most a sixth: saturation and value stay."""
    smallest = pixels.amin(dim=0)
    chroma = pixels.amax(dim=0).sub_(smallest)
    turned = chroma * abs(6 * turn)
    left = chroma - turned
    # Along the circle each colour rises in one sixth, is full in two, falls in one and is gone in two. Where it falls
    # or is full the next colour rises, which tells how far along; where it rises or is gone, the one before falls.
    red, green, blue = pixels
    colors = (red, green, blue) if turn > 0 else (red, blue, green)
    ahead = [colors[i] - colors[i - 2] for i in range(3)]  # of each colour to the next one
    behind = [chroma - difference for difference in ahead]
    for i, color in enumerate(colors):
        falling = torch.minimum(ahead[i] + left, behind[i - 1])
        rising = torch.minimum(ahead[i].add_(turned), behind[i - 2])
        torch.maximum(falling, rising, out=color).clamp_(min=0)
        torch.minimum(color, chroma, out=color).add_(smallest)


# ---------------------------------------------------------------------------------------------------------
# Mean average precision
# ---------------------------------------------------------------------------------------------------------

MIN_TRUE_OVERLAP = 0.5  # jaccard overlap from which a detection is of an object (VOC development kit)


def calculate_mAP(
    det_boxes,
    det_labels,
    det_scores,
    true_boxes,
    true_labels,
    true_difficulties,
    label_map=label_map,
    method="11-point",
):
    """Score detections as the Pascal VOC development kit does, except that its overlaps count both border pixels.

    :param det_boxes, det_labels, det_scores: lists of one tensor per image, (d, 4) xy, (d,), (d,)
    :param true_boxes, true_labels, true_difficulties: the same for the objects, (n, 4) xy, (n,), (n,);
        difficult objects are neither to be found nor an error when found
    :param label_map: class name -> index, background 0
    :param method: '11-point' (VOC2007) or 'area' (under the precision-recall curve, from VOC2010)
    :return: {class name: average precision}, and their mean; NaN for a class without (not difficult) objects,
        which is left out of the mean
    """
    curves = precision_recall_curves(
        det_boxes, det_labels, det_scores, true_boxes, true_labels, true_difficulties, label_map
    )
    return mean_average_precision(curves, method)


class Curve(NamedTuple):
    """What became of a class' detections, best first; those of difficult objects count neither way."""

    precision: np.ndarray  # (d,) float64, down to each detection
    recall: np.ndarray  # (d,) float64
    scores: np.ndarray  # (d,) float64
    right: np.ndarray  # (d,) bool
    images: np.ndarray  # (d,) index of the detection's image
    places: np.ndarray  # (d,) index of the detection in its image
    n_objects: np.ndarray  # (images,) number of objects to be found in each image


def precision_recall_curves(
    det_boxes, det_labels, det_scores, true_boxes, true_labels, true_difficulties, label_map=label_map
):
    """Return {class name: Curve}, with None for a class without objects to be found.

    The parameters are those of `calculate_mAP`.
    """
    n_images = len(true_boxes)
    if len(det_boxes) != n_images:
        raise ValueError(f"{len(det_boxes)} images with detections, {n_images} with objects")
    det_image, det_boxes, det_labels, det_scores = _concatenate(det_boxes, det_labels, det_scores)
    true_image, true_boxes, true_labels, true_difficulties = _concatenate(true_boxes, true_labels, true_difficulties)
    if not np.isin(np.append(det_labels, true_labels), list(label_map.values())).all():
        raise ValueError("a detection or an object has a label that the label map does not have")
    overlap, object_index = _best_objects(
        det_image * len(label_map) + det_labels,
        det_boxes,
        true_image * len(label_map) + true_labels,
        true_boxes,
    )

    # Find the fate of each detection, best first: the first one of an object is right, later ones are wrong.
    order = np.argsort(-det_scores, kind="stable")
    places = np.arange(len(det_image)) - np.searchsorted(det_image, det_image)
    labels, object_index, det_image, det_scores, places = (
        values[order] for values in (det_labels, object_index, det_image, det_scores, places)
    )
    matches = overlap[order] >= MIN_TRUE_OVERLAP
    ignored = np.zeros_like(matches)
    ignored[matches] = true_difficulties[object_index[matches]] != 0
    right = np.zeros_like(matches)
    found = np.flatnonzero(matches & ~ignored)
    right[found[np.unique(object_index[found], return_index=True)[1]]] = True

    curves = {}
    for name, label in label_map.items():
        if label == 0:
            continue
        n_objects = np.bincount(true_image[(true_labels == label) & (true_difficulties == 0)], minlength=n_images)
        scored = (labels == label) & ~ignored
        true_positives = np.cumsum(right[scored])
        precision = true_positives / np.arange(1, len(true_positives) + 1)
        if n_objects.any():
            recall = true_positives / n_objects.sum()
            of_class = (values[scored] for values in (det_scores, right, det_image, places))
            curves[name] = Curve(precision, recall, *of_class, n_objects)
        else:
            curves[name] = None
    return curves


def _concatenate(boxes, labels, values):
    """Return image index (n,), boxes (n, 4), labels (n,) and values (n,) over all images, as numpy arrays."""
    if not len(boxes) == len(labels) == len(values):
        raise ValueError(
            f"{len(boxes)} images with boxes, {len(labels)} with labels, {len(values)} with scores or flags"
        )
    counts = [len(image_boxes) for image_boxes in boxes]
    if counts != [len(image_labels) for image_labels in labels] or counts != [len(v) for v in values]:
        raise ValueError("an image's boxes, labels and scores (or difficulties) differ in number")
    boxes, labels, values = (
        torch.cat([torch.zeros(0, *shape), *(part.cpu() for part in parts)]).double()
        for parts, shape in ((boxes, (4,)), (labels, ()), (values, ()))
    )
    return np.repeat(np.arange(len(counts)), counts), boxes, labels.numpy().astype(np.int64), values.numpy()


def _best_objects(det_keys, det_boxes, true_keys, true_boxes):
    """Find for each detection the object of its image and class that it overlaps most, the first of equals.

    :param det_keys, true_keys: (d,), (n,) integers that tell image and class
    :param det_boxes, true_boxes: (d, 4), (n, 4) tensors, xy
    :return: overlap (d,), 0 where there is no object, and index of the object (d,)
    """
    overlap, object_index = np.zeros(len(det_keys)), np.zeros(len(det_keys), np.int64)
    order = np.argsort(true_keys, kind="stable")
    first = np.searchsorted(true_keys[order], det_keys, side="left")
    counts = np.searchsorted(true_keys[order], det_keys, side="right") - first

    # Lay out all pairs of a detection and an object of its image and class, a detection's pairs side by side.
    detections = np.flatnonzero(counts)
    counts, first = counts[detections], first[detections]
    if not len(detections):
        return overlap, object_index
    starts = np.cumsum(counts) - counts
    pairs = np.arange(counts.sum())
    objects = order[pairs + np.repeat(first - starts, counts)]
    pair_overlap = jaccard_overlap(det_boxes[np.repeat(detections, counts)], true_boxes[objects])
    pair_overlap = pair_overlap.nan_to_num(0).numpy()  # a box that is not finite overlaps nothing

    overlap[detections] = best = np.maximum.reduceat(pair_overlap, starts)
    is_best = pair_overlap == np.repeat(best, counts)
    object_index[detections] = objects[np.minimum.reduceat(np.where(is_best, pairs, len(pairs)), starts)]
    return overlap, object_index


def mean_average_precision(curves, method="11-point"):
    """Return {class name: average precision} of `precision_recall_curves` and their mean over scored classes."""
    average_precisions = {
        name: math.nan if curve is None else average_precision(*curve[:2], method) for name, curve in curves.items()
    }
    scored = [value for value in average_precisions.values() if not math.isnan(value)]
    return average_precisions, sum(scored) / len(scored) if scored else math.nan


def average_precision(precision, recall, method="11-point"):
    """Return the average precision of one class from its curve, two (d,) arrays, best detection first.

    '11-point' averages the best precision at recall 0, 0.1 ... 1 (VOC2007 development kit, VOCap with 11 points);
    'area' is the area under the curve made monotonic (development kit from 2010).
    """
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    if method == "11-point":
        # arange, as in the development kit's ports: 0.3 is 0.30000000000000004 there, above a recall of 3/10.
        reached = np.searchsorted(recall, np.arange(0.0, 1.1, 0.1), side="left")
        return float(np.append(envelope, 0.0)[reached].mean())
    if method == "area":
        return float((np.diff(recall, prepend=0.0) * envelope).sum())
    raise ValueError(f"method must be '11-point' or 'area', not {method!r}")
