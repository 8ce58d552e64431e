"""The comparison with torchvision's ssd300_vgg16."""

import argparse
import json
import os

import proof
import pytest
import torch
from torchvision.models.detection import ssd300_vgg16

from datasets import PascalVOCDataset
from utils import IMAGENET_MEAN, IMAGENET_STD
from voc import make_label_map


def test_torchvisions_network_gets_the_pixels_that_it_is_made_for():
    pixels = torch.rand(3, 300, 300, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    expected = ssd300_vgg16(weights=None, weights_backbone=None).transform([pixels])[0].tensors
    model = proof.make_torchvision(make_label_map(["bolt", "nut"]))
    assert torch.allclose(model.transform([(pixels - mean) / std])[0].tensors, expected, atol=1e-4)
    assert model.head.classification_head.num_columns == 3


def test_both_losses_are_the_same_function_and_both_trainings_stay_together(sample, tmp_path, run):
    """Within 1e-5 on the same predictions and matches, and over updates of networks of their own within 1e-3."""
    run("tests/proof.py", sample / "VOCsample", "--output-folder", tmp_path, "--compare-losses", 2, "--batch-size", 2,
        "--workers", 0)  # fmt: skip
    rows = json.loads((tmp_path / "losses.json").read_text())
    assert len(rows) == 2
    for row in rows:
        assert row["same_matches"] == pytest.approx(row["torchvision"], rel=1e-5)
    assert sum(row["matched_otherwise"] for row in rows) == 0  # no object lies within several priors of one size
    for row in rows:
        assert row["ours"] == pytest.approx(row["torchvision"], rel=1e-3)
    assert rows[0]["ours"] != rows[1]["ours"]


def test_images_without_objects_and_ties_are_noted_as_torchvision_matches_them():
    targets = [{"boxes": torch.tensor([[30.0, 60, 90, 150]]), "labels": torch.tensor([2])},
               {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}]  # fmt: skip
    matches = [torch.tensor([-1, 0, -2]), torch.tensor([-1, -1, -1])]
    boxes, labels = proof.noted_matches({"targets": targets, "matches": matches})
    assert labels.tolist() == [[0, 2, 0], [0, 0, 0]]
    assert torch.allclose(boxes[0, 1], torch.tensor([0.1, 0.2, 0.3, 0.5]))
    assert (boxes[..., 2:] > boxes[..., :2]).all()


def test_torchvisions_detections_are_scored_in_our_coordinates(sample):
    """A network that finds every object exactly, in pixels of 300, has mAP 1 by all rules."""
    dataset = PascalVOCDataset(sample, "TEST", keep_difficult=True)
    waiting = [dataset[index][1:] for index in range(len(dataset))]

    class Oracle(torch.nn.Module):
        label_map = dataset.label_map

        def forward(self, images):
            return [
                {"boxes": 300 * boxes, "labels": labels, "scores": torch.ones(len(labels))}
                for boxes, labels, _ in (waiting.pop(0) for _ in images)
            ]

    results = proof.evaluate(
        Oracle(), proof.detect_by_torchvision, argparse.Namespace(data_folder=sample, workers=0), None
    )
    assert results.pop("test_images") == 3
    assert set(results) == {"mAP_11_point", "mAP_area", "coco_AP", "coco_AP50", "coco_AP75"}
    for value in results.values():
        assert value == pytest.approx(1, abs=1e-6)


def test_a_proof_trains_and_scores_both_and_goes_on_where_it_was(sample, tmp_path, run):
    command = ("tests/proof.py", sample / "VOCsample", "--output-folder", tmp_path, "--seeds", 3, "--iterations", 1,
               "--batch-size", 1, "--test-images", 2, "--workers", 0)  # fmt: skip
    output = run(*command)
    assert "ours against torchvision: mAP" in output
    files = [tmp_path / f"{system}-3.json" for system in ("ours", "torchvision")]
    results = [json.loads(path.read_text()) for path in files]
    for result, system in zip(results, ("ours", "torchvision"), strict=True):
        assert (result["system"], result["seed"], result["settings"]["seed"]) == (system, 3, 3)
        assert result["precision"] == ("bf16" if torch.cuda.is_available() and system == "ours" else "fp32")
        assert result["images_per_second"] == pytest.approx(1 / result["training_seconds"])
        assert result["test_images"] == 2
    assert json.loads((tmp_path / "proof.json").read_text())["runs"] == results

    written = [os.stat(path).st_mtime_ns for path in files]
    assert "ours against torchvision: mAP" in run(*command, "--systems", "ours")
    assert [os.stat(path).st_mtime_ns for path in files] == written
    message = run(*command, "--lr", 0.1, "--zero-based", status=2)
    assert message == f"error: {files[0]}: differs in lr, zero_based; give another --output-folder"


def test_figures_are_summed_up_as_mean_and_range_over_seeds():
    runs = [{"system": "ours", **dict.fromkeys(proof.FIGURES, value), "peak_memory": None} for value in (0.5, 0.75)]
    runs.append({"system": "torchvision", **dict.fromkeys(proof.FIGURES, 3.0)})
    summary = proof.summarize(runs)
    assert summary["ours"]["mAP_area"] == {"mean": 0.625, "low": 0.5, "high": 0.75, "seeds": 2}
    assert "peak_memory" not in summary["ours"]
    assert summary["torchvision"]["peak_memory"] == {"mean": 3.0, "low": 3.0, "high": 3.0, "seeds": 1}
