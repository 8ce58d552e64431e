"""Checkpoints: the one place that knows their layout. They hold tensors and plain Python values, nothing else.

model = load_model("runs/voc/best.pth", device="cuda")
names = {index: name for name, index in model.label_map.items()}
"""

import torch

from model import PRIOR_FAMILIES, SSD300
from utils import InputError, atomic_writer, check_label_map

FORMAT = "ssd300-1"  # changes when older files can no longer be read


def save_checkpoint(path, model, optimizer, iteration, best_loss, settings):
    """Write everything that training goes on from, whole or not at all.

    :param path: of the file, replaced if it is there
    :param model: SSD300 whose label_map is set
    :param optimizer: its optimizer
    :param iteration: number of updates made
    :param best_loss: lowest validation loss so far
    :param settings: dict of plain values that describe the run
    """
    checkpoint = {
        "format": FORMAT,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "iteration": iteration,
        "best_loss": best_loss,
        "settings": settings,
        "label_map": model.label_map,
        "priors": model.priors,
    }
    with atomic_writer(path) as file:
        torch.save(checkpoint, file)


def load_checkpoint(path):
    """Read what `save_checkpoint` wrote, on the CPU, without running any code from the file.

    :return: the dictionary
    :raises InputError: naming the file, where it is missing, broken, or not such a checkpoint
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such checkpoint; give the path of one that train.py wrote") from error
    except Exception as error:  # torch.load raises a dozen types on truncated, foreign and hostile files
        raise InputError(
            f"{path}: cannot be read as a checkpoint, it is truncated, foreign or unsafe; give one that train.py wrote"
        ) from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise InputError(f"{path}: not a checkpoint of this code (format {FORMAT}); give one that train.py wrote")
    keys = ("model", "optimizer", "iteration", "best_loss", "settings", "label_map", "priors")
    missing = [key for key in keys if key not in checkpoint]
    if missing or checkpoint["priors"] not in PRIOR_FAMILIES:
        raise InputError(f"{path}: damaged checkpoint, without {', '.join(missing) or 'known priors'}; give another")
    check_label_map(checkpoint["label_map"], path)
    return checkpoint


def load_weights(model, weights, path):
    """Load a state dict into a model; InputError that names `path` where it does not fit."""
    try:
        model.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise InputError(
            f"{path}: its weights do not fit an SSD300 with {model.n_classes} classes, background included; "
            "give a checkpoint of this class set"
        ) from error


def load_model(source, device="cpu"):
    """Return the SSD300 of a checkpoint in eval mode, with its `.label_map` (name -> index, background 0).

    :param source: path of a checkpoint
    :param device: where the model is put
    :raises InputError: naming the file, where it cannot be used
    """
    checkpoint = load_checkpoint(source)
    model = SSD300(len(checkpoint["label_map"]), pretrained=False, priors=checkpoint["priors"])
    load_weights(model, checkpoint["model"], source)
    model.label_map = checkpoint["label_map"]
    return model.to(device).eval()
