"""Whole scripts, run as a user runs them; bad input ends in a one-line error."""

import json
import os
import sys

import numpy as np
import pytest
import torch
from conftest import Script
from PIL import Image

import eval as eval_script
import train
from datasets import PascalVOCDataset
from detect import annotate, detect, find_objects
from support.checkpoints import read_checkpoint, save_weights
from support.files import InputError
from support.labels import label_color_map, label_map, make_label_map
from support.sample import SAMPLE_LABELS
from utils import transform

QUICK = ("--no-pretrained", "--batch-size", 2, "--workers", 0, "--log-every", 1, "--warmup", 2, "--grad-clip", 5,
         "--validate-every", 0)  # fmt: skip


@pytest.fixture(scope="module")
def trained(sample, tmp_path_factory):
    """Folder of a run of three iterations with checkpoints and validation, and its output."""
    folder = tmp_path_factory.mktemp("run")
    arguments = ("--data-folder", sample, "--output-folder", folder, *QUICK, "--iterations", 3)
    schedule = ("--validate-every", 3, "--checkpoint-every", 2, "--keep-every", 2, "--decay-at", 9)
    script = Script("train.py", *arguments, *schedule, "--seed", 7)
    return folder, "".join(script.finish())


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_training_writes_checkpoints_and_a_log(trained, sample):
    folder, printed = trained
    start, *rest = records(folder)
    assert start["event"] == "start"
    assert start["settings"]["seed"] == 7
    assert start["classes"] == ["background", *SAMPLE_LABELS]
    assert start["versions"]["torch"] == torch.__version__
    assert start["hardware"]
    steps = [record for record in rest if record["event"] == "train"]
    assert [record["iteration"] for record in steps] == [1, 2, 3]
    assert "iteration 3 of 3: loss " in printed
    assert "time left 00:00" in printed
    assert "validation every 3 iterations and at the end, on the 3 images of the TEST split" in printed
    assert "best.pth is chosen on the test images" in printed
    assert '"settings"' not in printed  # which are in the log
    assert [record["lr"] for record in steps] == [0.0005, 0.001, 0.001]
    for record in steps:
        assert record["loss"] == pytest.approx(record["confidence_loss"] + record["localization_loss"])
        assert record["images_per_second"] > 0
        assert 0 <= record["data_wait"] <= 1
    (validation,) = (record for record in rest if record["event"] == "validation")
    checkpoint = read_checkpoint(folder / "checkpoint.pth")
    assert checkpoint["iteration"] == 3
    best = read_checkpoint(folder / "best.pth")
    assert (best["iteration"], best["best_loss"]) == (3, validation["loss"])
    assert f"python eval.py --checkpoint {folder / 'checkpoint.pth'} --split TEST" in printed
    assert sorted(path.name for path in folder.iterdir()) == [
        "best.pth", "checkpoint.pth", "checkpoint_2.pth", "curves.png", "log.jsonl"
    ]  # fmt: skip
    assert read_checkpoint(folder / "checkpoint_2.pth")["iteration"] == 2


def test_a_finished_run_is_not_overwritten_but_can_be_continued_or_exported(trained, sample, tmp_path, run):
    checkpoint = trained[0] / "checkpoint.pth"
    common = ("--data-folder", sample, "--output-folder", trained[0], *QUICK, "--seed", 7)
    assert "checkpoint.pth exists: continue from it" in run("train.py", *common, "--iterations", 2, status=2)
    assert "has made 3 iterations already" in run("train.py", "--resume", checkpoint, "--iterations", 3, status=2)
    arguments = ("--resume", checkpoint, "--output-folder", tmp_path / "run", "--weights-only", tmp_path / "small.pth")
    run("train.py", *arguments)
    whole, small = read_checkpoint(checkpoint), torch.load(tmp_path / "small.pth", weights_only=True)
    assert torch.equal(small["model"]["rescale_factors"], whole["model"]["rescale_factors"])
    assert "optimizer" not in small


def test_evaluation_prints_a_table_and_writes_its_files(trained, sample, tmp_path, run):
    arguments = ("--data-folder", sample, "--checkpoint", trained[0] / "checkpoint.pth", "--workers", 0)
    report = ("--report", tmp_path / "report", "--voc-results", tmp_path / "voc", "--coco", "--bootstrap", 20)
    files = ("--results", tmp_path / "results.json", "--detections", tmp_path / "detections.json")
    printed = run("eval.py", *arguments, *report, *files)
    assert "95% interval of the 11-point mAP" in printed
    assert "COCO's rules: AP " in printed
    assert {path.name for path in (tmp_path / "voc").iterdir()} == {
        f"comp4_det_test_{name}.txt" for name in SAMPLE_LABELS
    }
    detections = json.loads((tmp_path / "detections.json").read_text())
    assert {entry["image_id"] for entry in detections} <= {6, 7, 8}  # the names of the test images
    assert (tmp_path / "report" / "index.html").stat().st_size > 10_000
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["images"] == 3
    assert set(results["AP_11_point"]) == set(results["AP_area"]) == set(SAMPLE_LABELS)
    assert 0 <= results["mAP_11_point"] <= 1
    assert results["network_seconds"] > 0
    assert results["post_processing_seconds"] > 0
    for word in (*SAMPLE_LABELS, "mAP", "11-point", "area", "network", "post-processing"):
        assert word in printed


def test_detection_prints_objects_and_writes_an_annotated_copy(trained, sample, tmp_path, run):
    source = next((sample / "VOCsample" / "JPEGImages").glob("*.jpg"))
    before = source.read_bytes()
    arguments = (source, "--checkpoint", trained[0] / "checkpoint.pth", "--output", tmp_path / "annotated.png")
    printed = run("detect.py", *arguments, "--min-score", 0.05, "--top-k", 5)
    lines = [line.split() for line in printed.splitlines() if line.split()[0] in SAMPLE_LABELS]
    assert f"{len(lines)} objects" in printed
    with Image.open(tmp_path / "annotated.png") as annotated, Image.open(source) as image:
        assert annotated.size == image.size
        for _, score, *box in lines:
            assert 0.05 < float(score) <= 1
            assert 0 <= int(box[0]) <= int(box[2]) <= image.width
            assert 0 <= int(box[1]) <= int(box[3]) <= image.height
    assert source.read_bytes() == before
    assert "unicorn" in run("detect.py", *arguments, "--suppress", "unicorn", status=2)


def test_a_sample_run_creates_its_data_and_shows_what_it_has_learnt(trained, tmp_path, run):
    arguments = ("--sample", "--iterations", 1, "--batch-size", 1, "--workers", 0)
    printed = run("train.py", *arguments, cwd=tmp_path)
    assert "2 images of data/sample_by_heart" in printed
    assert "on the 2 images of the TRAIN split" in printed
    checkpoint = "runs/sample_by_heart/checkpoint.pth"
    assert read_checkpoint(tmp_path / checkpoint)["iteration"] == 1
    with Image.open(tmp_path / "runs" / "sample_by_heart" / "detected.png") as picture:
        assert min(picture.size) > 300
    assert f"python eval.py --checkpoint {checkpoint} --split TRAIN" in printed
    detection = f"python detect.py data/sample_by_heart/VOCsample/JPEGImages/000000.jpg --checkpoint {checkpoint}"
    assert detection in printed
    run("train.py", *arguments, cwd=tmp_path)  # a sample run replaces only an earlier sample run
    folder = trained[0]
    message = run("train.py", *arguments, "--output-folder", folder, cwd=tmp_path, status=2)
    assert "exists: continue from it" in message


def test_lists_are_created_from_the_command_line(sample, tmp_path, run):
    message = run(
        "create_data_lists.py", "--voc07", sample / "VOCsample", "--output-folder", tmp_path / "voc", status=2
    )
    assert "000000.xml" in message
    assert "no known class" in message
    assert not (tmp_path / "voc").exists()
    assert "give one of --train" in run("create_data_lists.py", "--output-folder", tmp_path, status=2)
    printed = run("create_data_lists.py", "--sample", "--output-folder", tmp_path / "made")
    assert "TRAIN: 240 images" in printed
    assert "images without objects" in printed


def test_an_unreadable_image_stops_training_with_an_error_that_names_it(sample, tmp_path, run):
    for name in ("label_map.json", "TRAIN_images.json", "TRAIN_objects.json", "TEST_images.json", "TEST_objects.json"):
        (tmp_path / name).write_bytes((sample / name).read_bytes())
    images = json.loads((tmp_path / "TRAIN_images.json").read_text())
    broken = tmp_path / "broken.jpg"
    with open(images[0], "rb") as file:
        broken.write_bytes(file.read()[:3000])
    (tmp_path / "TRAIN_images.json").write_text(json.dumps([str(broken)] * len(images)))
    for workers in (0, 1):
        arguments = ("--data-folder", tmp_path, "--output-folder", tmp_path / "run", *QUICK, "--iterations", 2)
        message = run("train.py", *arguments, "--workers", workers, status=2)
        assert message.startswith(f"error: {broken}: cannot read this image")
    assert not (tmp_path / "run" / "checkpoint.pth").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "data/voc"),
        (("--data-folder", "nowhere"), "nowhere"),
        (("--batch-size", 0), "--batch-size 0: must be 1 or more"),
        (("--epochs", 0), "--epochs 0: must be above 0"),
        (("--epochs", "nan"), "--epochs nan: must be above 0"),
        (("--epochs", "1e308"), "must be above 0, and at most a million"),
        (("--epochs", 2, "--iterations", 120_000), "--iterations: not allowed with argument --epochs"),
        (("--init-from", "coco", "--no-pretrained"), "--no-pretrained: not allowed with argument --init-from"),
        (("--sample", "--data-folder", "mine"), "leave --data-folder out"),
        (("--sample", "--data-folder", "data/voc"), "leave --data-folder out"),
        (("--lr", "nan"), "--lr nan"),
        (("--lr", "fast"), "argument --lr: invalid float value: 'fast'"),
        (("--accumulate", 64), "--accumulate 64: must not exceed --batch-size 32"),
        (("--batch_sise=8",), "unrecognized arguments: --batch_sise=8; did you mean --batch-size?"),
        (("--frobnicate", 1), "unrecognized arguments: --frobnicate 1; see python train.py --help"),
        (("--resume", "nowhere.pth"), "nowhere.pth: no such file"),
    ],
)
def test_invalid_settings_are_a_one_line_error(arguments, message, run, tmp_path):
    assert message in run("train.py", *arguments, status=2, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_options_are_accepted_with_underscores():
    settings = train.parse_settings(["--batch_size", "8", "--weight_decay=0.01", "--output_folder", "my_runs/a_b"])
    assert (settings.batch_size, settings.weight_decay, settings.output_folder) == (8, 0.01, "my_runs/a_b")


def test_results_go_to_a_folder_named_after_the_data():
    assert train.parse_settings([]).output_folder == os.path.join("runs", "voc")
    assert train.parse_settings(["--data-folder", "data/mine/"]).output_folder == os.path.join("runs", "mine")


def test_the_error_for_a_non_finite_loss_names_the_iteration_and_the_images(sample, tmp_path, run):
    arguments = ("--data-folder", sample, "--output-folder", tmp_path / "run", *QUICK, "--iterations", 6, "--lr", 1e12)
    message = run("train.py", *arguments, "--checkpoint-every", 1, "--grad-clip", 0, status=3)
    assert "not finite" in message
    assert "JPEGImages" in message
    iteration = int(message.split("iteration ")[1].split(":")[0])
    checkpoint = read_checkpoint(tmp_path / "run" / "checkpoint.pth")
    assert checkpoint["iteration"] == iteration - 1
    assert all(weight.isfinite().all() for weight in checkpoint["model"].values())


@pytest.mark.parametrize(
    "damage",
    [{"optimizer": {}}, {"settings": [1]}, {"settings": {}}, {"iteration": "x"}, {"label_map": {1: 0, "a": 1}}],
)
def test_a_damaged_checkpoint_is_rejected(damage, trained, tmp_path, sample, run):
    checkpoint = torch.load(trained[0] / "checkpoint.pth", weights_only=True) | damage
    torch.save(checkpoint, tmp_path / "bad.pth")
    arguments = ("--data-folder", sample, "--output-folder", tmp_path / "run", *QUICK, "--iterations", 9)
    arguments = [argument for argument in arguments if argument != "--no-pretrained"]
    assert "bad.pth: " in run("train.py", "--resume", tmp_path / "bad.pth", *arguments, status=2)
    assert not (tmp_path / "run").exists()


def test_evaluation_rejects_a_checkpoint_with_other_classes(trained, sample, tmp_path, run):
    for name in ("TEST_images.json", "TEST_objects.json"):
        (tmp_path / name).write_bytes((sample / name).read_bytes())
    (tmp_path / "label_map.json").write_text(json.dumps(make_label_map(["a", "b", "c", "d", "e"])))
    message = run("eval.py", "--data-folder", tmp_path, "--checkpoint", trained[0] / "checkpoint.pth", status=2)
    assert "its classes (background, disc" in message
    assert str(tmp_path) in message


def completed(*arguments, n_images=16_551, n_validation_images=4952):
    settings = train.parse_settings([str(argument) for argument in arguments])
    train.complete_settings(settings, n_images, n_validation_images)
    return settings


def test_the_learning_rate_warms_up_then_decays_by_factors_of_ten():
    settings = completed("--warmup", 4)
    rates = [train.learning_rate(i, settings) for i in (0, 1, 3, 4, 79_999, 80_000, 99_999, 100_000, 119_999)]
    assert rates == pytest.approx([2.5e-4, 5e-4, 1e-3, 1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5])
    assert (settings.batch_size, settings.iterations, settings.momentum, settings.weight_decay) == (
        32,
        120_000,
        0.9,
        5e-4,
    )


def test_a_schedule_that_is_not_given_follows_the_length_of_the_run():
    settings = completed()
    assert (settings.decay_at, settings.warmup, settings.validate_every) == ([80_000, 100_000], 500, 12_000)
    settings = completed("--iterations", 600)
    assert (settings.decay_at, settings.warmup) == ([400, 500], 60)
    assert settings.validate_every == 155  # 4,952 / 32: never more images than were trained on
    settings = completed("--epochs", 20)
    assert (settings.iterations, settings.epochs) == (10_344, None)  # 20 * 16,551 / 32
    assert (settings.decay_at, settings.warmup, settings.validate_every) == ([6896, 8620], 500, 1035)
    settings = completed("--iterations", 600, "--decay-at", "--warmup", 0, "--validate-every", 7)
    assert (settings.decay_at, settings.warmup, settings.validate_every) == ([], 0, 7)
    assert completed(n_validation_images=0).validate_every == 0
    assert completed("--iterations", 154).validate_every == 0  # it would take longer than the training
    assert completed("--epochs", 0.001, n_images=6).iterations == 1


def test_a_resumed_run_keeps_its_schedule_unless_told_otherwise(trained):
    checkpoint = trained[0] / "checkpoint.pth"
    settings = completed("--resume", checkpoint, "--iterations", 600)
    assert (settings.decay_at, settings.warmup, settings.validate_every) == ([9], 2, 3)
    assert completed("--resume", checkpoint, "--epochs", 4, n_images=6).iterations == 12
    assert completed("--resume", checkpoint, "--decay-at", 400).decay_at == [400]


def test_resuming_behind_the_original_command_line_works_and_names_what_cannot_change(trained, sample, tmp_path, run):
    checkpoint = trained[0] / "checkpoint.pth"
    original = ("--data-folder", sample, *QUICK, "--seed", 7, "--resume", checkpoint, "--output-folder", tmp_path)
    assert "has made 3 iterations already" in run("train.py", *original, "--iterations", 3, status=2)
    for change, message in (
        (("--seed", 8), "started with --seed 7, which cannot change; leave --seed out"),
        (("--batch-size", 1), "started with --batch-size 2, which cannot change"),
        (("--no-difficult",), "started without --no-difficult, which cannot change"),
    ):
        assert message in run("train.py", *original, *change, status=2)
    message = run("train.py", "--resume", checkpoint, "--init-from", checkpoint, status=2)
    assert "started without --init-from, which cannot change" in message
    assert list(tmp_path.iterdir()) == []


def test_size_and_priors_of_a_new_network_follow_the_settings(tmp_path, monkeypatch):
    classes = make_label_map(["cat"])
    monkeypatch.setattr(train, "read_base", lambda path, parameters: parameters)

    def start(*arguments):
        return train.start_model(train.parse_settings([*map(str, arguments)]), classes)

    for arguments, expected in (
        (("--no-pretrained",), (300, "paper")),
        (("--no-pretrained", "--priors", "coco"), (300, "coco")),
        (("--base", "x"), (300, "caffe")),
        (("--base", "x", "--priors", "paper"), (300, "paper")),
        (("--no-pretrained", "--size", 512), (512, "caffe")),
        (("--no-pretrained", "--size", 512, "--priors", "coco"), (512, "coco")),
    ):
        model = start(*arguments)
        assert (model.size, model.priors) == expected
    path = tmp_path / "weights.pth"
    save_weights(path, model)
    assert start("--init-from", path, "--size", 512).priors == "coco"
    for arguments, message in (
        (("--init-from", path), f"{path}: is a network of size 512; give --size 512"),
        (("--init-from", path, "--size", 512, "--priors", "caffe"), "leave --priors out"),
        (("--no-pretrained", "--size", 512, "--priors", "paper"), "--priors paper: neither a family of priors"),
    ):
        with pytest.raises(InputError, match=message):
            start(*arguments)


def test_a_network_for_512_pixels_trains(sample, run):
    arguments = ("--data-folder", sample, *QUICK, "--size", 512, "--batch-size", 1, "--iterations", 2, "--dry-run")
    assert run("train.py", *arguments).count("step in ") == 2


def test_a_small_batch_with_the_default_learning_rate_gets_a_word_of_warning(sample, tmp_path):
    arguments = ("--data-folder", sample, *QUICK, "--iterations", 1, "--output-folder")
    _, warned = Script("train.py", *arguments, tmp_path / "a").finish()
    assert "warning: --lr 0.001 is made for batches of 32; give --lr 6e-05 for batches of 2, or " in warned
    assert "--batch-size 32 --accumulate 16" in warned
    _, warned = Script("train.py", *arguments, tmp_path / "b", "--lr", 1e-4).finish()
    assert "warning" not in warned


def test_a_lack_of_gpu_memory_is_one_line_with_the_memory_and_the_remedies(sample, tmp_path, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(train, "train_step", fail)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 8 * 2**30))
    arguments = ("--data-folder", sample, *QUICK, "--output-folder", tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    with pytest.raises(InputError, match="8.0 GiB of the GPU's memory .* tried --batch-size 2 with --accumulate 1;"):
        train.main()


def test_biases_get_twice_the_learning_rate_and_no_weight_decay(model):
    optimizer = train.make_optimizer(model, train.parse_settings(["--data-folder", "x"]))
    weights, biases = optimizer.param_groups
    assert (weights["lr_factor"], weights["weight_decay"]) == (1, 5e-4)
    assert (biases["lr_factor"], biases["weight_decay"]) == (2, 0)
    assert sum(p.numel() for p in biases["params"]) == sum(
        m.bias.numel() for m in model.modules() if hasattr(m, "bias")
    )
    assert len(weights["params"]) + len(biases["params"]) == len(list(model.parameters()))


SECONDS = ("waiting_seconds", "network_seconds", "post_processing_seconds")


class Oracle(torch.nn.Module):
    """A stand-in for the network that returns the given detections."""

    size = 300

    def __init__(self, label_map, detections):
        super().__init__()
        self.label_map, self.detections = label_map, detections
        self.register_buffer("priors_cxcy", torch.zeros(1, 4))

    def forward(self, images):
        self.images = images
        return images, images

    def detect_objects(self, locs, scores, min_score, max_overlap, top_k):
        self.limits = min_score, max_overlap, top_k
        return [[part] for part in self.detections]


class Constant(torch.nn.Module):
    """A stand-in for the network that predicts its parameters for every image."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.locs, self.bias = (torch.nn.Parameter(torch.randn(shape)) for shape in ((12, 4), (12, 3)))
        self.register_buffer("priors_cxcy", torch.rand(12, 4) / 2 + 0.2)

    def forward(self, images):
        """Return locs and scores; scores are different in training mode."""
        scores = self.bias + (1.0 if self.training else 0.0) * torch.arange(3)
        return self.locs.expand(len(images), -1, -1), scores.expand(len(images), -1, -1)

    def detect_objects(self, locs, *_):
        """Detect nothing."""
        return tuple([torch.zeros(shape)] * len(locs) for shape in ((0, 4), (0,), (0,)))


BATCH = (
    torch.zeros(2, 3, 8, 8),
    [torch.tensor([[0.1, 0.1, 0.6, 0.6], [0.3, 0.4, 0.9, 0.8]]), torch.zeros(0, 4)],
    [torch.tensor([1, 2]), torch.zeros(0, dtype=torch.long)],
)


@pytest.mark.parametrize(("grad_clip", "scaled"), [(0, False), (0.5, False), (0.5, True)])
def test_a_training_step_matches_a_hand_computation(grad_clip, scaled):
    network, copy = Constant(), Constant()
    criterion = train.MultiBoxLoss(network.priors_cxcy)
    optimizer = torch.optim.SGD(
        [{"params": [network.locs], "lr_factor": 1.0, "weight_decay": 0.1},
         {"params": [network.bias], "lr_factor": 2.0, "weight_decay": 0.0}], lr=9, momentum=0.9,
    )  # fmt: skip
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    losses = train.train_step(network, criterion, optimizer, scaler, BATCH, 0.01, "fp32", grad_clip)
    confidence, localization, _ = criterion.parts(*copy(BATCH[0]), *BATCH[1:])
    (confidence + localization).backward()
    norm = (copy.locs.grad.square().sum() + copy.bias.grad.square().sum()).sqrt()
    assert norm > 0.5
    scale = 0.5 / norm if grad_clip else 1.0
    with torch.no_grad():
        expected_locs = copy.locs - 0.01 * (scale * copy.locs.grad + 0.1 * copy.locs)
        expected_bias = copy.bias - 0.02 * scale * copy.bias.grad
    assert torch.allclose(losses, torch.stack([confidence, localization, norm]).detach())
    assert torch.allclose(network.locs, expected_locs, atol=1e-6)
    assert torch.allclose(network.bias, expected_bias, atol=1e-6)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_batch_in_parts_has_the_gradient_of_the_whole_batch(scaled, random_objects):
    rng = np.random.RandomState(0)
    boxes, labels = zip(*(random_objects(rng, n, n_classes=3) for n in (3, 0, 1, 5, 2)), strict=True)
    batch = torch.zeros(5, 3, 8, 8), boxes, labels
    results = []
    for accumulate in (1, 2, 3, 5, 9):
        network = Constant()
        criterion = train.MultiBoxLoss(network.priors_cxcy)
        optimizer = torch.optim.SGD([{"params": list(network.parameters()), "lr_factor": 1.0}], lr=9)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled)
        losses = train.train_step(network, criterion, optimizer, scaler, batch, 0.1, "fp32", 0.5, accumulate)
        results.append(torch.cat([losses, network.locs.flatten(), network.bias.flatten()]).detach())
    assert (results[0][3:] - torch.cat([values.flatten() for values in Constant().parameters()])).norm() > 0.01
    for result in results[1:]:
        assert torch.allclose(result, results[0], atol=1e-6)


def test_the_validation_loss_does_not_depend_on_how_images_are_batched():
    network = Constant()
    network.label_map = make_label_map(["cat", "dog"])
    criterion = train.MultiBoxLoss(network.priors_cxcy)
    rng = torch.Generator().manual_seed(1)
    corners = torch.rand(5, 2, generator=rng) / 2
    boxes = torch.cat([corners, corners + 0.1 + torch.rand(5, 2, generator=rng) / 3], dim=1)
    boxes, labels = list(boxes.split([1, 3, 0, 1])), list(torch.tensor([1, 2, 1, 1, 2]).split([1, 3, 0, 1]))
    flags = [torch.zeros(len(image_labels)) for image_labels in labels]
    whole = (torch.zeros(4, 3, 8, 8), boxes, labels, flags)
    ranges = (slice(0, 2), slice(2, 3), slice(3, 4))
    batches = [tuple(part[r] for part in whole) for r in ranges]
    network.train()
    losses = [train.validate(loader, network, criterion, "fp32")["loss"] for loader in ([whole], batches)]
    assert network.training
    network.eval()
    assert losses == pytest.approx([criterion(*network(whole[0]), boxes, labels).item()] * 2, rel=1e-5)


def test_difficult_objects_are_kept_and_augmentation_can_be_switched_off(sample, tmp_path, monkeypatch):
    for name in ("label_map.json", "TRAIN_images.json", "TEST_images.json"):
        (tmp_path / name).write_bytes((sample / name).read_bytes())
    entry = {"boxes": [[1, 1, 99, 99], [50, 60, 90, 120]], "labels": [1, 2], "difficulties": [0, 1]}
    for split in ("TRAIN", "TEST"):
        n_images = len(json.loads((tmp_path / f"{split}_images.json").read_text()))
        (tmp_path / f"{split}_objects.json").write_text(json.dumps([entry] * n_images))
    settings = train.parse_settings(
        ["--data-folder", str(tmp_path), "--no-pretrained", "--no-augmentation", "--seed", "4"]
    )
    dataset = train.training_set(settings)
    assert dataset[0, 0][3].tolist() == [0, 1]
    assert torch.equal(dataset[0, 0][0], dataset[1, 0][0])
    settings = train.parse_settings(["--data-folder", str(tmp_path), "--no-pretrained", "--seed", "4"])
    dataset = train.training_set(settings)
    assert not torch.equal(dataset[0, 0][0], dataset[1, 0][0])
    assert dataset.seed == 4
    settings = train.parse_settings(["--data-folder", str(tmp_path), "--no-augmentation", "--no-difficult"])
    assert train.training_set(settings)[0][2:] == (torch.tensor([1]), torch.tensor([0]))

    seen = {}
    model = Oracle(dataset.label_map, (torch.zeros(0, 4), torch.zeros(0), torch.zeros(0)))

    def record_data(loader, *_, **__):
        seen.update(data=loader.dataset)
        boxes, others = [torch.zeros(0, 4)] * 3, [torch.zeros(0)] * 3
        return [boxes, others, others], [boxes, others, others], dict.fromkeys(SECONDS, 0.0)

    monkeypatch.setattr(eval_script, "load_model", lambda *arguments: model)
    monkeypatch.setattr(eval_script, "detect_all", record_data)
    monkeypatch.setattr(
        sys, "argv", ["eval.py", "--data-folder", str(tmp_path), "--checkpoint", "coco", "--workers", "0"]
    )
    eval_script.main()
    assert seen["data"][0][3].tolist() == [0, 1]
    assert isinstance(seen["data"], PascalVOCDataset)

    # If a later step fails, the scores are still written.
    def fail(*_):
        raise KeyError

    monkeypatch.setattr(eval_script, "coco_scores", fail)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--coco", "--results", str(tmp_path / "results.json")])
    with pytest.raises(KeyError):
        eval_script.main()
    assert json.loads((tmp_path / "results.json").read_text())["images"] == 3


def test_an_export_never_overwrites_a_file_that_training_reads_or_writes(tmp_path):
    arguments = ["--data-folder", "d", "--output-folder", str(tmp_path), "--no-pretrained", "--weights-only"]
    (tmp_path / "checkpoint_7.pth").touch()
    for name in ("checkpoint.pth", "best.pth", "log.jsonl", "checkpoint_7.pth"):
        with pytest.raises(InputError, match=f"^{tmp_path / name}: is also read, or written"):
            train.parse_settings([*arguments, str(tmp_path / name)])
    path = str(tmp_path / "base.pth")
    with pytest.raises(InputError, match=f"^{path}: is also read, or written"):
        train.parse_settings(["--data-folder", "d", "--base", path, "--weights-only", path])
    train.parse_settings([*arguments, path])


def test_suppressed_classes_neither_count_towards_top_k_nor_change_other_scores(model, monkeypatch):
    scores = torch.zeros(1, 8732, 21)
    scores[0, 0, 1], scores[0, 5000, 2] = 8, 7
    monkeypatch.setattr(model, "forward", lambda images: (torch.zeros(1, 8732, 4), scores.clone()))
    monkeypatch.setattr(model, "label_map", label_map)
    image = Image.new("RGB", (200, 100))
    detections = find_objects(image, model, 0.2, 0.45, 200)
    assert [name for name, *_ in detections] == ["aeroplane", "bicycle"]
    ((name, score, box),) = find_objects(image, model, 0.2, 0.45, 1, suppress=["aeroplane"])
    assert (name, pytest.approx(score), box) == detections[1]
    assert len(find_objects(image, model, 0.2, 0.45, 1)) == 1


def test_detect_maps_boxes_to_pixels():
    label_map = make_label_map(["cat", "dog"])
    objects = torch.tensor([[0.25, 0.5, 0.75, 1.2], [0, 0, 0.5, 0.5]]), torch.tensor([1, 2]), torch.tensor([0.9, 0.8])
    oracle = Oracle(label_map, objects)
    image = Image.new("L", (200, 100), 70)
    detections = find_objects(image, oracle, 0.2, 0.5, 200)
    assert detections == [("cat", pytest.approx(0.9), [50, 50, 150, 100]), ("dog", pytest.approx(0.8), [0, 0, 100, 50])]
    no_objects = torch.zeros(0, 4), torch.zeros(0), torch.zeros(0)
    expected = transform(image, *no_objects, "TEST", as_bytes=True)[0]
    assert torch.equal(oracle.images[0], expected)  # the same preprocessing
    before = image.tobytes()
    picture = detect(image, 0.2, 0.5, 200, model=oracle)
    assert (picture.mode, picture.size) == ("RGB", (200, 100))
    assert image.tobytes() == before
    assert np.asarray(picture).std() > 10
    with pytest.raises(InputError, match="cannot suppress cow"):
        detect(image, 0.2, 0.5, 200, suppress=["cow"], model=oracle)


@pytest.mark.parametrize("size", [(24, 18), (300, 300), (2400, 1600)])
@pytest.mark.parametrize("level", [0, 255])
def test_annotations_are_visible_on_any_image(size, level):
    colors = label_color_map(make_label_map(["white cat", "dog"]))
    picture = annotate(Image.new("RGB", size, (level,) * 3), [("dog", 0.5, [0, 0, *size])], colors)
    changed = (np.asarray(picture) != level).any(axis=2)
    assert changed[:, -1].mean() > 0.9  # the box
    assert changed[: max(8, size[1] // 40), : size[0] // 20 + 1].mean() > 0.9  # the background of the label
    blank = annotate(Image.new("RGB", size, (level,) * 3), [(" ", 0.5, [0, 0, *size])], {" ": colors["dog"]})
    background = np.asarray(picture)[: max(8, size[1] // 40)]
    assert (background == colors["dog"]).all(axis=2).any()
    assert (np.asarray(picture) != np.asarray(blank)).any()  # the text
    without_objects = annotate(Image.new("RGB", size), [], colors)
    assert without_objects.size == size


def test_perfect_detections_have_an_ap_of_one_and_difficult_objects_are_ignored():
    boxes = torch.tensor([[0.1, 0.1, 0.4, 0.4], [0.5, 0.5, 0.9, 0.9]])
    oracle = Oracle(make_label_map(["cat", "dog", "cow"]), (boxes, torch.tensor([1, 2]), torch.tensor([0.9, 0.8])))
    batch = torch.zeros(1, 3, 300, 300), [boxes], [torch.tensor([1, 2])], [torch.tensor([0, 1], dtype=torch.uint8)]
    results = eval_script.evaluate([batch], oracle)[0]
    assert oracle.limits == (0.01, 0.45, 200)
    assert results["mAP_11_point"] == results["mAP_area"] == pytest.approx(1)
    assert results["AP_area"] == {"cat": pytest.approx(1), "dog": None, "cow": None}
