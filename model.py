"""SSD300 (Liu et al., "SSD: Single Shot MultiBox Detector", ECCV 2016): the network, its priors, its loss.

model = SSD300(n_classes=21)
predicted_locs, predicted_scores = model(images)  # (N, 3, 300, 300), ImageNet-normalised
boxes, labels, scores = model.detect_objects(
    predicted_locs, predicted_scores, min_score=0.2, max_overlap=0.45, top_k=200
)
"""

import math
import os

import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from files import InputError
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

# name: (channels in, channels out, kernel size, stride, padding); paper figure 2, ssd_pascal.py AddExtraLayers.
AUXILIARY_LAYERS = {
    "conv8_1": (1024, 256, 1, 1, 0),
    "conv8_2": (256, 512, 3, 2, 1),
    "conv9_1": (512, 128, 1, 1, 0),
    "conv9_2": (128, 256, 3, 2, 1),
    "conv10_1": (256, 128, 1, 1, 0),
    "conv10_2": (128, 256, 3, 1, 0),
    "conv11_1": (256, 128, 1, 1, 0),
    "conv11_2": (128, 256, 3, 1, 0),
}

# name: (cells along a side, channels, priors per cell); paper figure 2.
FEATURE_MAPS = {
    "conv4_3": (38, 512, 4),
    "conv7": (19, 1024, 6),
    "conv8_2": (10, 512, 6),
    "conv9_2": (5, 256, 6),
    "conv10_2": (3, 256, 4),
    "conv11_2": (1, 256, 4),
}

# Families of priors. scales: side of the square prior of each feature map in image sides, and one more, for the
# geometric mean with the next; steps: distance of the cells' centres in image sides; aspect_ratios: width over
# height, in the family's order, of which a feature map with 4 priors takes those up to 2.
_CAFFE_STEPS = tuple(step / 300 for step in (8, 16, 32, 64, 100, 300))
PRIOR_FAMILIES = {
    # Paper §2.2: 0.1, then 0.2 ... 0.9. As in the public tutorial, the last extra prior is the whole image and
    # the ratio 1/3 is written 0.333: networks trained with them decode exactly.
    "paper": {
        "scales": (0.1, 0.2, 0.375, 0.55, 0.725, 0.9, 1 / 0.9),
        "steps": tuple(1 / cells for cells, _, _ in FEATURE_MAPS.values()),
        "aspect_ratios": (2, 3, 0.5, 0.333),
        "clip_centers": False,
    },
    # The released VOC networks: ssd_pascal.py, min_sizes and max_sizes in pixels of 300.
    "caffe": {
        "scales": tuple(size / 300 for size in (30, 60, 111, 162, 213, 264, 315)),
        "steps": _CAFFE_STEPS,
        "aspect_ratios": (2, 1 / 2, 3, 1 / 3),
        "clip_centers": True,
    },
    # The COCO networks: ssd_coco.py and torchvision's ssd300_vgg16.
    "coco": {
        "scales": (0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05),
        "steps": _CAFFE_STEPS,
        "aspect_ratios": (2, 1 / 2, 3, 1 / 3),
        "clip_centers": False,
    },
}


class VGGBase(nn.Module):
    """VGG-16 with conv6 and conv7 in place of its fully connected layers (paper §3.1).

    (N, 3, 300, 300) -> conv4_3 (N, 512, 38, 38), conv7 (N, 1024, 19, 19)

    :param pretrained: take torchvision's ImageNet weights, fetched once
    :raises InputError: where these cannot be had
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
        self.pool5 = nn.MaxPool2d(3, 1, padding=1)  # keeps 19, where VGG halves
        self.conv6 = nn.Conv2d(512, 1024, 3, padding=6, dilation=6)  # a trous: the reach of fc6 with fewer weights
        self.conv7 = nn.Conv2d(1024, 1024, 1)

        if pretrained:
            self.load_pretrained_layers()
        else:
            # From scratch, 15 layers keep the size of their signal only with He's initialisation.
            _initialize(self, nn.init.kaiming_normal_, nonlinearity="relu")

    def forward(self, images):
        """Return the conv4_3 and conv7 feature maps of images (N, 3, 300, 300), after their ReLU."""
        x = images
        for block, widths in enumerate(VGG_BLOCKS, start=1):
            for layer in range(1, len(widths) + 1):
                x = F.relu(self.get_submodule(f"conv{block}_{layer}")(x), inplace=True)
            if block == 4:
                conv4_3 = x
            x = self.get_submodule(f"pool{block}")(x)
        return conv4_3, F.relu(self.conv7(F.relu(self.conv6(x), inplace=True)), inplace=True)

    def load_pretrained_layers(self):
        """Take over torchvision's ImageNet VGG-16: its convolutions, and fc6 and fc7 decimated.

        fc6 is a 7x7 convolution with 4096 filters; every 4th filter, every 3rd row and column remain.
        """
        pretrained = fetch_weights(
            torchvision.models.VGG16_Weights.IMAGENET1K_V1, "train from scratch with --no-pretrained"
        )  # fmt: skip
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
    """The layers behind the base that give ever coarser feature maps (paper §2.1).

    conv7 (N, 1024, 19, 19) -> conv8_2 (N, 512, 10, 10), conv9_2 (N, 256, 5, 5), conv10_2 (N, 256, 3, 3),
    conv11_2 (N, 256, 1, 1)
    """

    def __init__(self):
        super().__init__()
        for name, (channels_in, channels_out, kernel_size, stride, padding) in AUXILIARY_LAYERS.items():
            self.add_module(name, nn.Conv2d(channels_in, channels_out, kernel_size, stride, padding))
        _initialize(self, nn.init.xavier_uniform_)

    def forward(self, conv7):
        """Return the four feature maps, after their ReLU, for the base's conv7 (N, 1024, 19, 19)."""
        feature_maps, x = [], conv7
        for name in AUXILIARY_LAYERS:
            x = F.relu(self.get_submodule(name)(x), inplace=True)
            if name in FEATURE_MAPS:
                feature_maps.append(x)
        return feature_maps


class PredictionConvolutions(nn.Module):
    """A 3x3 convolution for the boxes and one for the classes on each of the six feature maps (paper §2.1).

    six feature maps -> locs (N, 8732, 4), gcxgcy; scores (N, 8732, n_classes), before softmax
    """

    def __init__(self, n_classes):
        super().__init__()
        for prefix, n_values in (("loc", 4), ("cl", n_classes)):
            for name, (_, channels, n_priors) in FEATURE_MAPS.items():
                self.add_module(f"{prefix}_{name}", nn.Conv2d(channels, n_priors * n_values, 3, padding=1))
        self.n_classes = n_classes
        _initialize(self, nn.init.xavier_uniform_)

    def forward(self, *feature_maps):
        """Return locs (N, 8732, 4) and scores (N, 8732, n_classes) for the maps in the order of FEATURE_MAPS."""
        n_images = feature_maps[0].size(0)
        predictions = []
        for prefix, n_values in (("loc", 4), ("cl", self.n_classes)):
            maps = [
                self.get_submodule(f"{prefix}_{name}")(feature_map)
                for name, feature_map in zip(FEATURE_MAPS, feature_maps, strict=True)
            ]
            # (N, n_priors * n_values, h, w) -> (N, h * w * n_priors, n_values): the order of the priors
            maps = [x.permute(0, 2, 3, 1).reshape(n_images, -1, n_values) for x in maps]
            predictions.append(torch.cat(maps, dim=1))
        return predictions


class SSD300(nn.Module):
    """The whole network: base, auxiliary and prediction convolutions, and the priors they speak of.

    :param n_classes: number of classes, background among them
    :param pretrained: start the base from ImageNet weights
    :param priors: family of the priors, a key of PRIOR_FAMILIES
    :param pixel_mean: for a network that was trained on RGB of 0-255 minus a mean, that mean (red, green, blue);
        the network then makes its input of the ImageNet-normalised one itself
    """

    def __init__(self, n_classes, pretrained=True, priors="paper", pixel_mean=None):
        super().__init__()
        if priors not in PRIOR_FAMILIES:
            raise ValueError(f"priors must be one of {', '.join(PRIOR_FAMILIES)}, not {priors!r}")
        self.n_classes = n_classes
        self.priors = priors
        self.label_map = None  # class name -> index, where known
        self.base = VGGBase(pretrained)
        self.aux_convs = AuxiliaryConvolutions()
        self.pred_convs = PredictionConvolutions(n_classes)
        # Scale of each channel of conv4_3 after its L2 normalisation, learned (paper §3.1, [12] ParseNet).
        self.rescale_factors = nn.Parameter(torch.full((1, 512, 1, 1), 20.0))
        self.set_pixel_mean(pixel_mean)
        self.register_buffer("priors_cxcy", self.create_prior_boxes(), persistent=False)

    def forward(self, images):
        """Return locs (N, 8732, 4), gcxgcy, and scores (N, 8732, n_classes) for images (N, 3, 300, 300)."""
        if self.pixel_mean is not None:
            images = images * self.input_scale + self.input_shift
        conv4_3, conv7 = self.base(images)
        with torch.autocast(images.device.type, enabled=False):  # squares of features overflow half precision
            conv4_3 = F.normalize(conv4_3.float(), dim=1) * self.rescale_factors
        locs, scores = self.pred_convs(conv4_3, conv7, *self.aux_convs(conv7))
        return locs, scores

    def set_pixel_mean(self, pixel_mean):
        """Let the network be one that was trained on RGB of 0-255 minus this mean; None for ImageNet-normalised."""
        self.pixel_mean = pixel_mean
        mean, std, own = (
            torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD, pixel_mean or (0, 0, 0))
        )
        self.register_buffer("input_scale", 255 * std, persistent=False)
        self.register_buffer("input_shift", 255 * mean - own, persistent=False)

    def create_prior_boxes(self):
        """Return the 8,732 priors (8732, 4), fractional cxcy: by feature map, row, column and shape (paper §2.2).

        Sides above 1 are cut to 1, as all three published systems do: the released weights expect it.
        """
        family = PRIOR_FAMILIES[self.priors]
        priors = []
        for index, (cells, _, n_priors) in enumerate(FEATURE_MAPS.values()):
            scale, next_scale = family["scales"][index : index + 2]
            ratios = [r for r in family["aspect_ratios"] if n_priors == 6 or 0.5 <= r <= 2]
            shapes = [(scale, scale), (math.sqrt(scale * next_scale),) * 2]
            shapes += [(scale * math.sqrt(ratio), scale / math.sqrt(ratio)) for ratio in ratios]
            centers = [(cell + 0.5) * family["steps"][index] for cell in range(cells)]
            if family["clip_centers"]:
                centers = [min(center, 1.0) for center in centers]
            priors += [(c_x, c_y, min(w, 1.0), min(h, 1.0)) for c_y in centers for c_x in centers for w, h in shapes]
        return torch.tensor(priors)

    @torch.no_grad()
    def detect_objects(self, predicted_locs, predicted_scores, min_score, max_overlap, top_k):
        """Decode predictions and suppress those that overlap a better one of their class (paper §2.2, NMS).

        :param predicted_locs: (N, 8732, 4), gcxgcy
        :param predicted_scores: (N, 8732, n_classes), before softmax
        :param min_score: a detection's probability is above it
        :param max_overlap: jaccard overlap with a better one of the same class from above which a box goes
        :param top_k: keep the best so many of an image, all classes together
        :return: lists of length N: boxes (d, 4), fractional xy; labels (d,); scores (d,); best first, d may be 0
        """
        boxes = cxcy_to_xy(gcxgcy_to_cxcy(predicted_locs.float(), self.priors_cxcy))
        probabilities = predicted_scores.float().softmax(dim=2)[:, :, 1:]
        probabilities = torch.where(boxes.isfinite().all(dim=2, keepdim=True), probabilities, 0)  # else it is no box
        detections = [
            _non_maximum_suppression(image_boxes, image_scores, min_score, max_overlap, top_k)
            for image_boxes, image_scores in zip(boxes, probabilities, strict=True)
        ]
        return tuple(list(part) for part in zip(*detections, strict=True)) if detections else ([], [], [])


def _non_maximum_suppression(boxes, scores, min_score, max_overlap, top_k):
    """Return boxes (d, 4), labels (d,), scores (d,) that survive among boxes (p, 4), xy, with scores (p, classes).

    Whether a box survives depends only on better ones, and only the best top_k survivors count: so the best few
    candidates usually decide, and when they do not, more are taken. The result is that of taking all.
    """
    n_classes = scores.size(1)
    flat = scores.flatten().nan_to_num(0)  # a network that went astray finds nothing there
    n_candidates = int((flat > min_score).sum())
    if n_candidates == 0 or top_k < 1:
        return boxes.new_zeros(0, 4), torch.zeros(0, dtype=torch.long, device=boxes.device), flat.new_zeros(0)
    n_best = 4 * top_k
    while True:
        # Take the best; of equals the first, so that ties never depend on how many are taken.
        last = flat.topk(min(n_best, n_candidates)).values[-1]
        candidates = (flat >= last).nonzero().squeeze(1)
        candidates = candidates[flat[candidates].argsort(descending=True, stable=True)][:n_best]
        # Classes are kept apart by moving each to a place of its own; float64 leaves the overlaps exact.
        priors, classes = candidates // n_classes, candidates % n_classes
        places = boxes[priors].double().clamp(-1e6, 1e6)
        places = places + classes[:, None] * (places.max() - places.min() + 1)
        kept = torchvision.ops.nms(places, flat[candidates].double(), max_overlap)[:top_k]
        if len(kept) == top_k or len(candidates) >= n_candidates:
            return boxes[priors[kept]], classes[kept] + 1, flat[candidates[kept]]
        n_best *= 4


class MultiBoxLoss(nn.Module):
    """The paper's training objective (§2.2, equations 1 to 3), for a whole batch at once.

    Matching: every object takes the prior that overlaps it most (of objects that share it, the last one), then
    every other prior takes the object that it overlaps most, if by `threshold` or more. Hard negative mining:
    in each image the `neg_pos_ratio` times as many unmatched priors as matched ones that score background worst.

    :param priors_cxcy: (8732, 4), fractional cxcy
    :param threshold: jaccard overlap from which a prior matches an object
    :param neg_pos_ratio: hard negatives for each positive
    :param alpha: weight of the localisation loss
    """

    def __init__(self, priors_cxcy, threshold=0.5, neg_pos_ratio=3, alpha=1.0):
        super().__init__()
        self.register_buffer("priors_cxcy", priors_cxcy, persistent=False)
        # (8732, 4), xy, side by side in memory, which makes the overlaps several times faster
        self.register_buffer("priors_xy", cxcy_to_xy(priors_cxcy).t().contiguous().t(), persistent=False)
        self.threshold = threshold
        self.neg_pos_ratio = neg_pos_ratio
        self.alpha = alpha

    def forward(self, predicted_locs, predicted_scores, boxes, labels):
        """Return the loss, a scalar; parameters as for `parts`."""
        confidence_loss, localization_loss, _ = self.parts(predicted_locs, predicted_scores, boxes, labels)
        return confidence_loss + self.alpha * localization_loss

    def parts(self, predicted_locs, predicted_scores, boxes, labels):
        """Return confidence loss and localisation loss, both over the number of positives, and that number: scalars.

        :param predicted_locs: (N, 8732, 4), gcxgcy
        :param predicted_scores: (N, 8732, n_classes), before softmax
        :param boxes: N tensors (n_i, 4), fractional xy; n_i may be 0, a box without area counts as none
        :param labels: N tensors (n_i,), 1 ... n_classes - 1
        """
        n_images, n_priors, n_classes = predicted_scores.shape
        true_boxes, true_labels = self.match(boxes, labels)
        positive = true_labels > 0  # (N, 8732)
        n_positives = positive.sum(dim=1)
        n_used = (1 + self.neg_pos_ratio) * n_positives

        # Rank the priors of each image: its positives, then its negatives, the one that scores background worst first.
        with torch.no_grad():
            confidence = F.cross_entropy(
                predicted_scores.float().reshape(-1, n_classes), true_labels.reshape(-1), reduction="none"
            ).reshape(n_images, n_priors)
            hardness = torch.where(positive, torch.inf, confidence.nan_to_num(nan=torch.finfo(torch.float32).max))
            n_ranked = self.count_ranked(n_used, n_priors)
            ranked = hardness.topk(n_ranked, dim=1).indices
        rank = torch.arange(n_ranked, device=positive.device)
        predicted_locs, predicted_scores, true_boxes = (
            values.gather(1, ranked[..., None].expand(-1, -1, values.size(2))).float()
            for values in (predicted_locs, predicted_scores, true_boxes)
        )

        # Compare the boxes of the positives: smooth L1, summed over the four offsets.
        true_locs = cxcy_to_gcxgcy(xy_to_cxcy(true_boxes), self.priors_cxcy[ranked])
        localization = F.smooth_l1_loss(predicted_locs, true_locs, reduction="none").sum(dim=2)
        localization = torch.where(rank < n_positives[:, None], localization, 0).sum()

        # Compare the classes of the positives and of the hardest negatives.
        confidence = F.cross_entropy(
            predicted_scores.reshape(-1, n_classes), true_labels.gather(1, ranked).reshape(-1), reduction="none"
        ).reshape(n_images, n_ranked)
        confidence = torch.where(rank < n_used[:, None], confidence, 0).sum()

        n_positives = n_positives.sum()
        normalizer = n_positives.clamp(min=1)
        return confidence / normalizer, localization / normalizer, n_positives

    @staticmethod
    def count_ranked(n_used, n_priors):
        """Return how many priors of each image to rank, of which each image uses (N,) so many: at least the most.

        How many that is costs nothing on a CPU; to ask a GPU would mean to wait for it, so there all are ranked.
        """
        return n_priors if n_used.is_cuda else min(n_priors, max(1, math.ceil(n_used.max())))

    @torch.no_grad()
    def match(self, boxes, labels):
        """Return what each prior is to predict: boxes (N, 8732, 4), fractional xy, and labels (N, 8732), 0 background.

        The boxes of background priors mean nothing. Parameters as for `parts`.
        """
        device = self.priors_cxcy.device
        n_images, n_priors = len(boxes), len(self.priors_cxcy)

        # Pad the objects to the same number n for every image; what is no object is a whole-image box. Nothing here
        # or later waits for a GPU.
        counts = [len(image_boxes) for image_boxes in boxes]
        n_objects = max(1, *counts)
        boxes = pad_sequence([*boxes, boxes[0].new_zeros(n_objects, 4)], batch_first=True)[:-1]
        labels = pad_sequence([*labels, labels[0].new_zeros(n_objects)], batch_first=True)[:-1]
        is_object = torch.arange(n_objects) < torch.tensor(counts)[:, None]  # (N, n)
        boxes, labels, is_object = (part.to(device, non_blocking=True) for part in (boxes.float(), labels, is_object))
        is_object = is_object & (boxes[..., 2:] > boxes[..., :2]).all(dim=2)
        whole_image = torch.arange(4, device=device) // 2
        boxes = torch.where(is_object[..., None], boxes, whole_image.float())

        # Find for every prior the object that it overlaps most.
        overlap = find_jaccard_overlap(boxes.view(-1, 4), self.priors_xy).view(n_images, n_objects, n_priors)
        overlap.masked_fill_(~is_object[..., None], -1)
        best_overlap, best_object = overlap.max(dim=1)  # (N, 8732)

        # Force every object's best prior on it; where objects share one, the last of them has it.
        best_prior = overlap.argmax(dim=2)  # (N, n)
        objects = torch.where(is_object, torch.arange(n_objects, device=device), -1)
        forced = torch.full_like(best_object, -1).scatter_reduce(1, best_prior, objects, "amax")
        best_object = torch.where(forced >= 0, forced, best_object)
        positive = (forced >= 0) | (best_overlap >= self.threshold)

        true_boxes = boxes.gather(1, best_object[..., None].expand(-1, -1, 4))
        return true_boxes, torch.where(positive, labels.gather(1, best_object), 0)


def fetch_weights(weights, instead):
    """Return the state dict of published weights, an enum of torchvision's: downloaded once, checked, cached.

    :param instead: what a user may do without them, for the error
    :raises InputError: naming the cache file to put in place, where they cannot be had
    """
    cache_file = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(weights.url))
    try:
        return weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except Exception as error:  # the network, the disk and a broken file each raise something else
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"cannot get torchvision's {weights} ({reason}): put {weights.url} in place as {cache_file}, or {instead}"
        ) from error


def _initialize(module, initialize, **options):
    """Draw a module's convolution weights by `initialize`; its biases become 0."""
    for child in module.children():
        if isinstance(child, nn.Conv2d):
            initialize(child.weight, **options)
            nn.init.zeros_(child.bias)
