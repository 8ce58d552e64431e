"""Agreement with numbers recorded from the published implementations (tests/data)."""

from pathlib import Path

import numpy as np
import published
import pytest
import torch

from model import SSD300, MultiBoxLoss
from utils import calculate_mAP

DATA = Path(__file__).parent / "data"
TUTORIAL = np.load(DATA / "tutorial_reference.npz")
MAP = np.load(DATA / "map_reference.npz")


@pytest.fixture(scope="module")
def seeded_model():
    model = SSD300(21, pretrained=False).eval()
    model.load_state_dict({name: published.seeded(name, tuple(p.shape)) for name, p in model.state_dict().items()})
    return model


@pytest.mark.parametrize(
    ("family", "recorded"),
    [("paper", "priors_tutorial"), ("caffe", "priors_caffe_voc"), ("coco", "priors_coco_torchvision")],
)
def test_priors_of_each_family_are_the_recorded_ones(family, recorded):
    priors = SSD300(2, pretrained=False, priors=family).priors_cxcy
    assert np.abs(priors.numpy() - TUTORIAL[recorded]).max() < 1e-6


def test_the_forward_pass_gives_the_tutorials_outputs(seeded_model):
    with torch.no_grad():
        locs, scores = seeded_model(published.images())
    index = TUTORIAL["fwd_idx"]
    assert np.abs(locs[:, index].numpy() - TUTORIAL["fwd_locs"]).max() < 1e-3
    assert np.abs(scores[:, index].numpy() - TUTORIAL["fwd_scores"]).max() < 1e-3


@pytest.mark.parametrize("scenario", range(4))
def test_losses_and_gradients_are_the_recorded_ones(seeded_model, scenario):
    locs, scores, boxes, labels = published.loss_inputs(*TUTORIAL["loss_scenarios"][scenario].tolist())
    confidence, localization, _ = MultiBoxLoss(seeded_model.priors_cxcy).parts(locs, scores, boxes, labels)
    (confidence + localization).backward()
    found = [confidence.item(), localization.item(), locs.grad.norm().item(), scores.grad.norm().item()]
    expected = [*TUTORIAL["loss_conf_loc_l1"][scenario, :2], *TUTORIAL["loss_gradnorm_loc_scores"][scenario]]
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("scenario", range(3))
def test_detections_are_the_recorded_ones(seeded_model, scenario):
    seed, n_classes, shift, min_score, max_overlap, top_k, n_images = TUTORIAL["det_scenarios"][scenario].tolist()
    predictions = published.detection_inputs(int(seed), int(n_classes), shift, int(n_images))
    detections = seeded_model.detect_objects(*predictions, min_score, max_overlap, int(top_k))
    for image in range(int(n_images)):
        boxes, labels, scores = (part[image].numpy() for part in detections)
        expected = [TUTORIAL[f"det{scenario}_{image}_{part}"] for part in ("boxes", "labels", "scores")]
        if scenario == 2:  # nothing found: the tutorial's placeholder of class 0, here nothing
            assert expected[1].tolist() == [0]
            assert len(labels) == 0
            continue
        assert labels.tolist() == expected[1].tolist()
        assert np.abs(boxes - expected[0]).max() < 1e-5
        assert np.abs(scores - expected[2]).max() < 1e-5


@pytest.mark.parametrize("scenario", range(2))
@pytest.mark.parametrize(("method", "recorded"), [("11-point", "tenths07"), ("area", "devkitarea")])
def test_average_precisions_are_the_development_kits(scenario, method, recorded):
    """By 11 points with thresholds of exactly k/10, as Caffe has them."""
    average_precisions, mean = recorded_map(scenario, method)
    expected = MAP[f"s{scenario}_{recorded}_ap"]
    assert average_precisions == pytest.approx(expected.tolist(), abs=1e-6, nan_ok=True)
    assert mean == pytest.approx(np.nanmean(expected), abs=1e-6)


def test_ports_of_the_11_point_rule_with_arange_differ_in_two_of_39_classes():
    """They have thresholds 0.30000000000000004, 0.6000000000000001 and 0.7000000000000001."""
    ours = np.concatenate([recorded_map(scenario, "11-point")[0] for scenario in range(2)])
    ports = np.concatenate([MAP[f"s{scenario}_devkit07_ap"] for scenario in range(2)])
    scored = ~np.isnan(ours)
    assert scored.sum() == (~np.isnan(ports)).sum() == 39
    assert (np.abs(ours - ports)[scored] > 1e-6).sum() == 2
    assert (ours[scored] >= ports[scored] - 1e-6).all()


def recorded_map(scenario, method):
    """Our average precisions, a list, and their mean for the recorded detections and objects."""

    def images(kind, part):
        counts = MAP[f"s{scenario}_{kind}_n"].tolist()
        return list(torch.tensor(MAP[f"s{scenario}_{kind}_{part}"]).split(counts))

    label_map = {"background": 0} | {f"class {i}": i for i in range(1, int(MAP[f"s{scenario}_C"]))}
    detections = [images("det", part) for part in ("boxes", "labels", "scores")]
    ground_truth = [images("gt", part) for part in ("boxes", "labels", "diff")]
    average_precisions, mean = calculate_mAP(*detections, *ground_truth, label_map=label_map, method=method)
    return list(average_precisions.values()), mean
