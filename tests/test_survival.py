"""Training that is interrupted, killed, short of disk space, or spread over processes."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LONGEST_WAIT, TORCHRUN, Script, launch
from PIL import Image
from tensorboard.backend.event_processing import event_accumulator

import train
from datasets import PascalVOCDataset, TrainingSampler
from eval import evaluate, evaluation_loader
from support import runlog, runs
from support.checkpoints import read_checkpoint
from support.devices import Interruption
from support.files import DivergenceError, InputError
from support.runlog import RunLog, mean_losses, read_log
from support.sample import make_sample

TRAIN = str(Path(train.__file__))
ROOT = Path(TRAIN).parent
RECIPE = ("--no-pretrained", "--batch-size", 1, "--workers", 1, "--log-every", 2, "--warmup", 3, "--seed", 3,
          "--iterations", 4, "--checkpoint-every", 1, "--deterministic", "--validate-every", 0)  # fmt: skip
EXTRAS = ("--validate-every", 4, "--tensorboard")


def run_train(*arguments, status=0, **options):
    """Run train.py until it ends; return all output."""
    return "".join(Script("train.py", *arguments, **options).finish(status))


def logged_losses(folder):
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    keys = "event", "iteration", "loss", "confidence_loss", "localization_loss", "gradient_norm", "lr", "mAP_11_point"
    return [{key: record.get(key) for key in keys} for record in records if record["event"] != "start"]


def assert_same_runs(folder, other):
    ours, theirs = (read_checkpoint(path / "checkpoint.pth") for path in (folder, other))
    assert [ours[name] for name in ("iteration", "best_loss", "best_map", "pending")] == [
        theirs[name] for name in ("iteration", "best_loss", "best_map", "pending")
    ]
    for name, value in ours["model"].items():
        assert torch.equal(value, theirs["model"][name]), name
    for key, state in ours["optimizer"]["state"].items():
        assert torch.equal(state["momentum_buffer"], theirs["optimizer"]["state"][key]["momentum_buffer"])
    assert logged_losses(folder) == logged_losses(other)


@pytest.fixture(scope="module")
def uninterrupted(sample, tmp_path_factory):
    """Folder of a run of four iterations that was not interrupted."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_train("--data-folder", sample, "--output-folder", folder, *RECIPE, *EXTRAS)
    return folder


def wait_for(condition, script):
    """Wait until a condition holds or a script ends; tell whether the script is still running."""
    deadline = time.monotonic() + LONGEST_WAIT
    while script.is_running() and not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return script.is_running()


def test_a_run_that_is_killed_repeatedly_equals_an_uninterrupted_one(sample, uninterrupted, tmp_path):
    """Kill it once it has a log, a checkpoint, a partly written checkpoint and a new checkpoint; then let it finish."""
    checkpoint = tmp_path / "checkpoint.pth"

    def has_new_checkpoint(before):
        return lambda: checkpoint.exists() and checkpoint.stat().st_ino != before

    def has_partial_file(_):
        return lambda: any(tmp_path.glob("checkpoint.pth.*.tmp"))

    moments = [lambda _: (tmp_path / "log.jsonl").exists, has_new_checkpoint, has_partial_file, has_new_checkpoint]
    kills = 0
    for moment in [*moments, None]:
        inode = checkpoint.stat().st_ino if checkpoint.exists() else None
        logged = [(record["event"], record.get("iteration")) for record in read_log(tmp_path)]
        is_finished = inode and read_checkpoint(checkpoint)["iteration"] == 4  # a checkpoint is always readable
        if is_finished and ("validation", 4) in logged:
            break
        arguments = ("--resume", checkpoint) if inode else ("--data-folder", sample, *RECIPE, *EXTRAS)
        script = Script("train.py", *arguments, "--output-folder", tmp_path)
        if moment and wait_for(moment(inode), script):
            script.kill()
            kills += 1
        else:
            script.finish()
    assert kills > 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint.pth", "best.pth", "log.jsonl", "curves.png", "tensorboard"
    }  # fmt: skip
    assert_same_runs(tmp_path, uninterrupted)


# Run train.py, and send a signal to its whole process group in the second step.
SIGNALLED = """
import os, sys
import train
from support.files import run_command

train_step, steps, number = train.train_step, [], int(os.environ["SIGNAL"])

def signal_in_second_step(*arguments):
    steps.append(None)
    if len(steps) == 2:
        os.killpg(0, number)
    return train_step(*arguments)

train.train_step = signal_in_second_step
sys.argv = sys.argv[1:]
run_command(train.main)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_prints_how_to_continue(number, sample, uninterrupted, tmp_path):
    """The signal also reaches the data-loading workers, as one from a terminal or a scheduler does."""
    arguments = ("--data-folder", sample, "--output-folder", tmp_path, *RECIPE, *EXTRAS, "--checkpoint-every", 100)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SIGNAL": str(int(number))}
    printed = "".join(launch("-c", SIGNALLED, TRAIN, *arguments, env=environment, start_new_session=True))
    checkpoint = tmp_path / "checkpoint.pth"
    assert f"continue with: python train.py --resume {checkpoint}" in printed
    assert read_checkpoint(checkpoint)["iteration"] == 2
    assert "Traceback" not in printed
    if number == signal.SIGTERM:
        run_train("--resume", checkpoint)
        assert_same_runs(tmp_path, uninterrupted)


def test_a_second_interrupt_raises_at_once():
    before = signal.getsignal(signal.SIGINT)
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.agreed()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_processes_on_gpus_agree_on_an_interruption_at_every_tenth_iteration(monkeypatch):
    """A single process, and processes on a CPU, look at every iteration."""
    agreements = []
    monkeypatch.setattr("support.devices.any_process", lambda flag: agreements.append(flag) or flag)
    with Interruption() as interruption:
        interruption.requested = True
        for n_processes, device, expected in (
            (2, "cuda", [10, 20]),
            (1, "cuda", range(1, 21)),
            (2, "cpu", range(1, 21)),
        ):
            monkeypatch.setattr("support.devices.n_processes", lambda n=n_processes: n)
            monkeypatch.setattr("support.devices.find_device", lambda name=device: torch.device(name))
            agreements.clear()
            assert [i for i in range(1, 21) if interruption.agreed(i)] == list(expected)
            assert len(agreements) == len(expected)
            assert interruption.agreed()  # during a validation


AGREEMENT = """
import os, signal
from unittest import mock
import torch
from support import devices

devices.join_processes()
with mock.patch.object(devices, "find_device", lambda: torch.device("cuda")), devices.Interruption() as interruption:
    for iteration in range(1, 31):
        if (iteration, devices.rank()) == (13, 1):
            os.kill(os.getpid(), signal.SIGTERM)
        if interruption.agreed(iteration):
            break
print(f"STOPPED {iteration}\\n", end="")  # in a single write: torchrun's processes do not buffer
devices.leave_processes()
"""


def test_two_processes_stop_at_the_same_iteration_after_a_signal_to_one(tmp_path):
    """Only the question whether this is a GPU is answered by a stand-in."""
    script = tmp_path / "agreement.py"
    script.write_text(AGREEMENT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    printed, _ = launch(*TORCHRUN, script, env=environment)
    assert printed.split() == ["STOPPED", "20"] * 2


CPU = torch.device("cpu")


def parse(*arguments):
    return train.parse_settings([*map(str, arguments)])


class Started:
    """The state of a run that train.py has started or resumed: settings, data, network, optimizer, progress."""

    def __init__(self, settings):
        self.settings, self.dataset, held_out = settings, train.training_set(settings), train.validation_set(settings)
        train.complete_settings(settings, len(self.dataset), len(held_out or ()))
        state = train.start_or_resume(settings, self.dataset, held_out, CPU, "fp32")
        self.model, self.optimizer, self.scaler, self.progress = state
        self.criterion = train.MultiBoxLoss(self.model.priors_cxcy)

    def save(self, name="checkpoint.pth", **options):
        train.save_run(
            self.settings, self.dataset, self.model, self.optimizer, self.scaler, self.progress, name, **options
        )  # fmt: skip

    def log(self, **options):
        return RunLog(self.settings.output_folder, {"event": "start"}, **options)


@pytest.fixture
def run(sample, tmp_path):
    """A run in this process with batches of two, before its first update."""
    return Started(parse("--data-folder", sample, "--output-folder", tmp_path, *RECIPE, "--batch-size", 2))


def resume(folder, *arguments):
    return Started(parse("--resume", folder / "checkpoint.pth", *arguments))


def test_momentum_buffers_are_restored_from_any_memory_layout(run, tmp_path):
    """A GPU trains with channels last, a CPU does not; fused SGD works in the order of memory."""
    run.model.to(memory_format=torch.channels_last)
    run.optimizer = train.make_optimizer(run.model, run.settings)
    for parameter in run.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    run.optimizer.step()
    run.save()
    resumed = resume(tmp_path)
    for started in (run, resumed):
        for parameter in started.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        started.optimizer.step()
    for ours, theirs in zip(resumed.model.parameters(), run.model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-7)


def test_a_resumed_run_keeps_its_own_priors_without_their_file_but_not_with_a_changed_one(sample, tmp_path):
    path = tmp_path / "mine.json"
    table = {"scales": [0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9], "aspect_ratios": [2, 0.5, 3, 0.3333]}
    path.write_text(json.dumps(table))
    arguments = ("--data-folder", sample, "--output-folder", tmp_path, *RECIPE, "--priors", path)
    started = Started(parse(*arguments))
    assert started.model.priors_cxcy[0, 2].item() == pytest.approx(0.05)
    started.save()
    resume(tmp_path)
    path.write_text(json.dumps(table | {"scales": [0.06, *table["scales"][1:]]}))
    with pytest.raises(InputError, match=f"^{path}: not the priors of "):
        resume(tmp_path)
    path.unlink()
    assert torch.equal(resume(tmp_path).model.priors_cxcy, started.model.priors_cxcy)


def test_a_resumed_run_is_compiled_as_it_was_unless_told_otherwise(run, tmp_path):
    for is_compiled in (True, False):
        run.settings.compile = is_compiled
        run.save()
        assert resume(tmp_path).settings.compile is is_compiled
    assert resume(tmp_path, "--compile").settings.compile is True


def test_an_update_that_fp16_skips_leaves_the_weights_unchanged(run):
    run.settings.precision = "fp16"
    optimizer, scaler = train.make_optimizer(run.model, run.settings), torch.amp.GradScaler("cpu")
    before = [parameter.clone() for parameter in run.model.parameters()]
    for value in (torch.inf, 0.0):
        for parameter in run.model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        scaler.scale(torch.ones(()))
        for group in optimizer.param_groups:
            group.update(lr=1.0, weight_decay=0.0)
        scaler.step(optimizer)
        scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))


# Run train.py, and interrupt it in its first validation.
INTERRUPTED_VALIDATION = """
import os, signal, sys
import train
from support.files import run_command

detect_all = train.detect_all

def interrupt(*arguments, **options):
    os.kill(os.getpid(), signal.SIGTERM)
    return detect_all(*arguments, **options)

train.detect_all = interrupt
sys.argv = sys.argv[1:]
run_command(train.main)
"""


def test_an_interrupted_validation_is_repeated_after_resuming(sample, uninterrupted, tmp_path):
    arguments = ("--data-folder", sample, "--output-folder", tmp_path, *RECIPE, *EXTRAS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    printed = "".join(launch("-c", INTERRUPTED_VALIDATION, TRAIN, *arguments, env=environment))
    assert f"continue with: python train.py --resume {tmp_path / 'checkpoint.pth'}" in printed
    assert not (tmp_path / "best.pth").exists()
    assert logged_losses(tmp_path)[-1]["event"] == "train"
    run_train("--resume", tmp_path / "checkpoint.pth")
    assert logged_losses(tmp_path) == logged_losses(uninterrupted)
    best, expected = (read_checkpoint(folder / "best.pth") for folder in (tmp_path, uninterrupted))
    assert best["best_loss"] == expected["best_loss"] < float("inf")


def test_a_resumed_run_starts_with_the_validation_of_its_checkpoint(run, tmp_path):
    run.settings.validate_every = 2
    assert [runs.validation_is_missing(run.settings, iteration) for iteration in range(5)] == [0, 0, 1, 0, 1]
    run.log().append({"event": "validation", "iteration": 2})
    assert runs.validation_is_missing(run.settings, 2)  # repeated even if logged, unless the run is finished
    run.log(keep=lambda record: True).append({"event": "validation", "iteration": 4})
    assert not runs.validation_is_missing(run.settings, 4)
    run.progress["iteration"] = 4
    run.save()
    with pytest.raises(InputError, match="has made 4 iterations already"):
        resume(tmp_path, "--validate-every", 2)
    resume(tmp_path, "--validate-every", 2, "--iterations", 5)
    elsewhere = "--validate-every", 2, "--output-folder", tmp_path / "elsewhere"  # without the log
    resume(tmp_path, *elsewhere)
    with pytest.raises(InputError, match="has made 4 iterations already"):
        resume(tmp_path, *elsewhere, "--dry-run")


def loader_of(run):
    dataset = PascalVOCDataset(run.settings.data_folder, "TEST", keep_difficult=True)
    return evaluation_loader(dataset, 1, 0, CPU)


def test_validation_computes_the_same_map_as_eval_and_restores_training_mode(run, monkeypatch):
    loader = loader_of(run)
    objects = [(boxes[0], labels[0], torch.rand(len(labels[0]))) for _, boxes, labels, _ in loader]

    def detect_all_but(n_missed):  # stand-in for detect_objects: the true objects, without some of the first image
        kept = [tuple(part[n_missed if number == 0 else 0 :] for part in image) for number, image in enumerate(objects)]
        images = iter(kept)
        return lambda *_: [[part] for part in next(images)]

    means = []
    for n_missed in (0, 1):
        monkeypatch.setattr(run.model, "detect_objects", detect_all_but(n_missed))
        means.append(train.validate(loader, run.model, run.criterion, "fp32")["mAP_11_point"])
        assert run.model.training
        monkeypatch.setattr(run.model, "detect_objects", detect_all_but(n_missed))
        assert evaluate(loader, run.model)[0]["mAP_11_point"] == means[-1]
        run.model.train()
    assert means[0] == 1 > means[1] > 0


@pytest.mark.parametrize(("has_objects", "best_at"), [(False, [1, 2, 2]), (True, [1, 1, 3])])
def test_the_best_network_is_chosen_by_map_or_without_objects_by_loss(has_objects, best_at, run, tmp_path, monkeypatch):
    log = run.log()
    run.progress["validated_on"] = "TEST"
    for iteration, (loss, mean) in enumerate(((3.0, 0.5), (2.0, 0.4), (4.0, 0.6)), start=1):
        run.progress["iteration"] = iteration
        result = {"loss": loss} | ({"mAP_11_point": mean} if has_objects else {})
        monkeypatch.setattr(train, "validate", lambda *_, result=result: result)
        assert train.validate_and_keep_best(
            loader_of(run), run.model, run.criterion, "fp32", log, run.save, run.progress, None
        )
        best = read_checkpoint(tmp_path / "best.pth")
        assert (best["iteration"], best["chosen_on"]) == (best_at[iteration - 1], "TEST")
    run.save()
    assert read_checkpoint(tmp_path / "checkpoint.pth")["chosen_on"] is None
    best = 2.0, 0.6 if has_objects else -1.0
    resumed = resume(tmp_path, "--iterations", 9, "--validate-every", 3).progress
    assert (resumed["best_loss"], resumed["best_map"]) == best
    from_log = {"validated_on": "TEST", "best_loss": 9.0, "best_map": -1.0}
    runs.take_in_validations(from_log, read_log(tmp_path))
    assert (from_log["best_loss"], from_log["best_map"]) == best

    # Scores on other images do not count.
    shutil.copytree(run.settings.data_folder, tmp_path / "data")
    for name in ("images", "objects"):
        shutil.copy(tmp_path / "data" / f"TEST_{name}.json", tmp_path / "data" / f"VAL_{name}.json")
    arguments = ("--iterations", 9, "--validate-every", 3, "--data-folder", tmp_path / "data")
    resumed = resume(tmp_path, *arguments).progress
    runs.take_in_validations(resumed, read_log(tmp_path))
    assert (resumed["validated_on"], resumed["best_loss"], resumed["best_map"]) == ("VAL", float("inf"), -1.0)


def test_tensorboard_shows_the_log_without_records_that_a_resumed_run_repeats(run, tmp_path):
    test_set = PascalVOCDataset(run.settings.data_folder, "TEST", keep_difficult=True)
    earlier = tmp_path / "tensorboard" / "events.out.tfevents.1.x"
    earlier.parent.mkdir()
    earlier.write_text("of an earlier run")
    (tmp_path / "tensorboard" / "notes").write_text("of the user")
    log = run.log(tensorboard=True)
    assert not earlier.exists()
    assert (tmp_path / "tensorboard" / "notes").exists()
    for iteration in (1, 2):
        log.append({"event": "train", "iteration": iteration, "loss": 10.0 - iteration})
    log.append({"event": "validation", "iteration": 2, "loss": 7.0})
    log.append({"event": "train", "iteration": 3, "loss": 7.0})

    def keep(record):
        return record.get("iteration", 0) < 2 or record == {"event": "train", "iteration": 2, "loss": 8.0}

    log = run.log(tensorboard=True, keep=keep, iteration=2)
    log.append({"event": "validation", "iteration": 2, "loss": 7.0})  # repeated
    log.append({"event": "train", "iteration": 3, "loss": 6.0})
    validation = {"event": "validation", "iteration": 3, "split": "TEST", "loss": 5.0, "mAP_11_point": 0.25}
    log.append(validation, train.example_pictures(test_set, run.model))
    assert run.model.training
    board = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [(1, 9.0), (2, 8.0), (3, 6.0)]
    assert [event.value for event in board.Scalars("validation/mAP_11_point")] == [0.25]
    assert [(event.step, event.value) for event in board.Scalars("validation/loss")] == [(2, 7.0), (3, 5.0)]
    assert [record.get("loss") for record in read_log(tmp_path)] == [None, 9.0, 8.0, None, 7.0, 6.0, 5.0]
    assert board.Tags()["images"] == [f"image {number}" for number in (1, 2, 3)]
    (shown,) = board.Images("image 1")
    with Image.open(test_set.images[0]) as image:
        assert (shown.width, shown.height, shown.step) == (2 * image.width, image.height, 3)


def test_a_resumed_run_keeps_its_best_network_also_from_a_validation_off_the_grid(sample, tmp_path):
    """The last validation of a run is newer than its last checkpoint, and a longer run does not repeat it."""
    arguments = ("--data-folder", sample, "--output-folder", tmp_path, *RECIPE, "--validate-every", 2)
    run_train(*arguments, "--iterations", 1)
    log = tmp_path / "log.jsonl"
    records = [record | ({"loss": 0.5} if record["event"] == "validation" else {}) for record in read_log(tmp_path)]
    log.write_text("".join(json.dumps(record) + "\n" for record in records))  # as if it had been very good
    run_train("--resume", tmp_path / "checkpoint.pth", "--iterations", 2)
    assert [record["iteration"] for record in read_log(tmp_path) if record["event"] == "validation"] == [1, 2]
    assert read_checkpoint(tmp_path / "best.pth")["iteration"] == 1


def test_a_dry_run_validates_also_in_a_process_without_test_images(run, monkeypatch):
    """The other processes have some, and wait for it."""
    validated = []
    monkeypatch.setattr(train, "validate", lambda loader, *_: validated.append(list(loader)) or {"loss": 1.0})
    loader = train.training_loader(run.settings, run.dataset, 0, CPU)
    no_images = evaluation_loader(torch.utils.data.Subset(run.dataset, []), 1, 0, CPU)
    train.dry_run(run.settings, lambda *_: torch.ones(3), loader, no_images, run.model, run.criterion, "fp32")
    assert validated == [[]]


def test_curves_show_the_records_of_the_log_and_nothing_without_matplotlib(tmp_path, monkeypatch):
    drawn = {}

    def keep_lines(figure, *_, **__):
        for axes in figure.axes:
            drawn[axes.get_ylabel()] = [line.get_xydata().tolist() for line in axes.lines]

    log = RunLog(tmp_path, {"event": "start"})
    losses = {"confidence_loss": 3.0, "localization_loss": 1.0, "loss": 4.0}
    log.append({"event": "train", "iteration": 20, **losses, "lr": 0.1})
    log.append({"event": "train", "iteration": 40, "lr": 0.01})  # damaged
    log.append({"event": "validation", "iteration": 40, "split": "VAL", "loss": 5.0, "mAP_11_point": 0.25})
    log.append({"event": "validation", "iteration": 60, "split": "VAL", "loss": 6.0})
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", keep_lines)
    log.draw_curves()
    assert drawn == {
        "loss": [[[20, 3]], [[20, 1]], [[20, 4]], [[40, 5], [60, 6]]],
        "learning rate": [[[20, 0.1], [40, 0.01]]],
        "validation mAP": [[[40, 0.25]]],
    }
    monkeypatch.undo()
    (tmp_path / "curves.png").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    log.draw_curves()
    assert not (tmp_path / "curves.png").exists()
    monkeypatch.undo()
    log.draw_curves()
    with Image.open(tmp_path / "curves.png") as picture:
        assert min(picture.size) > 400


def test_a_log_keeps_complete_records_that_are_still_valid(tmp_path):
    lines = ['{"event": "train", "iteration": 1}', "[]", '{"iteration": 1}', '{"event": "tr']
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    RunLog(tmp_path, {"event": "start"}, keep=lambda record: record["iteration"] < 2)
    assert read_log(tmp_path) == [{"event": "train", "iteration": 1}, {"event": "start"}]
    RunLog(tmp_path, {"event": "start"})
    assert read_log(tmp_path) == [{"event": "start"}]


def test_contradictory_settings_and_missing_packages_are_rejected_before_training(sample, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="pip install tensorboard"):
        parse("--data-folder", sample, "--tensorboard")


def test_a_run_without_images_to_validate_on_says_so_unless_validation_was_asked_for(sample, tmp_path):
    for name in ("TRAIN_images.json", "TRAIN_objects.json", "label_map.json"):
        shutil.copy(sample / name, tmp_path)
    assert train.validation_set(parse("--data-folder", tmp_path)) is None
    assert train.validation_set(parse("--data-folder", sample, "--validate-every", 0)) is None
    assert train.validation_set(parse("--data-folder", sample)).split == "TEST"
    with pytest.raises(InputError, match="TEST_images.json"):
        train.validation_set(parse("--data-folder", tmp_path, "--validate-every", 5))
    for name in ("images", "objects"):
        shutil.copy(sample / f"TEST_{name}.json", tmp_path / f"VAL_{name}.json")
    assert train.validation_set(parse("--data-folder", tmp_path)).split == "VAL"


def test_validation_on_images_without_ground_truth_has_a_loss_and_no_map(run, tmp_path):
    shutil.copytree(run.settings.data_folder, tmp_path / "data")
    path = tmp_path / "data" / "TEST_objects.json"
    objects = json.loads(path.read_text())
    for entry in objects:
        entry["difficulties"] = [1] * len(entry["boxes"])
    path.write_text(json.dumps(objects))
    run.settings.data_folder = tmp_path / "data"
    result = train.validate(loader_of(run), run.model, run.criterion, "fp32")
    assert list(result) == ["loss"]
    assert result["loss"] > 0


def test_a_full_disk_keeps_the_old_checkpoint_and_is_an_error_only_at_the_end(run, tmp_path, monkeypatch):
    printed = []
    monkeypatch.setattr(runlog, "warn", printed.append)
    run.save()
    before = (tmp_path / "checkpoint.pth").read_bytes()
    for error in (OSError(28, "No space left on device"), RuntimeError("writing file failed")):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(torch, "save", fail)
        run.progress["iteration"] = 7
        run.save()
        reason = getattr(error, "strerror", "PyTorch could not write it, the disk may be full")
        assert f"{tmp_path / 'checkpoint.pth'}: iteration 7 cannot be saved ({reason})" in printed[-1]
        with pytest.raises(InputError, match="make room, then continue with --resume"):
            run.save(must=True)
    assert (tmp_path / "checkpoint.pth").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pth"]
    log = run.log()
    (tmp_path / "log.jsonl").unlink()
    (tmp_path / "log.jsonl").mkdir()
    log.append({"event": "train"})
    assert f"{tmp_path / 'log.jsonl'}: cannot write the log" in printed[-1]


def test_the_error_for_a_non_finite_gradient_names_the_images_and_has_its_own_exit_status(run):
    loader = train.training_loader(run.settings, run.dataset, 0, CPU)

    def check(losses, scaler=run.scaler):
        return train.stop_if_not_finite(losses, run.model, scaler, 2, loader)

    assert check([torch.ones(3), torch.ones(3)]) == [[1, 1, 1]] * 2
    infinite = [torch.ones(3), torch.tensor([1.0, 2.0, torch.inf])]
    with pytest.raises(DivergenceError) as caught:
        check(infinite)
    assert caught.value.status == 3
    assert str(caught.value).startswith("iteration 2: the loss or its gradient is not finite (confidence 1, local")
    for _, index in TrainingSampler(len(run.dataset), 2, seed=3, stop=5).batch(1):
        assert run.dataset.images[index] in str(caught.value)
    losses = check(infinite, torch.amp.GradScaler("cpu"))  # in fp16, the scaler skips such an update
    means = mean_losses(losses, alpha=1.0)
    assert means["skipped_updates"] == 1
    assert means["loss"] == 2
    with torch.no_grad():
        run.model.rescale_factors[0, 0] = torch.nan
    with pytest.raises(DivergenceError, match="weights are not finite"):
        check([torch.ones(3)])


def test_resuming_on_other_data_is_rejected_and_changed_settings_are_printed(run, sample, tmp_path, capsys):
    run.save()
    resume(tmp_path, "--lr", 0.5, "--iterations", 9)
    printed = capsys.readouterr().out
    assert "--lr is 0.5, and was 0.001" in printed
    assert "--iterations is 9, and was 4" in printed
    assert "--seed" not in printed
    other = tmp_path / "other"
    shutil.copytree(sample, other)
    objects = json.loads((other / "TRAIN_objects.json").read_text())
    objects[0] = {"boxes": [[1, 1, 50, 50]], "labels": [1], "difficulties": [0]}
    (other / "TRAIN_objects.json").write_text(json.dumps(objects))
    with pytest.raises(InputError, match="trained on other images"):
        resume(tmp_path, "--data-folder", other)


def test_a_checkpoint_of_the_previous_version_can_be_resumed(run, tmp_path):
    """That version validated on TEST, saved afterwards, and recorded whether the validation was interrupted."""
    del run.progress["validated_on"]
    run.progress |= {"iteration": 2, "best_loss": 1.5, "validation_due": True, "pending": [[1.0, 2.0, 3.0]]}
    run.save()
    progress = resume(tmp_path, "--validate-every", 2).progress
    assert progress == {
        "iteration": 2, "best_loss": 1.5, "best_map": -1.0, "pending": [[1.0, 2.0, 3.0]], "validated_on": "TEST"
    }  # fmt: skip


def test_two_processes_make_the_same_updates_as_one(sample, tmp_path):
    """Train three steps on an uneven split: images with many and few objects, and a process whose image has none.

    With --accumulate 2 process 0 takes its two images in two parts, and process 1 its only image in one.
    """
    data = tmp_path / "data"
    shutil.copytree(sample, data)
    order = TrainingSampler(6, 3, seed=3, stop=1).batch(0)
    objects = [{"boxes": [], "labels": [], "difficulties": []} for _ in range(6)]
    for position, n in ((0, 3), (2, 1)):  # process 0 gets images 0 and 2 of the first batch
        boxes = [[20 * i + 5, 10, 20 * i + 60, 90] for i in range(n)]
        objects[order[position][1]] = {"boxes": boxes, "labels": [1] * n, "difficulties": [0] * n}
    (data / "TRAIN_objects.json").write_text(json.dumps(objects))
    arguments = ("--data-folder", data, *RECIPE, "--batch-size", 3, "--iterations", 3, "--workers", 0)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    in_parts = ("--accumulate", 2, "--output-folder", tmp_path / "two")
    printed = "".join(launch(*TORCHRUN, TRAIN, *arguments, *in_parts, env=environment))
    assert printed.count("trained: ") == 1
    run_train(*arguments, "--output-folder", tmp_path / "one")
    one, two = (read_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("one", "two"))
    start_weights = Started(parse(*arguments, "--output-folder", tmp_path)).model.state_dict()
    changes = []
    for name, value in one["model"].items():
        # Sums in a different order round differently, which occasionally changes the maximum in a pooling layer: up to
        # 0.1% of the change in weights on several processors. Wrongly weighted shares would differ by tens of percent.
        changes.append((value - start_weights[name]).norm())
        assert (value - two["model"][name]).norm() <= 0.005 * changes[-1], name
    assert np.count_nonzero(changes) > 50  # of 71: parameters of unused priors do not change
    for ours, theirs in zip(logged_losses(tmp_path / "one"), logged_losses(tmp_path / "two"), strict=True):
        assert [ours["event"], ours["iteration"]] == [theirs["event"], theirs["iteration"]]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert (ours["gradient_norm"] or 0) == pytest.approx(theirs["gradient_norm"] or 0, rel=1e-3)


VALIDATION = """
import json, sys
import torch
import train
from datasets import PascalVOCDataset
from eval import evaluation_loader
from model import MultiBoxLoss, SSD300, create_prior_boxes
from support.devices import join_processes, leave_processes, n_processes, rank

device = join_processes()
data = PascalVOCDataset(sys.argv[1], "TEST", keep_difficult=True)
loader = evaluation_loader(data, 2, 0, device)
own = [index for batch in loader.batch_sampler for index in batch]
truth = iter([data[index] for index in own])

class Detector(SSD300):  # detects all objects but the first of each image, all with the same score
    def __init__(self):
        torch.nn.Module.__init__(self)
        self.label_map = data.label_map
        self.register_buffer("priors_cxcy", create_prior_boxes())
    def forward(self, images):
        return torch.zeros(len(images), 8732, 4), torch.zeros(len(images), 8732, 6)
    def detect_objects(self, locs, *_):
        objects = [next(truth) for _ in locs]
        return [o[1][1:] for o in objects], [o[2][1:] for o in objects], [torch.ones(len(o[1][1:])) for o in objects]

model = Detector()
result = train.validate(loader, model, MultiBoxLoss(model.priors_cxcy), "fp32")
print(f"RESULT {json.dumps([len(own), result])}\\n", end="")  # in a single write: torchrun's processes do not buffer
leave_processes()
"""


def test_two_processes_compute_the_same_validation_as_one(tmp_path):
    make_sample(tmp_path / "data", n_train=1, n_test=5, seed=2)
    script = tmp_path / "validation.py"
    script.write_text(VALIDATION)
    results = []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for launcher in ((), TORCHRUN):
        printed, _ = launch(*launcher, script, tmp_path / "data", env=environment)
        results.append([json.loads(line[7:]) for line in printed.splitlines() if line.startswith("RESULT ")])
    (one,), two = results
    assert one[0] == 5
    assert sorted(n_images for n_images, _ in two) == [2, 3]
    one = one[1]
    for _, result in two:
        assert result == {"loss": pytest.approx(one["loss"], rel=1e-5), "mAP_11_point": one["mAP_11_point"]}
    assert 0.1 < one["mAP_11_point"] < 1


def test_a_failing_process_stops_the_others(sample, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(sample, data)
    images = json.loads((data / "TRAIN_images.json").read_text())
    broken = images[TrainingSampler(6, 2, seed=3, stop=1).batch(0)[1][1]] = str(tmp_path / "broken.jpg")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(broken)
    Path(broken).write_bytes(Path(broken).read_bytes()[:-30])
    (data / "TRAIN_images.json").write_text(json.dumps(images))
    arguments = ("--data-folder", data, "--output-folder", tmp_path / "run", *RECIPE, "--batch-size", 2, "--workers", 0)
    printed = "".join(launch(*TORCHRUN, TRAIN, *arguments, status=1, env={**os.environ, "OMP_NUM_THREADS": "1"}))
    assert f"error: {broken}: cannot read this image" in printed


def test_a_dry_run_prints_the_cost_of_a_training_and_writes_nothing(sample, tmp_path):
    arguments = ("--data-folder", sample, "--output-folder", tmp_path / "run", *RECIPE, *EXTRAS, "--dry-run")
    printed = run_train(*arguments, cwd=tmp_path)
    assert "4 iterations are 0.7 epochs" in printed
    assert "validation of a batch: loss " in printed
    assert "images/s" in printed
    assert list(tmp_path.iterdir()) == []
