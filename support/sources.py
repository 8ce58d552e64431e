"""Which checkpoint and which data folder belong together if a command line does not say.

checkpoint, data_folder, chosen_on = choose_sources(None, "data/voc")  # runs/voc/checkpoint.pth
"""

import os

from support.checkpoints import read_origin
from support.files import InputError

DATA_FOLDER = "data/voc"  # if neither the command line nor the checkpoint names one


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
    if checkpoint != "coco" and not os.path.isfile(checkpoint):
        raise InputError(
            f"{checkpoint}: no such file; train first (python train.py --data-folder {data_folder or DATA_FOLDER}), "
            "or give --checkpoint FILE, or --checkpoint coco for torchvision's weights"
        )
    origin = read_origin(checkpoint)
    trained_on = origin["data_folder"]
    if trained_on and not data_folder and not os.path.isdir(trained_on):
        raise InputError(f"{checkpoint}: its data folder, {trained_on}, does not exist any more; give --data-folder")
    data_folder = data_folder or trained_on or DATA_FOLDER
    is_other_data = trained_on and os.path.isdir(trained_on) and not os.path.samefile(trained_on, data_folder)
    return checkpoint, data_folder, None if is_other_data else origin["chosen_on"]
