"""A network as an ONNX file, with or without non-maximum suppression; detections in the layout of older systems.

export_onnx(model, model.label_map, "model.onnx", limits=(0.2, 0.5, 200))
detections = class_wise(boxes, labels, scores, n_classes=21, k=200)
"""

import json
import sys
from contextlib import redirect_stdout

import torch
from torch import nn

from support.files import atomic_writer, import_optional


def export_onnx(model, label_map, path, limits=None):
    """Write a network as an ONNX file, whole or not at all.

    Its input is `images` (N, 3, size, size), ImageNet-normalised, of any N. Without limits its outputs are `boxes`
    (N, P, 4), fractional xy, and `scores` (N, P, n_classes), probabilities with background first. With limits they are
    the detections of each image, best first and padded with zeros: `boxes` (N, k, 4), fractional xy, `labels` (N, k),
    `scores` (N, k), and their number, `counts` (N,); k is top_k, or the number of all scores if that is smaller. The
    file's metadata has the label map, in the order of the classes, and the limits, both as JSON.

    :param model: network that takes images of `size` pixels, and whose `decode(locs)` turns offsets into boxes
    :param label_map: class name -> index
    :param path: file to write or replace
    :param limits: min_score, max_overlap and top_k as for `SSD300.detect_objects`; None leaves suppression out
    :raises InputError: if onnx or onnxscript is not installed
    """
    onnx, _ = import_optional("--export", "onnx", "onnxscript", packages="onnx onnxscript")
    images = torch.zeros(2, 3, model.size, model.size, device=next(model.parameters()).device)
    with redirect_stdout(sys.stderr):  # the exporter prints its progress
        program = torch.onnx.export(
            _ExportedNetwork(model, limits).eval(), (images,), input_names=["images"],
            output_names=["boxes", "labels", "scores", "counts"] if limits else ["boxes", "scores"],
            dynamic_shapes={"images": {0: torch.export.Dim.DYNAMIC}}, dynamo=True, verbose=False,
        )  # fmt: skip
    exported = program.model_proto
    metadata = {"label_map": dict(sorted(label_map.items(), key=lambda item: item[1]))}
    if limits:
        metadata["limits"] = dict(zip(("min_score", "max_overlap", "top_k"), limits, strict=True))
    onnx.helper.set_model_props(exported, {name: json.dumps(value) for name, value in metadata.items()})
    with atomic_writer(path) as file:
        file.write(exported.SerializeToString())


class _ExportedNetwork(nn.Module):
    """A network that decodes its boxes, turns its scores into probabilities and, given limits, detects objects."""

    def __init__(self, model, limits):
        super().__init__()
        self.model = model
        self.limits = limits

    def forward(self, images):
        locs, scores = self.model(images)
        boxes, scores = self.model.decode(locs), scores.softmax(dim=2)
        return _detect_objects(boxes, scores, *self.limits) if self.limits else (boxes, scores)


def _detect_objects(boxes, scores, min_score, max_overlap, top_k):
    """Return the outputs of a file with suppression; it can be exported, but not run.

    ONNX's NonMaxSuppression keeps scores above min_score and overlaps up to max_overlap, as `SSD300.detect_objects`
    does, but computes overlaps in float32.

    :param boxes: (N, P, 4), fractional xy
    :param scores: (N, P, n_classes), probabilities
    """
    is_valid = boxes.isfinite().all(dim=2, keepdim=True)  # a network that diverged detects nothing
    scores = torch.where(is_valid, scores[:, :, 1:], 0)

    # Suppress in each class of each image; the result is a list of indices (image, class, prior). The exporter must
    # know that its length depends on the values. Any number computed from them will do; the file does not contain it.
    by_class = scores.transpose(1, 2)  # (N, n_classes - 1, P)
    length = (scores > min_score).sum().item()
    thresholds = torch.tensor([[max_overlap], [min_score]], dtype=torch.float32)
    candidates = boxes.clamp(-1e6, 1e6), by_class, torch.tensor([top_k]), *thresholds
    selected = _onnx_operator("NonMaxSuppression", candidates, (length, 3), torch.int64)

    # Take the best of all classes. Scores that were not selected are 0; ties go to the first prior.
    selected_scores = _onnx_operator("GatherND", (by_class, selected), (length,), torch.float32)
    zeros = torch.zeros_like(by_class)
    kept = _onnx_operator("ScatterND", (zeros, selected, selected_scores), by_class.shape, torch.float32)
    kept = kept.to(scores.device).transpose(1, 2).flatten(1)  # (N, P * (n_classes - 1))
    best, indices = kept.topk(min(top_k, kept.size(1)))
    is_detection = best > 0
    priors, classes = indices // scores.size(2), indices % scores.size(2)
    boxes = boxes.gather(1, priors[..., None].expand(-1, -1, 4))
    boxes = torch.where(is_detection[..., None], boxes, 0)
    return boxes, torch.where(is_detection, classes + 1, 0), best, is_detection.sum(dim=1)


def _onnx_operator(name, inputs, shape, dtype):
    """Return the output of an ONNX operator that PyTorch lacks: zeros on the CPU, which stand for it in an export."""
    return torch.onnx.ops.symbolic(f"::{name}", inputs, shape=shape, dtype=dtype)


def class_wise(boxes, labels, scores, n_classes, k):
    """Return detections in the layout of ssd.pytorch and its relatives, (N, n_classes, k, 5), on the CPU.

    In each row are the score and the box; the rows of a class are best first and padded with zeros. Class 0, which is
    background, has only zeros.

    :param boxes, labels, scores: lists of length N, as `SSD300.detect_objects` returns them
    :param k: most detections per class; the best are kept
    """
    arranged = torch.zeros(len(boxes), n_classes, k, 5)
    for image, image_labels in enumerate(labels):
        rows = torch.cat([scores[image][:, None], boxes[image]], dim=1)
        for label in image_labels.unique().tolist():
            of_class = rows[image_labels == label][:k]
            arranged[image, label, : len(of_class)] = of_class
    return arranged
