"""Train, validate and detect on a GPU that does nothing, and write what each of them asked of it to a JSON file.

python steps.py DATA_FOLDER OUTPUT_FOLDER  # in the environment that test_nullgpu.py makes
"""

import json
import sys
from pathlib import Path

import stand_in
import torch

import model as network
import train
from eval import evaluation_loader
from model import DETECTION_LIMITS, MultiBoxLoss

TRAINING = {
    "deterministic": ["--deterministic"],
    "fp32": ["--precision", "fp32"],
    "tf32": ["--precision", "tf32"],
    "bf16": [],
    "fp16": ["--precision", "fp16"],
}
N_CANDIDATES = 1000


def observe_a_bad_step():
    """Return what is asked by a convolution of a blocking copy in the wrong layout, and by reading the sum of it."""
    weight = torch.ones(4, 3, 3, 3, device="cuda").to(memory_format=torch.channels_last)
    stand_in.forget()
    torch.conv2d(torch.ones(2, 3, 100, 100).cuda(), weight).sum().item()
    return stand_in.observed()


def train_and_observe(data_folder, output_folder, options):
    """Train four iterations by train.py; return the network, and what the third asked, the loading included."""
    observations, train_step = [], train.train_step

    def observed_step(*arguments):
        observations.append(stand_in.observed())
        stand_in.forget()
        return train_step(*arguments)

    train.train_step = observed_step
    arguments = ["--data-folder", data_folder, "--output-folder", output_folder, "--overwrite", "--no-pretrained",
                 "--batch-size", "8", "--iterations", "4", "--workers", "0", "--validate-every", "0"]  # fmt: skip
    model, complete = train.train(train.parse_settings([*arguments, *options]))
    train.train_step = train_step
    assert complete
    assert model.rescale_factors.stride() == (512, 1, 1, 1)  # DistributedDataParallel warns about channels last
    return model, observations[3]  # from the beginning of the third step to that of the fourth


def main():
    """Observe everything, and write what was observed."""
    data_folder, output_folder = sys.argv[1:]
    # Values are meaningless. Replace what they decide: here, whether losses and weights are finite.
    train.stop_if_not_finite = lambda losses, *_: [[1.0, 1.0, 1.0] for _ in losses]
    results = {"control": observe_a_bad_step()}
    for name, options in TRAINING.items():
        model, results[name] = train_and_observe(data_folder, output_folder, options)
        torch.use_deterministic_algorithms(False)

    # Which objects are detected: first none, in the validation of a batch of three images.
    device, detect_objects = model.priors_cxcy.device, model.detect_objects
    held_out = train.validation_set(train.parse_settings(["--data-folder", data_folder]))
    loader = evaluation_loader(held_out, len(held_out), 0, device)
    model.detect_objects = lambda locs, *_: [
        [torch.zeros(shape, device=device)] * len(locs) for shape in ((0, 4), (0,), (0,))
    ]
    stand_in.forget()
    train.validate(loader, model, MultiBoxLoss(model.priors_cxcy), "bf16")
    results["validation"] = stand_in.observed()

    # Then how many candidates there are, which they are, and which of them suppression keeps.
    torch.Tensor.__int__ = lambda _: N_CANDIDATES
    torch.Tensor.nonzero = lambda _: torch.zeros(N_CANDIDATES, 1, dtype=torch.long, device=device)
    network.load_nms = lambda: lambda boxes, scores, max_overlap: torch.arange(len(boxes), device=device)
    locs, scores = (torch.zeros(2, 8732, n, device=device) for n in (4, 21))
    stand_in.forget()
    boxes, labels, scores = detect_objects(locs, scores, *DETECTION_LIMITS)
    results["detection"] = stand_in.observed()
    assert {part.device.type for parts in (boxes, labels, scores) for part in parts} == {"cuda"}
    Path(output_folder, "observed.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
