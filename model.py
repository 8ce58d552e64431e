"""SSD300 and SSD512 (Liu et al., "SSD: Single Shot MultiBox Detector", ECCV 2016): network, priors, loss.

model = SSD300(n_classes=21)  # or load_model("runs/voc/checkpoint.pth")
predicted_locs, predicted_scores = model(images)  # (N, 3, 300, 300), RGB bytes or ImageNet-normalised floats
boxes, labels, scores = model.detect_objects(predicted_locs, predicted_scores, *DETECTION_LIMITS)
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from support.checkpoints import KNOWN_SYSTEMS, read_weights
from support.devices import load_nms
from support.download import VGG16_WEIGHTS, fetch_weights
from support.files import InputError
from support.labels import find_label
from utils import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    cxcy_to_gcxgcy,
    cxcy_to_xy,
    decimate,
    find_jaccard_overlap,
    gcxgcy_to_cxcy,
    xy_to_cxcy,
)

# Widths of the 3x3 convolutions conv1_1 ... conv5_3, a tuple per block (VGG-16, configuration D).
VGG_BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

# The tables of the two sizes of the network, by the side of its input in pixels.
# name: (channels in, channels out, kernel size, stride, padding); paper figure 2, AddExtraLayers of ssd_pascal.py and
# ssd_pascal_512.py.
AUXILIARY_LAYERS = {
    300: {
        "conv8_1": (1024, 256, 1, 1, 0),
        "conv8_2": (256, 512, 3, 2, 1),
        "conv9_1": (512, 128, 1, 1, 0),
        "conv9_2": (128, 256, 3, 2, 1),
        "conv10_1": (256, 128, 1, 1, 0),
        "conv10_2": (128, 256, 3, 1, 0),
        "conv11_1": (256, 128, 1, 1, 0),
        "conv11_2": (128, 256, 3, 1, 0),
    },
    512: {
        "conv8_1": (1024, 256, 1, 1, 0),
        "conv8_2": (256, 512, 3, 2, 1),
        "conv9_1": (512, 128, 1, 1, 0),
        "conv9_2": (128, 256, 3, 2, 1),
        "conv10_1": (256, 128, 1, 1, 0),
        "conv10_2": (128, 256, 3, 2, 1),
        "conv11_1": (256, 128, 1, 1, 0),
        "conv11_2": (128, 256, 3, 2, 1),
        "conv12_1": (256, 128, 1, 1, 0),
        "conv12_2": (128, 256, 4, 1, 1),
    },
}

# name: (cells along a side, channels, priors per cell); paper figure 2, ssd_pascal_512.py.
FEATURE_MAPS = {
    300: {
        "conv4_3": (38, 512, 4),
        "conv7": (19, 1024, 6),
        "conv8_2": (10, 512, 6),
        "conv9_2": (5, 256, 6),
        "conv10_2": (3, 256, 4),
        "conv11_2": (1, 256, 4),
    },
    512: {
        "conv4_3": (64, 512, 4),
        "conv7": (32, 1024, 6),
        "conv8_2": (16, 512, 6),
        "conv9_2": (8, 256, 6),
        "conv10_2": (4, 256, 6),
        "conv11_2": (2, 256, 4),
        "conv12_2": (1, 256, 4),
    },
}


class Priors(NamedTuple):
    """A family of priors. All lengths are in image sides.

    Each feature map has a scale, the side of its square prior. Its second square prior has the geometric mean of this
    scale and the next feature map's as its side, so there is one more scale than feature maps.
    """

    scales: tuple
    steps: tuple  # distance between the centres of neighbouring cells of each feature map
    # Width over height of the other priors, four of them, in their order. Feature maps with 6 priors per cell take all,
    # those with 4 priors the two that are closest to a square.
    aspect_ratios: tuple = (2, 1 / 2, 3, 1 / 3)
    clip_centers: bool = False  # move centres beyond the image's border onto it


def _caffe(size, scales, steps, **options):
    """Return the priors of a Caffe network, whose scales and steps are pixels."""
    return Priors(tuple(scale / size for scale in scales), tuple(step / size for step in steps), **options)


_STEPS_300, _STEPS_512 = (8, 16, 32, 64, 100, 300), (8, 16, 32, 64, 128, 256, 512)
_COCO_300 = (21, 45, 99, 153, 207, 261, 315)
PRIOR_FAMILIES = {
    300: {
        # Paper: scales 0.2 ... 0.9 (§2.2) and 0.1 for conv4_3 (§3.1). As in the public tutorial, the last extra prior
        # is the whole image and the ratio 1/3 is written 0.333, so that networks trained with it decode exactly.
        "paper": Priors(
            (0.1, 0.2, 0.375, 0.55, 0.725, 0.9, 1 / 0.9),
            tuple(1 / cells for cells, _, _ in FEATURE_MAPS[300].values()),
            (2, 3, 0.5, 0.333),
        ),
        # The released VOC networks: ssd_pascal.py, min_sizes and max_sizes. ssd.pytorch clips centres.
        "caffe": _caffe(300, (30, 60, 111, 162, 213, 264, 315), _STEPS_300, clip_centers=True),
        # The COCO networks: ssd_coco.py and torchvision's ssd300_vgg16; ssd.pytorch and lufficc/SSD clip centres.
        "coco": _caffe(300, _COCO_300, _STEPS_300),
        "coco-clipped": _caffe(300, _COCO_300, _STEPS_300, clip_centers=True),
    },
    512: {  # ssd_pascal_512.py and ssd_coco.py; no centre is beyond the image
        "caffe": _caffe(512, (35.84, 76.8, 153.6, 230.4, 307.2, 384, 460.8, 537.6), _STEPS_512),
        "coco": _caffe(512, (20.48, 51.2, 133.12, 215.04, 296.96, 378.88, 460.8, 542.72), _STEPS_512),
    },
}


class Limits(NamedTuple):
    """The limits of `SSD300.detect_objects`."""

    min_score: float  # detections have a probability above this
    max_overlap: float  # a detection is dropped if it overlaps a better one of its class by more than this
    top_k: int  # most detections per image, all classes together


EVALUATION_LIMITS = Limits(0.01, 0.45, 200)  # ssd_pascal.py: confidence_threshold, nms_threshold, keep_top_k
DETECTION_LIMITS = Limits(0.2, 0.5, 200)  # detect.py of the public tutorial


class VGGBase(nn.Module):
    """VGG-16 with conv6 and conv7 in place of its fully connected layers (paper §3.1).

    (N, 3, 300, 300) -> conv4_3 (N, 512, 38, 38), conv7 (N, 1024, 19, 19); other sizes in proportion

    :param pretrained: start from torchvision's ImageNet weights, which are downloaded once
    :raises InputError: if these cannot be downloaded
    """

    def __init__(self, pretrained=True):
        super().__init__()
        channels = 3
        for block, widths in enumerate(VGG_BLOCKS, start=1):
            for layer, width in enumerate(widths, start=1):
                self.add_module(f"conv{block}_{layer}", nn.Conv2d(channels, width, 3, padding=1))
                channels = width
        self.pool1 = self.pool2 = self.pool4 = nn.MaxPool2d(2, 2)
        self.pool3 = nn.MaxPool2d(2, 2, ceil_mode=True)  # 75 -> 38, not 37
        self.pool5 = nn.MaxPool2d(3, 1, padding=1)  # keeps 19 cells; VGG's halves them
        self.conv6 = nn.Conv2d(512, 1024, 3, padding=6, dilation=6)  # a trous: fc6's receptive field, fewer weights
        self.conv7 = nn.Conv2d(1024, 1024, 1)

        if pretrained:
            self.load_pretrained_layers()
        else:
            # From scratch, the signal fades over 15 layers unless they are initialised as by He et al.
            _initialize(self, nn.init.kaiming_normal_, nonlinearity="relu")

    def forward(self, images):
        """Return the conv4_3 and conv7 feature maps of images (N, 3, size, size), after their ReLU."""
        x = images
        for block, widths in enumerate(VGG_BLOCKS, start=1):
            for layer in range(1, len(widths) + 1):
                x = F.relu(self.get_submodule(f"conv{block}_{layer}")(x), inplace=True)
            if block == 4:
                conv4_3 = x
            x = self.get_submodule(f"pool{block}")(x)
        return conv4_3, F.relu(self.conv7(F.relu(self.conv6(x), inplace=True)), inplace=True)

    def load_pretrained_layers(self):
        """Load the convolutions of torchvision's ImageNet VGG-16, and its fc6 and fc7 decimated (paper §3.1).

        Written as a convolution, fc6 has 4096 filters of 7x7: every 4th filter, every 3rd row and column are kept.
        """
        pretrained = fetch_weights(VGG16_WEIGHTS, "train from scratch with --no-pretrained")
        convolutions = [name for name in pretrained if name.startswith("features.")]
        own = [name for name in self.state_dict() if not name.startswith(("conv6", "conv7"))]
        layers = dict(zip(own, (pretrained[name] for name in convolutions), strict=True))
        fc6, fc7 = pretrained["classifier.0.weight"], pretrained["classifier.3.weight"]
        layers["conv6.weight"] = decimate(fc6.view(4096, 512, 7, 7), (4, None, 3, 3))
        layers["conv6.bias"] = decimate(pretrained["classifier.0.bias"], (4,))
        layers["conv7.weight"] = decimate(fc7.view(4096, 4096, 1, 1), (4, 4, None, None))
        layers["conv7.bias"] = decimate(pretrained["classifier.3.bias"], (4,))
        self.load_state_dict(layers)


class AuxiliaryConvolutions(nn.Module):
    """The layers after the base, which compute ever coarser feature maps (paper §2.1).

    conv7 (N, 1024, 19, 19) -> conv8_2 (N, 512, 10, 10) ... conv11_2 (N, 256, 1, 1): those of AUXILIARY_LAYERS that are
    in FEATURE_MAPS

    :param size: of the network's input, a key of these tables
    """

    def __init__(self, size=300):
        super().__init__()
        self.size = size
        for name, (channels_in, channels_out, kernel_size, stride, padding) in AUXILIARY_LAYERS[size].items():
            self.add_module(name, nn.Conv2d(channels_in, channels_out, kernel_size, stride, padding))
        _initialize(self, nn.init.xavier_uniform_)

    def forward(self, conv7):
        """Return the feature maps after their ReLU, given conv7 (N, 1024, 19, 19)."""
        feature_maps, x = [], conv7
        for name in AUXILIARY_LAYERS[self.size]:
            x = F.relu(self.get_submodule(name)(x), inplace=True)
            if name in FEATURE_MAPS[self.size]:
                feature_maps.append(x)
        return feature_maps


class PredictionConvolutions(nn.Module):
    """Two 3x3 convolutions on each feature map: one predicts boxes, one classes (paper §2.1).

    feature maps -> locs (N, P, 4), gcxgcy; scores (N, P, n_classes), before softmax

    :param size: of the network's input, a key of FEATURE_MAPS
    """

    def __init__(self, n_classes, size=300):
        super().__init__()
        for prefix, n_values in (("loc", 4), ("cl", n_classes)):
            for name, (_, channels, n_priors) in FEATURE_MAPS[size].items():
                self.add_module(f"{prefix}_{name}", nn.Conv2d(channels, n_priors * n_values, 3, padding=1))
        self.n_classes, self.size = n_classes, size
        _initialize(self, nn.init.xavier_uniform_)

    def forward(self, *feature_maps):
        """Return locs (N, P, 4) and scores (N, P, n_classes), given the maps in the order of FEATURE_MAPS."""
        n_images = feature_maps[0].size(0)
        predictions = []
        for prefix, n_values in (("loc", 4), ("cl", self.n_classes)):
            maps = [
                self.get_submodule(f"{prefix}_{name}")(feature_map)
                for name, feature_map in zip(FEATURE_MAPS[self.size], feature_maps, strict=True)
            ]
            # (N, n_priors * n_values, h, w) -> (N, h * w * n_priors, n_values): the order of the priors
            maps = [x.permute(0, 2, 3, 1).reshape(n_images, -1, n_values) for x in maps]
            predictions.append(torch.cat(maps, dim=1))
        return predictions


class SSD300(nn.Module):
    """The whole network: base, auxiliary and prediction convolutions, and its P = 8,732 priors.

    :param n_classes: number of classes, background included
    :param pretrained: start the base from ImageNet weights
    :param priors: name of a family in PRIOR_FAMILIES, or a family of one's own, Priors
    :param pixel_mean: mean (red, green, blue) that the base expects to be subtracted from RGB of 0-255, or None if it
        takes ImageNet-normalised images. The whole network takes either RGB bytes or ImageNet-normalised floats.
    :raises ValueError: if the family of priors is unknown, or does not fit the network's feature maps
    """

    size = 300  # side of the input, pixels

    def __init__(self, n_classes, pretrained=True, priors="paper", pixel_mean=None):
        super().__init__()
        self.n_classes = n_classes
        self.priors = priors
        self.label_map = None  # class name -> index, if known
        self.base = VGGBase(pretrained)
        self.aux_convs = AuxiliaryConvolutions(self.size)
        self.pred_convs = PredictionConvolutions(n_classes, self.size)
        # Learned scale of each channel of conv4_3 after its L2 normalisation (paper §3.1; ParseNet).
        self.rescale_factors = nn.Parameter(torch.full((1, 512, 1, 1), 20.0))
        self.set_pixel_mean(pixel_mean)
        self.register_buffer("priors_cxcy", create_prior_boxes(priors, self.size), persistent=False)

    def forward(self, images):
        """Return locs (N, P, 4), gcxgcy, and scores (N, P, n_classes), given images (N, 3, size, size)."""
        if images.dtype == torch.uint8:
            images = (images - self.byte_mean) / self.byte_std
        elif self.pixel_mean is not None:
            images = images * self.input_scale + self.input_shift
        conv4_3, conv7 = self.base(images)
        with torch.autocast(images.device.type, enabled=False):  # squares of features overflow half precision
            rescaled = F.normalize(conv4_3.float(), dim=1) * self.rescale_factors
        rescaled = rescaled.to(conv4_3.dtype)  # once, not for each of the two convolutions that take it
        return tuple(self.pred_convs(rescaled, conv7, *self.aux_convs(conv7)))

    def set_pixel_mean(self, pixel_mean):
        """Set what the base takes: RGB of 0-255 minus this mean, or ImageNet-normalised images if it is None."""
        # NumPy, because arithmetic on PyTorch's meta device imports its compiler.
        self.pixel_mean = pixel_mean
        mean, std = (255 * np.float32(values).reshape(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        own_mean = mean if pixel_mean is None else np.float32(pixel_mean).reshape(3, 1, 1)
        own_std = std if pixel_mean is None else np.ones_like(std)
        # The base gets (bytes - byte_mean) / byte_std or, with a pixel_mean, floats * input_scale + input_shift.
        buffers = {"byte_mean": own_mean, "byte_std": own_std, "input_scale": std, "input_shift": mean - own_mean}
        for name, values in buffers.items():
            self.register_buffer(name, torch.tensor(values), persistent=False)

    def decode(self, predicted_locs):
        """Return the boxes (N, P, 4), fractional xy, of predicted offsets (N, P, 4), gcxgcy."""
        return cxcy_to_xy(gcxgcy_to_cxcy(predicted_locs.float(), self.priors_cxcy))

    @torch.no_grad()
    def detect_objects(self, predicted_locs, predicted_scores, min_score, max_overlap, top_k, class_candidates=None):
        """Decode predictions and apply non-maximum suppression to each class (paper §2.2).

        :param predicted_locs: (N, P, 4), gcxgcy
        :param predicted_scores: (N, P, n_classes), before softmax
        :param min_score, max_overlap, top_k: see `Limits`
        :param class_candidates: number of the best candidates of each class that suppression considers; None: all
        :return: lists of length N: boxes (d, 4), fractional xy; labels (d,); scores (d,); best first, d may be 0
        """
        boxes = self.decode(predicted_locs)
        is_valid = boxes.isfinite().all(dim=2, keepdim=True)  # a network that diverged detects nothing
        probabilities = torch.where(is_valid, predicted_scores.float().softmax(dim=2)[:, :, 1:], 0).nan_to_num(0)
        if class_candidates is not None:  # keep the best of each class; of those tied at the lowest score, the first
            lowest = probabilities.topk(min(class_candidates, boxes.size(1)), dim=1).values[:, -1:]
            is_above, is_tied = probabilities > lowest, probabilities == lowest
            n_free = class_candidates - is_above.sum(dim=1, keepdim=True)  # places left for tied candidates
            probabilities = torch.where(is_above | (is_tied & (is_tied.cumsum(dim=1) <= n_free)), probabilities, 0)
        detections = [
            _non_maximum_suppression(image_boxes, image_scores, min_score, max_overlap, top_k)
            for image_boxes, image_scores in zip(boxes, probabilities, strict=True)
        ]
        return tuple(list(part) for part in zip(*detections, strict=True)) if detections else ([], [], [])


class SSD512(SSD300):
    """The network for images of 512x512 pixels, with P = 24,564 priors; its layers are in the same tables."""

    size = 512

    def __init__(self, n_classes, pretrained=True, priors="caffe", pixel_mean=None):
        super().__init__(n_classes, pretrained, priors, pixel_mean)


NETWORKS = {300: SSD300, 512: SSD512}  # by the side of the input, pixels


def _non_maximum_suppression(boxes, scores, min_score, max_overlap, top_k):
    """Suppress, in one image, the boxes that overlap a better one of their class.

    Whether a box survives depends on better boxes only. So it is enough to look at the best candidates, and at more of
    them only if fewer than `top_k` survive: the result is the same as with all candidates.

    :param boxes: (p, 4), xy
    :param scores: (p, n_classes - 1), probabilities
    :return: boxes (d, 4), labels (d,), scores (d,), best first
    """
    flat = scores.flatten()
    n_candidates = int((flat > min_score).sum())
    if n_candidates == 0 or top_k < 1:
        return boxes.new_zeros(0, 4), torch.zeros(0, dtype=torch.long, device=boxes.device), flat.new_zeros(0)
    n_best = 4 * top_k
    while True:
        # Take the best candidates. Ties go to the first, so the result does not depend on how many are taken.
        lowest_score = flat.topk(min(n_best, n_candidates)).values[-1]
        candidates = (flat >= lowest_score).nonzero().squeeze(1)
        candidates = candidates[flat[candidates].argsort(descending=True, stable=True)][:n_best]
        prior_indices, classes = candidates // scores.size(1), candidates % scores.size(1)
        # Move each class to a region of its own: one call then suppresses within classes. Float64 keeps overlaps exact.
        shifted = boxes[prior_indices].double().clamp(-1e6, 1e6)
        shifted = shifted + classes[:, None] * (shifted.max() - shifted.min() + 1)
        kept = load_nms()(shifted, flat[candidates].double(), max_overlap)[:top_k]
        if len(kept) == top_k or len(candidates) >= n_candidates:
            return boxes[prior_indices[kept]], classes[kept] + 1, flat[candidates[kept]]
        n_best *= 4


def create_prior_boxes(priors="paper", size=300):
    """Return the priors (P, 4), fractional cxcy, ordered by feature map, row, column and shape (paper §2.2).

    Sides above 1 are cut to 1, as in all PyTorch systems with released weights.

    :param priors: name of a family in PRIOR_FAMILIES, or Priors
    :param size: of the network, a key of PRIOR_FAMILIES
    :raises ValueError: if the family is unknown, or does not fit the network's feature maps
    """
    family = PRIOR_FAMILIES[size].get(priors) if isinstance(priors, str) else priors
    if family is None:
        raise ValueError(f"priors of SSD{size} must be one of {', '.join(PRIOR_FAMILIES[size])}, not {priors!r}")
    n_maps = len(FEATURE_MAPS[size])
    numbers = (*family.scales, *family.steps, *family.aspect_ratios)
    is_positive = all(0 < number < math.inf for number in numbers)  # False for NaN, too
    lengths = len(family.scales), len(family.steps), len(set(family.aspect_ratios))
    if lengths != (n_maps + 1, n_maps, 4) or not is_positive:
        raise ValueError(f"priors of SSD{size}: {n_maps + 1} scales, {n_maps} steps and 4 aspect ratios, all above 0")
    squarest = sorted(family.aspect_ratios, key=lambda ratio: abs(math.log(ratio)))[:2]
    boxes = []
    for index, (cells, _, n_priors) in enumerate(FEATURE_MAPS[size].values()):
        scale, next_scale = family.scales[index : index + 2]
        extra_scale = math.sqrt(scale * next_scale)
        ratios = [ratio for ratio in family.aspect_ratios if n_priors == 6 or ratio in squarest]
        shapes = [(scale, scale), (extra_scale, extra_scale)]
        shapes += [(scale * math.sqrt(ratio), scale / math.sqrt(ratio)) for ratio in ratios]
        centers = [(cell + 0.5) * family.steps[index] for cell in range(cells)]
        if family.clip_centers:
            centers = [min(center, 1.0) for center in centers]
        boxes += [(c_x, c_y, min(w, 1.0), min(h, 1.0)) for c_y in centers for c_x in centers for w, h in shapes]
    return torch.tensor(boxes)


def split_by_feature_map(per_prior, size=300):
    """Split a tensor of all priors (P, ...) into views (cells, cells, priors per cell, ...), one per feature map."""
    shapes = [(cells, cells, n_priors) for cells, _, n_priors in FEATURE_MAPS[size].values()]
    parts = per_prior.split([math.prod(shape) for shape in shapes])
    return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]


def load_model(source, device="cpu", label_map=None):
    """Return the network in a file, in eval mode, with its `label_map` (class name -> index, background 0).

    The file may be of any system that `support.checkpoints.read_weights` knows. No code in it is run.

    :param source: path of the file, or "coco" for torchvision's weights, which are downloaded once
    :param device: where to put the model
    :param label_map: class names for a file that has none, if their number fits
    :raises InputError: naming the file, if it cannot be used
    """
    with torch.device("meta"):
        parameter_names = {size: list(network(2, pretrained=False).state_dict()) for size, network in NETWORKS.items()}
    return build_model(read_weights(source, parameter_names, label_map), source).to(device).eval()


def build_model(description, source):
    """Return the network of a description.

    :param description: as `support.checkpoints.read_weights` returns it; "size" is 300 if it is missing
    :param source: the file that the description was read from, for the error
    :raises InputError: if the priors are unknown or the weights do not fit
    """
    label_map, priors, size = description["label_map"], description["priors"], description.get("size", 300)
    try:
        priors = Priors(**priors) if isinstance(priors, dict) else priors
        with torch.device("meta"):  # makes no weights; they would be initialised in vain
            model = NETWORKS[size](len(label_map), False, priors, description["pixel_mean"])
        weights = {name: value.float().cpu().clone().contiguous() for name, value in description["model"].items()}
        model.load_state_dict(weights, assign=True)
        model.set_pixel_mean(description["pixel_mean"])  # state dicts lack the buffers
        model.register_buffer("priors_cxcy", create_prior_boxes(priors, size), persistent=False)
    except (RuntimeError, AttributeError, TypeError, ValueError, KeyError, OverflowError) as error:
        raise InputError(
            f"{source}: its weights or priors ({str(priors):.60}) do not fit an SSD{size} of {len(label_map)} classes, "
            f"background included; expected {KNOWN_SYSTEMS}"
        ) from error
    model.label_map = label_map
    return model


def transfer(trained, label_map):
    """Return a network for other classes with the weights of `trained`, and the names of the classes carried over.

    The class heads keep the filters of classes that both know, by COCO's or VOC's spelling; the others are fresh.
    """
    model = type(trained)(len(label_map), pretrained=False, priors=trained.priors, pixel_mean=trained.pixel_mean)
    model.label_map = label_map
    shared = [name for name in label_map if find_label(name, trained.label_map) is not None]
    ours, theirs = [label_map[name] for name in shared], [find_label(name, trained.label_map) for name in shared]
    weights = model.state_dict()  # shares the model's memory: writing to it changes the model
    for name, value in trained.state_dict().items():
        if name.startswith("pred_convs.cl_"):
            # (n_priors * n_classes, ...) -> (n_priors, n_classes, ...)
            per_class = weights[name].unflatten(0, (-1, model.n_classes))
            per_class[:, ours] = value.unflatten(0, (-1, trained.n_classes))[:, theirs]
        else:
            weights[name].copy_(value)
    return model, shared


class MultiBoxLoss(nn.Module):
    """The training objective (paper §2.2, equations 1 to 3), for a whole batch at once.

    Matching: every object gets the prior that overlaps it most; if objects share a best prior, the last one gets it.
    Then every other prior is matched with the object that it overlaps most, if that overlap is at least `threshold`.
    Hard negative mining: each image uses its unmatched priors with the highest confidence loss, `neg_pos_ratio` times
    as many as it has matched priors.

    :param priors_cxcy: (P, 4), fractional cxcy
    :param threshold: jaccard overlap from which a prior matches an object
    :param neg_pos_ratio: hard negatives per positive
    :param alpha: weight of the localisation loss
    """

    def __init__(self, priors_cxcy, threshold=0.5, neg_pos_ratio=3, alpha=1.0):
        super().__init__()
        self.register_buffer("priors_cxcy", priors_cxcy, persistent=False)
        # (P, 4), xy; stored column by column, which makes the overlaps several times faster
        self.register_buffer("priors_xy", cxcy_to_xy(priors_cxcy).t().contiguous().t(), persistent=False)
        self.threshold = threshold
        self.neg_pos_ratio = neg_pos_ratio
        self.alpha = alpha

    def forward(self, predicted_locs, predicted_scores, boxes, labels):
        """Return the loss, a scalar; parameters as for `parts`."""
        confidence_loss, localization_loss, _ = self.parts(predicted_locs, predicted_scores, boxes, labels)
        return confidence_loss + self.alpha * localization_loss

    def parts(self, predicted_locs, predicted_scores, boxes, labels):
        """Return three scalars: confidence loss and localisation loss per positive, and the number of positives.

        :param predicted_locs: (N, P, 4), gcxgcy
        :param predicted_scores: (N, P, n_classes), before softmax
        :param boxes: N tensors (n_i, 4), fractional xy; n_i may be 0; boxes without area are ignored
        :param labels: N tensors (n_i,), 1 ... n_classes - 1
        """
        true_boxes, true_labels = self.match(boxes, labels)
        losses = self.sums(predicted_locs, predicted_scores, true_boxes, true_labels)
        n_positives = (true_labels > 0).sum()
        confidence, localization = losses / n_positives.clamp(min=1)
        return confidence, localization, n_positives

    def sums(self, predicted_locs, predicted_scores, true_boxes, true_labels):
        """Return confidence loss and localisation loss (2,), summed over positives and hard negatives.

        :param predicted_locs, predicted_scores: as for `parts`
        :param true_boxes, true_labels: each prior's target, as from `match`
        """
        priors = self.priors_cxcy
        if not predicted_scores.is_cuda:  # leave out the priors that do not count
            image, used = torch.arange(len(true_labels))[:, None], self.find_used(predicted_scores, true_labels)
            predicted_locs, predicted_scores = predicted_locs[image, used], predicted_scores[image, used]
            true_boxes, true_labels, priors = true_boxes[image, used], true_labels[image, used], priors[used]
        positive, background = true_labels > 0, true_labels == 0  # (N, P)

        # Compare the boxes of the positives: smooth L1, summed over the four offsets.
        true_locs = cxcy_to_gcxgcy(xy_to_cxcy(true_boxes), priors)
        localization = F.smooth_l1_loss(predicted_locs.float(), true_locs, reduction="none").sum(dim=2)
        localization = localization.masked_fill(background, 0).sum()  # not a product: infinity times 0 is NaN

        # Compare the classes of the positives and, in each image, of the negatives with the highest loss.
        confidence = F.cross_entropy(predicted_scores.float().flatten(0, 1), true_labels.flatten(), reduction="none")
        confidence = confidence.view_as(positive)
        negatives = confidence.masked_fill(positive, 0).sort(dim=1, descending=True).values
        position = torch.arange(positive.size(1), device=positive.device)
        is_easy = position >= self.neg_pos_ratio * positive.sum(dim=1, keepdim=True)
        confidence = confidence.masked_fill(background, 0).sum() + negatives.masked_fill(is_easy, 0).sum()
        return torch.stack([confidence, localization])

    @torch.no_grad()
    def find_used(self, predicted_scores, true_labels):
        """Return the indices (N, R) of the priors of each image that count in its loss, and some more in most images.

        A CPU is faster with these alone. A GPU, which would have to wait until R is known, takes all priors.
        """
        positive = true_labels > 0
        n_used = math.ceil((1 + self.neg_pos_ratio) * positive.sum(dim=1).max())
        confidence = F.cross_entropy(predicted_scores.float().transpose(1, 2), true_labels, reduction="none")
        hardness = torch.where(positive, torch.inf, confidence.nan_to_num(nan=torch.finfo(torch.float32).max))
        return hardness.topk(min(n_used, positive.size(1)), dim=1).indices

    @torch.no_grad()
    def match(self, boxes, labels):
        """Return each prior's target: boxes (N, P, 4), fractional xy, and labels (N, P), 0 for background.

        The boxes of background priors are meaningless. Parameters as for `parts`.
        """
        # Pad every image to n objects, at least 1: an extra entry of length n does that, and is cut off again.
        # Nothing waits for a GPU, not even the copy to it.
        device, n_objects = self.priors_cxcy.device, max(1, *map(len, boxes))
        boxes = pad_sequence([*boxes, boxes[0].new_zeros(n_objects, 4)], batch_first=True)[:-1]
        labels = pad_sequence([*labels, labels[0].new_zeros(n_objects)], batch_first=True)[:-1]
        objects = torch.cat([boxes.float(), labels[..., None]], dim=2)  # (N, n, 5)
        if device.type == "cuda" and objects.is_cpu:
            objects = objects.pin_memory()
        boxes, labels = objects.to(device, non_blocking=True).split((4, 1), dim=2)
        labels = labels.squeeze(2).long()

        # Padding, which has label 0, and boxes without area become whole-image boxes.
        is_object = (labels > 0) & (boxes[..., 2:] > boxes[..., :2]).all(dim=2)
        whole_image = (torch.arange(4, device=device) // 2).float()  # 0, 0, 1, 1, made on the device
        boxes = torch.where(is_object[..., None], boxes, whole_image)

        # Find the object that each prior overlaps most.
        overlap = find_jaccard_overlap(boxes.view(-1, 4), self.priors_xy).unflatten(0, (-1, n_objects))  # (N, n, P)
        overlap.masked_fill_(~is_object[..., None], -1)
        best_overlap, best_object = overlap.max(dim=1)  # (N, P)

        # Assign each object its best prior; the last object wins a shared one.
        best_prior = overlap.argmax(dim=2)  # (N, n)
        indices = torch.where(is_object, torch.arange(n_objects, device=device), -1)
        forced = torch.full_like(best_object, -1).scatter_reduce(1, best_prior, indices, "amax")
        best_object = torch.where(forced >= 0, forced, best_object)
        positive = (forced >= 0) | (best_overlap >= self.threshold)

        true_boxes = boxes.gather(1, best_object[..., None].expand(-1, -1, 4))
        return true_boxes, torch.where(positive, labels.gather(1, best_object), 0)


def _initialize(module, initialize, **options):
    """Initialise the convolutions of a module, unless on the meta device: weights by `initialize`, biases to 0."""
    for child in module.children():
        if isinstance(child, nn.Conv2d) and not child.weight.is_meta:
            initialize(child.weight, **options)
            nn.init.zeros_(child.bias)
