"""The output folder of a training: where it is, when it may be overwritten, what a run may resume from.

checkpoint, data_folder, chosen_on = choose_sources(None, "data/voc")  # runs/voc/checkpoint.pth
check_overwriting(settings)
check_same_run(read_checkpoint(path), settings, defaults, dataset)
"""

import glob
import os
import shlex
from contextlib import suppress

from support.checkpoints import read_checkpoint, read_origin
from support.devices import any_process, rank
from support.files import InputError
from support.runlog import read_log, warn

DATA_FOLDER = "data/voc"  # if neither the command line nor a checkpoint names one
RUN_FILES = ("checkpoint.pth", "best.pth", "log.jsonl", "curves.png", "detected.png")  # in the output folder
# Settings that a resumed run cannot change.
FIXED = ("batch_size", "seed", "size", "priors", "no_pretrained", "base", "init_from", "no_difficult")
MAX_NAMES = 8  # of classes to print
MANY_EPOCHS = 1000  # the published schedule makes 232 on VOC


def run_folder(data_folder):
    """Return the output folder of a training on a data folder, unless another one is given."""
    return os.path.join("runs", os.path.basename(os.path.abspath(data_folder)))


def choose_sources(checkpoint, data_folder):
    """Return the checkpoint and the data folder to score; what is None is completed from the other.

    :param checkpoint: file, or "coco" for torchvision's weights; by default that of the run on the data folder
    :param data_folder: by default the one that the checkpoint was trained on, or DATA_FOLDER if it does not say
    :return: checkpoint; data folder; the split of this data whose score chose the checkpoint from its run, or None
    :raises InputError: if the checkpoint or the data folder does not exist
    """
    if data_folder and not os.path.isdir(data_folder):
        raise InputError(f"{data_folder}: no such folder; give a --data-folder that create_data_lists.py made")
    checkpoint = checkpoint or os.path.join(run_folder(data_folder or DATA_FOLDER), "checkpoint.pth")
    if checkpoint != "coco" and not os.path.exists(checkpoint):
        train = shlex.join(["python", "train.py", "--data-folder", data_folder or DATA_FOLDER])
        raise InputError(
            f"{checkpoint}: no such file; train first ({train}), "
            "or give --checkpoint FILE, or --checkpoint coco for torchvision's weights"
        )
    origin = read_origin(checkpoint)
    trained_on = origin["data_folder"]
    if trained_on and not data_folder and not os.path.isdir(trained_on):
        raise InputError(f"{checkpoint}: its data folder, {trained_on}, does not exist any more; give --data-folder")
    data_folder = data_folder or trained_on or DATA_FOLDER
    is_other_data = trained_on and os.path.isdir(trained_on) and not os.path.samefile(trained_on, data_folder)
    return checkpoint, data_folder, None if is_other_data else origin["chosen_on"]


def option(name):
    """Return a setting's name as the command line spells it."""
    return f"--{name.replace('_', '-')}"


def check_overwriting(settings):
    """Raise InputError if a new run would overwrite an earlier one; but a sample run may overwrite a sample run."""
    checkpoint = os.path.join(settings.output_folder, "checkpoint.pth")
    if not os.path.exists(checkpoint) or settings.resume or settings.overwrite or settings.dry_run:
        return
    if not (settings.sample and read_checkpoint(checkpoint)["settings"].get("sample")):
        raise InputError(
            f"{checkpoint} exists: continue from it with --resume {checkpoint}, or give another --output-folder, "
            "or --overwrite"
        )


def check_same_run(checkpoint, settings, defaults, dataset):
    """Print the settings that differ from a checkpoint's, and raise InputError if they make it another run.

    :param checkpoint: as `read_checkpoint` returns it
    :param settings, defaults: dicts of the settings; the defaults are for settings that an earlier version did not have
    :param dataset: the training set, with its label_map and fingerprint
    """
    source, folder = settings["resume"], settings["data_folder"]
    if checkpoint["label_map"] != dataset.label_map:
        raise InputError(
            f"{source}: its classes ({', '.join(checkpoint['label_map'])}) are not those of {folder} "
            f"({', '.join(dataset.label_map)}); resume on the same data"
        )
    if checkpoint.get("data") not in (None, dataset.fingerprint):
        raise InputError(f"{source}: trained on other images or objects than {folder} has; resume on the same data")
    earlier_settings = defaults | checkpoint["settings"]
    for name, value in settings.items():
        earlier = earlier_settings[name]
        if name in FIXED and earlier != value:
            is_off = earlier is None or earlier is False
            how = f"without {option(name)}" if is_off else f"with {option(name)} {earlier}"
            raise InputError(f"{source}: this run was started {how}, which cannot change; leave {option(name)} out")
        if name not in ("resume", "weights_only", "dry_run", "overwrite") and earlier != value and rank() == 0:
            print(f"{option(name)} is {value}, and was {earlier}")


def list_files(folder):
    """Return the paths of all files that a run may write to its output folder."""
    numbered = glob.glob(os.path.join(glob.escape(folder), "checkpoint_*.pth"))
    return [os.path.join(folder, name) for name in RUN_FILES] + numbered


def clean(folder, is_new):
    """Remove what a run that was killed left half-written and, for a new run, results of an earlier one.

    checkpoint.pth and log.jsonl stay until they are replaced, numbered checkpoints for good.
    """
    for name in (*RUN_FILES, "checkpoint_*.pth"):
        for temporary in glob.glob(os.path.join(glob.escape(folder), f"{name}.*.tmp")):
            os.remove(temporary)
    if is_new:
        for name in ("best.pth", "curves.png", "detected.png"):
            with suppress(FileNotFoundError):
                os.remove(os.path.join(folder, name))


def is_still_true(iteration, log_every, validates_first, record):
    """Tell whether a record of an earlier log is still true in a run that resumes.

    :param iteration: number of updates made before
    :param log_every: iterations per record
    :param validates_first: whether the run begins with the validation of that iteration
    """
    logged_at = record.get("iteration", 0)
    if record["event"] == "validation" and validates_first:
        return logged_at < iteration
    is_extra = record["event"] == "train" and logged_at % log_every != 0  # made at the end of a run
    return logged_at <= iteration and not is_extra


def take_in_validations(progress, records):
    """Update "best_loss" and "best_map" of a resumed run by the log: its checkpoint was saved before its validation.

    Only validations on the same split count. Earlier versions validated on TEST and did not log the split.
    """
    for record in records:
        if record["event"] == "validation" and record.get("split", "TEST") == progress["validated_on"]:
            progress["best_loss"] = min(progress["best_loss"], record["loss"])
            progress["best_map"] = max(progress["best_map"], record.get("mAP_11_point", -1.0))


def is_due(iteration, every, last):
    """Tell whether a periodic action is due after an update: after each `every` updates (0: never), and at the end."""
    return every > 0 and iteration > 0 and (iteration % every == 0 or iteration == last)


def validation_is_missing(settings, iteration):
    """Tell whether a resumed run must first validate: a checkpoint is saved before the validation of its iteration.

    The validation is repeated even if it was made. Only a finished run that has logged it does not repeat it.
    """
    records = read_log(settings.output_folder) if rank() == 0 else []  # only process 0 is sure to have the log
    logged = any(record["event"] == "validation" and record.get("iteration") == iteration for record in records)
    is_finished = any_process(logged) and iteration >= settings.iterations
    return is_due(iteration, settings.validate_every, settings.iterations) and not is_finished


def announce(description, dataset, held_out):
    """Print the network, the data, and the length of the training.

    :param description: as `runlog.describe_run` returns it
    :param dataset, held_out: data sets for training and for validation; None for no validation
    """
    settings = description["settings"]
    names = [name for name in description["classes"] if name != "background"]
    shown = ", ".join(names[:MAX_NAMES]) + (" …" if len(names) > MAX_NAMES else "")
    device = f"{description['precision']} on {description['hardware']}"
    print(f"SSD{settings['size']} of {len(names)} classes ({shown}), {device}")
    epochs = settings["iterations"] * settings["batch_size"] / len(dataset)
    print(f"{len(dataset)} images of {settings['data_folder']}, {settings['iterations']} iterations of "
          f"{settings['batch_size']} images: {epochs:.1f} epochs")  # fmt: skip
    if settings["sample"] and settings["no_augmentation"]:
        print("the network only overfits these few images, which shows without a GPU that everything works")
    elif held_out is None:
        print("no validation: --validate-every N turns it on, and there must be objects to validate on")
    else:
        print(f"validation every {settings['validate_every']} iterations and at the end, on the {len(held_out)} images "
              f"of the {held_out.split} split")  # fmt: skip
    if held_out and held_out.split == "TEST":
        print("best.pth is chosen on the test images, so its score on them will be optimistic; to avoid that, make a "
              "VAL split with create_data_lists.py --validation")  # fmt: skip
    if epochs > MANY_EPOCHS:
        warn(f"{epochs:.0f} epochs; a shorter training, such as --epochs 200, may be enough")
    print(f"output: {settings['output_folder']}; all settings are in its log.jsonl", flush=True)


def say_what_is_next(settings, complete, split, example):
    """Print where the results of a run are and the commands that continue from it.

    :param complete: whether the run has made all its iterations
    :param split: to score
    :param example: path of an image of that split, or None if the split does not exist
    """
    checkpoint = os.path.join(settings.output_folder, "checkpoint.pth")
    checkpoint = checkpoint if os.path.exists(checkpoint) else settings.resume  # resumed into another folder
    if not complete:
        print(f"interrupted and saved; continue with: {shlex.join(['python', 'train.py', '--resume', checkpoint])}")
        return
    curves = os.path.join(settings.output_folder, "curves.png")
    print(f"trained: {checkpoint}; curves: {curves if os.path.exists(curves) else 'none, pip install matplotlib'}")
    if example:
        print("next:")
        print(shlex.join(["python", "eval.py", "--checkpoint", checkpoint, "--split", split]))
        output = os.path.join(settings.output_folder, "example.png")
        options = ["--checkpoint", checkpoint, "--output", output, "--min-score", "0.5"]
        print(shlex.join(["python", "detect.py", min(example, os.path.relpath(example), key=len), *options]))
