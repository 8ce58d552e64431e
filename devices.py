"""Where the work is done: devices, the precision of their arithmetic, the way of batches to them, several processes.

device = find_device()
precision = choose_precision("auto", device)
for images, boxes, labels, difficulties in batches_on(device, loader):
    with mixed_precision(precision, device):
        predicted_locs, predicted_scores = model(images)
"""

import datetime
import itertools
import os
import signal

import torch
from torch import distributed

from files import InputError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def find_device():
    """Return the GPU where PyTorch sees one, and the CPU where not."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def name_hardware():
    """Return the name of the GPU, or what there is to say of the CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"


def count_cores(most=16):
    """Return how many processor cores this process may use, `most` at most: as many workers keep a GPU busy."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, most)


def choose_precision(name, device):
    """Return the key of PRECISIONS to compute with, and have convolutions in fp32 keep all of its digits on a GPU.

    :param name: a key of PRECISIONS, or "auto": bf16 where the device is a GPU made for it, else fp32
    :raises InputError: for bf16 and fp16 on a CPU, which most emulate, a hundred times slower
    """
    torch.backends.cudnn.allow_tf32 = False  # PyTorch's default rounds to the 10 bits of TF32
    if name == "auto":
        is_made_for_it = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if is_made_for_it else "fp32"
    if name != "fp32" and device.type == "cpu":
        raise InputError(f"--precision {name}: needs a GPU; take auto or fp32")
    return name


def make_deterministic():
    """Have PyTorch take only algorithms that give the same bits every time; call it before a GPU is used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # slow, and nothing reads what was not written


def mixed_precision(precision, device):
    """Return the context in which a network computes in a precision; its weights stay in fp32."""
    return torch.autocast(device.type, dtype=PRECISIONS[precision], enabled=precision != "fp32")


def batches_on(device, loader):
    """Yield a loader's batches with the images on the device; the copy to a GPU overlaps the work before it.

    For that the loader pins its memory (`pin_memory=True`).
    """
    if device.type != "cuda":
        yield from loader
        return
    copying, working = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    for images, *objects in loader:
        with torch.cuda.stream(copying):
            images = images.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        working.wait_stream(copying)
        images.record_stream(working)  # its memory is not to be used again before the work is done
        yield images, *objects


def join_processes():
    """Join the other processes where torchrun started this one; return this one's device."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        return find_device()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # What lies on the CPU goes by gloo, which waits for no GPU. A process that is gone ends the others in time.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, timeout=datetime.timedelta(minutes=10))
    return find_device()


def leave_processes():
    """Undo `join_processes`."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def n_processes():
    """Return how many processes train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank():
    """Return the number of this process; 0 writes and prints."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def sum_over_processes(tensor):
    """Add up a tensor over all processes in place, and return it."""
    if n_processes() > 1:
        distributed.all_reduce(tensor)
    return tensor


def gather_over_processes(items):
    """Return the items of all processes' lists: the first of each process, the second of each, and so on."""
    if n_processes() == 1:
        return items
    lists = [None] * n_processes()
    distributed.all_gather_object(lists, items)
    absent = object()
    return [item for turn in itertools.zip_longest(*lists, fillvalue=absent) for item in turn if item is not absent]


class Interruption:
    """A context in which SIGTERM and SIGINT are wishes, for the work to heed; a second SIGINT ends it at once."""

    def __init__(self):
        self.wished = False

    def __enter__(self):
        self.earlier = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.earlier.items():
            signal.signal(number, handler)

    def _note(self, number, _frame):
        if number == signal.SIGINT and self.wished:
            raise KeyboardInterrupt
        self.wished = True

    def agreed(self):
        """Tell whether any process was interrupted: the same answer in all of them, which must ask together."""
        return bool(sum_over_processes(torch.tensor(int(self.wished))))


def ignore_signals(_worker=None):
    """Let a process that loads images outlive signals to all processes and end with its parent; a worker_init_fn."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
