"""Train SSD300 by the paper's recipe.

python train.py --sample
python train.py --data-folder data/voc --output-folder runs/voc --workers 8
python train.py --resume runs/voc/checkpoint.pth
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
import time

import torch
import torchvision
from torch.utils.data import DataLoader
from tqdm import tqdm

from checkpoints import (
    load_base,
    load_checkpoint,
    load_model,
    load_optimizer,
    make_model,
    save_checkpoint,
    save_weights,
    transfer,
)
from create_data_lists import make_sample
from datasets import PascalVOCDataset, TrainingSampler, collate_fn
from devices import PRECISIONS, batches_on, choose_precision, count_cores, find_device, mixed_precision
from model import SSD300, MultiBoxLoss
from utils import InputError, check_target, run_command

# What --sample changes. On a CPU just enough to see the loss fall within minutes, on a GPU to detect well.
SAMPLE = {
    "data_folder": "data/sample",
    "output_folder": "runs/sample",
    "no_pretrained": True,
    "batch_size": 4,
    "iterations": 60,
    "lr": 3e-4,
    "decay_at": [50],
    "warmup": 10,
    "log_every": 5,
    "workers": 1,
}
SAMPLE_ON_GPU = {
    "batch_size": 32,
    "iterations": 4000,
    "lr": 1e-3,
    "decay_at": [3000, 3600],
    "warmup": 500,
    "grad_clip": 5.0,
    "log_every": 20,
    "workers": 8,
}


def make_parser():
    """Return the parser of the command line: every setting with its unit, its default and its source."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument_group("data and output").add_argument
    add("--data-folder", help="folder with the lists that create_data_lists.py writes")
    add("--output-folder", default="runs/voc", help="gets checkpoint.pth, best.pth, log.jsonl [%(default)s]")
    add("--overwrite", action="store_true", help="start anew where the output folder holds a checkpoint")
    add("--sample", action="store_true", help="make a small synthetic data set, if need be, and train on it")
    add("--no-augmentation", action="store_true", help="take the training images as they are: to overfit a few")
    add("--workers", type=int, default=count_cores(),
        help="processes that load images, 0 for none [the processor's cores, 16 at most]")  # fmt: skip

    # Paper §3 and §3.1; ssd_pascal.py, solver_param and batch_size.
    add = parser.add_argument_group("recipe (defaults: the paper's)").add_argument
    add("--batch-size", type=int, default=32, help="images per iteration [%(default)s]")
    add("--iterations", type=int, default=120_000, help="updates in all [%(default)s]")
    add("--lr", type=float, default=1e-3, help="learning rate of weights; biases get twice that [%(default)s]")
    add("--decay-at", type=int, nargs="*", default=[80_000, 100_000], metavar="N",
        help="iterations from which the rate is a tenth [80000 100000]")  # fmt: skip
    add("--momentum", type=float, default=0.9, help="of SGD [%(default)s]")
    add("--weight-decay", type=float, default=5e-4, help="of weights; biases get none [%(default)s]")
    add("--no-pretrained", action="store_true", help="start from random weights, not from ImageNet's")
    add("--base", metavar="FILE", help="start from the paper's reduced VGG-16, vgg16_reducedfc.pth, instead")
    add("--init-from", metavar="SOURCE", help="start from a whole network: any checkpoint, or coco")
    add("--seed", type=int, default=0, help="of weights, order and augmentation [%(default)s]")

    add = parser.add_argument_group("speed").add_argument
    add("--precision", choices=["auto", *PRECISIONS], default="auto",
        help="of the network's arithmetic; auto: bf16 on a GPU made for it, else fp32")  # fmt: skip
    add("--compile", action="store_true", help="compile the network first, which takes a minute and a C++ compiler")

    # Not in the paper.
    add = parser.add_argument_group("safeguards (not in the paper)").add_argument
    add("--warmup", type=int, default=0, metavar="N", help="iterations of linear rise to the rate [%(default)s]")
    add("--grad-clip", type=float, default=0.0, metavar="NORM", help="limit of the gradient's norm, 0: none")

    add = parser.add_argument_group("keeping track").add_argument
    add("--checkpoint-every", type=int, default=1000, metavar="N", help="iterations [%(default)s]")
    add("--validate-every", type=int, default=0, metavar="N",
        help="iterations between losses over the test split, by which best.pth goes; 0: never")  # fmt: skip
    add("--log-every", type=int, default=20, metavar="N", help="iterations per record in log.jsonl [%(default)s]")
    add("--resume", metavar="FILE", help="go on from this checkpoint, with its settings")
    add("--weights-only", metavar="FILE", help="at the end also write the network alone, a small file to share")
    return parser


def parse_settings(arguments=None):
    """Return the settings of a command line; a sample's or a resumed run's come before the defaults."""
    parser = make_parser()
    given = parser.parse_args(arguments)
    if bool(given.base) + bool(given.init_from) + given.no_pretrained + bool(given.resume) > 1:
        raise InputError("--base, --init-from, --no-pretrained and --resume exclude each other; give one")
    if given.sample:
        parser.set_defaults(**SAMPLE | (SAMPLE_ON_GPU if torch.cuda.is_available() else {}))
    if given.resume:
        parser.set_defaults(**load_checkpoint(given.resume)["settings"])
    settings = parser.parse_args(arguments)

    if not settings.data_folder:
        raise InputError("no data: give --data-folder, or --sample for a small synthetic set")
    if settings.weights_only:
        check_target(settings.weights_only)
    if min(settings.decay_at, default=0) < 0 or settings.seed >= 2**63 or settings.momentum >= 1:
        raise InputError("--decay-at must be 0 or more, --seed below 2**63, --momentum below 1")
    for name, least in (("batch_size", 1), ("iterations", 1), ("checkpoint_every", 1), ("log_every", 1), ("workers", 0),
                        ("validate_every", 0), ("warmup", 0), ("seed", 0), ("lr", 0), ("momentum", 0),
                        ("weight_decay", 0), ("grad_clip", 0)):  # fmt: skip
        if not least <= getattr(settings, name) < float("inf"):
            raise InputError(f"--{name.replace('_', '-')} {getattr(settings, name)}: must be {least} or more")
    return settings


def learning_rate(iteration, settings):
    """Return the rate of the update with this number, from 0: linear warm-up, then steps down by a tenth."""
    warmup = min(1.0, (iteration + 1) / settings.warmup) if settings.warmup else 1.0
    return settings.lr * warmup * 0.1 ** sum(iteration >= step for step in settings.decay_at)


def make_optimizer(model, settings):
    """Return SGD with twice the rate and no decay for biases (ssd_pascal.py: lr_mult 2, decay_mult 0)."""
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith(".bias")]
    weights = [parameter for name, parameter in model.named_parameters() if not name.endswith(".bias")]
    return torch.optim.SGD(
        [
            {"params": weights, "lr_factor": 1.0, "weight_decay": settings.weight_decay},
            {"params": biases, "lr_factor": 2.0, "weight_decay": 0.0},
        ],
        lr=settings.lr,
        momentum=settings.momentum,
        fused=True,
    )


@torch.inference_mode()
def validate(loader, model, criterion, precision):
    """Return the loss over all of a loader's images as over one batch; the model trains again afterwards."""
    device = model.priors_cxcy.device
    model.eval()
    total, positives = torch.zeros(2, device=device)
    batches = tqdm(loader, "validating", unit="batch", leave=False, disable=None)
    for images, boxes, labels, _ in batches_on(device, batches):
        with mixed_precision(precision, device):
            predictions = model(images)
        confidence, localization, n_positives = criterion.parts(*predictions, boxes, labels)
        total += (confidence + criterion.alpha * localization) * n_positives
        positives += n_positives
    model.train()
    return (total / positives.clamp(min=1)).item()


def describe_run(settings, model, precision):
    """Return the first record of a log: settings, versions, hardware, the precision chosen, commit."""
    command = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        commit = None
    return {
        "event": "start",
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "settings": vars(settings),
        "classes": list(model.label_map),
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__
        },
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores",
        "precision": precision,
        "git_commit": commit,
    }  # fmt: skip


def append_record(path, record):
    """Append one record to a log of JSON lines."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def build(settings, device):
    """Return data set, model, loss, optimizer, gradient scaler, and the iteration and best loss to go on from."""
    dataset = PascalVOCDataset(
        settings.data_folder, "TRAIN", keep_difficult=True, augment=not settings.no_augmentation, seed=settings.seed
    )  # difficult objects are trained on: ssd_pascal.py, use_difficult_gt
    start, best_loss = 0, float("inf")
    torch.manual_seed(settings.seed)
    if settings.resume:
        checkpoint = load_checkpoint(settings.resume)
        if checkpoint["label_map"] != dataset.label_map:
            raise InputError(
                f"{settings.resume}: its classes ({', '.join(checkpoint['label_map'])}) are not those of "
                f"{settings.data_folder} ({', '.join(dataset.label_map)}); resume on the same data"
            )
        for name in ("batch_size", "seed"):
            if checkpoint["settings"].get(name) != getattr(settings, name):
                raise InputError(f"{settings.resume}: trained with another --{name.replace('_', '-')}; leave it out")
        start, best_loss = checkpoint["iteration"], checkpoint["best_loss"]
        if start >= settings.iterations and not settings.weights_only:
            raise InputError(f"{settings.resume}: has its {start} iterations; give more with --iterations")
        model = make_model(checkpoint, settings.resume)
    elif settings.init_from:
        source = load_model(settings.init_from, label_map=dataset.label_map)
        model, shared = transfer(source, dataset.label_map)
        fresh = [name for name in dataset.label_map if name not in shared]
        print(f"{settings.init_from}: took all layers and the class filters of {', '.join(shared)}")
        print(f"freshly initialised: the class filters of {', '.join(fresh) or 'none'}")
    else:
        model = SSD300(len(dataset.label_map), pretrained=not (settings.no_pretrained or settings.base))
        model.label_map = dataset.label_map
        if settings.base:
            load_base(model, settings.base)
    model.to(device).train()
    if device.type == "cuda":  # on a CPU the backward pass is slower so
        model.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(model, settings)
    scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
    if start:
        load_optimizer(optimizer, scaler, checkpoint, settings.resume)
    return dataset, model, MultiBoxLoss(model.priors_cxcy), optimizer, scaler, start, best_loss


def train(settings):
    """Train from the settings' start to its end; write checkpoints and log into the output folder."""
    device = find_device()
    precision = choose_precision(settings.precision, device)
    paths = {name: os.path.join(settings.output_folder, name) for name in ("checkpoint.pth", "best.pth", "log.jsonl")}
    taken = os.path.exists(paths["checkpoint.pth"]) and not (settings.resume or settings.overwrite)
    if taken and not (settings.sample and load_checkpoint(paths["checkpoint.pth"])["settings"].get("sample")):
        raise InputError(
            f"{paths['checkpoint.pth']} is there already: go on from it with --resume {paths['checkpoint.pth']}, "
            "or give another --output-folder, or --overwrite"
        )
    dataset, model, criterion, optimizer, scaler, start, best_loss = build(settings, device)
    network = compile_network(model, settings.batch_size, precision) if settings.compile else model
    batches = TrainingSampler(len(dataset), settings.batch_size, settings.seed, settings.iterations, start)
    options = {
        "collate_fn": collate_fn, "pin_memory": device.type == "cuda", "num_workers": settings.workers,
        "persistent_workers": settings.workers > 0, "prefetch_factor": 4 if settings.workers else None,
    }  # fmt: skip
    train_loader = DataLoader(dataset, batch_sampler=batches, **options)
    if settings.validate_every:
        test_set = PascalVOCDataset(settings.data_folder, "TEST", keep_difficult=True)
        test_loader = DataLoader(test_set, batch_size=settings.batch_size, **options)

    os.makedirs(settings.output_folder, exist_ok=True)
    for name in () if settings.resume else ("log.jsonl", "best.pth"):  # an earlier run's
        if os.path.exists(paths[name]):
            os.remove(paths[name])
    run = describe_run(settings, model, precision)
    append_record(paths["log.jsonl"], run)
    print(json.dumps(run, indent=2))
    print(f"{len(dataset)} images, {settings.iterations * settings.batch_size / len(dataset):.1f} epochs")

    bar = tqdm(total=settings.iterations, initial=start, desc="training", unit="it", disable=None)
    interval = Interval()
    for done, batch in enumerate(batches_on(device, train_loader), start=start + 1):
        interval.stop_waiting()
        rate = learning_rate(done - 1, settings)
        losses = train_step(network, criterion, optimizer, scaler, batch, rate, settings.grad_clip, precision)
        interval.losses.append(losses)
        bar.update()

        # Look at the losses now and then: each look waits for the GPU. No checkpoint is written unseen.
        last = done == settings.iterations
        validate_now = settings.validate_every and (last or done % settings.validate_every == 0)
        save_now = last or done % settings.checkpoint_every == 0
        look = validate_now or save_now or done % settings.log_every == 0
        if look:
            record = interval.record(done, rate, batches, dataset, criterion.alpha)
            append_record(paths["log.jsonl"], record)
            show(bar, record)
        if (validate_now or save_now) and not all(weight.isfinite().all() for weight in model.parameters()):
            raise InputError(
                f"iteration {done}: the weights are not finite; the last checkpoint stays; lower --lr, use --warmup "
                f"or --grad-clip"
            )
        if validate_now:
            loss = validate(test_loader, model, criterion, precision)
            append_record(paths["log.jsonl"], {"event": "validation", "iteration": done, "loss": loss})
            bar.write(f"iteration {done}: validation loss {loss:.4f}")
            if loss < best_loss:
                best_loss = loss
                save_checkpoint(paths["best.pth"], model, optimizer, scaler, done, best_loss, vars(settings))
        if save_now:
            save_checkpoint(paths["checkpoint.pth"], model, optimizer, scaler, done, best_loss, vars(settings))
        if look:
            interval = Interval()  # validation and saving count in none
        interval.start_waiting()
    bar.close()
    if settings.weights_only:
        save_weights(settings.weights_only, model)
    return paths["checkpoint.pth"]


def compile_network(model, batch_size, precision):
    """Return the model compiled for batches of this size, its weights shared; InputError where PyTorch cannot."""
    network = torch.compile(model)
    device = model.priors_cxcy.device
    try:
        with mixed_precision(precision, device):
            sum(part.sum() for part in network(torch.zeros(batch_size, 3, 300, 300, device=device))).backward()
    except RuntimeError as error:  # no compiler, most often
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--compile: PyTorch cannot compile the network here ({reason}); leave it out") from error
    model.zero_grad()
    return network


def train_step(network, criterion, optimizer, scaler, batch, rate, grad_clip, precision):
    """Update the weights once; return confidence and localisation loss, (2,), left on the device."""
    images, boxes, labels, _ = batch
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]
    with mixed_precision(precision, images.device):
        predictions = network(images)
    confidence, localization, _ = criterion.parts(*predictions, boxes, labels)  # in fp32
    optimizer.zero_grad()
    scaler.scale(confidence + criterion.alpha * localization).backward()
    if grad_clip:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(network.parameters(), grad_clip)
    scaler.step(optimizer)
    scaler.update()
    return torch.stack([confidence, localization]).detach()


class Interval:
    """The losses and times of the iterations since the last record."""

    def __init__(self):
        self.losses, self.waited = [], 0.0
        self.started = self.asked = time.perf_counter()

    def start_waiting(self):
        """Note that a batch is asked for."""
        self.asked = time.perf_counter()

    def stop_waiting(self):
        """Note that it is there."""
        self.waited += time.perf_counter() - self.asked

    def record(self, iteration, rate, batches, dataset, alpha):
        """Return the log's record up to an iteration.

        :raises InputError: naming the iteration and the images of the first loss that is not finite
        """
        losses = torch.stack(self.losses).cpu()  # waits for the GPU, so that the time is that of the work
        elapsed = time.perf_counter() - self.started
        for index in (~losses.isfinite().all(dim=1)).nonzero().flatten()[:1].tolist():
            broken = iteration - len(losses) + index
            images = ", ".join(dataset.images[image] for _, image in batches.batch(broken))
            raise InputError(
                f"iteration {broken + 1}: the loss is not finite (confidence {losses[index, 0]:.4g}, localization "
                f"{losses[index, 1]:.4g}); the last checkpoint stays; lower --lr, use --warmup or --grad-clip, or "
                f"look at these images: {images}"
            )
        confidence, localization = losses.mean(dim=0).tolist()
        return {
            "event": "train", "iteration": iteration, "loss": confidence + alpha * localization,
            "confidence_loss": confidence, "localization_loss": localization, "lr": rate,
            "images_per_second": len(losses) * batches.batch_size / elapsed, "data_wait": self.waited / elapsed,
        }  # fmt: skip


def show(bar, record):
    """Show a record on the progress bar; print it where there is no bar, as in a file."""
    parts = {
        "loss": f"{record['loss']:.3f}", "conf": f"{record['confidence_loss']:.3f}",
        "loc": f"{record['localization_loss']:.3f}", "lr": f"{record['lr']:.1e}",
        "img/s": f"{record['images_per_second']:.1f}", "waiting": f"{record['data_wait']:.0%}",
    }  # fmt: skip
    bar.set_postfix(parts)
    if bar.disable:
        print(f"iteration {record['iteration']}: " + ", ".join(f"{k} {v}" for k, v in parts.items()), flush=True)


def main():
    """Run the command line."""
    settings = parse_settings()
    if settings.sample and not os.path.exists(os.path.join(settings.data_folder, "label_map.json")):
        make_sample(settings.data_folder)
    image = PascalVOCDataset(settings.data_folder, "TEST").images[0]
    checkpoint = train(settings)
    if settings.sample and not torch.cuda.is_available():
        n = SAMPLE_ON_GPU["iterations"]
        print(
            f"these {settings.iterations} iterations show that the loss falls; to detect takes thousands ({n} on a GPU)"
        )
    print(f"trained: {checkpoint}; next:")
    print(shlex.join(["python", "eval.py", "--data-folder", settings.data_folder, "--checkpoint", checkpoint]))
    image = min(image, os.path.relpath(image), key=len)
    print(shlex.join(["python", "detect.py", image, "--checkpoint", checkpoint]))


if __name__ == "__main__":
    run_command(main)
