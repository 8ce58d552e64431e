"""Precision, compilation, determinism, and a loss that never waits for the GPU."""

import functools
import itertools
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional as F

import train
from model import SSD300, MultiBoxLoss
from support.checkpoints import read_checkpoint
from support.devices import (
    batches_on,
    choose_precision,
    compile_network,
    count_cores,
    gather_over_processes,
    make_deterministic,
    mixed_precision,
    share_workers,
    sum_over_processes,
)
from support.files import InputError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_a_cpu_computes_in_fp32_and_rejects_precisions_it_would_emulate(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", "amx_bf16": False})
    assert choose_precision("auto", CPU) == choose_precision("fp32", CPU) == "fp32"
    assert torch.backends.cudnn.allow_tf32 is False
    assert torch.backends.cudnn.conv.fp32_precision != "tf32"
    for name in ("tf32", "bf16", "fp16"):
        with pytest.raises(InputError, match=f"--precision {name}: needs a GPU"):
            choose_precision(name, CPU)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert choose_precision("bf16", CPU) == "bf16"
    assert choose_precision("auto", CPU) == "fp32"


def test_auto_is_bf16_on_gpus_with_native_support_and_fp32_on_others(monkeypatch):
    for native in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert choose_precision("auto", CUDA) == ("bf16" if native else "fp32")
    assert choose_precision("fp16", CUDA) == "fp16"


def test_tf32_is_fp32_with_other_convolutions_on_a_gpu():
    try:
        assert choose_precision("tf32", CUDA) == "tf32"
        assert torch.backends.cudnn.allow_tf32 is True
        with mixed_precision("tf32", CPU):
            assert not torch.is_autocast_enabled("cpu")
    finally:
        choose_precision("fp32", CUDA)
    assert torch.backends.cudnn.allow_tf32 is False


def test_the_core_count_stays_within_its_bounds():
    assert 1 <= count_cores(most=3) <= 3


def test_loading_processes_are_counted_per_machine_and_shared_by_its_processes(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    assert (count_cores(), share_workers(5), share_workers(0)) == (16, 5, 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # as torchrun sets it
    assert (count_cores(), share_workers(5), share_workers(1), share_workers(0)) == (32, 3, 1, 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert (count_cores(), share_workers(count_cores())) == (64, 8)
    cores_of = {7: range(64), 0: range(8)}  # torchrun --numa-binding
    monkeypatch.setattr(os, "sched_getaffinity", cores_of.get, raising=False)
    monkeypatch.setattr(os, "getppid", lambda: 7)
    assert (count_cores(), share_workers(count_cores())) == (8, 1)  # another launcher, whose cores say nothing
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert (count_cores(), share_workers(count_cores())) == (64, 8)


def test_the_l2_norm_and_the_loss_stay_in_fp32_under_mixed_precision(random_objects):
    """Stubs replace the slow layers; conv4_3 has values whose norm, 453,000, overflows fp16."""
    seen = {}

    class Base(torch.nn.Module):
        def forward(self, images):
            seen["convolution"] = F.conv2d(images, torch.ones(1, 3, 1, 1)).dtype
            return torch.full((len(images), 512, 38, 38), 2e4, dtype=torch.float16), images

    class Auxiliary(torch.nn.Module):
        def forward(self, _):
            return ()

    class Heads(torch.nn.Module):
        def forward(self, conv4_3, *_):
            seen["conv4_3"] = conv4_3
            return torch.zeros(2, 8732, 4, dtype=torch.bfloat16), torch.zeros(2, 8732, 21, dtype=torch.bfloat16)

    model = SSD300(21, pretrained=False)
    model.base, model.aux_convs, model.pred_convs = Base(), Auxiliary(), Heads()
    with mixed_precision("bf16", CPU):
        predictions = model(torch.zeros(2, 3, 4, 4))
    assert seen["convolution"] == torch.bfloat16
    assert seen["conv4_3"].dtype == torch.float16  # after the norm
    assert torch.allclose(seen["conv4_3"].float(), torch.tensor(20 / 512**0.5), rtol=1e-3)
    boxes, labels = zip(*(random_objects(np.random.RandomState(i), 3) for i in range(2)), strict=True)
    confidence, localization, n_positives = MultiBoxLoss(model.priors_cxcy).parts(*predictions, boxes, labels)
    assert confidence.dtype == localization.dtype == torch.float32
    assert confidence.item() == pytest.approx(4 * np.log(21), rel=1e-5)  # uniform scores, three negatives per positive
    with mixed_precision("fp32", CPU):
        model(torch.zeros(1, 3, 4, 4))
    assert seen["convolution"] == torch.float32


def test_the_loss_never_reads_a_value_from_the_gpu(monkeypatch):
    """Fake tensors have no values: an operation that needs one, and would wait for the GPU, raises."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # fake tensors cannot be pinned
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        int(torch.zeros(1, device="cuda"))
    with FakeTensorMode():
        criterion = MultiBoxLoss(torch.zeros(8732, 4, device="cuda"))
        locs, scores = (torch.zeros(3, 8732, n, device="cuda", requires_grad=True) for n in (4, 21))
        boxes = [torch.zeros(n, 4) for n in (2, 0, 5)]
        labels = [torch.zeros(n, dtype=torch.long) for n in (2, 0, 5)]
        assert criterion(locs, scores, boxes, labels).device.type == "cuda"


def test_batches_on_a_cpu_are_the_batches_of_the_loader():
    batches = [(torch.zeros(1), 1, 2, 3), (torch.ones(1), 4, 5, 6)]
    assert list(batches_on(CPU, batches)) == batches


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs the C++ compiler g++")
def test_the_compiled_network_equals_the_eager_one():
    torch.manual_seed(0)
    model = SSD300(2, pretrained=False)
    network = compile_network(model, [(1, 3, 300, 300)], "fp32")
    assert all(parameter.grad is None for parameter in model.parameters())
    images = torch.randint(256, (1, 3, 300, 300), dtype=torch.uint8)
    with torch.no_grad():
        for compiled, eager in zip(network(images), model(images), strict=True):
            assert torch.allclose(compiled, eager, atol=1e-3)


@pytest.mark.parametrize("error", [RuntimeError, ImportError, PermissionError, OSError])
def test_a_failed_compilation_is_a_one_line_error(error, monkeypatch):
    def fail(*_, **__):
        raise error("no compiler\nand much more")

    monkeypatch.setattr(torch, "compile", lambda network, dynamic: fail)
    with pytest.raises(InputError, match=r"^--compile: PyTorch cannot compile the network here \(no compiler\)"):
        compile_network(torch.nn.Linear(1, 1), [(1, 3, 2, 2)], "fp32")


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that torch.compile makes: a list, which grows. They run as they are."""
    made = []

    def backend(graph, _):
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    return made


class Means(torch.nn.Module):
    """A stand-in for the network with many weights in several layers, and little to compute."""

    def __init__(self, width=2):
        super().__init__()
        self.layers = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(4)))

    def forward(self, images):
        return (self.layers(images.float().mean((1, 2, 3)).expand(self.layers[0].in_features, -1).t()),)


def test_batches_of_uneven_sizes_are_compiled_beforehand(graphs):
    network = compile_network(Means(), [(4, 3, 8, 8), (5, 3, 8, 8)], "fp32")
    assert len(graphs) == 2
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in (5, 4, 5):
            network(torch.ones(n, 3, 8, 8, dtype=torch.uint8))[0].sum().backward()
        with pytest.raises(RuntimeError):
            network(torch.ones(3, 3, 8, 8, dtype=torch.uint8))


def test_with_several_processes_the_backward_pass_is_divided_so_that_gradients_travel_meanwhile(graphs, monkeypatch):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = Means(width=2600)  # each layer fills a bucket of 25 MB, which is sent as a whole
        monkeypatch.setattr("support.devices.n_processes", lambda: 2)
        network = compile_network(torch.nn.parallel.DistributedDataParallel(model), [(1, 3, 8, 8)], "fp32")
        assert len(graphs) == 4
        with torch.compiler.set_stance("fail_on_recompile"):
            network(torch.ones(1, 3, 8, 8, dtype=torch.uint8))[0].sum().backward()
        assert all(parameter.grad.any() for parameter in model.parameters())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("options", "is_cuda", "compiled"),
    [
        (["--iterations", "1001"], True, True),
        (["--iterations", "1000"], True, False),
        (["--iterations", "1001"], False, False),
        (["--iterations", "1001", "--deterministic"], True, False),
        (["--iterations", "1001", "--no-compile"], True, False),
        (["--iterations", "9", "--compile"], False, True),
    ],
)
def test_long_runs_on_a_gpu_compile_the_network_unless_told_otherwise(options, is_cuda, compiled, monkeypatch):
    model, settings = SimpleNamespace(priors_cxcy=SimpleNamespace(is_cuda=is_cuda)), train.parse_settings(options)
    monkeypatch.setattr(train.devices, "compile_network", lambda network, shapes, precision: (network, shapes))
    network = train.prepare_network(settings, model, "bf16")
    assert network == ((model, [(32, 3, 300, 300)]) if compiled else model)
    assert settings.compile is compiled


@pytest.mark.parametrize("fails", ["here", "elsewhere"])
def test_a_failed_compilation_is_a_warning_and_the_same_for_all_processes(fails, monkeypatch, capsys):
    def compile_network(*_):
        if fails == "here":
            raise InputError("--compile: PyTorch cannot compile the network here (no compiler); use --no-compile")

    monkeypatch.setattr(train.devices, "compile_network", compile_network)
    monkeypatch.setattr(train.devices, "any_process", lambda flag: flag or fails == "elsewhere")
    model = SimpleNamespace(priors_cxcy=SimpleNamespace(is_cuda=True))
    for options in ([], ["--compile"]):
        settings = train.parse_settings(options)
        assert train.prepare_network(settings, model, "bf16") is model
        assert settings.compile is True  # a resumed run tries again
        message = "no compiler); use --no-compile" if fails == "here" else "another process cannot compile the network"
        assert f"{message}; training continues uncompiled" in capsys.readouterr().err


def test_the_shapes_to_compile_for_are_those_of_the_parts_of_each_process_s_share(monkeypatch):
    for n_images, n_processes, accumulate in itertools.product((5, 8, 9), (1, 2, 3), (1, 2, 4)):
        monkeypatch.setattr(train.devices, "n_processes", lambda n=n_processes: n)
        settings = SimpleNamespace(batch_size=n_images, accumulate=accumulate)
        for process in range(n_processes):
            share = torch.arange(n_images)[process::n_processes]
            parts = share.tensor_split(min(accumulate, len(share)))  # as in train_step
            assert train.images_at_once(settings, process) == sorted({len(part) for part in parts})


def test_deterministic_mode_rejects_nondeterministic_algorithms(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    indices = torch.zeros(1, 1, 2, 2, dtype=torch.long)
    try:
        make_deterministic()
        with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
            torch.nn.functional.max_unpool2d(torch.ones(1, 1, 2, 2), indices, 2)
    finally:
        torch.use_deterministic_algorithms(False)
    assert os.environ == {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "MKL_CBWR": "AUTO"}


@pytest.mark.parametrize("lengths", [(3, 3), (3, 2), (1, 0)])
def test_items_gathered_over_processes_have_the_order_of_a_single_process(lengths, monkeypatch):
    lists = [[(i, rank) for i in range(n)] for rank, n in enumerate(lengths)]
    monkeypatch.setattr("support.devices.n_processes", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_gather_object", lambda out, own: out.__setitem__(slice(None), lists))
    assert gather_over_processes(lists[0]) == sorted(lists[0] + lists[1])


def test_the_failure_of_another_process_is_one_line(monkeypatch):
    def fail(*_):
        raise RuntimeError("Connection closed by peer\nand much more")

    monkeypatch.setattr("support.devices.n_processes", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_reduce", fail)
    monkeypatch.setattr("torch.distributed.all_gather_object", fail)
    for communicate in (lambda: sum_over_processes(torch.zeros(1)), lambda: gather_over_processes([])):
        with pytest.raises(InputError, match="^another process failed; its message says why$"):
            communicate()


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_deterministic_run_on_a_gpu_resumes_bit_for_bit(precision, sample, tmp_path, run):
    """Compare six iterations with three, resumed for another three."""
    arguments = ("--data-folder", sample, "--no-pretrained", "--batch-size", 4, "--workers", 0, "--warmup", 3,
                 "--deterministic", "--decay-at", 5, "--precision", precision)  # fmt: skip
    run("train.py", *arguments, "--output-folder", tmp_path / "whole", "--iterations", 6)
    run("train.py", *arguments, "--output-folder", tmp_path / "parts", "--iterations", 3)
    run("train.py", "--resume", tmp_path / "parts" / "checkpoint.pth", "--iterations", 6)
    whole, parts = (read_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("whole", "parts"))
    for name, value in whole["model"].items():
        assert torch.equal(value, parts["model"][name]), name


@needs_gpu
def test_the_loss_never_synchronises_with_a_gpu(model, random_objects):
    criterion = MultiBoxLoss(model.priors_cxcy.to(CUDA))
    locs, scores = (torch.randn(4, 8732, n, device=CUDA, requires_grad=True) for n in (4, 21))
    boxes, labels = zip(*(random_objects(np.random.RandomState(i), i) for i in range(4)), strict=True)
    criterion(locs, scores, boxes, labels).backward()  # one-time initialisation may synchronise
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        criterion(locs, scores, boxes, labels).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize(("precision", "compiled"), [("bf16", False), ("fp16", False), ("bf16", True)])
def test_a_fast_step_on_a_gpu_agrees_with_eager_fp32(precision, compiled, random_objects):
    """Losses agree within 2%, gradients within 10% of their norm: bf16 has 8 bits, and errors add up over 20 layers."""
    boxes, labels = zip(*(random_objects(np.random.RandomState(i), 3) for i in range(4)), strict=True)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (4, 3, 300, 300), dtype=torch.uint8, generator=generator).to(CUDA)
    results = []
    for name, fast in (("fp32", False), (precision, True)):
        choose_precision(name, CUDA)
        torch.manual_seed(0)
        model = SSD300(21, pretrained=False).to(CUDA)
        network = model
        if fast:
            model.to(memory_format=torch.channels_last)
            network = compile_network(model, [images.shape], precision) if compiled else model
        optimizer = torch.optim.SGD([{"params": list(model.parameters()), "lr_factor": 1.0}], lr=0, fused=True)
        scaler = torch.amp.GradScaler("cuda", enabled=name == "fp16", init_scale=64.0)
        criterion = MultiBoxLoss(model.priors_cxcy)
        losses = train.train_step(network, criterion, optimizer, scaler, (images, boxes, labels), 0, name)[:2]
        gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).float()
        results.append((losses, gradient))
    (losses, gradient), (fast_losses, fast_gradient) = results
    assert torch.allclose(losses, fast_losses, rtol=0.02)
    assert (gradient - fast_gradient).norm() < 0.1 * gradient.norm()


@needs_gpu
def test_batches_arrive_on_the_gpu_intact():
    loader = torch.utils.data.DataLoader(
        [torch.full((3, 30, 30), float(i)) for i in range(32)], batch_size=4, pin_memory=True,
        collate_fn=lambda images: (torch.stack(images), 1),
    )  # fmt: skip
    for number, (images, one) in enumerate(batches_on(CUDA, loader)):
        assert one == 1
        assert images.device.type == "cuda"
        assert images.amax((1, 2, 3)).tolist() == images.amin((1, 2, 3)).tolist() == [4 * number + i for i in range(4)]
