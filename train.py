"""Train SSD300 by the paper's recipe.

python train.py --sample
python train.py --data-folder data/voc --output-folder runs/voc --workers 8
python train.py --resume runs/voc/checkpoint.pth
torchrun --nproc-per-node=8 train.py --data-folder data/voc --output-folder runs/voc
"""

import argparse
import glob
import itertools
import json
import os
import shlex
import time

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from checkpoints import (
    load_base,
    load_checkpoint,
    load_model,
    load_optimizer,
    make_model,
    save_weights,
    transfer,
)
from create_data_lists import make_sample
from datasets import PascalVOCDataset, TrainingSampler, collate_fn
from devices import (
    PRECISIONS,
    Interruption,
    batches_on,
    choose_precision,
    count_cores,
    ignore_signals,
    join_processes,
    leave_processes,
    make_deterministic,
    mixed_precision,
    n_processes,
    rank,
    sum_over_processes,
)
from files import InputError, check_targets, make_folder, run_command
from model import SSD300, MultiBoxLoss
from runs import Interval, Run, describe_run, fingerprint, import_tensorboard, show, train_step, validate

RUN_FILES = ("checkpoint.pth", "best.pth", "log.jsonl")  # in the output folder

# What --sample changes. On a CPU just enough to see the loss fall within minutes, on a GPU to detect well.
SAMPLE = {
    "data_folder": "data/sample",
    "output_folder": "runs/sample",
    "no_pretrained": True,
    "batch_size": 4,
    "iterations": 40,
    "lr": 3e-4,
    "decay_at": [32],
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
    add("--compile", action=argparse.BooleanOptionalAction, default=False,
        help="compile the network first, which takes a minute and a C++ compiler")  # fmt: skip

    # Not in the paper.
    add = parser.add_argument_group("safeguards (not in the paper)").add_argument
    add("--warmup", type=int, default=500, metavar="N", help="iterations of linear rise to the rate [%(default)s]")
    add("--grad-clip", type=float, default=0.0, metavar="NORM", help="limit of the gradient's norm, 0: none")

    add = parser.add_argument_group("keeping track").add_argument
    add("--checkpoint-every", type=int, default=1000, metavar="N", help="iterations [%(default)s]")
    add("--validate-every", type=int, default=0, metavar="N",
        help="iterations between losses over the test split, by which best.pth goes; 0: never")  # fmt: skip
    add("--validate-map", action="store_true",
        help="validate by 11-point mAP, too, and have best.pth go by that")  # fmt: skip
    add("--log-every", type=int, default=20, metavar="N", help="iterations per record in log.jsonl [%(default)s]")
    add("--resume", metavar="FILE", help="go on from this checkpoint, with its settings")
    add("--dry-run", action="store_true",
        help="make two steps, validate one batch, print speed, memory and duration, write nothing")  # fmt: skip
    add("--tensorboard", action="store_true",
        help="log to TensorBoard, too, with test images at each validation; needs that package")  # fmt: skip
    add("--deterministic", action="store_true",
        help="take only algorithms that give the same bits every time; slower on a GPU")  # fmt: skip
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
    kept = [settings.base, settings.init_from, settings.resume]
    kept += [os.path.join(settings.output_folder, name) for name in RUN_FILES]
    check_targets(settings.weights_only, inputs=filter(None, kept))
    if settings.tensorboard:
        import_tensorboard()
    if settings.validate_map and not settings.validate_every:
        raise InputError("--validate-map: goes with --validate-every N; give both")
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
        fused=settings.precision != "fp16",  # fused, an update that fp16 skips leaves momenta that were never set
    )


def build(settings, device, precision="fp32"):
    """Return the Run that settings describe, to be begun or to be gone on with."""
    dataset = training_set(settings)
    progress = {}
    torch.manual_seed(settings.seed)
    if settings.resume:
        checkpoint = load_checkpoint(settings.resume)
        compare_with(checkpoint, settings, dataset)
        names = ("iteration", "best_loss", "best_map", "pending", "validation_due")
        progress = {name: checkpoint[name] for name in names if name in checkpoint}
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
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    if settings.resume:
        load_optimizer(optimizer, scaler, checkpoint, settings.resume)
    return Run(settings, dataset, model, MultiBoxLoss(model.priors_cxcy), optimizer, scaler, precision, **progress)


def training_set(settings):
    """Return the images to train on; difficult objects are trained on, too (ssd_pascal.py, use_difficult_gt)."""
    return PascalVOCDataset(
        settings.data_folder, "TRAIN", keep_difficult=True, augment=not settings.no_augmentation, seed=settings.seed
    )


def compare_with(checkpoint, settings, dataset):
    """Name the settings that differ from a checkpoint's; InputError for those that make it another run."""
    if checkpoint["label_map"] != dataset.label_map:
        raise InputError(
            f"{settings.resume}: its classes ({', '.join(checkpoint['label_map'])}) are not those of "
            f"{settings.data_folder} ({', '.join(dataset.label_map)}); resume on the same data"
        )
    if checkpoint.get("data") not in (None, fingerprint(dataset)):
        raise InputError(f"{settings.resume}: trained on other images than {settings.data_folder} has; resume on those")
    for name, value in vars(settings).items():
        earlier = checkpoint["settings"].get(name)
        option = f"--{name.replace('_', '-')}"
        if name in ("batch_size", "seed") and earlier != value:
            raise InputError(f"{settings.resume}: trained with another {option}, {earlier}; leave it out")
        if name not in ("resume", "weights_only", "dry_run", "overwrite") and earlier != value and rank() == 0:
            print(f"{option} is {value}, and was {earlier}")
    done = checkpoint["iteration"]
    if done >= settings.iterations and not (settings.weights_only or checkpoint.get("validation_due")):
        raise InputError(f"{settings.resume}: has its {done} iterations; give more with --iterations")


def train(settings):
    """Train from the settings' start to its end, or until interrupted; return the Run, which tells how far it came."""
    if settings.deterministic:
        make_deterministic()
    device = join_processes()
    precision = choose_precision(settings.precision, device)
    if settings.batch_size < n_processes():
        raise InputError(f"--batch-size {settings.batch_size}: too small for {n_processes()} processes; give more")
    checkpoint = os.path.join(settings.output_folder, "checkpoint.pth")
    taken = os.path.exists(checkpoint) and not (settings.resume or settings.overwrite or settings.dry_run)
    if taken and not (settings.sample and load_checkpoint(checkpoint)["settings"].get("sample")):
        raise InputError(
            f"{checkpoint} is there already: go on from it with --resume {checkpoint}, "
            "or give another --output-folder, or --overwrite"
        )
    run = build(settings, device, precision)
    share = -(-settings.batch_size // n_processes())
    network = compile_network(run.model, share, precision) if settings.compile else run.model
    if n_processes() > 1:
        network = DistributedDataParallel(network, gradient_as_bucket_view=True)

    # Each process takes its share of every batch, and of the images to validate on.
    batches = TrainingSampler(
        len(run.dataset),
        settings.batch_size,
        settings.seed,
        settings.iterations,
        run.iteration,
        (rank(), n_processes()),
    )
    options = loader_options(settings, device)
    train_loader = DataLoader(run.dataset, batch_sampler=batches, **options)
    test_loader = None
    if settings.validate_every:
        run.test_set = PascalVOCDataset(settings.data_folder, "TEST", keep_difficult=True)
        if settings.validate_map and not any(0 in objects["difficulties"] for objects in run.test_set.objects):
            raise InputError(f"--validate-map: the test split of {settings.data_folder} has no object to be found")
        own = Subset(run.test_set, range(rank(), len(run.test_set), n_processes()))
        test_loader = DataLoader(own, batch_size=share, **options)
    if settings.dry_run:
        dry_run(run, network, train_loader, test_loader)
        return run

    if rank() == 0:
        make_folder(settings.output_folder)
        if not settings.resume and os.path.exists(run.path("best.pth")):  # an earlier run's
            os.remove(run.path("best.pth"))
        for name in RUN_FILES:
            for half_written in glob.glob(f"{glob.escape(run.path(name))}.*.tmp"):  # when an earlier run was killed
                os.remove(half_written)
        description = describe_run(settings, run.model, precision)
        run.prepare_log(description)
        print(json.dumps(description, indent=2))
        print(f"{len(run.dataset)} images, {run.n_epochs:.1f} epochs", flush=True)
        if settings.tensorboard:
            run.open_board()
    with Interruption() as interruption:
        if run.validation_due and test_loader:
            run.validate(test_loader, interruption)
            run.save("checkpoint.pth", must=True)
        iterate(run, network, train_loader, test_loader, interruption)
    return run


def loader_options(settings, device):
    """Return how a DataLoader is to load images for a training."""
    return {
        "collate_fn": collate_fn, "pin_memory": device.type == "cuda", "num_workers": settings.workers,
        "persistent_workers": settings.workers > 0, "prefetch_factor": 4 if settings.workers else None,
        "worker_init_fn": ignore_signals,
    }  # fmt: skip


def iterate(run, network, train_loader, test_loader, interruption):
    """Make the iterations that are left."""
    settings, batches, losses = run.settings, train_loader.batch_sampler, []
    bar = tqdm(total=settings.iterations, initial=run.iteration, desc="training", unit="it", disable=rank() > 0 or None)
    interval = Interval(run.iteration)
    for batch in batches_on(run.model.priors_cxcy.device, train_loader):
        interval.stop_waiting()
        rate = learning_rate(run.iteration, settings)
        losses.append(train_step(run, network, batch, rate))
        run.iteration += 1
        bar.update()

        # Look at the losses now and then: each look waits for the GPU. No checkpoint is written unseen.
        last = run.iteration == settings.iterations
        log_now, validate_now, save_now = (
            every and (last or run.iteration % every == 0)
            for every in (settings.log_every, settings.validate_every, settings.checkpoint_every)
        )
        stop = interruption.agreed()
        if log_now or validate_now or save_now or stop:
            run.check(losses, batches)
            losses.clear()
        if log_now:
            record = interval.record(run, rate, batches.batch_size)
            run.append(record)
            if rank() == 0:
                show(bar, record)
            if run.iteration % settings.log_every == 0:
                run.pending.clear()
        if validate_now:
            run.validate(test_loader, interruption)
            stop = interruption.agreed()
        if save_now or stop:
            run.save("checkpoint.pth", must=last or stop)
        if log_now:
            interval = Interval(run.iteration)  # validation and saving count in none
        if stop:
            break
        interval.start_waiting()
    bar.close()


def dry_run(run, network, train_loader, test_loader):
    """Make two steps, the second of them timed, and validate one batch; print what a training would take."""
    settings, device = run.settings, run.model.priors_cxcy.device
    say = print if rank() == 0 else lambda _: None
    asked = time.perf_counter()
    for batch in itertools.islice(batches_on(device, train_loader), 2):
        started = time.perf_counter()
        losses = sum_over_processes(train_step(run, network, batch, learning_rate(0, settings))).tolist()
        waited, asked = started - asked, time.perf_counter()
        seconds = asked - started
        say(f"step in {seconds:.2f} s, after {waited:.2f} s for its images; loss {sum(losses[:2]):.3f}")
    if test_loader:
        batch = list(itertools.islice(test_loader, 1))
        result = validate(batch, run.model, run.criterion, run.precision, settings.validate_map)
        say("validation of a batch: " + ", ".join(f"{name} {value:.3f}" for name, value in result.items()))
    if device.type == "cuda":
        say(f"memory of the GPU: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most")
    hours = (settings.iterations - run.iteration) * seconds / 3600
    say(f"{settings.batch_size / seconds:.1f} images/s; {settings.iterations} iterations are {run.n_epochs:.1f} epochs "
        f"and take about {hours:.1f} hours at that speed; nothing was written")  # fmt: skip


def compile_network(model, batch_size, precision):
    """Return the model compiled for batches of this size, its weights shared; InputError where PyTorch cannot."""
    network = torch.compile(model)
    device = model.priors_cxcy.device
    try:
        with mixed_precision(precision, device):
            ((images,),) = batches_on(device, [(torch.zeros(batch_size, 3, 300, 300),)])
            sum(part.sum() for part in network(images)).backward()
    except RuntimeError as error:  # no compiler, most often
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--compile: PyTorch cannot compile the network here ({reason}); take --no-compile") from error
    model.zero_grad()
    return network


def main():
    """Run the command line."""
    settings = parse_settings()
    join_processes()
    try:
        if settings.sample and rank() == 0 and not os.path.exists(os.path.join(settings.data_folder, "label_map.json")):
            make_sample(settings.data_folder)
        sum_over_processes(torch.zeros(1))  # wait for it
        run = train(settings)
        is_first = rank() == 0
    finally:
        leave_processes()
    if is_first and not settings.dry_run:
        say_what_is_next(run)


def say_what_is_next(run):
    """Export the weights where asked to, and print the commands that go on from a run."""
    settings, checkpoint = run.settings, run.path("checkpoint.pth")
    if not run.finished:
        print(f"interrupted, and saved; go on with: {shlex.join(['python', 'train.py', '--resume', checkpoint])}")
        return
    if settings.weights_only:
        save_weights(settings.weights_only, run.model)
    if settings.sample and not torch.cuda.is_available():
        n = SAMPLE_ON_GPU["iterations"]
        print(
            f"these {settings.iterations} iterations show that the loss falls; to detect takes thousands ({n} on a GPU)"
        )
    print(f"trained: {checkpoint}; next:")
    print(shlex.join(["python", "eval.py", "--data-folder", settings.data_folder, "--checkpoint", checkpoint]))
    image = PascalVOCDataset(settings.data_folder, "TEST").images[0]
    image = min(image, os.path.relpath(image), key=len)
    print(shlex.join(["python", "detect.py", image, "--checkpoint", checkpoint]))


if __name__ == "__main__":
    run_command(main)
