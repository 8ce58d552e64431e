"""What every script shares: labels, Pascal VOC lists, box arithmetic, transforms, mean average precision.

from utils import parse_annotation, find_jaccard_overlap, transform, calculate_mAP
"""

import colorsys
import json
import math
import os
import sys
import warnings
import xml.etree.ElementTree as ElementTree
from contextlib import ExitStack, contextmanager, suppress

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm


class InputError(Exception):
    """Bad input from outside (a file, a setting): one line that names it and says what to do."""


def run_command(main):
    """Run a script's `main`; bad input ends in one line on standard error and exit status 2."""
    try:
        main()
    except (InputError, OSError) as error:
        # A DataLoader worker's error arrives wrapped in its traceback; our own line is the last.
        sys.exit(_complain(str(error).rsplit("InputError: ", 1)[-1].strip(), status=2))
    except KeyboardInterrupt:
        sys.exit(_complain("interrupted", status=130))


def _complain(message, status):
    print(f"error: {message}", file=sys.stderr)
    return status


@contextmanager
def atomic_writer(path):
    """Open a temporary file beside `path` for writing bytes; it takes that name only when all went well."""
    path = os.path.realpath(path)  # a link stays one
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            os.remove(temporary)


def check_target(path):
    """Raise InputError unless the folder of a file to be written is there: before the work, not after it."""
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder) or os.path.isdir(path):
        raise InputError(f"{path}: cannot be written, {folder} is no folder or this is one; give another path")


# ---------------------------------------------------------------------------------------------------------
# Labels
# ---------------------------------------------------------------------------------------------------------

# The 20 classes of Pascal VOC, in the order of the development kit.
voc_labels = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
).split()


def make_label_map(labels):
    """Return class name -> index for a sequence of names: background is 0, the first name 1."""
    return {"background": 0} | {name: index for index, name in enumerate(labels, start=1)}


label_map = make_label_map(voc_labels)


def check_label_map(label_map, source):
    """Raise InputError that names `source` unless `label_map` is {name: index}, background 0, no gaps."""
    if (
        not isinstance(label_map, dict)
        or label_map.get("background") != 0
        or not all(type(name) is str and type(index) is int for name, index in label_map.items())
        or sorted(label_map.values()) != list(range(len(label_map)))
        or len(label_map) < 2
    ):
        raise InputError(
            f'{source}: not a label map; expected class names with indices, {{"background": 0, "cat": 1, ...}}'
        )


def label_color_map(label_map):
    """Return class name -> (red, green, blue) of 0-255: the same for a class at every call, far apart."""
    # Steps of the golden angle keep neighbours in the list apart, however many classes there are.
    return {
        name: tuple(
            round(255 * part)
            for part in colorsys.hsv_to_rgb(index * 0.618034 % 1, (1, 0.6)[index // 8 % 2], (1, 0.8)[index // 4 % 2])
        )
        for name, index in label_map.items()
    }


# ---------------------------------------------------------------------------------------------------------
# Pascal VOC lists
# ---------------------------------------------------------------------------------------------------------

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".JPG", ".JPEG", ".PNG", ".BMP", ".WEBP")


def parse_annotation(annotation_path, label_map=label_map):
    """Read one Pascal VOC annotation.

    :param annotation_path: path of the XML file; its coordinates are 1-based pixels, integer or float
    :param label_map: class name -> index
    :return: {"boxes": n lists (x_min, y_min, x_max, y_max) in 0-based pixels, "labels": n indices,
        "difficulties": n of 0 or 1}; all three empty for an image without objects
    :raises InputError: naming the file and the object, for anything that is not a valid annotation
    """
    try:
        root = ElementTree.parse(annotation_path).getroot()
    except (OSError, ElementTree.ParseError, LookupError, ValueError) as error:
        raise InputError(f"{annotation_path}: cannot read this annotation ({error}); correct or remove it") from error

    if root.tag != "annotation":
        raise InputError(f"{annotation_path}: its root is <{root.tag}>, not VOC's <annotation>; correct or remove it")
    objects = {"boxes": [], "labels": [], "difficulties": []}
    # Only direct children count: VOC's <part> elements have names and boxes of their own.
    for number, element in enumerate(root.findall("object"), start=1):
        name = " ".join((element.findtext("name") or "").split())
        where = f"{annotation_path}: object {number} ({name or 'no name'})"
        if name not in label_map or name == "background":
            known = ", ".join(other for other in label_map if other != "background")
            raise InputError(
                f"{where} is of no known class; correct its name, or use a label map with it (known: {known})"
            )
        difficult = (element.findtext("difficult") or "0").strip()
        if difficult not in ("0", "1"):
            raise InputError(f"{where} has <difficult>{difficult}</difficult>; expected 0 or 1")
        objects["boxes"].append(_parse_box(element, root, where))
        objects["labels"].append(label_map[name])
        objects["difficulties"].append(int(difficult))
    return objects


def _parse_box(element, root, where):
    """Return one object's box in 0-based pixels, whole numbers as integers."""
    box = []
    for corner in ("xmin", "ymin", "xmax", "ymax"):
        text = element.findtext(f"bndbox/{corner}")
        try:
            value = float(text)
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise InputError(f"{where} has {corner} {text!r} in its bndbox; expected a number of pixels")
        # VOC counts pixels from 1; a 0-based annotation must not become negative.
        value = max(value - 1, 0.0)
        box.append(int(value) if value.is_integer() else value)
    x_min, y_min, x_max, y_max = box
    if x_min >= x_max or y_min >= y_max:
        raise InputError(f"{where} has a box without area, {box} in 0-based pixels; correct or remove the object")
    for corner, side in ((x_min, "width"), (y_min, "height")):
        size = (root.findtext(f"size/{side}") or "").strip()
        if size.isdecimal() and 0 < int(size) <= corner:
            raise InputError(f"{where} has a box outside the image's {side} of {size} pixels; correct or remove it")
    return box


def _read_split(root, split):
    """Yield (image path, annotation path) of a VOC folder's split, as ImageSets/Main/SPLIT.txt names them."""
    root = os.path.abspath(root)
    split_file = os.path.join(root, "ImageSets", "Main", f"{split}.txt")
    try:
        with open(split_file, encoding="utf-8") as file:
            names = [line.split()[0] for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{split_file}: cannot read this split ({error}); {root} must be a VOC folder") from error
    if not names:
        raise InputError(f"{split_file}: names no images; add one image name per line")
    for name in names:
        stem = os.path.join(root, "JPEGImages", name)
        image = next((stem + suffix for suffix in IMAGE_SUFFIXES if os.path.isfile(stem + suffix)), None)
        if image is None:
            raise InputError(f"{stem}.jpg: no such image, though {split_file} names it; add it or drop the line")
        yield image, os.path.join(root, "Annotations", f"{name}.xml")


def create_data_lists(train, test, output_folder, label_map=label_map):
    """Write the JSON lists that the data set reads, after everything was parsed: all five files or none.

    The files are {TRAIN,TEST}_images.json (absolute paths), {TRAIN,TEST}_objects.json (what
    `parse_annotation` returns, one per image) and label_map.json. Images without objects stay in.

    :param train: (VOC folder, split name) pairs for training, such as ("VOC2007", "trainval")
    :param test: the same for testing
    :param output_folder: made if it is not there
    :param label_map: class name -> index
    :return: {"TRAIN": (images, objects), "TEST": (images, objects)}, the lists that were written
    :raises InputError: naming the file, when one is missing or wrong
    """
    lists = {}
    for split, folders in (("TRAIN", train), ("TEST", test)):
        pairs = [pair for root, name in folders for pair in _read_split(root, name)]
        progress = tqdm(pairs, f"{split} annotations", unit="", leave=False, disable=None)
        objects = [parse_annotation(annotation, label_map) for _, annotation in progress]
        lists[split] = ([image for image, _ in pairs], objects)

    files = {}
    for split, (images, objects) in lists.items():
        files |= {f"{split}_images": images, f"{split}_objects": objects}
    files["label_map"] = label_map
    os.makedirs(output_folder, exist_ok=True)
    write_json({os.path.join(output_folder, f"{name}.json"): value for name, value in files.items()})
    return lists


def read_data_lists(data_folder, split):
    """Read and check what `create_data_lists` wrote.

    :param split: 'TRAIN' or 'TEST'
    :return: image paths, objects per image, label map
    :raises InputError: naming the file, when one is missing or of another shape
    """
    label_file, image_file, object_file = (
        os.path.join(data_folder, name) for name in ("label_map.json", f"{split}_images.json", f"{split}_objects.json")
    )
    label_map, images, objects = (read_json(path) for path in (label_file, image_file, object_file))
    check_label_map(label_map, label_file)
    if not isinstance(images, list) or not images or not all(isinstance(path, str) for path in images):
        raise InputError(f"{image_file}: expected a list of image paths, one or more; run create_data_lists.py again")
    if not isinstance(objects, list) or len(objects) != len(images):
        raise InputError(f"{object_file}: expected a list as long as {image_file}; run create_data_lists.py again")
    for path, entry in zip(images, objects, strict=True):
        if not _is_valid_entry(entry, len(label_map)):
            raise InputError(f"{object_file}: the objects of {path} are not valid; run create_data_lists.py again")
    return images, objects, label_map


def _is_valid_entry(entry, n_classes):
    """Tell whether `entry` has boxes with area, labels in 1 ... n_classes - 1, and flags, in lists all aligned."""
    try:
        boxes, labels, difficulties = parts = [entry[key] for key in ("boxes", "labels", "difficulties")]
        return all(type(part) is list for part in parts) and all(
            0 <= x_min < x_max < 1e9 and 0 <= y_min < y_max < 1e9
            and type(label) is int and 0 < label < n_classes and flag in (0, 1)
            for (x_min, y_min, x_max, y_max), label, flag in zip(boxes, labels, difficulties, strict=True)
        )  # fmt: skip
    except (KeyError, TypeError, ValueError):
        return False


def read_json(path):
    """Return what the JSON file `path` holds; InputError where it cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: cannot read this JSON file ({error}); run create_data_lists.py to make it"
        ) from error


def write_json(files):
    """Write {path: value} as JSON files; they take their names when all are written whole, else none does."""
    with ExitStack() as all_or_none:
        for path, value in files.items():
            all_or_none.enter_context(atomic_writer(path)).write(json.dumps(value, ensure_ascii=False).encode())


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
    """Return the jaccard overlap (IoU) of boxes (..., 4), xy, element by element, with broadcasting."""
    lower = torch.maximum(boxes_1[..., :2], boxes_2[..., :2])
    upper = torch.minimum(boxes_1[..., 2:], boxes_2[..., 2:])
    intersection = (upper - lower).clamp(min=0).prod(-1)
    areas = (boxes_1[..., 2:] - boxes_1[..., :2]).prod(-1), (boxes_2[..., 2:] - boxes_2[..., :2]).prod(-1)
    return intersection / (areas[0] + areas[1] - intersection)


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


def read_image(path):
    """Return the picture at `path` as upright RGB; InputError that names it where it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large pictures are welcome
            with Image.open(path) as image:
                image.load()
                return upright_rgb(image)
    except Exception as error:  # decoders raise whatever they like on a broken file
        raise InputError(f"{path}: cannot read this image ({error}); replace it or take it out of the data") from error


def upright_rgb(image):
    """Return a PIL image of any mode as RGB, turned as its EXIF orientation says; the input stays as it is."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # grayscale of more than 8 bits, which PIL would clip rather than scale
        levels = np.asarray(image)
        image = Image.fromarray((levels / (257 if levels.max() > 255 else 1)).clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def transform(image, boxes, labels, difficulties, split, rng=None):
    """Turn an image and its objects into what the network takes; augment for training (paper §2.2).

    The geometry (zoom-out, crop, flip) is drawn on the boxes alone, then the pixels are sampled once from
    the image into 300x300, then the colours of those are distorted. Nothing given is changed.

    :param image: PIL image of any mode and size
    :param boxes: (n, 4) float tensor, pixel xy of the upright image; n may be 0
    :param labels, difficulties: (n,) tensors
    :param split: 'TRAIN' augments, 'TEST' resizes and normalises only
    :param rng: numpy.random.Generator of all random choices; None draws one from torch's random state
    :return: image (3, 300, 300), ImageNet-normalised; boxes (m, 4), fractional xy inside [0, 1]; labels (m,);
        difficulties (m,); m < n only where a training crop leaves an object's centre out, and m = 0 only if n = 0
    :raises InputError: for a box without area inside the image
    """
    if split not in ("TRAIN", "TEST"):
        raise ValueError(f"split must be 'TRAIN' or 'TEST', not {split!r}")
    image = upright_rgb(image)
    width, height = image.size
    window = np.array([0.0, 0.0, width, height])
    boxes = _clip(boxes.double(), window)
    for number in (boxes[:, 2:] <= boxes[:, :2]).any(1).nonzero().flatten()[:1].tolist():
        raise InputError(f"object {number + 1} has no area inside the {width}x{height} image; correct or remove it")

    kept, flip = torch.ones(len(boxes), dtype=torch.bool), False
    if split == "TRAIN":
        rng = rng or np.random.default_rng(int(torch.randint(2**62, ())))
        window = zoom_out(window, rng)
        window, kept = crop_around_objects(window, boxes, rng)
        flip = rng.random() < 0.5

    image = _sample_window(image, window, rng if split == "TRAIN" else None)
    boxes = _clip(boxes[kept], window)
    low, high = torch.from_numpy(window).chunk(2)
    boxes = (boxes - low.repeat(2)) / (high - low).repeat(2)
    if flip:
        image = ImageOps.mirror(image)
        boxes[:, [0, 2]] = 1 - boxes[:, [2, 0]]
    return _normalize(image), boxes.float().clamp(0, 1), labels[kept], difficulties[kept]


def _clip(boxes, window):
    """Cut boxes (n, 4), xy, off at the borders of a window (4,), xy."""
    low, high = torch.from_numpy(window).chunk(2)
    return boxes.clamp(low.repeat(2), high.repeat(2))


def zoom_out(window, rng):
    """With probability 0.5 place a window (4,), pixel xy, at random in one of 1 to 4 times its sides."""
    if rng.random() < 0.5:
        return window
    sides = window[2:] - window[:2]
    scale = rng.uniform(1, MAX_ZOOM_OUT)
    corner = window[:2] - rng.random(2) * (scale - 1) * sides
    return np.concatenate([corner, corner + scale * sides])


def crop_around_objects(window, boxes, rng):
    """Draw the paper's crop: one that overlaps an object by a random minimum.

    :param window: (4,) array, pixel xy: what is there to crop from
    :param boxes: (n, 4) double tensor, pixel xy
    :return: the crop (4,), pixel xy, and a boolean (n,) tensor of the objects whose centre it holds, never
        all False where there are objects
    """
    sides = window[2:] - window[:2]
    centers = xy_to_cxcy(boxes)[:, :2]
    while True:
        min_overlap = MIN_OVERLAPS[rng.integers(len(MIN_OVERLAPS))]
        if min_overlap is None:
            return window, torch.ones(len(boxes), dtype=torch.bool)
        crop_sides = rng.uniform(*CROP_SIDES, (CROP_TRIALS, 2)) * sides
        corners = window[:2] + rng.random((CROP_TRIALS, 2)) * (sides - crop_sides)
        aspects = torch.from_numpy(crop_sides[:, 1] / crop_sides[:, 0])
        crops = torch.from_numpy(np.concatenate([corners, corners + crop_sides], axis=1))
        holds = ((crops[:, None, :2] < centers) & (centers < crops[:, None, 2:])).all(2)  # (trials, n)
        fits = (CROP_ASPECTS[0] <= aspects) & (aspects <= CROP_ASPECTS[1])
        if len(boxes):
            fits &= holds.any(1) & (find_jaccard_overlap(crops, boxes).amax(1) >= min_overlap)
        if fits.any():
            first = fits.int().argmax()
            return crops[first].numpy(), holds[first]


def _sample_window(image, window, rng=None):
    """Resize a window (4,), pixel xy, of an RGB image to 300x300; where it leaves the image is ImageNet's mean.

    With `rng` the colours of the image's part, not of the filling, are distorted.
    """
    size = np.array(image.size)
    scale = IMAGE_SIZE / (window[2:] - window[:2])
    # Round the image's part to whole pixels of the output; sample from exactly where these come from.
    low = np.rint((np.maximum(window[:2], 0) - window[:2]) * scale).astype(int)
    high = np.rint((np.minimum(window[2:], size) - window[:2]) * scale).astype(int)
    canvas = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), tuple(round(255 * mean) for mean in IMAGENET_MEAN))
    if (low < high).all():
        source = np.concatenate([(window[:2] + low / scale).clip(0, size), (window[:2] + high / scale).clip(0, size)])
        patch = image.resize(tuple((high - low).tolist()), Image.Resampling.BILINEAR, tuple(source.tolist()))
        canvas.paste(photometric_distort(patch, rng) if rng else patch, tuple(low.tolist()))
    return canvas


def photometric_distort(image, rng):
    """Change brightness, contrast, saturation and hue of an RGB image, each with probability 0.5, in random order."""
    levels = np.arange(256)
    for distortion in rng.permutation(4):
        if rng.random() < 0.5:
            continue
        if distortion == 0:
            image = _map_levels(image, [levels + rng.uniform(-BRIGHTNESS_DELTA, BRIGHTNESS_DELTA)] * 3)
        elif distortion == 1:
            image = _map_levels(image, [levels * rng.uniform(*CONTRAST_RANGE)] * 3)
        elif distortion == 2:
            factor = rng.uniform(*SATURATION_RANGE)
            image = _map_levels(image.convert("HSV"), [levels, levels * factor, levels]).convert("RGB")
        else:
            shift = round(256 * rng.uniform(-HUE_DELTA, HUE_DELTA))
            image = _map_levels(image.convert("HSV"), [(levels + shift) % 256, levels, levels]).convert("RGB")
    return image


def _map_levels(image, tables):
    """Replace the 256 levels of each of an image's three bands by those of its table, rounded and clipped."""
    return image.point(np.concatenate(tables).round().clip(0, 255).astype(int).tolist())


def _normalize(image):
    """Return an RGB image as a float tensor (3, height, width), ImageNet-normalised."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    mean, std = (255 * torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels - mean) / std


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
    """Score detections as the Pascal VOC development kit does.

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


def precision_recall_curves(
    det_boxes, det_labels, det_scores, true_boxes, true_labels, true_difficulties, label_map=label_map
):
    """Return {class name: (precision, recall)}: float64 arrays, one value per scored detection, best first.

    The parameters are those of `calculate_mAP`. None stands for a class without objects to be found.
    """
    det_image, det_boxes, det_labels, det_scores = _concatenate(det_boxes, det_labels, det_scores)
    true_image, true_boxes, true_labels, true_difficulties = _concatenate(true_boxes, true_labels, true_difficulties)
    overlap, object_index = _best_objects(
        det_image * len(label_map) + det_labels,
        det_boxes,
        true_image * len(label_map) + true_labels,
        true_boxes,
    )

    # Find the fate of each detection, best first: the first one of an object is right, later ones are wrong.
    order = np.argsort(-det_scores, kind="stable")
    labels, object_index = det_labels[order], object_index[order]
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
        n_objects = np.count_nonzero((true_labels == label) & (true_difficulties == 0))
        right_here = right[(labels == label) & ~ignored]
        true_positives = np.cumsum(right_here)
        precision = true_positives / np.arange(1, len(right_here) + 1)
        curves[name] = (precision, true_positives / n_objects) if n_objects else None
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
        name: math.nan if curve is None else average_precision(*curve, method) for name, curve in curves.items()
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
