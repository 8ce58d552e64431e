"""Boxes, transforms of images with their boxes, and mean average precision; labels and lists come from support/.

from utils import parse_annotation, find_jaccard_overlap, transform, calculate_mAP
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from support.files import InputError
from support.images import decoding, upright_rgb
from support.labels import label_color_map, label_map, label_names, make_label_map, voc_labels  # noqa: F401
from support.voc import create_data_lists, parse_annotation  # noqa: F401

rev_label_map = label_names(label_map)

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
    """Encode boxes (..., 4), cxcy, as offsets from their priors (..., 4), cxcy.

    Paper §2.2, equation 2, with Caffe's variances (ssd_pascal.py, `prior_variance: 0.1, 0.1, 0.2, 0.2`):
    offsets of centres are divided by 0.1, logarithms of side ratios by 0.2.
    """
    centers = (cxcy[..., :2] - priors_cxcy[..., :2]) / (priors_cxcy[..., 2:] / 10)
    return torch.cat([centers, torch.log(cxcy[..., 2:] / priors_cxcy[..., 2:]) * 5], dim=-1)


def gcxgcy_to_cxcy(gcxgcy, priors_cxcy):
    """Decode offsets (..., 4) from their priors (..., 4), cxcy, into boxes, cxcy: the inverse of encoding."""
    centers = gcxgcy[..., :2] * priors_cxcy[..., 2:] / 10 + priors_cxcy[..., :2]
    return torch.cat([centers, torch.exp(gcxgcy[..., 2:] / 5) * priors_cxcy[..., 2:]], dim=-1)


def jaccard_overlap(boxes_1, boxes_2):
    """Return the jaccard overlap (IoU) of boxes (..., 4), xy, element by element, with broadcasting.

    Takes tensors or arrays. For a few boxes arrays are several times faster.
    """
    library, shared_sides = (np if isinstance(boxes_1, np.ndarray) else torch), []
    for low, high in ((0, 2), (1, 3)):
        side = library.minimum(boxes_1[..., high], boxes_2[..., high])
        side -= library.maximum(boxes_1[..., low], boxes_2[..., low])  # in place: the tables are large
        shared_sides.append(side.clip(min=0))
    intersection = shared_sides[0] * shared_sides[1]
    area_1 = (boxes_1[..., 2] - boxes_1[..., 0]) * (boxes_1[..., 3] - boxes_1[..., 1])
    area_2 = (boxes_2[..., 2] - boxes_2[..., 0]) * (boxes_2[..., 3] - boxes_2[..., 1])
    return intersection / (area_1 + area_2 - intersection)


def find_jaccard_overlap(set_1, set_2):
    """Return the jaccard overlap (n1, n2) of every box in set_1 (n1, 4) with every box in set_2 (n2, 4), xy."""
    return jaccard_overlap(set_1[:, None], set_2[None])


def decimate(tensor, m):
    """Keep every m-th value along each dimension.

    This turns the fully connected layers of VGG-16 into convolutions with fewer weights (paper §3.1).

    :param tensor: any shape
    :param m: one factor per dimension, None to keep all
    """
    if tensor.dim() != len(m):
        raise ValueError(f"{len(m)} factors for a tensor of {tensor.dim()} dimensions")
    return tensor[tuple(slice(None, None, factor) for factor in m)]


# ---------------------------------------------------------------------------------------------------------
# Image-and-box transforms
# ---------------------------------------------------------------------------------------------------------

IMAGE_SIZE = 300  # side of SSD300's input, pixels
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in 0-1: torchvision's VGG-16 was trained with these
IMAGENET_STD = (0.229, 0.224, 0.225)
_PIXEL_MEAN, _PIXEL_STD = (255 * torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
_FILLING = _PIXEL_MEAN.round().byte()  # of the area around an image

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
ZOOM_OUT_PROBABILITY = FLIP_PROBABILITY = 0.5
DISTORTION_PROBABILITY = 0.5  # of each of the four changes of colours


def transform(image, boxes, labels, difficulties, split, rng=None, size=IMAGE_SIZE, antialias=True, as_bytes=False):
    """Turn an image and its objects into a sample for the network; augment it for training (paper §2.2).

    The geometry (zoom-out, crop, flip) is drawn on the boxes alone. Then one window of the image is resized and its
    colours are distorted. No argument is changed, except that training may decode an open JPEG file at a smaller size.

    :param image: PIL image of any mode and size
    :param boxes: (n, 4) float tensor, pixel xy of the upright image; n may be 0
    :param labels, difficulties: (n,) tensors
    :param split: 'TRAIN' augments, 'TEST' only resizes and normalises; upper or lower case
    :param rng: numpy.random.Generator for all random choices; None seeds one from torch's random state
    :param size: side of the network's input, pixels
    :param antialias: False resizes a test image as OpenCV's INTER_LINEAR does; training images are always antialiased
    :param as_bytes: return the image as RGB of 0-255, uint8; the network normalises it
    :return: image (3, size, size), ImageNet-normalised unless `as_bytes`; boxes (m, 4), fractional xy inside [0, 1];
        labels (m,); difficulties (m,); a training crop drops objects whose centre it does not hold, but never all
    :raises InputError: if a box has no area inside the image, or the image cannot be decoded
    """
    is_training = str(split).upper() == "TRAIN"
    if not is_training and str(split).upper() != "TEST":
        raise ValueError(f"split must be 'TRAIN' or 'TEST', not {split!r}")
    image = upright_rgb(image)
    width, height = image.size
    window = np.array([0, 0, width, height])
    boxes = _clip(boxes.numpy().astype(np.float64), window)
    without_area = (boxes[:, 2:] <= boxes[:, :2]).any(axis=1)
    if without_area.any():
        number = without_area.argmax() + 1
        raise InputError(f"object {number} has no area inside the {width}x{height} image; correct or remove it")

    if not is_training:
        pixels, boxes = _sample_window(image, window, boxes, size, antialias=antialias)
    else:
        rng = rng or np.random.default_rng(int(torch.randint(2**62, ())))
        window = zoom_out(window, rng)
        window, kept = crop_around_objects(window, boxes, rng)
        flip = rng.random() < FLIP_PROBABILITY
        pixels, boxes = _sample_window(image, window, _clip(boxes[kept], window), size, flip, rng)
        labels, difficulties = (values[torch.from_numpy(kept)] for values in (labels, difficulties))
    pixels = pixels if as_bytes else (pixels - _PIXEL_MEAN) / _PIXEL_STD
    boxes = torch.from_numpy(boxes.astype(np.float32).clip(0, 1))
    return pixels, boxes, labels.clone(), difficulties.clone()


def _clip(boxes, window):
    """Clip boxes (n, 4), xy, to a window (4,), xy."""
    return np.minimum(np.maximum(boxes.reshape(-1, 2, 2), window[:2]), window[2:]).reshape(-1, 4)


def zoom_out(window, rng):
    """With ZOOM_OUT_PROBABILITY, extend a window (4,), pixel xy, to a canvas of 1 to 4 times its sides around it."""
    if rng.random() < 1 - ZOOM_OUT_PROBABILITY:
        return window
    sides = window[2:] - window[:2]
    canvas = np.floor(rng.uniform(1, MAX_ZOOM_OUT) * sides).astype(int)
    corner = window[:2] - np.floor(rng.random(2) * (canvas - sides + 1)).astype(int)
    return np.concatenate([corner, corner + canvas])


def crop_around_objects(window, boxes, rng):
    """Draw the paper's crop, which overlaps at least one object by a random minimum.

    :param window: (4,) integer array, pixel xy: the area to crop from
    :param boxes: (n, 4) array, pixel xy
    :return: the crop (4,), whole pixels, xy; a boolean array (n,) of the objects whose centre it holds, with at least
        one True if there are objects
    """
    corner, sides = window[:2], window[2:] - window[:2]
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    while True:
        min_overlap = MIN_OVERLAPS[rng.integers(len(MIN_OVERLAPS))]
        if min_overlap is None:
            return window, np.ones(len(boxes), bool)
        # Draw all trials at once and take the first that fits.
        crop_sides = np.ceil(rng.uniform(*CROP_SIDES, (CROP_TRIALS, 2)) * sides)
        low = corner + np.floor(rng.random((CROP_TRIALS, 2)) * (sides - crop_sides + 1))
        crops = np.concatenate([low, low + crop_sides], axis=1)
        aspects = crop_sides[:, 1] / crop_sides[:, 0]
        fits = (CROP_ASPECTS[0] <= aspects) & (aspects <= CROP_ASPECTS[1])
        holds_center = ((low[:, None] < centers) & (centers < crops[:, None, 2:])).all(axis=2)  # (trials, n)
        if len(boxes):
            fits &= holds_center.any(axis=1) & (find_jaccard_overlap(crops, boxes).max(axis=1) >= min_overlap)
        if fits.any():
            first = fits.argmax()
            return crops[first].astype(int), holds_center[first]


def _sample_window(image, window, boxes, size=IMAGE_SIZE, flip=False, rng=None, antialias=True):
    """Resize a window of an RGB image; the part of the window outside the image becomes ImageNet's mean.

    :param window: (4,) integer array, pixel xy
    :param boxes: (n, 4) array, pixel xy, inside both image and window
    :param size, antialias: as for `transform`
    :param flip: whether to mirror the result
    :param rng: with it, the colours of the image, not of the filling, are distorted, and JPEGs may be decoded small
    :return: pixels (3, size, size), uint8; boxes (n, 4), fractional xy
    """
    low, high, out_low, out_size = _visible_part(window, image.size, size)
    output = torch.empty(3, size, size, dtype=torch.uint8)
    if (out_size < size).any():
        output.copy_(_FILLING)
    if (out_size == 0).any():
        return output, boxes

    # Decode the image. Training takes the smallest size that has a pixel for each pixel of the output.
    reduction = 8 if rng else 1
    while reduction > 1 and (high - low < reduction * out_size).any():
        reduction //= 2
    pixels, low, high = _decode(image, low, high, reduction)

    # Resize pixels and boxes: x_out = (x - low) * scale + out_low.
    pixels = pixels if antialias else pixels.float()  # without antialiasing, integers would be cut off, not rounded
    pixels = F.interpolate(pixels, out_size[::-1].tolist(), mode="bilinear", antialias=antialias)[0, :3]
    scale = out_size / (high - low)
    boxes = (((boxes.reshape(-1, 2, 2) - low) * scale + out_low) / size).reshape(-1, 4)

    # Distort the colours, round to bytes, mirror.
    (left, top), (right, bottom) = out_low.tolist(), (out_low + out_size).tolist()
    visible = output[:, top:bottom, left:right]
    if rng:
        photometric_distort(pixels, rng, out=visible)
    else:
        visible.copy_(pixels if antialias else pixels + 0.5)
    if flip:
        output = output.flip(2)
        boxes = np.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], axis=1)
    return output, boxes


def _visible_part(window, image_size, size=IMAGE_SIZE):
    """Return the part of an image (width, height) that a window (4,), pixel xy, shows, and its place in the output.

    :return: four integer arrays (2,), xy: low and high corner in the image; low corner and size in the output, where
        each side has at least one pixel; a size of 0 if the window shows nothing of the image
    """
    low, high = np.maximum(window[:2], 0), np.minimum(window[2:], image_size)
    is_visible = (low < high).all()
    scale = size / (window[2:] - window[:2])
    out_low = np.minimum(np.rint((low - window[:2]) * scale), size - 1).astype(int)
    out_high = np.rint((high - window[:2]) * scale).astype(int)
    return low, high, out_low, np.maximum(out_high - out_low, 1) if is_visible else np.zeros(2, int)


def _decode(image, low, high, reduction):
    """Return the pixels of a part of an RGB image, decoded at 1/`reduction` of its size if its format allows that.

    :param low, high: corners (2,) of the part, pixel xy
    :return: pixels (1, 4, height, width) of 0-255, the fourth channel unused; the corners of exactly these pixels in
        the image, which are those of the part rounded outwards to whole pixels of the reduced size
    """
    with decoding():
        if reduction > 1 and not image.draft("RGB", [side // reduction for side in image.size]):
            reduction = 1
        # Let PIL, which stores RGB in four bytes per pixel, decode into this memory: that saves a copy.
        pixels = np.zeros((1, image.height, image.width, 4), np.uint8)
        memory = Image.core.map_buffer(pixels, image.size, "raw", 0, ("RGB", 0, 1))
        if image.format == "JPEG" and image.tile:  # a file that is not decoded yet
            image.im = memory
        image.load()
        if image.im is not memory:
            memory.paste(image.im, (0, 0, *image.size))
    low, high = low // reduction, -(-high // reduction)  # floor, ceiling
    # With the first dimension from the start, not by [None], PyTorch sees channels last, which it resizes faster.
    pixels = torch.from_numpy(pixels[:, low[1] : high[1], low[0] : high[0]])
    return pixels.permute(0, 3, 1, 2), low * reduction, high * reduction


def photometric_distort(pixels, rng, out):
    """Change brightness, contrast, saturation and hue, each with DISTORTION_PROBABILITY, in random order.

    :param pixels: (3, height, width), RGB of 0-255, uint8
    :param out: tensor like pixels for the result, which is rounded once
    """
    order = [DISTORTIONS[number] for number in rng.permutation(len(DISTORTIONS))]
    changes = [(change, rng.uniform(*limits)) for change, limits in order if rng.random() >= 1 - DISTORTION_PROBABILITY]
    # A part of the rows at a time stays in the processor's cache for all changes.
    for rows, out_rows in zip(pixels.split(100, dim=1), out.split(100, dim=1), strict=True):
        rows = rows.to(torch.float32, memory_format=torch.contiguous_format)
        for change, value in changes:
            change(rows, value)
        out_rows.copy_(rows.add_(0.5).short())  # twice as fast as from float to uint8 directly


def _scale_saturation(pixels, factor):
    """Multiply HSV's saturation by a factor, up to a saturation of 1; hue and value stay.

    value = max(R, G, B), saturation = 1 - min(R, G, B) / value; new colour = value - factor * (value - colour)
    """
    value = pixels.amax(dim=0)
    if factor > 1:
        factor = (value / (value - pixels.amin(dim=0)).clamp_(min=1e-6)).clamp_(max=factor)  # saturation <= 1
    torch.lerp(value, pixels, factor, out=pixels)


def _turn_hue(pixels, turn):
    """Turn HSV's hue by a share of the colour circle, at most a sixth; saturation and value stay.

    Each colour moves towards the one before it on the circle red, green, blue (after it if turn < 0), by at most a step
    of |6 * turn| * (max(R, G, B) - min(R, G, B)), minus the distance to the third colour if that lies on the same side.
    """
    step = (pixels.amax(dim=0) - pixels.amin(dim=0)).mul_(abs(6 * turn))
    red, green, blue = pixels
    colors = (red, green, blue) if turn > 0 else (red, blue, green)
    ahead = [colors[i] - colors[i - 2] for i in range(3)]  # each minus the third colour
    for i, color in enumerate(colors):
        rise = ahead[i].clamp(max=0).add_(step).clamp_(min=0)  # max(0, step - max(0, third - color))
        fall = ahead[i].clamp(min=0).sub_(step).clamp_(max=0)  # min(0, max(0, color - third) - step)
        color.add_(torch.clamp(ahead[i - 1], fall, rise))


DISTORTIONS = (  # changes of pixels (3, height, width) in place by a value, and its limits
    (lambda pixels, delta: pixels.add_(delta).clamp_(0, 255), (-BRIGHTNESS_DELTA, BRIGHTNESS_DELTA)),
    (lambda pixels, factor: pixels.mul_(factor).clamp_(max=255), CONTRAST_RANGE),
    (_scale_saturation, SATURATION_RANGE),
    (_turn_hue, (-HUE_DELTA, HUE_DELTA)),
)


# ---------------------------------------------------------------------------------------------------------
# Mean average precision
# ---------------------------------------------------------------------------------------------------------

MIN_TRUE_OVERLAP = 0.5  # jaccard overlap from which a detection matches an object (VOC development kit)


def calculate_mAP(
    det_boxes, det_labels, det_scores, true_boxes, true_labels, true_difficulties, label_map=label_map,
    method="11-point",
):  # fmt: skip
    """Score detections as the Pascal VOC development kit does, except that its overlaps count both border pixels.

    :param det_boxes, det_labels, det_scores: lists of one tensor per image: (d, 4), xy; (d,); (d,)
    :param true_boxes, true_labels, true_difficulties: the same for the objects: (n, 4), xy; (n,); (n,); a difficult
        object need not be detected, and its detections do not count
    :param label_map: class name -> index, background 0
    :param method: '11-point' (VOC2007) or 'area' (under the precision-recall curve, from VOC2010)
    :return: {class name: average precision}; their mean. A class without objects, or with difficult ones only, has
        NaN and is left out of the mean.
    :raises ValueError: if the lists do not fit together
    """
    curves = precision_recall_curves(
        det_boxes, det_labels, det_scores, true_boxes, true_labels, true_difficulties, label_map
    )
    return mean_average_precision(curves, method)


class Curve(NamedTuple):
    """The detections of one class, best first. Detections of difficult objects are left out."""

    precision: np.ndarray  # (d,) float64, up to and including each detection
    recall: np.ndarray  # (d,) float64, likewise
    scores: np.ndarray  # (d,) float64
    right: np.ndarray  # (d,) bool
    images: np.ndarray  # (d,) index of the image
    indices: np.ndarray  # (d,) index of the detection in its image
    best_overlaps: np.ndarray  # (d,) float64, with the object of its class that it overlaps most
    best_objects: np.ndarray  # (d,) index of that object in its image, -1 if the image has none of the class
    n_objects: np.ndarray  # (images,) number of objects to detect in each image

    @property
    def is_scored(self):
        """Whether there are objects to detect; if not, the class is left out of the mean."""
        return bool(self.n_objects.any())


def precision_recall_curves(
    det_boxes, det_labels, det_scores, true_boxes, true_labels, true_difficulties, label_map=label_map
):
    """Match detections with objects and return {class name: Curve}; parameters as for `calculate_mAP`."""
    n_images = len(true_boxes)
    if len(det_boxes) != n_images:
        raise ValueError(f"{len(det_boxes)} images with detections, {n_images} with objects")
    det_image, det_boxes, det_labels, det_scores = _concatenate(det_boxes, det_labels, det_scores)
    true_image, true_boxes, true_labels, true_difficulties = _concatenate(true_boxes, true_labels, true_difficulties)
    if not np.isin(np.append(det_labels, true_labels), list(label_map.values())).all():
        raise ValueError("a detection or an object has a label that the label map does not have")

    # Find the object that each detection overlaps most. Only those of the same image and class, the key, are compared.
    overlaps, matched = best_objects(
        det_image * len(label_map) + det_labels, det_boxes, true_image * len(label_map) + true_labels, true_boxes
    )

    # Judge the detections, best first: the first one that matches an object is right.
    order = np.argsort(-det_scores, kind="stable")
    labels, scores, images = det_labels[order], det_scores[order], det_image[order]
    indices, overlaps, matched = _index_in_group(det_image)[order], overlaps[order], matched[order]
    matches = overlaps >= MIN_TRUE_OVERLAP
    ignored = np.zeros_like(matches)
    ignored[matches] = true_difficulties[matched[matches]] != 0
    candidates = np.flatnonzero(matches & ~ignored)
    _, first_of_object = np.unique(matched[candidates], return_index=True)
    right = np.zeros_like(matches)
    right[candidates[first_of_object]] = True
    matched = np.append(_index_in_group(true_image), -1)[matched]  # now the index in the image; -1 stays -1

    curves = {}
    for name, label in label_map.items():
        if label == 0:
            continue
        n_objects = np.bincount(true_image[(true_labels == label) & (true_difficulties == 0)], minlength=n_images)
        of_class = np.flatnonzero((labels == label) & ~ignored)  # indices select far faster than a mask
        true_positives = np.cumsum(right[of_class])
        precision = true_positives / np.arange(1, len(true_positives) + 1)
        recall = true_positives / max(n_objects.sum(), 1)
        columns = (scores, right, images, indices, overlaps, matched)
        curves[name] = Curve(precision, recall, *(values[of_class] for values in columns), n_objects)
    return curves


def _concatenate(boxes, labels, values):
    """Join the images: return image indices (n,), boxes (n, 4) as a tensor, labels (n,) and values (n,)."""
    counts = [len(image_boxes) for image_boxes in boxes]
    if not counts == [len(image_labels) for image_labels in labels] == [len(image_values) for image_values in values]:
        images = f"{len(boxes)}, {len(labels)} and {len(values)} images"
        raise ValueError(f"boxes, labels and scores (or difficulties) differ in number: of {images}, or in an image")

    def join(parts, *shape):
        return torch.cat([torch.zeros(0, *shape), *(part.cpu() for part in parts)]).double()

    image = np.repeat(np.arange(len(counts)), counts)
    return image, join(boxes, 4), join(labels).numpy().astype(np.int64), join(values).numpy()


def _index_in_group(group):
    """Return 0, 1, 2 ... within each run of equal values of an ascending array (n,)."""
    return np.arange(len(group)) - np.searchsorted(group, group)


def best_objects(det_keys, det_boxes, true_keys, true_boxes):
    """Find, for each detection, the object with the same key that it overlaps most, the first if several are equal.

    :param det_keys, true_keys: (d,), (n,) integers
    :param det_boxes, true_boxes: (d, 4), (n, 4) tensors, xy
    :return: overlap (d,) and index of the object (d,); 0 and -1 if no object has the key
    """
    # List all pairs with equal keys: of the objects sorted by key, each detection has `counts`, from `first` on.
    by_key = np.argsort(true_keys, kind="stable")
    first = np.searchsorted(true_keys[by_key], det_keys, side="left")
    counts = np.searchsorted(true_keys[by_key], det_keys, side="right") - first
    detections = np.repeat(np.arange(len(det_keys)), counts)
    first_pair = np.cumsum(counts) - counts  # of each detection
    objects = by_key[np.arange(len(detections)) + np.repeat(first - first_pair, counts)]
    overlaps = jaccard_overlap(det_boxes[detections], true_boxes[objects])
    overlaps = overlaps.nan_to_num(0).numpy()  # a box that is not finite overlaps nothing

    # Take the best pair of each detection. The last assignment to an index wins, so pairs are reversed for the first.
    best_overlap, best_object = np.zeros(len(det_keys)), np.full(len(det_keys), -1)
    np.maximum.at(best_overlap, detections, overlaps)
    is_best = (overlaps == best_overlap[detections])[::-1]
    best_object[detections[::-1][is_best]] = objects[::-1][is_best]
    return best_overlap, best_object


def mean_average_precision(curves, method="11-point"):
    """Return {class name: average precision} of `precision_recall_curves`, and their mean over the scored classes."""
    average_precisions = {
        name: average_precision(curve.precision, curve.recall, method) if curve.is_scored else math.nan
        for name, curve in curves.items()
    }
    scored = [value for value in average_precisions.values() if not math.isnan(value)]
    return average_precisions, sum(scored) / len(scored) if scored else math.nan


def average_precision(precision, recall, method="11-point"):
    """Return the average precision of one class from its curve, two (d,) arrays, best detection first.

    '11-point' averages the best precision at a recall of 0, 0.1 ... 1 or more (VOC2007 development kit); 'area' is the
    area under the curve made monotonic (development kit from 2010).
    """
    best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    if method == "11-point":
        # A recall of exactly j/10 reaches its point. np.arange(0, 1.1, 0.1), used by many ports, has thresholds
        # such as 0.30000000000000004, which 3/10 misses.
        reached = np.searchsorted(recall, np.arange(11) / 10, side="left")
        return float(np.append(best_from_here, 0.0)[reached].mean())
    if method == "area":
        return float((np.diff(recall, prepend=0.0) * best_from_here).sum())
    raise ValueError(f"method must be '11-point' or 'area', not {method!r}")
