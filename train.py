"""Train SSD300 or SSD512 by the schedule of the released Caffe networks.

python train.py --sample
python train.py
python train.py --data-folder data/mine --init-from coco --epochs 60
python train.py --size 512 --batch-size 32 --accumulate 4
python train.py --resume runs/voc/checkpoint.pth
torchrun --nproc-per-node=8 train.py
"""

import argparse
import itertools
import math
import os
import time
from contextlib import nullcontext
from functools import partial

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from datasets import PascalVOCDataset, TrainingSampler, collate_fn
from detect import example_pictures
from eval import detect_all, evaluate, evaluation_loader
from model import (
    DETECTION_LIMITS,
    NETWORKS,
    PRIOR_FAMILIES,
    MultiBoxLoss,
    build_model,
    create_prior_boxes,
    load_model,
    transfer,
)
from support import devices, runlog, runs
from support.checkpoints import CAFFE_MEAN, load_optimizer, read_base, read_checkpoint, save_checkpoint, save_weights
from support.files import CommandParser, DivergenceError, InputError, check_outputs, make_folder, run_command
from support.images import tile, write_image
from support.lists import has_split
from support.priors import default_family, find_priors
from support.sample import make_sample
from utils import calculate_mAP

# Defaults that --sample changes. A CPU learns a few pictures by heart within minutes, a GPU learns the whole set.
SAMPLE_ON_CPU = {
    "data_folder": "data/sample_by_heart", "no_pretrained": True, "no_augmentation": True, "batch_size": 2,
    "iterations": 75, "lr": 2e-3, "grad_clip": 5.0, "log_every": 5, "validate_every": 15, "workers": 1,
}  # fmt: skip
SAMPLE_ON_GPU = {
    "data_folder": "data/sample", "no_pretrained": True, "iterations": 4000, "grad_clip": 5.0, "workers": 8,
}  # fmt: skip
LEARNING_RATE = 1e-3  # for batches of 32
COMPILE_ABOVE = 1000  # iterations; an estimate: a much shorter run does not win back the time that compiling takes
SMALL_BATCH = 12  # images; a run with this learning rate gets a warning if its batches are not larger
PICTURE_LIMITS = DETECTION_LIMITS._replace(min_score=0.5)  # without a clutter of weak boxes


def make_parser():
    """Return the parser of the command line: every setting with its unit, its default and its source."""
    parser = CommandParser(__doc__)
    add = parser.add_argument_group("data and output").add_argument
    add("--data-folder", default=runs.DATA_FOLDER, help="folder with the lists of create_data_lists.py [%(default)s]")
    add("--output-folder", help="folder for checkpoints, log and curves [runs/NAME for a data folder NAME]")
    add("--overwrite", action="store_true", help="replace the run in the output folder; numbered checkpoints stay")
    add("--sample", action="store_true", help="train on synthetic images: overfit two on a CPU, use 240 on a GPU")
    add("--no-augmentation", action="store_true", help="do not augment, for instance to overfit a few images")
    add("--no-difficult", action="store_true", help="do not train on objects that are marked as difficult")
    add("--workers", type=int, default=devices.count_cores(),
        help="processes per machine that load images, 0 for none [number of cores, at most 16 per GPU]")  # fmt: skip

    # ssd_pascal.py: solver_param and batch_size; paper §3 and §3.1.
    recipe = parser.add_argument_group("recipe (defaults: Caffe's)")
    add = recipe.add_argument
    add("--batch-size", type=int, default=32, help="images per iteration [%(default)s]")
    length = recipe.add_mutually_exclusive_group().add_argument
    length("--iterations", type=int, default=120_000, help="updates in all [%(default)s]")
    length("--epochs", type=float, metavar="N", help="how often to see every image, instead of --iterations")
    add("--lr", type=float, default=LEARNING_RATE, help="learning rate; biases get twice that [%(default)s]")
    add("--decay-at", type=int, nargs="*", metavar="N",
        help="iterations after which the rate is divided by 10 [after two thirds and five sixths of all]")  # fmt: skip
    add("--momentum", type=float, default=0.9, help="momentum of SGD [%(default)s]")
    add("--weight-decay", type=float, default=5e-4, help="weight decay; biases get none [%(default)s]")
    start = recipe.add_mutually_exclusive_group().add_argument
    start("--no-pretrained", action="store_true", help="start from random weights instead of ImageNet's")
    start("--base", metavar="FILE", help="start from the paper's reduced VGG-16, vgg16_reducedfc.pth, instead")
    start("--init-from", metavar="SOURCE", help="start from a whole network: any checkpoint, or coco")
    add("--size", type=int, choices=list(NETWORKS), default=300, help="side of the input, pixels [%(default)s]")
    add("--priors", metavar="FAMILY|FILE",
        help="paper (size 300), caffe, coco, or a JSON file [paper; with --base or --size 512: caffe]")  # fmt: skip
    add("--seed", type=int, default=0, help="seed of weights, order and augmentation [%(default)s]")

    add = parser.add_argument_group("speed").add_argument
    add("--precision", choices=["auto", *devices.PRECISIONS], default="auto",
        help="precision of the network; auto: bf16 on a GPU with native support, else fp32")  # fmt: skip
    add("--compile", action=argparse.BooleanOptionalAction,
        help=f"compile the network first [on a GPU, if the run has more than {COMPILE_ABOVE} iterations]")  # fmt: skip
    add("--accumulate", type=int, default=1, metavar="N",
        help="take the batch through the network in N parts: less memory, same gradient [%(default)s]")  # fmt: skip

    add = parser.add_argument_group("safeguards (not in the paper)").add_argument
    add("--warmup", type=int, metavar="N",
        help="iterations over which the learning rate rises linearly [500, but at most a tenth of all]")  # fmt: skip
    add("--grad-clip", type=float, default=0.0, metavar="NORM", help="limit of the gradient's norm, 0 for none")

    add = parser.add_argument_group("progress").add_argument
    add("--checkpoint-every", type=int, default=1000, metavar="N", help="iterations [%(default)s]")
    add("--keep-every", type=int, default=0, metavar="N",
        help="iterations between checkpoints that are kept, as checkpoint_N.pth; 0: none [%(default)s]")  # fmt: skip
    add("--validate-every", type=int, metavar="N",
        help="iterations between validations, for best.pth; 0: never [about a tenth of all]")  # fmt: skip
    add("--log-every", type=int, default=20, metavar="N", help="iterations per record in log.jsonl [%(default)s]")
    add("--resume", metavar="FILE", help="continue from this checkpoint, with its settings")
    add("--dry-run", action="store_true", help="try two steps, print speed, memory and duration; save nothing")
    add("--tensorboard", action="store_true", help="also log to TensorBoard, with images; needs its package")
    add("--deterministic", action="store_true", help="compute the same bits every time; slower on a GPU")
    add("--weights-only", metavar="FILE", help="at the end also write the network alone, a small file to share")
    return parser


def parse_settings(arguments=None):
    """Return the settings: those given, then those of the sample or of the run to resume, then the defaults."""
    parser = make_parser()
    given = parser.parse_args(arguments)
    if given.sample:
        parser.set_defaults(**(SAMPLE_ON_GPU if torch.cuda.is_available() else SAMPLE_ON_CPU))
        if parser.parse_args(arguments).data_folder != parser.get_default("data_folder"):
            raise InputError("--sample trains on images that it makes itself; leave --data-folder out")
    if given.resume:
        earlier = read_checkpoint(given.resume)["settings"]  # its workers describe a machine, not the run
        parser.set_defaults(**{name: earlier[name] for name in vars(given).keys() & earlier.keys() - {"workers"}})
    settings = parser.parse_args(arguments)
    settings.output_folder = settings.output_folder or runs.run_folder(settings.data_folder)
    check_settings(settings)
    return settings


def check_settings(settings):
    """Raise InputError if settings are impossible or contradict each other."""
    if settings.init_from and settings.priors:
        raise InputError("--priors: those of --init-from come with its network; leave --priors out")
    inputs = [settings.base, settings.init_from, settings.resume]
    check_outputs(settings.weights_only, inputs=[*filter(None, inputs), *runs.list_files(settings.output_folder)])
    if settings.tensorboard:
        runlog.import_tensorboard()
    if any(step < 0 for step in settings.decay_at or ()) or settings.seed >= 2**63 or settings.momentum >= 1:
        raise InputError("--decay-at must be 0 or more, --seed below 2**63, --momentum below 1")
    smallest = {
        "batch_size": 1, "iterations": 1, "accumulate": 1, "checkpoint_every": 1, "keep_every": 0, "log_every": 1,
        "workers": 0, "validate_every": 0, "warmup": 0, "seed": 0, "lr": 0, "momentum": 0, "weight_decay": 0,
        "grad_clip": 0,
    }  # fmt: skip
    for name, least in smallest.items():
        value = getattr(settings, name)
        if value is not None and not least <= value < math.inf:  # False for NaN, too
            raise InputError(f"{runs.option(name)} {value}: must be {least} or more")
    if settings.epochs is not None and not 0 < settings.epochs <= 1e6:
        raise InputError(f"--epochs {settings.epochs:g}: must be above 0, and at most a million")
    if settings.accumulate > settings.batch_size:
        raise InputError(f"--accumulate {settings.accumulate}: must not exceed --batch-size {settings.batch_size}")


def complete_settings(settings, n_images, n_validation_images):
    """Fill in the settings that depend on the length of the run and were not given.

    The rate decays after two thirds and five sixths of the iterations, as in ssd_pascal.py. A run has about ten
    validations. It has fewer if one reads more images than a tenth of the run, and none if more than the whole run.

    :param n_images: number of training images
    :param n_validation_images: number of images to validate on, 0 for no validation
    """
    if settings.epochs:
        settings.iterations = max(1, round(settings.epochs * n_images / settings.batch_size))
        settings.epochs = None
    if settings.decay_at is None:
        settings.decay_at = [round(settings.iterations * share) for share in (2 / 3, 5 / 6)]
    if settings.warmup is None:
        settings.warmup = min(500, settings.iterations // 10)
    if n_validation_images == 0:
        settings.validate_every = 0
    elif settings.validate_every is None:
        every = math.ceil(max(settings.iterations / 10, n_validation_images / settings.batch_size))
        settings.validate_every = every if every <= settings.iterations else 0


def training_set(settings):
    """Return the images to train on, by default with difficult objects (ssd_pascal.py, use_difficult_gt)."""
    return PascalVOCDataset(
        settings.data_folder, "TRAIN", keep_difficult=not settings.no_difficult,
        augment=not settings.no_augmentation, seed=settings.seed, size=settings.size,
    )  # fmt: skip


def validation_set(settings):
    """Return the images to validate on, of VAL if it exists, else of TEST; None without validation or any object."""
    split = "VAL" if has_split(settings.data_folder, "VAL") else "TEST"
    if settings.validate_every == 0 or (settings.validate_every is None and not has_split(settings.data_folder, split)):
        return None
    dataset = PascalVOCDataset(settings.data_folder, split, keep_difficult=True, size=settings.size)
    return dataset if len(dataset.objects.labels) else None


def chosen_priors(settings):
    """Return the priors that the settings ask for: the name of a family, or the contents of a file."""
    families = PRIOR_FAMILIES[settings.size]
    default = "caffe" if settings.base else default_family(families)
    return find_priors(settings.priors or default, families)


def start_model(settings, label_map):
    """Return the network that a new run starts from."""
    if settings.init_from:
        trained = load_model(settings.init_from, label_map=label_map)
        if trained.size != settings.size:
            raise InputError(f"{settings.init_from}: is a network of size {trained.size}; give --size {trained.size}")
        model, shared = transfer(trained, label_map)
        fresh = [name for name in label_map if name not in shared]
        print(f"{settings.init_from}: took all layers and the class filters of {', '.join(shared)}")
        print(f"freshly initialised: the class filters of {', '.join(fresh) or 'none'}")
        return model
    is_pretrained = not (settings.no_pretrained or settings.base)
    model = NETWORKS[settings.size](len(label_map), is_pretrained, chosen_priors(settings))
    model.label_map = label_map
    if settings.base:
        model.base.load_state_dict(read_base(settings.base, model.base.state_dict()))
        model.set_pixel_mean(CAFFE_MEAN)
    return model


def learning_rate(iteration, settings):
    """Return the learning rate of an update (0, 1 ...): a linear warm-up, then a tenth at each step of decay_at."""
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


def start_or_resume(settings, dataset, held_out, device, precision):
    """Return the model, its optimizer and gradient scaler, and the progress of the run.

    :return: network on the device, in training mode; optimizer; scaler; {"iteration": number of updates made,
        "best_loss", "best_map": of the validations so far, "validated_on": the split of these validations, "pending":
        losses since the last regular record of the log}
    """
    split = held_out.split if held_out else None
    progress = {"iteration": 0, "best_loss": math.inf, "best_map": -1.0, "validated_on": split, "pending": []}
    torch.manual_seed(settings.seed)
    if settings.resume:
        checkpoint = read_checkpoint(settings.resume)
        runs.check_same_run(checkpoint, vars(settings), vars(make_parser().parse_args([])), dataset)
        done = checkpoint["iteration"]
        if done >= settings.iterations and (
            settings.dry_run or not (settings.weights_only or runs.validation_is_missing(settings, done))
        ):
            raise InputError(
                f"{settings.resume}: has made {done} iterations already; to go on, raise --iterations and --decay-at"
            )
        names = ["iteration", "pending"]
        if checkpoint.get("validated_on", "TEST") == split:  # else its scores are of other images
            names += ["best_loss", "best_map"]
        progress |= {name: checkpoint[name] for name in names if name in checkpoint}
        model = build_model(checkpoint, settings.resume)
        has_file = settings.priors and os.path.isfile(settings.priors)  # the checkpoint holds its contents
        if has_file and not torch.equal(create_prior_boxes(chosen_priors(settings), model.size), model.priors_cxcy):
            raise InputError(f"{settings.priors}: not the priors of {settings.resume}; restore or remove this file")
    else:
        model = start_model(settings, dataset.label_map)
    model.to(device).train()
    if device.type == "cuda":  # on a CPU it slows the backward pass down
        for part in model.children():  # not rescale_factors: DistributedDataParallel would warn about its gradient
            part.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(model, settings)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    if settings.resume:
        load_optimizer(optimizer, scaler, checkpoint, settings.resume)
    return model, optimizer, scaler, progress


def training_loader(settings, dataset, iteration, device):
    """Return the loader of this process's share of the batches from an iteration on."""
    rank, n_processes = devices.rank(), devices.n_processes()
    if settings.batch_size < n_processes:
        raise InputError(f"--batch-size {settings.batch_size}: too small for {n_processes} processes; give more")
    sampler = TrainingSampler(
        len(dataset), settings.batch_size, settings.seed, settings.iterations, iteration, share=(rank, n_processes)
    )
    workers = devices.share_workers(settings.workers)
    return DataLoader(
        dataset, batch_sampler=sampler, collate_fn=collate_fn, pin_memory=device.type == "cuda", num_workers=workers,
        prefetch_factor=4 if workers else None, worker_init_fn=devices.ignore_signals,
    )  # fmt: skip


def images_at_once(settings, process=0):
    """Return how many images a process takes through the network at once: one number, or two neighbouring ones."""
    share = len(range(process, settings.batch_size, devices.n_processes()))
    n_parts = min(settings.accumulate, share)
    return sorted({share // n_parts, math.ceil(share / n_parts)})


def prepare_network(settings, model, precision):
    """Return the model, distributed and compiled as the settings say; decides on `settings.compile` if it is None."""
    network = model
    if devices.n_processes() > 1:
        network = DistributedDataParallel(model, gradient_as_bucket_view=True)
        network.broadcast_buffers = False  # they never change; as an argument, PyTorch calls it deprecated
    if settings.compile is None:
        is_long = settings.iterations > COMPILE_ABOVE
        settings.compile = is_long and model.priors_cxcy.is_cuda and not settings.deterministic
    if not settings.compile:
        return network
    if devices.rank() == 0:
        print("compiling the network, which may take some minutes", flush=True)
    shapes = [(n, 3, settings.size, settings.size) for n in images_at_once(settings, devices.rank())]
    try:
        compiled, failure = devices.compile_network(network, shapes, precision), None
    except InputError as error:
        compiled, failure = None, error
    if not devices.any_process(failure is not None):
        return compiled
    if devices.rank() == 0:
        runlog.warn(f"{failure or 'another process cannot compile the network'}; training continues uncompiled")
    return network


def train(settings):
    """Train until the last iteration or an interruption; return the network, and whether the run is complete."""
    # Prepare the device, the data and the network.
    if settings.deterministic:
        devices.make_deterministic()
    torch.backends.cudnn.benchmark = not settings.deterministic  # cuDNN tries its algorithms, and takes the fastest
    device = devices.join_processes()
    precision = devices.choose_precision(settings.precision, device)
    runs.check_overwriting(settings)
    dataset, held_out = training_set(settings), validation_set(settings)
    complete_settings(settings, len(dataset), len(held_out or ()))
    held_out = held_out if settings.validate_every else None
    model, optimizer, scaler, progress = start_or_resume(settings, dataset, held_out, device, precision)
    criterion = MultiBoxLoss(model.priors_cxcy)
    train_loader = training_loader(settings, dataset, progress["iteration"], device)
    held_out_loader = held_out and evaluation_loader(held_out, max(images_at_once(settings)), settings.workers, device)
    network = prepare_network(settings, model, precision)
    step = partial(train_step, network, criterion, optimizer, scaler)
    if settings.dry_run:
        dry_run(settings, step, train_loader, held_out_loader, model, criterion, precision)
        return model, False

    # A checkpoint is saved before the validation of its iteration, so a resumed run begins with that.
    validate_now = runs.validation_is_missing(settings, progress["iteration"])
    log = prepare_output(settings, dataset, held_out, model, precision, progress, validate_now)
    save = partial(save_run, settings, dataset, model, optimizer, scaler, progress)
    validation = partial(validate_and_keep_best, held_out_loader, model, criterion, precision, log, save, progress)
    todo = {"total": settings.iterations, "initial": progress["iteration"], "disable": devices.rank() > 0 or None}
    with tqdm(**todo, desc="training", unit="it") as bar, devices.Interruption() as interruption:
        if validate_now and not validation(interruption):
            return model, False
        stopwatch, losses = runlog.Stopwatch(), []
        for batch in devices.batches_on(device, train_loader):
            stopwatch.stop_waiting()
            rate = learning_rate(progress["iteration"], settings)
            losses.append(step(batch, rate, precision, settings.grad_clip, settings.accumulate))
            progress["iteration"] += 1
            bar.update()

            # Look at the losses now and then, and before every checkpoint: each look waits for the GPU.
            log_now = runs.is_due(progress["iteration"], settings.log_every, settings.iterations)
            save_now = runs.is_due(progress["iteration"], settings.checkpoint_every, settings.iterations)
            validate_now = runs.is_due(progress["iteration"], settings.validate_every, settings.iterations)
            keep_now = settings.keep_every and progress["iteration"] % settings.keep_every == 0
            stop = interruption.agreed(progress["iteration"])
            if log_now or save_now or keep_now or validate_now or stop:
                progress["pending"] += stop_if_not_finite(losses, model, scaler, progress["iteration"], train_loader)
                losses = []
            if log_now:
                means = runlog.mean_losses(progress["pending"], criterion.alpha)
                figures = {**means, "lr": rate, **stopwatch.figures(settings.batch_size)}
                record = {"event": "train", "iteration": progress["iteration"], **figures}
                log.append(record)
                runlog.show(bar, record, settings.batch_size)
                if progress["iteration"] % settings.log_every == 0:  # not after the extra record at the end
                    progress["pending"] = []
            if save_now or validate_now or stop:
                save("checkpoint.pth", must=stop or progress["iteration"] == settings.iterations)
            if keep_now:
                save(f"checkpoint_{progress['iteration']}.pth")
            if validate_now and (stop or not validation(interruption)):
                return model, False
            if stop:
                break
            if log_now:
                stopwatch = runlog.Stopwatch()  # validating and saving do not count
            stopwatch.start_waiting()
    log.draw_curves()
    return model, progress["iteration"] >= settings.iterations


def train_step(network, criterion, optimizer, scaler, batch, rate, precision="fp32", grad_clip=0.0, accumulate=1):
    """Update the weights once.

    :param network: the model, compiled or distributed or as it is
    :param batch: this process's share: images (N, 3, size, size), lists of boxes and labels, and more that is not used
    :param rate: learning rate
    :param grad_clip: limit of the gradient's norm, 0 for none
    :param accumulate: number of parts of about the same size in which this share goes through the network
    :return: (3,) tensor, still on the device: this process's share of confidence loss, localisation loss and norm of
        the gradient before clipping; the sum over all processes is the whole batch's
    """
    images, boxes, labels, *_ = batch
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]
    optimizer.zero_grad()
    # Match before the network runs: every part is normalised by the positives of the whole batch.
    true_boxes, true_labels = criterion.match(boxes, labels)
    n_positives = devices.sum_over_processes((true_labels > 0).sum()).clamp(min=1)
    n_parts = min(accumulate, len(images))
    parts = zip(*(values.tensor_split(n_parts) for values in (images, true_boxes, true_labels)), strict=True)
    losses = torch.zeros(2, device=images.device)
    for number, (part_images, *targets) in enumerate(parts, start=1):
        is_early = devices.n_processes() > 1 and number < n_parts
        with network.no_sync() if is_early else nullcontext():  # the processes add up their gradients once
            with devices.mixed_precision(precision, images.device):
                predictions = network(part_images)
            part_losses = criterion.sums(*predictions, *targets) / n_positives  # in fp32
            # DistributedDataParallel averages the gradients of the processes; the factor turns that into their sum.
            scaler.scale((part_losses[0] + criterion.alpha * part_losses[1]) * devices.n_processes()).backward()
        losses += part_losses.detach()
    scaler.unscale_(optimizer)
    parameters = list(network.parameters())
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    if grad_clip:
        torch.nn.utils.clip_grads_with_norm_(parameters, grad_clip, norm)
    scaler.step(optimizer)
    scaler.update()
    return torch.cat([losses, norm[None] / devices.n_processes()])


def stop_if_not_finite(losses, model, scaler, iteration, loader):
    """Return the losses of the last updates as lists; raises DivergenceError if they or the weights are not finite.

    :param losses: what `train_step` returned for each update since the last call
    :param iteration: number of updates made
    :param loader: of the training batches
    :raises DivergenceError: naming the iteration and, unless only the weights are not finite, its images
    """
    losses = devices.sum_over_processes(torch.stack(losses)).cpu()  # waits for the GPU
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


def validate(loader, model, criterion, precision, interruption=None):
    """Return the loss over all images, normalised as one batch, and the 11-point mAP; leave the model in training mode.

    :param loader: as `eval.evaluation_loader` makes it
    :return: {"loss": ..., "mAP_11_point": ..., missing if there is no object to detect}; None if interrupted
    """
    outcome = detect_all(loader, model, precision=precision, criterion=criterion, interruption=interruption)
    model.train()
    if outcome is None:
        return None
    detections, ground_truth, figures = outcome
    mean = calculate_mAP(*detections, *ground_truth, label_map=model.label_map)[1]
    return {"loss": figures["loss"]} | ({} if math.isnan(mean) else {"mAP_11_point": mean})


def validate_and_keep_best(loader, model, criterion, precision, log, save, progress, interruption):
    """Validate, save the best network and log the result; return False if interrupted.

    The best network has the highest mAP or, if there are no objects to detect, the lowest loss.

    :param save: function that saves a checkpoint under a name
    :param progress: its "best_loss" and "best_map" are updated
    """
    result = validate(loader, model, criterion, precision, interruption)
    if result is None:
        return False
    split, loss, mean = loader.dataset.split, result["loss"], result.get("mAP_11_point")
    is_best = loss < progress["best_loss"] if mean is None else mean > progress["best_map"]
    progress["best_loss"] = min(loss, progress["best_loss"])
    progress["best_map"] = max(-1.0 if mean is None else mean, progress["best_map"])
    if is_best:  # save before logging: a run that is killed in between repeats the validation when it is resumed
        save("best.pth", chosen_on=split)
    pictures = example_pictures(loader.dataset, model, PICTURE_LIMITS) if log.board else ()
    log.append({"event": "validation", "iteration": progress["iteration"], "split": split, **result}, pictures)
    if devices.rank() == 0:
        figures = ", ".join(f"{name} {value:.4f}" for name, value in result.items())
        tqdm.write(f"iteration {progress['iteration']}: validation {figures}")
    log.draw_curves()
    return True


def prepare_output(settings, dataset, held_out, model, precision, progress, validates_first):
    """Clean the output folder of an earlier run, print what will be trained and how long, and return the log.

    :param dataset, held_out: images to train on and to validate on
    :param progress: its "best_loss" and "best_map" are updated by the validations in the log of a resumed run
    :param validates_first: whether the run begins with the validation of its iteration
    """
    description = runlog.describe_run(vars(settings), list(model.label_map), precision)
    if devices.rank() == 0:
        make_folder(settings.output_folder)
        runs.clean(settings.output_folder, is_new=not settings.resume)
        runs.announce(description, dataset, held_out)
        if settings.batch_size <= SMALL_BATCH and settings.lr == LEARNING_RATE and not settings.resume:
            size = settings.batch_size
            runlog.warn(f"--lr {LEARNING_RATE} is made for batches of 32; give --lr {LEARNING_RATE * size / 32:.1g} "
                        f"for batches of {size}, or --batch-size 32 --accumulate {32 // size}")  # fmt: skip
    keep = settings.resume and partial(runs.is_still_true, progress["iteration"], settings.log_every, validates_first)
    log = runlog.RunLog(settings.output_folder, description, keep, settings.tensorboard, progress["iteration"])
    runs.take_in_validations(progress, log.kept)
    log.draw_curves()
    return log


def save_run(settings, dataset, model, optimizer, scaler, progress, name, must=False, chosen_on=None):
    """Save a checkpoint in the output folder. If the disk is full, the earlier file is kept.

    :param dataset: the training set, whose fingerprint is saved
    :param name: of the file
    :param must: raise InputError if it cannot be written, instead of warning
    :param chosen_on: the split whose validation chose this network as the best; eval.py calls a score on it optimistic
    """
    if devices.rank() > 0:
        return
    path = os.path.join(settings.output_folder, name)
    training = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "settings": vars(settings)}
    try:
        save_checkpoint(path, model, {**training, **progress, "data": dataset.fingerprint, "chosen_on": chosen_on})
    except (OSError, RuntimeError) as error:  # torch.save raises either if the disk is full
        reason = getattr(error, "strerror", None) or "PyTorch could not write it, the disk may be full"
        message = f"{path}: iteration {progress['iteration']} cannot be saved ({reason}); the earlier file is kept"
        if must:
            raise InputError(f"{message}; make room, then continue with --resume") from error
        runlog.warn(f"{message}; training goes on")


def dry_run(settings, step, train_loader, held_out_loader, model, criterion, precision):
    """Make two steps, the second of which is timed, validate one batch, and print what training would take."""
    device = model.priors_cxcy.device
    say = print if devices.rank() == 0 else lambda _: None
    asked = time.perf_counter()
    for batch in itertools.islice(devices.batches_on(device, train_loader), 2):
        started = time.perf_counter()
        losses = step(batch, learning_rate(0, settings), precision, settings.grad_clip, settings.accumulate)
        loss = devices.sum_over_processes(losses).tolist()
        seconds = time.perf_counter() - started
        say(f"step in {seconds:.2f} s, after {started - asked:.2f} s for its images; loss {sum(loss[:2]):.3f}")
        asked = started + seconds
    if held_out_loader is not None:
        one_batch = list(itertools.islice(held_out_loader, 1))
        result = validate(one_batch, model, criterion, precision)
        say("validation of a batch: " + ", ".join(f"{name} {value:.3f}" for name, value in result.items()))
    if device.type == "cuda":
        say(f"memory of the GPU: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most")
    epochs = settings.iterations * settings.batch_size / len(train_loader.dataset)
    hours = (settings.iterations - train_loader.batch_sampler.start) * seconds / 3600
    say(f"{settings.batch_size / seconds:.1f} images/s; {settings.iterations} iterations are "
        f"{epochs:.1f} epochs and take about {hours:.1f} hours at that speed; "
        "no checkpoint and no log was written")  # fmt: skip


def main():
    """Run the command line."""
    settings = parse_settings()
    devices.join_processes()
    try:
        if settings.sample and devices.rank() == 0 and not has_split(settings.data_folder, "TRAIN"):
            few = {"n_train": 2, "n_test": 10, "by_heart": True, "seed": 5}
            make_sample(settings.data_folder, **(few if settings.no_augmentation else {"n_val": 30}))
        devices.sum_over_processes(torch.zeros(1))  # wait for the sample
        tried = f"tried --batch-size {settings.batch_size} with --accumulate {settings.accumulate}"
        with devices.explain_memory(f"{tried}; lower the first or raise the second"):
            model, complete = train(settings)
        is_first = devices.rank() == 0
    finally:
        devices.leave_processes()
    if not is_first or settings.dry_run:
        return
    if complete and settings.weights_only:
        save_weights(settings.weights_only, model)
    if complete and settings.sample:
        show_sample(settings, model)
    split = sample_split(settings) if settings.sample else "TEST"
    example = None
    if complete and has_split(settings.data_folder, split):
        example = PascalVOCDataset(settings.data_folder, split).images[0]
    runs.say_what_is_next(settings, complete, split, example)


def sample_split(settings):
    """Return the split that shows what a sample run has learnt: TRAIN if it learnt its images by heart."""
    return "TRAIN" if settings.no_augmentation else "TEST"


def show_sample(settings, model):
    """Score the network of a sample run, and draw what it detects."""
    split = sample_split(settings)
    dataset = PascalVOCDataset(settings.data_folder, split, keep_difficult=True, augment=False, size=model.size)
    loader = evaluation_loader(dataset, settings.batch_size, settings.workers, model.priors_cxcy.device)
    mean = evaluate(loader, model).results["mAP_11_point"]
    path = os.path.join(settings.output_folder, "detected.png")
    write_image(tile(example_pictures(dataset, model, PICTURE_LIMITS), columns=1, side=800), path)
    print(f"mAP {mean:.4f} on the {len(dataset)} images of the {dataset.split} split")
    print(f"look at {path}: the objects on the left, what the network detects on the right")


if __name__ == "__main__":
    run_command(main)
