"""Devices, the precision of their arithmetic, the transfer of batches, several processes, signals.

device = find_device()
precision = choose_precision("auto", device)
for images, boxes, labels, difficulties in batches_on(device, loader):
    with mixed_precision(precision, device):
        predicted_locs, predicted_scores = model(images)
"""

import datetime
import functools
import glob
import importlib.util
import itertools
import math
import os
import signal
from contextlib import contextmanager, nullcontext, suppress

import torch
from torch import distributed

from support.files import InputError

# tf32 is fp32 whose factors a GPU's convolutions round to 10 bits, PyTorch's own default.
PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
AGREE_EVERY = 10  # iterations after which processes on several GPUs agree whether to stop


def find_device():
    """Return the GPU if PyTorch can use one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def name_hardware():
    """Return the name of the GPU, or "CPU" and its number of cores."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"


def count_cores(most=16):
    """Return the number of cores that the processes on this machine may use, but no more than `most` for each."""
    # torchrun, the parent, can bind each of its processes to cores of its own.
    process = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else 0
    available = len(os.sched_getaffinity(process)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, most * _n_processes_here())


def share_workers(n):
    """Return how many of the n loading processes of this machine belong to this process, at least one if n > 0."""
    return math.ceil(n / _n_processes_here())


def _n_processes_here():
    """Return the number of processes that torchrun started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def choose_precision(name, device):
    """Return the key of PRECISIONS to compute with, and turn TF32 on or off.

    :param name: a key of PRECISIONS, or "auto": bf16 if the device is a GPU with native support for it, else fp32
    :raises InputError: for the others on a CPU, except bf16 with AMX: CPUs emulate them, a hundred times slower
    """
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    if name == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if has_bf16 else "fp32"
    has_amx = name == "bf16" and torch.cpu.get_capabilities().get("amx_bf16")
    if name != "fp32" and device.type == "cpu" and not has_amx:
        or_amx = " or a CPU with AMX" if name == "bf16" else ""
        raise InputError(f"--precision {name}: needs a GPU{or_amx}; use auto or fp32")
    return name


@contextmanager
def explain_memory(remedy):
    """Turn a lack of GPU memory into an InputError that says how much memory there is.

    :param remedy: what to do, such as "lower --batch-size 32"
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        _, total = torch.cuda.mem_get_info()
        raise InputError(f"the {total / 2**30:.1f} GiB of the GPU's memory are not enough; {remedy}") from error


def make_deterministic():
    """Restrict PyTorch to algorithms that give the same bits every time; call it before any computation."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses to run without it
    os.environ.setdefault("MKL_CBWR", "AUTO")  # otherwise results of MKL differ between runs on some processors
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # slow, and no uninitialised memory is read


def mixed_precision(precision, device):
    """Return the autocast context of a precision; the weights stay in fp32."""
    return torch.autocast(device.type, dtype=PRECISIONS[precision], enabled=PRECISIONS[precision] != torch.float32)


def batches_on(device, loader):
    """Yield a loader's batches with the images on the device.

    The copy to a GPU overlaps the work on the batch before, if the loader pins its memory (`pin_memory=True`).
    """
    if device.type != "cuda":
        yield from loader
        return
    copying, working = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    for images, *objects in loader:
        with torch.cuda.stream(copying):
            images = images.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        working.wait_stream(copying)
        images.record_stream(working)  # do not reuse this memory before the work on it is done
        yield images, *objects


def compile_network(network, shapes, precision):
    """Return the network compiled for batches of these shapes, sharing its weights.

    DistributedDataParallel comes first: the compiler then divides the backward pass where gradients can be sent.

    :param network: the model, or DistributedDataParallel of it if there are several processes
    :param shapes: of all batches of images, as bytes, that will come; each is compiled by itself
    :raises InputError: if PyTorch cannot compile it
    """
    device = next(network.parameters()).device
    try:
        compiled = torch.compile(network, dynamic=False)
        for (images,) in batches_on(device, [(torch.zeros(shape, dtype=torch.uint8),) for shape in shapes]):
            alone = network.no_sync() if n_processes() > 1 else nullcontext()  # another process may have other sizes
            with alone, mixed_precision(precision, device):
                sum(part.sum() for part in compiled(images)).backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers and their caches raise all kinds of exceptions
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"--compile: PyTorch cannot compile the network here ({reason}); use --no-compile") from error
    network.zero_grad()
    return compiled


@functools.cache
def load_nms():
    """Return torchvision's operator for non-maximum suppression, the function that `torchvision.ops.nms` calls.

    It is loaded from the library in torchvision's folder. `import torchvision` takes as long as importing PyTorch,
    because it imports PyTorch's compiler.
    """
    folder = os.path.dirname(importlib.util.find_spec("torchvision").origin)
    for library in glob.glob(os.path.join(glob.escape(folder), "_C*")):
        with suppress(OSError):
            torch.ops.load_library(library)
    if not hasattr(torch.ops.torchvision, "nms"):  # another layout of the folder
        importlib.import_module("torchvision")
    return torch.ops.torchvision.nms


# ---------------------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------------------


def join_processes():
    """Join the other processes if torchrun started this one; return this process's device."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        return find_device()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Tensors on the CPU go through gloo, which does not wait for a GPU. If a process dies, the others end, too.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, timeout=datetime.timedelta(minutes=10))
    return find_device()


def leave_processes():
    """Undo `join_processes`."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def n_processes():
    """Return the number of processes that work together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank():
    """Return the number of this process; only process 0 writes and prints."""
    return distributed.get_rank() if distributed.is_initialized() else 0


@contextmanager
def _communicating():
    """Turn the failure of another process, which breaks the connection, into an InputError."""
    try:
        yield
    except RuntimeError as error:
        raise InputError("another process failed; its message says why") from error


def sum_over_processes(tensor):
    """Sum a tensor over all processes, in place, and return it."""
    if n_processes() > 1:
        with _communicating():
            distributed.all_reduce(tensor)
    return tensor


def any_process(flag):
    """Return whether a flag is set in any process: the same answer in all of them, which must call this together."""
    return bool(sum_over_processes(torch.tensor(int(flag))))


def gather_over_processes(items):
    """Return the items of all processes' lists: the first item of each process, then the second of each, and so on."""
    if n_processes() == 1:
        return items
    lists = [None] * n_processes()
    with _communicating():
        distributed.all_gather_object(lists, items)
    missing = object()
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*lists, fillvalue=missing))
    return [item for item in in_turn if item is not missing]


# ---------------------------------------------------------------------------------------------------------
# Signals
# ---------------------------------------------------------------------------------------------------------


class Interruption:
    """Turn SIGTERM and the first Ctrl-C into a flag; a second Ctrl-C raises KeyboardInterrupt. A context manager."""

    def __init__(self):
        self.requested = False

    def __enter__(self):
        self.earlier = {number: signal.signal(number, self._request) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.earlier.items():
            signal.signal(number, handler)

    def _request(self, number, _frame):
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def agreed(self, iteration=0):
        """Return whether any process was interrupted. All processes must call this together.

        With several GPUs the answer is False for most iterations: to agree, the processes wait for each other.
        """
        is_costly = n_processes() > 1 and find_device().type == "cuda"
        return False if is_costly and iteration % AGREE_EVERY else any_process(self.requested)


def ignore_signals(_worker=None):
    """Make a loading process ignore signals sent to the whole group: it ends with its parent. A worker_init_fn."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
