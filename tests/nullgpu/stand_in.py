"""What PyTorch asks of a GPU that does nothing: kernels, copies, waits, and convolutions.

`runtime.cpp`, preloaded, takes the place of CUDA's runtime. This module must be imported before anything uses CUDA.
PyTorch's own CUDA code runs: every shape, dtype, layout, device and wait is the real one. Kernels are counted and not
run, so every value is meaningless, and code whose control flow depends on values must have these replaced.

forget()
train_step(...)
print(observed())
"""

import collections
import ctypes
import os
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
COUNTERS = ("kernels", "copies_from_pinned", "copies_from_pageable", "copies_to_host", "copies_on_device", "waits")
KINDS = ("wait", "copy to the host", "copy from pageable memory")  # of events that the runtime reports
_runtime = ctypes.CDLL(os.environ["STAND_IN"])
_runtime.stand_in_counters.restype = ctypes.POINTER(ctypes.c_long * len(COUNTERS))
_before = dict.fromkeys(COUNTERS, 0)
_events = collections.Counter()
_convolutions, _layout_copies = set(), collections.Counter()


def forget():
    """Begin to observe anew."""
    _before.update(_count())
    for observations in (_events, _convolutions, _layout_copies):
        observations.clear()


def observed():
    """Return what has happened since `forget`.

    :return: dict of the COUNTERS without convolutions' kernels; "events": waits and copies, with their places in this
        code; "convolutions": sorted (cudnn.benchmark, deterministic, allow_tf32, dtype, layout) of forward passes;
        "layout_copies": shapes of inputs, weights and gradients that are copied into the layout that cuDNN takes
    """
    return {
        **{name: number - _before[name] for name, number in _count().items()},
        "events": [f"{n} x {event}" for event, n in sorted(_events.items())],
        "convolutions": sorted(_convolutions),
        "layout_copies": sorted(_layout_copies),
    }


def _count():
    return dict(zip(COUNTERS, _runtime.stand_in_counters().contents, strict=True))


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_long)
def _note(kind, n_bytes):
    """Note an event with the two innermost places of this code that led to it."""
    places = [
        f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno}"
        for frame in traceback.extract_stack()[:-1]
        if Path(frame.filename).is_relative_to(ROOT)
    ]
    _events[f"{KINDS[kind]}, {n_bytes} bytes, {' > '.join(places[-2:])}"] += 1


def _in_cudnns_layout(*tensors):
    """Return an input, a weight and perhaps a gradient in the layout that cuDNN takes them in, and note the copies."""
    is_last = any(t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in tensors[:2])
    layout = torch.channels_last if is_last else torch.contiguous_format
    for tensor in tensors:
        if not tensor.is_contiguous(memory_format=layout):
            _layout_copies[tuple(tensor.shape)] += 1
    return layout, *(tensor.contiguous(memory_format=layout) for tensor in tensors)


def _convolve(x, weight, bias, stride, padding, dilation, _transposed, _padding, _groups, *flags):
    layout, x, weight = _in_cudnns_layout(x, weight)
    benchmark, deterministic, _, allow_tf32 = flags
    _convolutions.add((benchmark, deterministic, allow_tf32, str(x.dtype), str(layout)))
    sides = [
        (x.size(2 + i) + 2 * padding[i] - dilation[i] * (weight.size(2 + i) - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]
    shape = len(x), len(weight), *sides
    result = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    return result if bias is None else result.add_(bias[:, None, None])


def _convolve_backward(grad, x, weight, _bias_sizes, _stride, _padding, _dilation, _transposed, _more, _groups, mask):
    layout, x, weight, grad = _in_cudnns_layout(x, weight, grad)
    return (
        torch.empty_like(x, memory_format=layout) if mask[0] else None,
        torch.empty_like(weight, memory_format=layout) if mask[1] else None,
        grad.sum((0, 2, 3)) if mask[2] else None,
    )


_runtime.stand_in_callback(_note)
_operators = torch.library.Library("aten", "IMPL")
_operators.impl("_convolution", _convolve, "CUDA")
_operators.impl("convolution_backward", _convolve_backward, "CUDA")
