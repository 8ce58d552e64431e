"""The slow and obvious version of each fast function: the tests' oracle and the benchmark's baseline."""

import math
from fractions import Fraction

import numpy as np
import torch
from torch.nn import functional as F
from torchvision.ops import box_convert, box_iou


def jaccard_overlap(box_1, box_2):
    """IoU of two boxes, sequences xy."""
    width = min(box_1[2], box_2[2]) - max(box_1[0], box_2[0])
    height = min(box_1[3], box_2[3]) - max(box_1[1], box_2[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    area_1 = (box_1[2] - box_1[0]) * (box_1[3] - box_1[1])
    area_2 = (box_2[2] - box_2[0]) * (box_2[3] - box_2[1])
    return shared / (area_1 + area_2 - shared)


def overlap_table(boxes_1, boxes_2):
    """IoU of all pairs, (n1, n2), row by row."""
    table = torch.zeros(len(boxes_1), len(boxes_2))
    for row, (x_min, y_min, x_max, y_max) in enumerate(boxes_1.tolist()):
        for column, box in enumerate(boxes_2.tolist()):
            table[row, column] = jaccard_overlap((x_min, y_min, x_max, y_max), box)
    return table


def match(priors_xy, boxes, labels, threshold=0.5):
    """Index and label (0: background) of the object matched to each prior of one image, two tensors (n_priors,)."""
    if len(boxes) == 0:
        return torch.zeros(2, len(priors_xy), dtype=torch.long)
    overlap = box_iou(boxes, priors_xy)
    best_overlap, object_of = overlap.max(dim=0)
    label_of = labels[object_of]
    label_of[best_overlap < threshold] = 0
    for number in range(len(boxes)):  # a later object takes a contested prior from an earlier one
        prior = overlap[number].argmax()
        object_of[prior], label_of[prior] = number, labels[number]
    return object_of, label_of


def multibox_loss(priors_cxcy, predicted_locs, predicted_scores, boxes, labels, threshold=0.5, neg_pos_ratio=3):
    """Confidence and localisation loss of a batch, image by image, as in the published implementations."""
    priors_xy = box_convert(priors_cxcy, "cxcywh", "xyxy")
    confidence, localization, n_positives = [], [predicted_locs.sum() * 0], 0
    for locs, scores, true_boxes, true_labels in zip(predicted_locs, predicted_scores, boxes, labels, strict=True):
        object_of, label_of = match(priors_xy, true_boxes, true_labels, threshold)
        losses = F.cross_entropy(scores, label_of, reduction="none")
        positive = label_of > 0
        n_here = int(positive.sum())
        hardest = losses[~positive].sort(descending=True).values[: neg_pos_ratio * n_here]
        confidence += [losses[positive].sum(), hardest.sum()]
        n_positives += n_here
        if n_here:
            c_x, c_y, w, h = box_convert(true_boxes[object_of[positive]], "xyxy", "cxcywh").unbind(1)
            p_x, p_y, p_w, p_h = priors_cxcy[positive].unbind(1)
            offsets = (c_x - p_x) / (p_w / 10), (c_y - p_y) / (p_h / 10), (w / p_w).log() * 5, (h / p_h).log() * 5
            difference = (locs[positive] - torch.stack(offsets, dim=1)).abs()
            localization.append(torch.where(difference < 1, difference**2 / 2, difference - 0.5).sum())
    return sum(confidence) / max(n_positives, 1), sum(localization) / max(n_positives, 1)


def detect_objects(priors_cxcy, locs, scores, min_score, max_overlap, top_k, class_candidates=None):
    """Boxes, labels and scores of one image, best first, from locs (n_priors, 4) and scores (n_priors, n_classes).

    Of each class the best `class_candidates` go into suppression, and the best `top_k` of all are kept; None: all.
    """
    probabilities = scores.softmax(dim=1)
    centers = locs[:, :2] * priors_cxcy[:, 2:] / 10 + priors_cxcy[:, :2]
    half = torch.exp(locs[:, 2:] / 5) * priors_cxcy[:, 2:] / 2
    boxes = torch.cat([centers - half, centers + half], dim=1)
    detections = []
    for label in range(1, scores.size(1)):
        candidates = (probabilities[:, label] > min_score).nonzero().flatten()
        candidates = candidates[probabilities[candidates, label].argsort(descending=True, stable=True)]
        candidates = candidates[:class_candidates]
        while len(candidates):
            best, candidates = candidates[0], candidates[1:]
            detections.append((float(probabilities[best, label]), int(best), label))
            overlap = box_iou(boxes[best][None].double(), boxes[candidates].double())[0]
            candidates = candidates[overlap <= max_overlap]
    detections.sort(key=lambda detection: (-detection[0], detection[1], detection[2]))
    detections = detections[:top_k]
    priors = [prior for _, prior, _ in detections]
    return boxes[priors].reshape(-1, 4), [label for _, _, label in detections], [score for score, _, _ in detections]


def average_precisions(
    det_boxes, det_labels, det_scores, true_boxes, true_labels, true_difficulties, n_classes, eleven_points=True
):
    """AP of each foreground class by the rules of VOC's development kit; NaN if all its objects are difficult."""
    results = []
    for label in range(1, n_classes):
        detections, objects, n_objects = [], {}, 0
        for image in range(len(true_boxes)):
            objects[image] = [
                {"box": box, "difficult": bool(difficult), "detected": False}
                for box, object_label, difficult in zip(
                    true_boxes[image].tolist(),
                    true_labels[image].tolist(),
                    true_difficulties[image].tolist(),
                    strict=True,
                )
                if object_label == label
            ]
            n_objects += sum(not candidate["difficult"] for candidate in objects[image])
            for box, detected_label, score in zip(
                det_boxes[image].tolist(), det_labels[image].tolist(), det_scores[image].tolist(), strict=True
            ):
                if detected_label == label:
                    detections.append((score, image, box))
        if n_objects == 0:
            results.append(math.nan)
            continue
        precision, recall, right, wrong = [], [], 0, 0
        for _, image, box in sorted(detections, key=lambda d: -d[0]):
            best, best_overlap = None, -1.0
            for candidate in objects[image]:
                overlap = jaccard_overlap(box, candidate["box"])
                if overlap > best_overlap:
                    best, best_overlap = candidate, overlap
            if best_overlap >= 0.5 and best["difficult"]:
                continue
            if best_overlap >= 0.5 and not best["detected"]:
                best["detected"] = True
                right += 1
            else:
                wrong += 1
            precision.append(right / (right + wrong))
            recall.append(right / n_objects)
        if eleven_points:
            best_beyond = [
                max((p for p, r in zip(precision, recall, strict=True) if r >= t), default=0.0)
                for t in [j / 10 for j in range(11)]
            ]
            results.append(sum(best_beyond) / 11)
        else:
            area, previous = 0.0, 0.0
            for position, reached in enumerate(recall):
                area += (reached - previous) * max(precision[position:])
                previous = reached
            results.append(area)
    return results


def errors_by_kind(
    det_boxes, det_labels, det_scores, true_boxes, true_labels, true_difficulties, n_classes
):  # fmt: skip
    """The kind of each detection that counts and of each object to detect: two dicts with keys (image, index)."""
    objects = {}  # (image, index): (box, label, difficult)
    for image in range(len(true_boxes)):
        for index, box in enumerate(true_boxes[image].tolist()):
            objects[image, index] = box, int(true_labels[image][index]), bool(true_difficulties[image][index])
    kinds, detected, explained = {}, set(), set()
    for label in range(1, n_classes):
        n_objects = sum(own == label and not difficult for _, own, difficult in objects.values())
        candidates = []
        for image in range(len(det_boxes)):
            for index, score in enumerate(det_scores[image].tolist()):
                if det_labels[image][index] == label:
                    candidates.append((score, image, index))

        # Judge the detections, best first, and find the score of the best F1.
        judged, found, best_f1, threshold = [], set(), 0, math.inf
        for score, image, index in sorted(candidates, key=lambda candidate: -candidate[0]):
            best = {"own": (0.0, None), "other": (0.0, None)}  # overlap, key of the object
            for key, (box, own, _) in objects.items():
                overlap = jaccard_overlap(det_boxes[image][index].tolist(), box) if key[0] == image else 0.0
                side = "own" if own == label else "other"
                if overlap > best[side][0]:
                    best[side] = overlap, key
            own_overlap, own_object = best["own"]
            if own_overlap >= 0.5 and objects[own_object][2]:
                continue
            is_right = own_overlap >= 0.5 and own_object not in found
            found |= {own_object} if is_right else set()
            judged.append((score, (image, index), is_right, *best["own"], *best["other"]))
            f1 = Fraction(2 * len(found), len(judged) + n_objects)
            if f1 > best_f1:
                best_f1, threshold = f1, score

        for score, key, is_right, own_overlap, own_object, other_overlap, other_object in judged:
            if score < threshold:
                continue
            if is_right:
                kinds[key] = "right"
                detected.add(own_object)
            elif own_overlap >= 0.5:
                kinds[key] = "duplicate"
            elif own_overlap >= 0.1:
                kinds[key] = "place"
                explained.add(own_object)
            elif other_overlap >= 0.5:
                kinds[key] = "class"
                explained.add(other_object)
            else:
                kinds[key] = "both" if other_overlap >= 0.1 else "background"
    object_kinds = {}
    for key, (_, _, difficult) in objects.items():
        if not difficult:
            object_kinds[key] = "detected" if key in detected else "explained" if key in explained else "missed"
    return kinds, object_kinds


def resize(pixels, size):
    """Resize (height, width, 3) to (size, size, 3) from the four pixels around the centre of each pixel of the output.

    The centre of pixel i is at i + 0.5. Beyond the border the image goes on with its last pixel.
    """
    result = np.zeros((size, size, 3))
    for row in range(size):
        for column in range(size):
            y, x = ((i + 0.5) * n / size - 0.5 for i, n in zip((row, column), pixels.shape, strict=False))
            for i in (math.floor(y), math.floor(y) + 1):
                for j in (math.floor(x), math.floor(x) + 1):
                    pixel = pixels[min(max(i, 0), pixels.shape[0] - 1), min(max(j, 0), pixels.shape[1] - 1)]
                    result[row, column] += (1 - abs(y - i)) * (1 - abs(x - j)) * pixel
    return result


def augment(pixels, boxes, rng, colors=True):
    """The paper's augmentation step by step: distort, zoom out, crop, flip; without the final resizing.

    pixels: RGB array 0-255; boxes: list of pixel xy. Returns the new pixels, the remaining boxes in
    fractional xy, their indices, and two ratios of areas: canvas to image and crop to canvas.
    """
    if colors:
        pixels = distort(pixels.astype(float), rng).astype(np.uint8)
    boxes, indices = [list(box) for box in boxes], list(range(len(boxes)))
    image_area = pixels.size
    if rng.random() < 0.5:  # zoom out
        height, width, _ = pixels.shape
        scale = rng.uniform(1, 4)
        canvas = np.empty((int(scale * height), int(scale * width), 3), np.uint8)
        canvas[:] = [round(255 * mean) for mean in (0.485, 0.456, 0.406)]
        left, top = rng.randint(0, canvas.shape[1] - width), rng.randint(0, canvas.shape[0] - height)
        canvas[top : top + height, left : left + width] = pixels
        pixels = canvas
        boxes = [[x0 + left, y0 + top, x1 + left, y1 + top] for x0, y0, x1, y1 in boxes]
    canvas_area = pixels.size
    pixels, boxes, indices = crop(pixels, boxes, indices, rng)
    ratios = canvas_area / image_area, pixels.size / canvas_area
    height, width, _ = pixels.shape
    if rng.random() < 0.5:  # flip
        pixels = pixels[:, ::-1]
        boxes = [[width - x1, y0, width - x0, y1] for x0, y0, x1, y1 in boxes]
    return pixels, [[x0 / width, y0 / height, x1 / width, y1 / height] for x0, y0, x1, y1 in boxes], indices, ratios


def crop(pixels, boxes, indices, rng):
    """The paper's random crop, one trial at a time."""
    height, width, _ = pixels.shape
    while True:
        min_overlap = rng.choice([None, 0.0, 0.1, 0.3, 0.5, 0.7, 0.9])
        if min_overlap is None:
            return pixels, boxes, indices
        for _ in range(50):
            w, h = rng.uniform(0.3, 1) * width, rng.uniform(0.3, 1) * height
            if not 0.5 <= h / w <= 2:
                continue
            left, top = int(rng.uniform(0, width - w)), int(rng.uniform(0, height - h))
            right, bottom = int(left + w), int(top + h)
            inside = [
                i
                for i, (x0, y0, x1, y1) in enumerate(boxes)
                if left < (x0 + x1) / 2 < right and top < (y0 + y1) / 2 < bottom
            ]
            overlaps = [jaccard_overlap(box, (left, top, right, bottom)) for box in boxes]
            if boxes and (not inside or max(overlaps) < min_overlap):
                continue
            clipped = [
                [
                    max(boxes[i][0], left) - left,
                    max(boxes[i][1], top) - top,
                    min(boxes[i][2], right) - left,
                    min(boxes[i][3], bottom) - top,
                ]
                for i in inside
            ]
            return pixels[top:bottom, left:right], clipped, [indices[i] for i in inside]


def distort(pixels, rng):
    """Brightness, contrast, saturation and hue in random order, each with probability 0.5, on a float array 0-255."""
    steps = ["brightness", "contrast", "saturation", "hue"]
    rng.shuffle(steps)
    for step in steps:
        if rng.random() < 0.5:
            continue
        if step == "brightness":
            pixels = pixels + rng.uniform(-32, 32)
        elif step == "contrast":
            pixels = pixels * rng.uniform(0.5, 1.5)
        else:
            factor = rng.uniform(0.5, 1.5) if step == "saturation" else 1.0
            shift = rng.uniform(-0.1, 0.1) if step == "hue" else 0.0
            pixels = distort_hsv(pixels, factor, shift)
        pixels = pixels.clip(0, 255).round()
    return pixels


def distort_hsv(pixels, factor, shift):
    """Multiply the saturation by a factor and shift the hue by a fraction of the circle; RGB in, RGB out."""
    red, green, blue = np.moveaxis(pixels, -1, 0)
    value, smallest = pixels.max(-1), pixels.min(-1)
    chroma = value - smallest
    divisor = np.where(chroma == 0, 1, chroma)
    hue = np.select(
        [value == red, value == green],
        [(green - blue) / divisor, (blue - red) / divisor + 2],
        (red - green) / divisor + 4,
    ) / 6  # fmt: skip
    saturation = chroma / np.where(value == 0, 1, value)

    hue, saturation = (hue + shift) % 1, np.minimum(1, saturation * factor)
    sector, part = np.floor(hue * 6).astype(int) % 6, hue * 6 % 1
    low, falling, rising = (value * (1 - saturation * fraction) for fraction in (1, part, 1 - part))
    order = [(value, rising, low), (falling, value, low), (low, value, rising),
             (low, falling, value), (rising, low, value), (value, low, falling)]  # fmt: skip
    return np.stack([np.choose(sector, [colors[band] for colors in order]) for band in range(3)], axis=-1)
