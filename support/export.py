"""Export of a network as ONNX, with the decoding of its boxes and the softmax inside.

export_onnx(model, model.label_map, "model.onnx")
"""

import json
import sys
from contextlib import redirect_stdout

import torch
from torch import nn

from support.files import atomic_writer, import_optional


def export_onnx(model, label_map, path):
    """Write a network as an ONNX file, whole or not at all.

    Its input is `images` (N, 3, size, size), ImageNet-normalised, of any N. Its outputs are `boxes` (N, P, 4),
    fractional xy, and `scores` (N, P, n_classes), probabilities with background first. The label map is in the file's
    metadata as JSON, in the order of the classes.

    :param model: network that takes images of `size` pixels, and whose `decode(locs)` turns offsets into boxes
    :param label_map: class name -> index
    :param path: file to write or replace
    :raises InputError: if onnx or onnxscript is not installed
    """
    onnx, _ = import_optional("--export", "onnx", "onnxscript", packages="onnx onnxscript")
    images = torch.zeros(2, 3, model.size, model.size, device=next(model.parameters()).device)
    with redirect_stdout(sys.stderr):  # the exporter prints its progress
        program = torch.onnx.export(
            _ExportedNetwork(model).eval(), (images,), input_names=["images"], output_names=["boxes", "scores"],
            dynamic_shapes={"images": {0: torch.export.Dim.DYNAMIC}}, dynamo=True, verbose=False,
        )  # fmt: skip
    exported = program.model_proto
    in_order = dict(sorted(label_map.items(), key=lambda item: item[1]))
    onnx.helper.set_model_props(exported, {"label_map": json.dumps(in_order)})
    with atomic_writer(path) as file:
        file.write(exported.SerializeToString())


class _ExportedNetwork(nn.Module):
    """A network that decodes its boxes and turns its scores into probabilities."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        locs, scores = self.model(images)
        return self.model.decode(locs), scores.softmax(dim=2)
