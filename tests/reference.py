"""The slow and obvious version of each fast function: the tests' oracle and the benchmark's baseline."""

import colorsys
import math

import numpy as np
import torch


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
    """IoU of all pairs, (n1, n2), a row at a time."""
    table = torch.zeros(len(boxes_1), len(boxes_2))
    for row, (x_min, y_min, x_max, y_max) in enumerate(boxes_1.tolist()):
        for column, box in enumerate(boxes_2.tolist()):
            table[row, column] = jaccard_overlap((x_min, y_min, x_max, y_max), box)
    return table


def match(priors_xy, boxes, labels, threshold=0.5):
    """Object index (-1: none) and label (0: background) of each prior, for one image."""
    object_of, label_of = [-1] * len(priors_xy), [0] * len(priors_xy)
    if len(boxes) == 0:
        return object_of, label_of
    overlap = overlap_table(boxes, priors_xy)
    for prior in range(len(priors_xy)):
        best = int(overlap[:, prior].argmax())
        if overlap[best, prior] >= threshold:
            object_of[prior], label_of[prior] = best, int(labels[best])
    for number in range(len(boxes)):  # a later object takes a contested prior from an earlier one
        prior = int(overlap[number].argmax())
        object_of[prior], label_of[prior] = number, int(labels[number])
    return object_of, label_of


def multibox_loss(priors_cxcy, predicted_locs, predicted_scores, boxes, labels, threshold=0.5, neg_pos_ratio=3):
    """Confidence and localisation loss of a batch, image by image and prior by prior."""
    half = priors_cxcy[:, 2:] / 2
    priors_xy = torch.cat([priors_cxcy[:, :2] - half, priors_cxcy[:, :2] + half], dim=1)
    confidence, localization, n_positives = 0.0, 0.0, 0
    log_probabilities = predicted_scores.double().log_softmax(dim=2)
    for image in range(len(boxes)):
        object_of, label_of = match(priors_xy, boxes[image], labels[image], threshold)
        negatives, n_here = [], 0
        for prior, (number, label) in enumerate(zip(object_of, label_of, strict=True)):
            loss = -float(log_probabilities[image, prior, label])
            if label == 0:
                negatives.append(loss)
                continue
            n_here += 1
            confidence += loss
            x_min, y_min, x_max, y_max = boxes[image][number].double().tolist()
            c_x, c_y, w, h = priors_cxcy[prior].double().tolist()
            target = (
                ((x_min + x_max) / 2 - c_x) / (w / 10),
                ((y_min + y_max) / 2 - c_y) / (h / 10),
                math.log((x_max - x_min) / w) * 5,
                math.log((y_max - y_min) / h) * 5,
            )
            for offset, wanted in zip(predicted_locs[image, prior].double().tolist(), target, strict=True):
                difference = abs(offset - wanted)
                localization += difference**2 / 2 if difference < 1 else difference - 0.5
        confidence += sum(sorted(negatives, reverse=True)[: neg_pos_ratio * n_here])
        n_positives += n_here
    return confidence / max(n_positives, 1), localization / max(n_positives, 1)


def detect_objects(priors_cxcy, locs, scores, min_score, max_overlap, top_k):
    """Boxes, labels and scores, best first, of one image: locs (p, 4), scores (p, n_classes)."""
    probabilities = scores.softmax(dim=1)
    centers = locs[:, :2] * priors_cxcy[:, 2:] / 10 + priors_cxcy[:, :2]
    half = torch.exp(locs[:, 2:] / 5) * priors_cxcy[:, 2:] / 2
    boxes = torch.cat([centers - half, centers + half], dim=1)
    found = []
    for label in range(1, scores.size(1)):
        candidates = [p for p in range(len(boxes)) if probabilities[p, label] > min_score]
        candidates.sort(key=lambda p: -float(probabilities[p, label]))
        survivors = []
        for prior in candidates:
            box = boxes[prior].double().tolist()
            if all(jaccard_overlap(box, other) <= max_overlap for other in survivors):
                survivors.append(box)
                found.append((float(probabilities[prior, label]), prior, label))
    found.sort(key=lambda detection: (-detection[0], detection[1], detection[2]))
    found = found[:top_k]
    priors = [prior for _, prior, _ in found]
    return boxes[priors].reshape(-1, 4), [label for _, _, label in found], [score for score, _, _ in found]


def average_precisions(
    det_boxes, det_labels, det_scores, true_boxes, true_labels, true_difficulties, n_classes, eleven_points=True
):
    """AP of each class but background by the development kit's rules, NaN where there is no object to be found."""
    results = []
    for label in range(1, n_classes):
        detections, objects, n_objects = [], {}, 0
        for image in range(len(true_boxes)):
            objects[image] = [
                {"box": box, "difficult": bool(difficult), "found": False}
                for box, own, difficult in zip(
                    true_boxes[image].tolist(),
                    true_labels[image].tolist(),
                    true_difficulties[image].tolist(),
                    strict=True,
                )
                if own == label
            ]
            n_objects += sum(not o["difficult"] for o in objects[image])
            for box, own, score in zip(
                det_boxes[image].tolist(), det_labels[image].tolist(), det_scores[image].tolist(), strict=True
            ):
                if own == label:
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
            if best_overlap >= 0.5 and not best["found"]:
                best["found"] = True
                right += 1
            else:
                wrong += 1
            precision.append(right / (right + wrong))
            recall.append(right / n_objects)
        if eleven_points:
            best_beyond = [
                max((p for p, r in zip(precision, recall, strict=True) if r >= t), default=0.0)
                for t in np.arange(0.0, 1.1, 0.1)
            ]
            results.append(sum(best_beyond) / 11)
        else:
            area, previous = 0.0, 0.0
            for place, reached in enumerate(recall):
                area += (reached - previous) * max(precision[place:])
                previous = reached
            results.append(area)
    return results


def augment(pixels, boxes, rng, colors=True):
    """The paper's augmentation one step after the other: distort, zoom out, crop, flip; resizing is left to do.

    pixels: RGB array 0-255; boxes: list of pixel xy. Returns the new pixels, the boxes that stayed, fractional, and
    their indices.
    """
    if colors:
        pixels = distort(pixels.astype(float), rng).astype(np.uint8)
    boxes, indices = [list(box) for box in boxes], list(range(len(boxes)))
    if rng.random() < 0.5:  # zoom out
        height, width, _ = pixels.shape
        scale = rng.uniform(1, 4)
        canvas = np.empty((int(scale * height), int(scale * width), 3), np.uint8)
        canvas[:] = [round(255 * mean) for mean in (0.485, 0.456, 0.406)]
        left, top = rng.randint(0, canvas.shape[1] - width), rng.randint(0, canvas.shape[0] - height)
        canvas[top : top + height, left : left + width] = pixels
        pixels = canvas
        boxes = [[x0 + left, y0 + top, x1 + left, y1 + top] for x0, y0, x1, y1 in boxes]
    pixels, boxes, indices = crop(pixels, boxes, indices, rng)
    height, width, _ = pixels.shape
    if rng.random() < 0.5:  # flip
        pixels = pixels[:, ::-1]
        boxes = [[width - x1, y0, width - x0, y1] for x0, y0, x1, y1 in boxes]
    return pixels, [[x0 / width, y0 / height, x1 / width, y1 / height] for x0, y0, x1, y1 in boxes], indices


def crop(pixels, boxes, indices, rng):
    """The paper's random crop, trial by trial."""
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
    """Multiply saturation by a factor and turn hue by a share of the circle, colour by colour."""
    result = np.empty_like(pixels)
    for row in range(pixels.shape[0]):
        for column in range(pixels.shape[1]):
            h, s, v = colorsys.rgb_to_hsv(*(pixels[row, column] / 255))
            result[row, column] = colorsys.hsv_to_rgb((h + shift) % 1, min(1, s * factor), v)
    return result * 255
