"""Train SSD300 by the schedule of the released Caffe networks.

python train.py --sample
python train.py --data-folder data/voc --output-folder runs/voc --workers 8
python train.py --resume runs/voc/checkpoint.pth
torchrun --nproc-per-node=8 train.py --data-folder data/voc --output-folder runs/voc
"""

import argparse
import glob
import itertools
import json
import math
import os
import shlex
import time
from functools import partial

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from datasets import PascalVOCDataset, TrainingSampler, collate_fn
from detect import annotate, find_objects
from eval import detect_all, evaluation_loader
from model import DETECTION_LIMITS, EVALUATION_LIMITS, SSD300, MultiBoxLoss, build_model, load_model
from support import runlog
from support.checkpoints import CAFFE_MEAN, load_optimizer, read_base, read_checkpoint, save_checkpoint, save_weights
from support.devices import (
    PRECISIONS,
    Interruption,
    any_process,
    batches_on,
    choose_precision,
    compile_network,
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
from support.files import DivergenceError, InputError, check_outputs, make_folder, run_command
from support.images import draw_boxes, read_image
from support.labels import label_color_map, label_names
from support.sample import make_sample
from utils import IMAGE_SIZE, calculate_mAP

RUN_FILES = ("checkpoint.pth", "best.pth", "log.jsonl")  # in the output folder

# Defaults that --sample changes. On a CPU: enough to see the loss fall within minutes. On a GPU: enough to detect well.
SAMPLE = {
    "data_folder": "data/sample", "output_folder": "runs/sample", "no_pretrained": True, "batch_size": 4,
    "iterations": 40, "lr": 3e-4, "decay_at": [32], "warmup": 10, "log_every": 5, "workers": 1,
}  # fmt: skip
SAMPLE_ON_GPU = {
    "batch_size": 32, "iterations": 4000, "lr": 1e-3, "decay_at": [3000, 3600], "warmup": 500, "grad_clip": 5.0,
    "log_every": 20, "workers": 8,
}  # fmt: skip


def make_parser():
    """Return the parser of the command line: every setting with its unit, its default and its source."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument_group("data and output").add_argument
    add("--data-folder", help="folder with the lists that create_data_lists.py writes")
    add("--output-folder", default="runs/voc", help="gets checkpoint.pth, best.pth and log.jsonl [%(default)s]")
    add("--overwrite", action="store_true", help="start anew even if the output folder holds a checkpoint")
    add("--sample", action="store_true", help="train on a small synthetic data set, made if it does not exist")
    add("--no-augmentation", action="store_true", help="do not augment, for instance to overfit a few images")
    add("--workers", type=int, default=count_cores(),
        help="processes that load images, 0 for none [number of cores, at most 16]")  # fmt: skip

    # ssd_pascal.py: solver_param and batch_size; paper §3 and §3.1.
    add = parser.add_argument_group("recipe (defaults: Caffe's)").add_argument
    add("--batch-size", type=int, default=32, help="images per iteration [%(default)s]")
    add("--iterations", type=int, default=120_000, help="updates in all [%(default)s]")
    add("--lr", type=float, default=1e-3, help="learning rate of the weights; biases get twice that [%(default)s]")
    add("--decay-at", type=int, nargs="*", default=[80_000, 100_000], metavar="N",
        help="iterations after which the rate is divided by 10 [80000 100000]")  # fmt: skip
    add("--momentum", type=float, default=0.9, help="of SGD [%(default)s]")
    add("--weight-decay", type=float, default=5e-4, help="of the weights; biases get none [%(default)s]")
    add("--no-pretrained", action="store_true", help="start from random weights instead of ImageNet's")
    add("--base", metavar="FILE", help="start from the paper's reduced VGG-16, vgg16_reducedfc.pth, instead")
    add("--init-from", metavar="SOURCE", help="start from a whole network: any checkpoint, or coco")
    add("--seed", type=int, default=0, help="of weights, order and augmentation [%(default)s]")

    add = parser.add_argument_group("speed").add_argument
    add("--precision", choices=["auto", *PRECISIONS], default="auto",
        help="of the network's arithmetic; auto: bf16 on a GPU with native support, else fp32")  # fmt: skip
    add("--compile", action=argparse.BooleanOptionalAction, default=False,
        help="compile the network first; takes a minute and a C++ compiler")  # fmt: skip

    add = parser.add_argument_group("safeguards (not in the paper)").add_argument
    add("--warmup", type=int, default=500, metavar="N",
        help="iterations over which the learning rate rises linearly [%(default)s]")  # fmt: skip
    add("--grad-clip", type=float, default=0.0, metavar="NORM", help="limit of the gradient's norm, 0 for none")

    add = parser.add_argument_group("progress").add_argument
    add("--checkpoint-every", type=int, default=1000, metavar="N", help="iterations [%(default)s]")
    add("--validate-every", type=int, default=0, metavar="N",
        help="iterations between losses over the test split, for best.pth; 0: never [%(default)s]")  # fmt: skip
    add("--validate-map", action="store_true", help="also validate by 11-point mAP, which then decides best.pth")
    add("--log-every", type=int, default=20, metavar="N", help="iterations per record in log.jsonl [%(default)s]")
    add("--resume", metavar="FILE", help="continue from this checkpoint, with its settings")
    add("--dry-run", action="store_true",
        help="make two steps, validate one batch, print speed, memory and duration; write nothing")  # fmt: skip
    add("--tensorboard", action="store_true",
        help="also log to TensorBoard, with test images at each validation; needs the tensorboard package")  # fmt: skip
    add("--deterministic", action="store_true",
        help="use only algorithms that give the same bits every time; slower on a GPU")  # fmt: skip
    add("--weights-only", metavar="FILE", help="at the end also write the network alone, a small file to share")
    return parser


def parse_settings(arguments=None):
    """Return the settings: those given, then those of the sample or of the run to resume, then the defaults."""
    parser = make_parser()
    given = parser.parse_args(arguments)
    if bool(given.base) + bool(given.init_from) + given.no_pretrained + bool(given.resume) > 1:
        raise InputError("--base, --init-from, --no-pretrained and --resume exclude each other; give one of them")
    if given.sample:
        parser.set_defaults(**SAMPLE | (SAMPLE_ON_GPU if torch.cuda.is_available() else {}))
    if given.resume:
        parser.set_defaults(**read_checkpoint(given.resume)["settings"])
    settings = parser.parse_args(arguments)
    check_settings(settings)
    return settings


def check_settings(settings):
    """Raise InputError if settings are impossible or contradict each other."""
    if not settings.data_folder:
        raise InputError("no data: give --data-folder, or --sample for a small synthetic data set")
    inputs = [settings.base, settings.init_from, settings.resume]
    inputs += [os.path.join(settings.output_folder, name) for name in RUN_FILES]
    check_outputs(settings.weights_only, inputs=filter(None, inputs))
    if settings.tensorboard:
        runlog.import_tensorboard()
    if settings.validate_map and not settings.validate_every:
        raise InputError("--validate-map: needs --validate-every N; give both")
    if min(settings.decay_at, default=0) < 0 or settings.seed >= 2**63 or settings.momentum >= 1:
        raise InputError("--decay-at must be 0 or more, --seed below 2**63, --momentum below 1")
    smallest = {
        "batch_size": 1, "iterations": 1, "checkpoint_every": 1, "log_every": 1, "workers": 0, "validate_every": 0,
        "warmup": 0, "seed": 0, "lr": 0, "momentum": 0, "weight_decay": 0, "grad_clip": 0,
    }  # fmt: skip
    for name, least in smallest.items():
        if not least <= getattr(settings, name) < math.inf:  # False for NaN, too
            raise InputError(f"{_option(name)} {getattr(settings, name)}: must be {least} or more")


def _option(name):
    return f"--{name.replace('_', '-')}"


def training_set(settings):
    """Return the images to train on, difficult objects included (ssd_pascal.py, use_difficult_gt)."""
    return PascalVOCDataset(
        settings.data_folder, "TRAIN", keep_difficult=True, augment=not settings.no_augmentation, seed=settings.seed
    )


def start_model(settings, label_map):
    """Return the SSD300 that a new run starts from."""
    if settings.init_from:
        source = load_model(settings.init_from, label_map=label_map)
        model, shared = transfer(source, label_map)
        fresh = [name for name in label_map if name not in shared]
        print(f"{settings.init_from}: took all layers and the class filters of {', '.join(shared)}")
        print(f"freshly initialised: the class filters of {', '.join(fresh) or 'none'}")
        return model
    model = SSD300(len(label_map), pretrained=not (settings.no_pretrained or settings.base))
    model.label_map = label_map
    if settings.base:
        model.base.load_state_dict(read_base(settings.base, model.base.state_dict()))
        model.set_pixel_mean(CAFFE_MEAN)
    return model


def transfer(source, label_map):
    """Return an SSD300 for other classes with the weights of `source`, and the names of the classes carried over.

    All layers are taken. The class heads keep the filters of classes that both know by name; the others are fresh.
    """
    model = SSD300(len(label_map), pretrained=False, priors=source.priors, pixel_mean=source.pixel_mean)
    model.label_map = label_map
    shared = [name for name in label_map if name in source.label_map]
    ours, theirs = ([classes[name] for name in shared] for classes in (label_map, source.label_map))
    weights = model.state_dict()
    for name, value in source.state_dict().items():
        if name.startswith("pred_convs.cl_"):
            # (n_priors * n_classes, ...) -> (n_priors, n_classes, ...)
            per_class = weights[name].unflatten(0, (-1, model.n_classes))
            per_class[:, ours] = value.unflatten(0, (-1, source.n_classes))[:, theirs]
        else:
            weights[name].copy_(value)
    return model, shared


def learning_rate(iteration, settings):
    """Return the learning rate of an update, from 0: a linear rise (warm-up), then a tenth at each step of decay_at."""
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
        fused=settings.precision != "fp16",  # fused SGD leaves momenta uninitialised if fp16 skips the first update
    )


def start_or_resume(settings, dataset, device, precision):
    """Return the model, its optimizer and gradient scaler, and the progress of the run.

    :return: SSD300 on the device, in training mode; optimizer; scaler; {"iteration": number of updates made,
        "best_loss", "best_map": of the validations so far, "pending": losses since the last regular record of the log}
    """
    progress = {"iteration": 0, "best_loss": math.inf, "best_map": -1.0, "pending": []}
    torch.manual_seed(settings.seed)
    if settings.resume:
        checkpoint = read_checkpoint(settings.resume)
        check_same_run(checkpoint, settings, dataset)
        progress |= {name: checkpoint[name] for name in progress if name in checkpoint}
        model = build_model(checkpoint, settings.resume)
    else:
        model = start_model(settings, dataset.label_map)
    model.to(device).train()
    if device.type == "cuda":  # on a CPU it slows the backward pass down
        model.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(model, settings)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    if settings.resume:
        load_optimizer(optimizer, scaler, checkpoint, settings.resume)
    return model, optimizer, scaler, progress


def check_same_run(checkpoint, settings, dataset):
    """Print the settings that differ from a checkpoint's, and raise InputError if they make it another run."""
    if checkpoint["label_map"] != dataset.label_map:
        raise InputError(
            f"{settings.resume}: its classes ({', '.join(checkpoint['label_map'])}) are not those of "
            f"{settings.data_folder} ({', '.join(dataset.label_map)}); resume on the same data"
        )
    if checkpoint.get("data") not in (None, dataset.fingerprint):
        raise InputError(f"{settings.resume}: trained on other images than those of {settings.data_folder}")
    for name, value in vars(settings).items():
        earlier = checkpoint["settings"].get(name)
        if name in ("batch_size", "seed") and earlier != value:
            raise InputError(f"{settings.resume}: trained with {_option(name)} {earlier}, which cannot change")
        if name not in ("resume", "weights_only", "dry_run", "overwrite") and earlier != value and rank() == 0:
            print(f"{_option(name)} is {value}, and was {earlier}")
    done = checkpoint["iteration"]
    if done >= settings.iterations and not (settings.weights_only or validation_is_missing(settings, done)):
        raise InputError(f"{settings.resume}: has finished its {done} iterations; to train further, raise --iterations")


def training_loader(settings, dataset, iteration, device):
    """Return the loader of this process's share of the batches from an iteration on."""
    if settings.batch_size < n_processes():
        raise InputError(f"--batch-size {settings.batch_size}: too small for {n_processes()} processes; give more")
    sampler = TrainingSampler(
        len(dataset), settings.batch_size, settings.seed, settings.iterations, iteration, (rank(), n_processes())
    )
    return DataLoader(
        dataset, batch_sampler=sampler, collate_fn=collate_fn, pin_memory=device.type == "cuda",
        num_workers=settings.workers, prefetch_factor=4 if settings.workers else None, worker_init_fn=ignore_signals,
    )  # fmt: skip


def validation_loader(settings, device):
    """Return the loader of this process's share of the test images, None without validation."""
    if not settings.validate_every:
        return None
    test_set = PascalVOCDataset(settings.data_folder, "TEST", keep_difficult=True)
    if settings.validate_map and not any(0 in objects["difficulties"] for objects in test_set.objects):
        raise InputError(f"--validate-map: the test split of {settings.data_folder} has no ground truth to score by")
    return evaluation_loader(test_set, share_of(settings.batch_size), settings.workers, device)


def share_of(batch_size):
    """Return the number of images of a batch that one process gets at most."""
    return -(-batch_size // n_processes())


def train(settings):
    """Train until the last iteration or an interruption; return the SSD300, and whether the run is complete."""
    # Prepare the device, the data and the network.
    if settings.deterministic:
        make_deterministic()
    device = join_processes()
    precision = choose_precision(settings.precision, device)
    check_overwriting(settings)
    dataset = training_set(settings)
    model, optimizer, scaler, progress = start_or_resume(settings, dataset, device, precision)
    criterion = MultiBoxLoss(model.priors_cxcy)
    network = model
    if settings.compile:
        network = compile_network(model, (share_of(settings.batch_size), 3, IMAGE_SIZE, IMAGE_SIZE), precision)
    if n_processes() > 1:
        network = DistributedDataParallel(network, gradient_as_bucket_view=True)
    train_loader = training_loader(settings, dataset, progress["iteration"], device)
    test_loader = validation_loader(settings, device)
    step = partial(train_step, network, criterion, optimizer, scaler)
    if settings.dry_run:
        dry_run(settings, step, train_loader, test_loader, model, criterion, precision)
        return model, False

    # A checkpoint is saved before the validation of its iteration, so a resumed run begins with that.
    validate_now = validation_is_missing(settings, progress["iteration"])
    log = prepare_output(settings, dataset, model, precision, progress, validate_now)
    save = partial(save_run, settings, dataset, model, optimizer, scaler, progress)
    validation = partial(validate_and_keep_best, test_loader, model, criterion, precision, log, save, progress)
    todo = {"total": settings.iterations, "initial": progress["iteration"], "disable": rank() > 0 or None}
    with tqdm(**todo, desc="training", unit="it") as bar, Interruption() as interruption:
        if validate_now and not validation(settings.validate_map, interruption):
            return model, False
        stopwatch, losses = runlog.Stopwatch(), []
        for batch in batches_on(device, train_loader):
            stopwatch.stop_waiting()
            rate = learning_rate(progress["iteration"], settings)
            losses.append(step(batch, rate, precision, settings.grad_clip))
            progress["iteration"] += 1
            bar.update()

            # Look at the losses now and then, and before every checkpoint: each look waits for the GPU.
            log_now, save_now, validate_now = (
                is_due(progress["iteration"], every, settings.iterations)
                for every in (settings.log_every, settings.checkpoint_every, settings.validate_every)
            )
            stop = interruption.agreed()
            if log_now or save_now or validate_now or stop:
                progress["pending"] += stop_if_not_finite(losses, model, scaler, progress["iteration"], train_loader)
                losses = []
            if log_now:
                means = runlog.mean_losses(progress["pending"], criterion.alpha)
                record = {"event": "train", "iteration": progress["iteration"], **means, "lr": rate}
                record |= stopwatch.figures(settings.batch_size)
                log.append(record)
                runlog.show(bar, record)
                if progress["iteration"] % settings.log_every == 0:  # an extra record at the end keeps them
                    progress["pending"] = []
            if save_now or validate_now or stop:
                save("checkpoint.pth", must=stop or progress["iteration"] == settings.iterations)
            if validate_now and (stop or not validation(settings.validate_map, interruption)):
                return model, False
            if stop:
                break
            if log_now:
                stopwatch = runlog.Stopwatch()  # validating and saving do not count
            stopwatch.start_waiting()
    return model, progress["iteration"] >= settings.iterations


def train_step(network, criterion, optimizer, scaler, batch, rate, precision="fp32", grad_clip=0.0):
    """Update the weights once.

    :param network: the SSD300, compiled or distributed or as it is
    :param batch: this process's share: images (N, 3, 300, 300), lists of boxes and labels, and more that is not used
    :param rate: learning rate
    :param grad_clip: limit of the gradient's norm, 0 for none
    :return: (3,) tensor, still on the device: this process's share of confidence loss, localisation loss and norm of
        the gradient before clipping; the sum over all processes is the whole batch's
    """
    images, boxes, labels, *_ = batch
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]
    with mixed_precision(precision, images.device):
        predictions = network(images)
    confidence, localization, n_positives = criterion.parts(*predictions, boxes, labels)  # in fp32
    losses = torch.stack([confidence, localization])
    if n_processes() > 1:  # normalise by the positives of the whole batch
        losses = losses * (n_positives / sum_over_processes(n_positives.clone()).clamp(min=1))
    optimizer.zero_grad()
    # DistributedDataParallel averages the gradients of the processes; the factor turns that into their sum.
    scaler.scale((losses[0] + criterion.alpha * losses[1]) * n_processes()).backward()
    scaler.unscale_(optimizer)
    parameters = list(network.parameters())
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    if grad_clip:
        torch.nn.utils.clip_grads_with_norm_(parameters, grad_clip, norm)
    scaler.step(optimizer)
    scaler.update()
    return torch.cat([losses.detach(), norm[None] / n_processes()])


def is_due(iteration, every, last):
    """Tell whether a periodic action is due after an update: after each `every` updates (0: never), and at the end."""
    return every > 0 and iteration > 0 and (iteration % every == 0 or iteration == last)


def stop_if_not_finite(losses, model, scaler, iteration, loader):
    """Return the losses of the last updates as lists; raises DivergenceError if they or the weights are not finite.

    :param losses: what `train_step` returned for each update since the last call
    :param iteration: number of updates made
    :param loader: of the training batches
    :raises DivergenceError: naming the iteration and its images
    """
    losses = sum_over_processes(torch.stack(losses)).cpu()  # waits for the GPU
    # With fp16 the scaler handles gradients that are not finite: it skips the update.
    finite = losses[:, : 2 if scaler.is_enabled() else 3].isfinite().all(dim=1)
    if not finite.all():
        index = finite.int().argmin().item()  # the first that is not
        broken = iteration - len(losses) + index
        images = ", ".join(loader.dataset.images[image] for _, image in loader.batch_sampler.batch(broken))
        confidence, localization, norm = losses[index].tolist()
        raise DivergenceError(
            f"iteration {broken + 1}: the loss or its gradient is not finite (confidence {confidence:.4g}, "
            f"localization {localization:.4g}, norm of the gradient {norm:.4g}); the last checkpoint is kept; lower "
            f"--lr, raise --warmup, use --grad-clip, or look at these images: {images}"
        )
    if not torch.stack([weight.isfinite().all() for weight in model.parameters()]).all():
        raise DivergenceError(
            f"iteration {iteration}: the weights are not finite; the last checkpoint is kept; lower --lr, "
            "raise --warmup or use --grad-clip"
        )
    return losses.tolist()


def validate(loader, model, criterion, precision, with_map=False, interruption=None):
    """Return the loss over all test images, normalised as one batch, and the mAP on request; back in training mode.

    :param loader: as `eval.evaluation_loader` makes it
    :return: {"loss": ..., "mAP_11_point": ... if `with_map`}; None if interrupted
    """
    limits = EVALUATION_LIMITS if with_map else None
    outcome = detect_all(loader, model, limits, precision, criterion, interruption)
    model.train()
    if outcome is None:
        return None
    detections, ground_truth, figures = outcome
    result = {"loss": figures["loss"]}
    if with_map:
        result["mAP_11_point"] = calculate_mAP(*detections, *ground_truth, label_map=model.label_map)[1]
    return result


def validate_and_keep_best(loader, model, criterion, precision, log, save, progress, with_map, interruption):
    """Validate, log the result and save the best network; return False if interrupted.

    :param save: function that saves a checkpoint under a name
    :param progress: its "best_loss" and "best_map" are updated
    """
    result = validate(loader, model, criterion, precision, with_map, interruption)
    if result is None:
        return False
    pictures = example_pictures(model, loader.dataset) if log.board else ()
    log.append({"event": "validation", "iteration": progress["iteration"], **result}, pictures)
    if rank() == 0:
        figures = ", ".join(f"{name} {value:.4f}" for name, value in result.items())
        tqdm.write(f"iteration {progress['iteration']}: validation {figures}")
    loss, mean = result["loss"], result.get("mAP_11_point", -1.0)
    is_best = mean > progress["best_map"] if with_map else loss < progress["best_loss"]
    progress["best_loss"], progress["best_map"] = min(loss, progress["best_loss"]), max(mean, progress["best_map"])
    if is_best:
        save("best.pth")
    return True


def validation_is_missing(settings, iteration):
    """Tell whether a resumed run must first validate: a checkpoint is saved before the validation of its iteration.

    The validation is repeated even if it was made. Only a finished run that has logged it does not repeat it.
    """
    if not is_due(iteration, settings.validate_every, settings.iterations):
        return False
    if iteration < settings.iterations:
        return True
    records = runlog.read_log(settings.output_folder)  # which only process 0 is sure to have
    logged = any(record["event"] == "validation" and record.get("iteration") == iteration for record in records)
    return any_process(rank() == 0 and not logged)


def example_pictures(model, test_set, n=4):
    """Return (title, array) of the first test images: on the left the ground truth, on the right the detections."""
    names, colors = label_names(test_set.label_map), label_color_map(test_set.label_map)
    limits = DETECTION_LIMITS._replace(max_overlap=EVALUATION_LIMITS.max_overlap, top_k=10)
    model.eval()
    pictures = []
    for number, (path, objects) in enumerate(zip(test_set.images[:n], test_set.objects[:n], strict=True)):
        image = read_image(path)
        labels = [names[label] for label in objects["labels"]]
        truth = draw_boxes(image, objects["boxes"], labels, [colors[label] for label in labels])
        detected = annotate(image, find_objects(image, model, *limits), colors)
        pictures.append((f"test image {number}", np.concatenate([truth, detected], axis=1)))
    model.train()
    return pictures


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


def prepare_output(settings, dataset, model, precision, progress, validates_first):
    """Clean the output folder of an earlier run, print the settings and the size of the data set, and return the log.

    :param progress: its "best_loss" and "best_map" are updated by the validations in the log of a resumed run
    :param validates_first: whether the run begins with the validation of its iteration
    """

    def keep(record):
        """Tell whether a record of an earlier log is still true after resuming from a checkpoint."""
        logged_at = record.get("iteration", 0)
        if record["event"] == "validation" and validates_first:
            return logged_at < progress["iteration"]
        is_extra = record["event"] == "train" and logged_at % settings.log_every != 0  # made at the end of a run
        return logged_at <= progress["iteration"] and not is_extra

    if rank() == 0:
        make_folder(settings.output_folder)
        best = os.path.join(settings.output_folder, "best.pth")
        if not settings.resume and os.path.exists(best):  # of an earlier run
            os.remove(best)
        for name in RUN_FILES:
            half_written = os.path.join(glob.escape(settings.output_folder), f"{name}.*.tmp")
            for path in glob.glob(half_written):  # of an earlier run that was killed
                os.remove(path)
    description = runlog.describe_run(vars(settings), list(model.label_map), precision)
    kept = keep if settings.resume else None
    log = runlog.RunLog(settings.output_folder, description, kept, settings.tensorboard, progress["iteration"])
    runlog.take_in_validations(progress, log.kept)
    if rank() == 0:
        print(json.dumps(description, indent=2))
        print(f"{len(dataset)} images, {count_epochs(settings, dataset):.1f} epochs", flush=True)
    return log


def count_epochs(settings, dataset):
    """Return how often every image is seen in all iterations."""
    return settings.iterations * settings.batch_size / len(dataset)


def save_run(settings, dataset, model, optimizer, scaler, progress, name, must=False):
    """Save a checkpoint in the output folder. If the disk is full, the earlier file is kept.

    :param dataset: the training set, whose fingerprint is saved
    :param name: of the file
    :param must: raise InputError if it cannot be written, instead of warning
    """
    if rank() > 0:
        return
    path = os.path.join(settings.output_folder, name)
    training = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "settings": vars(settings)}
    try:
        save_checkpoint(path, model, {**training, **progress, "data": dataset.fingerprint})
    except (OSError, RuntimeError) as error:  # torch.save raises either if the disk is full
        reason = getattr(error, "strerror", None) or "PyTorch could not write it, the disk may be full"
        message = f"{path}: iteration {progress['iteration']} cannot be saved ({reason}); the earlier file is kept"
        if must:
            raise InputError(f"{message}; make room, then continue with --resume") from error
        runlog.warn(f"{message}; training goes on")


def dry_run(settings, step, train_loader, test_loader, model, criterion, precision):
    """Make two steps, the second of which is timed, validate one batch, and print what training would take."""
    device = model.priors_cxcy.device
    say = print if rank() == 0 else lambda _: None
    asked = time.perf_counter()
    for batch in itertools.islice(batches_on(device, train_loader), 2):
        started = time.perf_counter()
        losses = step(batch, learning_rate(0, settings), precision, settings.grad_clip)
        loss = sum_over_processes(losses).tolist()
        waited, asked = started - asked, time.perf_counter()
        seconds = asked - started
        say(f"step in {seconds:.2f} s, after {waited:.2f} s for its images; loss {sum(loss[:2]):.3f}")
    if test_loader is not None:
        one_batch = list(itertools.islice(test_loader, 1))
        result = validate(one_batch, model, criterion, precision, settings.validate_map)
        say("validation of a batch: " + ", ".join(f"{name} {value:.3f}" for name, value in result.items()))
    if device.type == "cuda":
        say(f"memory of the GPU: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most")
    hours = (settings.iterations - train_loader.batch_sampler.start) * seconds / 3600
    say(f"{settings.batch_size / seconds:.1f} images/s; {settings.iterations} iterations are "
        f"{count_epochs(settings, train_loader.dataset):.1f} epochs and take about {hours:.1f} hours at that speed; "
        "nothing was written")  # fmt: skip


def main():
    """Run the command line."""
    settings = parse_settings()
    join_processes()
    try:
        if settings.sample and rank() == 0 and not os.path.exists(os.path.join(settings.data_folder, "label_map.json")):
            make_sample(settings.data_folder)
        sum_over_processes(torch.zeros(1))  # wait for the sample
        model, complete = train(settings)
        is_first = rank() == 0
    finally:
        leave_processes()
    if is_first and complete and settings.weights_only:
        save_weights(settings.weights_only, model)
    if is_first and not settings.dry_run:
        say_what_is_next(settings, complete)


def say_what_is_next(settings, complete):
    """Print the commands that continue from a run."""
    checkpoint = os.path.join(settings.output_folder, "checkpoint.pth")
    if not complete:
        checkpoint = checkpoint if os.path.exists(checkpoint) else settings.resume  # resumed into another folder
        print(f"interrupted and saved; continue with: {shlex.join(['python', 'train.py', '--resume', checkpoint])}")
        return
    if settings.sample and not torch.cuda.is_available():
        n = SAMPLE_ON_GPU["iterations"]
        print(f"{settings.iterations} iterations only show that the loss falls; on a GPU, --sample makes {n}")
    print(f"trained: {checkpoint}; next:")
    print(shlex.join(["python", "eval.py", "--data-folder", settings.data_folder, "--checkpoint", checkpoint]))
    image = PascalVOCDataset(settings.data_folder, "TEST").images[0]
    image = min(image, os.path.relpath(image), key=len)
    print(shlex.join(["python", "detect.py", image, "--checkpoint", checkpoint]))


if __name__ == "__main__":
    run_command(main)
