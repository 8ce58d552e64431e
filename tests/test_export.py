"""The network as an ONNX file, and detections in the layout of older systems."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import published
import pytest
import torch
from PIL import Image

from model import DETECTION_LIMITS, SSD300, create_prior_boxes
from support.export import class_wise, export_onnx
from support.files import InputError
from support.labels import make_label_map
from utils import cxcy_to_xy, gcxgcy_to_cxcy, transform

ROOT = Path(__file__).resolve().parent.parent
TUTORIAL = np.load(ROOT / "tests" / "data" / "tutorial_reference.npz")
CLASSES = make_label_map(f"class {number}" for number in range(1, 21))


def example_of(call):
    """Return the example of docs/weights.md that contains a call; it has at most ten lines."""
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "weights.md").read_text(), re.S)
    (example,) = (example for example in examples if call in example)
    assert example.count("\n") <= 10
    return example


@pytest.fixture
def photo(tmp_path, monkeypatch):
    """A small picture, photo.png in the current folder, prepared for the network (3, 300, 300)."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)).save("photo.png")
    return transform(Image.open("photo.png"), torch.zeros(0, 4), torch.zeros(0), torch.zeros(0), "TEST")[0]


def test_the_exported_network_gives_the_same_boxes_and_scores(model, tmp_path, photo, capsys):
    """Run the exported network with the example of docs/weights.md."""
    export_onnx(model, dict(reversed(CLASSES.items())), "model.onnx")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["model.onnx", "photo.png"]
    variables = {}
    exec(example_of('InferenceSession("model.onnx")').replace("photo.jpg", "photo.png"), variables)
    assert capsys.readouterr().out.startswith("class ")
    for images in (photo[None], torch.stack([photo, -photo, photo * 0.5])):
        boxes, scores = variables["session"].run(None, {"images": images.numpy()})
        with torch.inference_mode():
            locs, logits = model(images)
        expected = cxcy_to_xy(gcxgcy_to_cxcy(locs, model.priors_cxcy))
        assert np.abs(boxes - expected.numpy()).max() < 1e-4
        assert np.abs(scores - logits.softmax(dim=2).numpy()).max() < 1e-4
    assert variables["names"] == list(CLASSES)
    assert set(variables["session"].get_modelmeta().custom_metadata_map) == {"label_map"}


def test_the_exported_network_with_suppression_gives_the_same_detections(model, tmp_path, photo, capsys):
    """Run the exported network with the example of docs/weights.md."""
    limits = 0.9, 0.45, 200
    export_onnx(model, CLASSES, "detector.onnx", limits)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["detector.onnx", "photo.png"]
    variables = {"names": list(CLASSES), "image": photo, "onnxruntime": onnxruntime}
    exec(example_of('InferenceSession("detector.onnx")'), variables)
    printed = capsys.readouterr().out
    for images in (photo[None], torch.stack([photo, -photo, photo * 0.5])):
        outputs = variables["session"].run(None, {"images": images.numpy()})
        with torch.inference_mode():
            expected = model.detect_objects(*model(images), *limits)
        assert_same_detections(outputs, expected, tolerance=1e-4)
    assert len(re.findall("^class ", printed, re.M)) == variables["counts"][0] == outputs[3][0] > 20
    assert json.loads(variables["session"].get_modelmeta().custom_metadata_map["label_map"]) == CLASSES


class PixelNetwork(torch.nn.Module):
    """Stand-in for a network: the first values of an image are the locs and scores of its priors."""

    decode, detect_objects = SSD300.decode, SSD300.detect_objects

    def __init__(self, n_classes, n_priors, size):
        super().__init__()
        self.size, self.n_classes = size, n_classes
        priors = create_prior_boxes("caffe", size)
        chosen = torch.linspace(0, len(priors) - 1, n_priors).long()  # of all feature maps
        self.priors_cxcy = torch.nn.Parameter(priors[chosen])

    def forward(self, images):
        shape = len(self.priors_cxcy), 4 + self.n_classes
        predictions = images.flatten(1)[:, : shape[0] * shape[1]].unflatten(1, shape)
        return predictions.split((4, self.n_classes), dim=2)

    def to_images(self, locs, scores):
        """Return images (N, 3, size, size) for which the network predicts these locs and scores."""
        predictions = torch.cat([locs, scores], dim=2).flatten(1)
        images = torch.zeros(len(locs), 3, self.size, self.size)
        images.flatten(1)[:, : predictions.size(1)] = predictions
        return images


def make_predictions(network):
    """Return locs and scores of six images: many objects, with ties, few, none, not finite, far outside the image."""
    n_priors, generator = len(network.priors_cxcy), torch.Generator().manual_seed(1)
    locs = torch.randn(6, n_priors, 4, generator=generator)
    scores = torch.randn(6, n_priors, network.n_classes, generator=generator) * 3
    scores[1] = scores[1].round()
    locs[1] = locs[1, torch.arange(n_priors) // 3 * 3]  # neighbours overlap more
    scores[2, 5:, 0], scores[3, :, 0] = 20, 20
    locs[4, 0, 2], locs[4, 1, 0], scores[4, 2, 0] = 1e4, torch.nan, torch.nan
    locs[4, 4:6, 2:] = torch.tensor([[90.0], [100.0]])  # boxes of more than a million, which are clamped
    scores[4, :6, 1] = 15
    locs[5, ::2, :2] *= 100
    locs[5, 1::2, 2:] *= 20
    return locs, scores


def assert_same_detections(outputs, expected, tolerance=1e-6):
    """Compare a file's outputs with the lists of detect_objects; of scores within the tolerance any may come first."""
    assert [len(labels) for labels in expected[1]] == outputs[3].tolist()
    for image, (boxes, labels, scores) in enumerate(zip(*expected, strict=True)):
        n = len(labels)
        assert all((part[image, n:] == 0).all() for part in outputs[:3])
        found_boxes, found_labels, found_scores = (torch.from_numpy(part[image, :n]) for part in outputs[:3])
        assert torch.allclose(found_scores, scores, rtol=0, atol=tolerance)
        is_same = found_labels[:, None] == labels
        is_same &= torch.isclose(found_scores[:, None], scores, rtol=0, atol=tolerance)
        is_same &= torch.isclose(found_boxes[:, None], boxes, rtol=tolerance, atol=tolerance).all(dim=2)
        assert is_same.any(dim=0).all()
        assert is_same.any(dim=1).all()


@pytest.mark.parametrize(
    ("n_classes", "n_priors", "size", "limits"),
    [
        (21, 8732, 300, (0.2, 0.45, 200)),
        (91, 8000, 512, (0.1, 0.5, 100)),
        (2, 3000, 300, (0, 0, 2000)),
        (3, 1500, 300, (0.01, 1, 1000)),
        (4, 30, 300, (0.05, 0.45, 1000)),  # fewer scores than top_k
    ],
)
def test_detections_in_onnxruntime_are_those_of_detect_objects(n_classes, n_priors, size, limits, tmp_path):
    network = PixelNetwork(n_classes, n_priors, size)
    path = tmp_path / "model.onnx"
    export_onnx(network, CLASSES, path, limits)
    session = onnxruntime.InferenceSession(path)
    assert [output.name for output in session.get_outputs()] == ["boxes", "labels", "scores", "counts"]
    metadata = json.loads(session.get_modelmeta().custom_metadata_map["limits"])
    assert metadata == dict(zip(("min_score", "max_overlap", "top_k"), limits, strict=True))
    locs, scores = make_predictions(network)
    for images in (slice(0, 6), slice(0, 1), slice(1, 4), slice(3, 4)):
        predictions = locs[images], scores[images]
        outputs = session.run(None, {"images": network.to_images(*predictions).numpy()})
        k = min(limits[2], n_priors * (n_classes - 1))
        n_images = len(predictions[0])
        assert [part.shape for part in outputs] == [(n_images, k, 4), (n_images, k), (n_images, k), (n_images,)]
        expected = network.detect_objects(*predictions, *limits)
        assert_same_detections(outputs, expected)
    counts = [len(labels) for labels in network.detect_objects(locs, scores, *limits)[1]]
    assert (counts[3] == 0) == (limits[0] > 0)
    assert len(set(counts)) > 2


def test_thresholds_are_exceeded_strictly_and_ties_go_to_the_first_prior(tmp_path):
    """A score equal to min_score is not detected, and an overlap equal to max_overlap does not suppress."""
    network = PixelNetwork(4, 8, 300)
    boxes = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.25, 0.375, 0.5, 0.25]] * 4)  # cxcy; overlap by exactly a half
    with torch.no_grad():
        network.priors_cxcy.copy_(boxes + torch.tensor([1, 1, 0, 0]) * (torch.arange(8) // 2)[:, None])
    scores = torch.zeros(1, 8, 4)  # all probabilities are a quarter
    scores[0, :4, 2] = torch.tensor([1.0, 1.0, 1.0, 2.0])
    images = network.to_images(torch.zeros(1, 8, 4), scores)
    for max_overlap, order in ((0.5, [3, 0, 1, 2]), (0.499, [3, 0])):
        limits = 0.25, max_overlap, 10
        export_onnx(network, CLASSES, tmp_path / "model.onnx", limits)
        outputs = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"images": images.numpy()})
        assert outputs[1][0].tolist() == [2] * len(order) + [0] * (10 - len(order))
        assert np.array_equal(outputs[0][0, : len(order)], cxcy_to_xy(network.priors_cxcy[order]).detach().numpy())
        assert_same_detections(outputs, network.detect_objects(*network(images), *limits))


def test_a_network_on_another_device_can_be_exported_with_suppression(tmp_path, monkeypatch):
    """The stand-ins for ONNX's operators are on the CPU."""
    devices = []

    def record(network, inputs, dynamic_shapes, **_):
        program = torch.export.export(network, inputs, dynamic_shapes=dynamic_shapes)
        devices.extend(output.meta["val"].device.type for output in program.graph.output_node().args[0])
        raise InputError("that is enough")

    monkeypatch.setattr(torch.onnx, "export", record)
    with pytest.raises(InputError, match="that is enough"):
        export_onnx(PixelNetwork(3, 50, 300).to("meta"), CLASSES, tmp_path / "model.onnx", DETECTION_LIMITS)
    assert devices == ["meta"] * 4


def test_the_exported_network_takes_images_of_its_size(tmp_path, monkeypatch):
    exported = []

    def record(network, inputs, **_):
        exported.extend(inputs)
        raise InputError("that is enough")

    monkeypatch.setattr(torch.onnx, "export", record)
    network = torch.nn.Conv2d(3, 1, 1)
    network.size = 512
    with pytest.raises(InputError, match="that is enough"):
        export_onnx(network, make_label_map(["cat"]), tmp_path / "model.onnx")
    assert [images.shape for images in exported] == [(2, 3, 512, 512)]


def test_a_missing_package_for_the_export_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match="pip install onnx onnxscript"):
        export_onnx(model, CLASSES, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("k", [3, 200])
def test_recorded_detections_are_arranged_by_class(k):
    """In each class are its recorded detections with the best scores, as a loop collects them."""
    recorded = [[TUTORIAL[f"det1_{image}_{part}"] for image in (0, 1)] for part in ("boxes", "labels", "scores")]
    n_classes = int(TUTORIAL["det_scenarios"][1, 1])
    arranged = class_wise(*([torch.from_numpy(part) for part in parts] for parts in recorded), n_classes, k)
    assert arranged.shape == (2, n_classes, k, 5)
    for image, (boxes, labels, scores) in enumerate(zip(*recorded, strict=True)):
        for label in range(n_classes):
            rows = [[score, *box] for box, one, score in zip(boxes, labels, scores, strict=True) if one == label][:k]
            assert label > 0 or not rows
            assert arranged[image, label].tolist() == [*np.array(rows).tolist(), *[[0.0] * 5] * (k - len(rows))]


def test_nothing_detected_is_arranged_as_zeros():
    locs, scores = published.detection_inputs(*(int(value) for value in TUTORIAL["det_scenarios"][2, [0, 1, 2, 6]]))
    network = PixelNetwork(scores.size(2), 8732, 300)
    detections = network.detect_objects(locs, scores, 0.99, 0.45, 200)
    assert [len(labels) for labels in detections[1]] == [0] * len(locs)
    assert torch.equal(class_wise(*detections, scores.size(2), 7), torch.zeros(len(locs), scores.size(2), 7, 5))
    assert class_wise([], [], [], 21, 200).shape == (0, 21, 200, 5)
