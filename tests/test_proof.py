"""The comparison with torchvision's ssd300_vgg16."""

import argparse
import json
import os
import signal
import sys

import proof
import pytest
import torch

import train
from datasets import PascalVOCDataset, TrainingSampler
from support.files import InputError
from support.runlog import read_log


def test_both_losses_agree_and_both_trainings_stay_close(sample, tmp_path, run):
    """Within 1e-5 on the same predictions and matches; within 1e-3 if each loss updates its own network."""
    run("tests/proof.py", sample / "VOCsample", "--output-folder", tmp_path, "--compare-losses", 3, "--batch-size", 1,
        "--lr", 0.01, "--warmup", 0, "--workers", 0)  # fmt: skip
    rows = json.loads((tmp_path / "losses.json").read_text())
    assert len(rows) == 3
    for row in rows:
        assert row["same_matches"] == pytest.approx(row["torchvision"], rel=1e-5)
    assert sum(row["matched_otherwise"] for row in rows) == 0  # no object is inside several priors of one size
    for row in rows:
        assert row["ours"] == pytest.approx(row["torchvision"], rel=1e-3)


def test_recorded_matches_include_unmatched_priors_and_images_without_objects():
    targets = [{"boxes": torch.tensor([[30.0, 60, 90, 150]]), "labels": torch.tensor([2])},
               {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}]  # fmt: skip
    matches = [torch.tensor([-1, 0, -2]), torch.tensor([-1, -1, -1])]
    boxes, labels = proof.recorded_matches({"targets": targets, "matches": matches})
    assert labels.tolist() == [[0, 2, 0], [0, 0, 0]]
    assert torch.allclose(boxes[0, 1], torch.tensor([0.1, 0.2, 0.3, 0.5]))
    assert (boxes[..., 2:] > boxes[..., :2]).all()


def test_torchvisions_detections_are_scored_in_our_coordinates(sample):
    """A network that detects every object exactly, in pixels of a 300 x 300 image, has mAP 1 by all rules."""
    dataset = PascalVOCDataset(sample, "TEST", keep_difficult=True)
    remaining = [dataset[index][1:] for index in range(len(dataset))]

    class Oracle(torch.nn.Module):
        label_map = dataset.label_map

        def forward(self, images):
            assert all(image.is_floating_point() and 0.2 < image.max() <= 1 for image in images)
            return [
                {"boxes": 300 * boxes, "labels": labels, "scores": torch.ones(len(labels))}
                for boxes, labels, _ in (remaining.pop(0) for _ in images)
            ]

    results = proof.evaluate(
        Oracle(), proof.detect_by_torchvision, argparse.Namespace(data_folder=sample, workers=0), None
    )
    assert results.pop("test_images") == 3
    assert set(results) == {"mAP_11_point", "mAP_area", "coco_AP", "coco_AP50", "coco_AP75"}
    for value in results.values():
        assert value == pytest.approx(1, abs=1e-6)


def test_a_proof_trains_and_scores_both_systems_and_skips_finished_trainings(sample, tmp_path, run):
    command = ("tests/proof.py", sample / "VOCsample", "--output-folder", tmp_path, "--seeds", 3, "--iterations", 1,
               "--batch-size", 2, "--test-images", 2, "--workers", 0)  # fmt: skip
    output = run(*command)
    assert "ours against torchvision: mAP" in output
    files = [tmp_path / f"{system}-3.json" for system in ("ours", "torchvision")]
    results = [json.loads(path.read_text()) for path in files]
    for result, system in zip(results, ("ours", "torchvision"), strict=True):
        assert (result["system"], result["seed"], result["settings"]["seed"]) == (system, 3, 3)
        assert result["precision"] == ("bf16" if torch.cuda.is_available() and system == "ours" else "fp32")
        assert result["images_per_second"] == pytest.approx(2 / result["training_seconds"])
        assert result["test_images"] == 2
    assert json.loads((tmp_path / "proof.json").read_text())["runs"] == results

    modified = [os.stat(path).st_mtime_ns for path in files]
    assert "ours against torchvision: mAP" in run(*command, "--systems", "ours")
    assert [os.stat(path).st_mtime_ns for path in files] == modified
    message = run(*command, "--lr", 0.1, "--zero-based", status=2)
    conditions = tmp_path / "conditions.json"
    assert message == f"error: {conditions}: differs in lr, data; give another --output-folder"
    expected = json.loads(conditions.read_text())
    assert list(proof.read_runs(tmp_path)) == [str(path) for path in files]
    for name in ("hardware", "torch", "torchvision", "test_images", "iterations"):
        with pytest.raises(InputError, match=f"differs in {name};"):
            proof.check_conditions(tmp_path, expected | {name: "other"})


@pytest.mark.parametrize(
    "arguments", [["--seed", "7"], ["--priors=coco"], ["--compile"], ["--resume", "x"], ["--compare-losses", "0"]]
)
def test_settings_that_a_proof_fixes_are_rejected(arguments, capsys):
    with pytest.raises(SystemExit):
        proof.parse_arguments(["root", "--output-folder", "x", *arguments])
    assert arguments[0].partition("=")[0] in capsys.readouterr().err.splitlines()[-1]


def test_an_update_of_torchvisions_network_equals_an_update_of_train_py():
    """Computed by hand: gradients 3 and 4 have norm 5 and are halved; only weights decay, biases get twice the rate."""

    class Stub(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            torch.nn.init.ones_(self.layer.weight)
            torch.nn.init.ones_(self.layer.bias)

        def forward(self, images, targets):
            assert images[0].unique().tolist() == pytest.approx([0.2])
            assert targets[0]["boxes"].tolist() == [[0, 150, 300, 300]]
            assert targets[0]["labels"].tolist() == [2]
            return {"classification": 3 * self.layer.weight.sum(), "bbox_regression": 4 * self.layer.bias.sum()}

    model = Stub()
    settings = argparse.Namespace(lr=0.0, momentum=0.5, weight_decay=0.1, grad_clip=2.5, precision="fp32")
    optimizer = train.make_optimizer(model, settings)
    batch = torch.full((1, 3, 2, 2), 51, dtype=torch.uint8), [torch.tensor([[0, 0.5, 1, 1]])], [torch.tensor([2])], None
    losses = [proof.step_torchvision(model, optimizer, batch, 0.1, settings).item() for _ in range(2)]
    weight = 1 - 0.1 * (1.5 + 0.1)
    assert losses == pytest.approx([7, 3 * weight + 4 * (1 - 0.2 * 2)])
    assert model.layer.weight.item() == pytest.approx(weight - 0.1 * (0.5 * 1.6 + 1.5 + 0.1 * weight))
    assert model.layer.bias.item() == pytest.approx(1 - 0.2 * 2 - 0.2 * (0.5 * 2 + 2), abs=1e-6)


def test_torchvisions_network_trains_with_the_batches_and_schedule_of_train_py(sample, tmp_path, monkeypatch):
    steps = []

    def record_step(model, optimizer, batch, rate, settings):
        steps.append((batch[0], rate))
        return torch.zeros(())

    monkeypatch.setattr(proof, "make_torchvision", lambda label_map: torch.nn.Linear(1, 1))
    monkeypatch.setattr(proof, "step_torchvision", record_step)
    settings = train.parse_settings(
        ["--data-folder", str(sample), "--output-folder", str(tmp_path), "--iterations", "4", "--batch-size", "2",
         "--warmup", "2", "--decay-at", "3", "--seed", "5", "--workers", "0", "--no-pretrained"]
    )  # fmt: skip
    proof.train_torchvision(settings)
    dataset = PascalVOCDataset(sample, "TRAIN", keep_difficult=True, seed=5)
    keys = list(TrainingSampler(len(dataset), 2, 5, 4))
    assert [rate for _, rate in steps] == pytest.approx([5e-4, 1e-3, 1e-3, 1e-4])
    for (images, _), batch in zip(steps, keys, strict=True):
        assert torch.equal(images, torch.stack([dataset[key][0] for key in batch]))


def test_systems_are_compared_by_mean_map_spread_and_time(capsys):
    runs = [
        {"system": system, **dict.fromkeys(proof.FIGURES, value), "training_seconds": seconds}
        for system, value, seconds in (("ours", 0.5, 10), ("ours", 0.7, 20), ("torchvision", 0.5, 45))
    ]
    proof.print_summary(proof.summarize(runs))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "ours against torchvision: mAP +0.1000 (range over seeds: 0.2000), 3.00 times as fast"
    assert "0.6000 (0.5000 to 0.7000)" in lines[1]


def test_each_of_our_systems_is_compared_with_each_of_torchvisions(capsys):
    systems = {"ours": 0.5, "ours-tf32": 0.4, "torchvision": 0.3, "torchvision-bf16": 0.2}
    proof.print_summary(
        proof.summarize([{"system": name, **dict.fromkeys(proof.FIGURES, value)} for name, value in systems.items()])
    )
    pairs = [line.partition(" (")[0] for line in capsys.readouterr().out.splitlines()[-4:]]
    assert pairs == [
        "ours against torchvision: mAP +0.2000", "ours against torchvision-bf16: mAP +0.3000",
        "ours-tf32 against torchvision: mAP +0.1000", "ours-tf32 against torchvision-bf16: mAP +0.2000",
    ]  # fmt: skip


def test_figures_are_summarised_as_mean_and_range_over_seeds():
    runs = [{"system": "ours", **dict.fromkeys(proof.FIGURES, value), "peak_memory": None} for value in (0.5, 0.75)]
    runs.append({"system": "torchvision", **dict.fromkeys(proof.FIGURES, 3.0)})
    summary = proof.summarize(runs)
    assert summary["ours"]["mAP_area"] == {"mean": 0.625, "low": 0.5, "high": 0.75, "seeds": 2}
    assert "peak_memory" not in summary["ours"]
    assert summary["torchvision"]["peak_memory"] == {"mean": 3.0, "low": 3.0, "high": 3.0, "seeds": 1}


@pytest.mark.parametrize("system", ["ours", "torchvision"])
def test_a_training_that_was_killed_goes_on_and_ends_with_the_same_weights(system, sample, tmp_path, monkeypatch):
    def settings_of(folder, checkpoint_every=1):
        options = "--iterations 2 --batch-size 1 --log-every 1 --lr 0.01 --warmup 0 --decay-at 2 --validate-every 0"
        options += f" --checkpoint-every {checkpoint_every} --grad-clip 5 --no-pretrained --workers 0 --precision fp32"
        return train.parse_settings(["--data-folder", str(sample), "--output-folder", str(folder), *options.split()])

    train_system = {"ours": proof.train_ours, "torchvision": proof.train_torchvision}[system]
    expected = train_system(settings_of(tmp_path / "whole", checkpoint_every=2)).state_dict()

    settings = settings_of(tmp_path / "killed")
    name, step = {"ours": (train, "train_step"), "torchvision": (proof, "step_torchvision")}[system]
    make_step, n_steps = getattr(name, step), []

    def step_or_be_killed(*arguments):
        n_steps.append(1)
        if len(n_steps) == 2:
            raise KeyboardInterrupt
        return make_step(*arguments)

    monkeypatch.setattr(name, step, step_or_be_killed)
    with pytest.raises(KeyboardInterrupt):
        train_system(settings)
    assert proof.updates_made(settings) == 1
    trained = train_system(settings_of(tmp_path / "killed")).state_dict()
    assert len(n_steps) == 3
    assert all(torch.equal(trained[name], value) for name, value in expected.items())
    assert [r["iteration"] for r in read_log(settings.output_folder) if r["event"] == "train"] == [1, 2]

    again = train_system(settings_of(tmp_path / "killed")).state_dict()  # killed before the evaluation was complete
    assert len(n_steps) == 3
    assert all(torch.equal(again[name], value) for name, value in expected.items())


def test_sigterm_saves_the_training_of_torchvisions_network(sample, tmp_path, monkeypatch):
    def step_and_get_sigterm(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        return torch.zeros(())

    monkeypatch.setattr(proof, "make_torchvision", lambda label_map: torch.nn.Linear(1, 1))
    monkeypatch.setattr(proof, "step_torchvision", step_and_get_sigterm)
    settings = train.parse_settings(
        ["--data-folder", str(sample), "--output-folder", str(tmp_path), "--workers", "0", "--no-pretrained"]
    )
    train.complete_settings(settings, 6, 0)
    with pytest.raises(InputError, match="interrupted and saved"):
        proof.train_torchvision(settings)
    assert proof.updates_made(settings) == 1


def test_the_duration_of_a_training_is_that_of_all_its_iterations(tmp_path):
    """By hand: 20 iterations of 4 images at 8 images/s and 10 more at 2 images/s take 10 and 20 seconds."""
    records = [{"event": "start"}, {"event": "train", "iteration": 20, "images_per_second": 8.0},
               {"event": "start"}, {"event": "train", "iteration": 30, "images_per_second": 2.0}]  # fmt: skip
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = argparse.Namespace(output_folder=tmp_path, batch_size=4)
    assert proof.training_seconds(settings) == pytest.approx(30)


def test_a_system_of_ours_starts_as_torchvisions_network(sample, tmp_path, monkeypatch):
    """Given the same images, both predict the same."""
    settings = train.parse_settings(
        ["--data-folder", str(sample), "--output-folder", str(tmp_path), "--init-from", str(tmp_path / "initial.pth"),
         "--seed", "3"]
    )  # fmt: skip
    started = []
    monkeypatch.setattr(train, "train", lambda settings: (started.append(settings) or torch.nn.Identity(), True))
    proof.train_ours(settings)
    label_map = train.training_set(started[0]).label_map
    ours = train.start_model(started[0], label_map).eval()
    torch.manual_seed(3)
    theirs = proof.make_torchvision(label_map).eval()
    images = torch.randint(256, (1, 3, 300, 300), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        transformed = theirs.transform(list(images / 255))[0].tensors
        expected = theirs.head(list(theirs.backbone(transformed).values()))
        locs, scores = ours(images)
    assert ours.priors == "coco"
    assert ours.label_map == label_map
    assert torch.allclose(locs, expected["bbox_regression"], atol=1e-3)
    assert torch.allclose(scores, expected["cls_logits"], atol=1e-3)


def test_without_pycocotools_its_column_is_empty(sample, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    model = argparse.Namespace(label_map=PascalVOCDataset(sample, "TEST").label_map)

    def detect_nothing(loader, _):
        ground_truth = [list(parts) for parts in zip(*(image[1:] for image in loader.dataset), strict=True)]
        nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0)
        return [[part] * len(ground_truth[0]) for part in nothing], ground_truth

    results = proof.evaluate(model, detect_nothing, argparse.Namespace(data_folder=sample, workers=0), None)
    assert results["mAP_11_point"] == 0
    assert [results[f"coco_{name}"] for name in ("AP", "AP50", "AP75")] == [None] * 3
    proof.print_summary(proof.summarize([{"system": "ours", **dict.fromkeys(proof.FIGURES, 0.5), "coco_AP": None}]))
    assert capsys.readouterr().out.splitlines()[1].split()[9] == "-"


def test_every_process_takes_part_in_the_evaluation_and_the_first_returns_the_results(monkeypatch):
    model = argparse.Namespace(label_map={"background": 0})
    evaluated = []
    monkeypatch.setattr(proof, "train_ours", lambda settings: model)
    monkeypatch.setattr(proof, "training_seconds", lambda settings: 2.0)
    monkeypatch.setattr(proof, "evaluate", lambda *_: evaluated.append(1) or {"mAP_11_point": 0.5})
    settings = argparse.Namespace(precision="fp32", seed=0, iterations=1, batch_size=1, output_folder="")
    for number in (0, 1):
        monkeypatch.setattr(proof, "rank", lambda number=number: number)
        result = proof.prove("ours", settings, None)
        assert (result is None) == (number == 1)
    assert len(evaluated) == 2
