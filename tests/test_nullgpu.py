"""What training, validation and detection ask of a GPU: counted on one that does nothing (see nullgpu/stand_in.py)."""

import json
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from conftest import ROOT, launch

SOURCES = ROOT / "tests" / "nullgpu"
# Kernels of a step on 8 images, at most, besides the convolutions' and with PyTorch 2.15. With fp16 values decide.
KERNELS = {"fp32": 296, "tf32": 296, "bf16": 445, "deterministic": 469}
TRAINING = [*KERNELS, "fp16"]
# Shapes of the gradients of the prediction convolutions for 5 classes and background: slices of those of all priors,
# which cuDNN does not take. They are small.
HEADS = [[8, n, cells, cells] for n_priors, maps in ((4, (38, 3, 1)), (6, (19, 10, 5)))
         for n in (n_priors * 4, n_priors * 6) for cells in maps]  # fmt: skip


def find_headers():
    """Return the folder of CUDA's headers, which come with the CUDA build of PyTorch, or None."""
    packages = Path(sysconfig.get_paths()["purelib"])
    return next((path.parent for path in packages.glob("triton/backends/nvidia/include/cuda_runtime_api.h")), None)


@pytest.fixture(scope="module")
def observed(sample, tmp_path_factory):
    """What nullgpu/steps.py observed: for each kind of work, a dict as `stand_in.observed` returns it."""
    headers, version = find_headers(), tuple(map(int, torch.__version__.split(".")[:2]))
    if torch.version.cuda is None or version < (2, 15) or headers is None or not all(map(shutil.which, ("gcc", "g++"))):
        pytest.skip("needs the CUDA build of PyTorch 2.15 or newer, with Triton, and the compilers gcc and g++")
    folder = tmp_path_factory.mktemp("nullgpu")
    runtime, driver = folder / "runtime.so", folder / "libcuda.so.1"
    options = ("-O1", "-shared", "-fPIC", "-w")
    subprocess.run(["g++", *options, f"-I{headers}", SOURCES / "runtime.cpp", "-o", runtime], check=True)
    subprocess.run(["gcc", *options, SOURCES / "driver.c", "-o", driver], check=True)
    environment = {
        **os.environ, "STAND_IN": str(runtime), "LD_PRELOAD": str(runtime), "LD_LIBRARY_PATH": str(folder),
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    launch(SOURCES / "steps.py", sample, folder, env=environment)
    return json.loads((folder / "observed.json").read_text())


def test_the_stand_in_sees_a_wait_a_copy_from_pageable_memory_and_one_into_another_layout(observed):
    bad = observed["control"]
    counts = {"waits": 2, "copies_to_host": 1, "copies_from_pageable": 1, "copies_from_pinned": 0}
    assert {name: bad[name] for name in counts} == counts
    assert any("copy from pageable memory, 240000 bytes" in event for event in bad["events"])
    assert bad["layout_copies"] == [[2, 3, 100, 100]]


@pytest.mark.parametrize("name", TRAINING)
def test_a_training_step_does_not_wait_for_the_gpu(name, observed):
    n_waits = 1 if name == "fp16" else 0  # the gradient scaler looks whether to skip the update
    assert [observed[name]["waits"], observed[name]["copies_to_host"]] == [n_waits] * 2, observed[name]["events"]


@pytest.mark.parametrize("name", [*TRAINING, "validation"])
def test_images_and_objects_are_copied_from_pinned_memory(name, observed):
    assert observed[name]["copies_from_pageable"] == 0, observed[name]["events"]
    assert observed[name]["copies_from_pinned"] > 0


@pytest.mark.parametrize("name", [*TRAINING, "validation"])
def test_convolutions_get_their_input_in_cudnns_layout_and_choose_algorithms_as_intended(name, observed):
    dtype = {"fp32": "float32", "tf32": "float32", "fp16": "float16"}.get(name, "bfloat16")
    flags = [name != "deterministic", name == "deterministic", name == "tf32", f"torch.{dtype}", "torch.channels_last"]
    assert observed[name]["convolutions"] == [flags]
    assert observed[name]["layout_copies"] == ([] if name == "validation" else sorted(HEADS))


@pytest.mark.parametrize("name", KERNELS)
def test_a_training_step_launches_no_more_kernels_than_known(name, observed):
    assert KERNELS[name] / 2 < observed[name]["kernels"] <= KERNELS[name]


def test_validation_waits_for_its_losses_only(observed):
    assert observed["validation"]["waits"] == 1, observed["validation"]["events"]


def test_detection_runs_on_the_gpu(observed):
    """Its candidates, which values decide, are replaced; so it has nothing to wait for."""
    assert observed["detection"]["kernels"] > 0
    assert observed["detection"]["waits"] == observed["detection"]["copies_from_pageable"] == 0
