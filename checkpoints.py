"""Checkpoints: the one place that knows their layout, ours and that of other systems.

model = load_model("runs/voc/best.pth", device="cuda")
model = load_model("coco")  # torchvision's, fetched once
model = load_model("ssd300_mAP_77.43_v2.pth")  # ssd.pytorch's
"""

import pickle
import re
from collections import OrderedDict
from types import SimpleNamespace

import torch
from torchvision.models.detection import SSD300_VGG16_Weights

from files import InputError, atomic_writer
from model import PRIOR_FAMILIES, SSD300, fetch_weights
from voc import check_label_map, make_label_map
from voc import label_map as voc_label_map

FORMAT = "ssd300-1"  # changes when older files can no longer be read
_NETWORKS = "an SSD300 of this code, the public PyTorch tutorial, ssd.pytorch or torchvision"

# Other systems' state dicts. Key: a name that tells the system. prefixes: of its names, in the order of our own
# parameters (scale of conv4_3, base and auxiliary layers, boxes, classes). All of them order the boxes of a cell
# as our predictions do, filter by filter; which shape comes when is kept by the family of priors.
_CAFFE_MEAN = (123.0, 117.0, 104.0)  # RGB, 0-255
_OTHER_SYSTEMS = {
    "vgg.0.weight": {  # ssd.pytorch
        "prefixes": ("L2Norm.", "vgg.", "extras.", "loc.", "conf."),
        "priors": "caffe",
        "pixel_mean": _CAFFE_MEAN,
    },
    "backbone.features.0.weight": {  # torchvision's ssd300_vgg16; its mean as its image_mean has it
        "prefixes": (
            "backbone.scale_weight", "backbone.features.", "backbone.extra.", "head.regression_head.",
            "head.classification_head.",
        ),
        "priors": "coco",
        "pixel_mean": (255 * 0.48235, 255 * 0.45882, 255 * 0.40784),
    },
}  # fmt: skip
_COCO_TO_VOC = {
    "__background__": "background", "airplane": "aeroplane", "couch": "sofa", "dining table": "diningtable",
    "motorcycle": "motorbike", "potted plant": "pottedplant", "tv": "tvmonitor",
}  # fmt: skip


def save_weights(path, model):
    """Write a model alone, for sharing, whole or not at all: `load_model` reads it."""
    _save(path, model, {})


def save_checkpoint(path, model, optimizer, scaler, progress, settings):
    """Write everything that training goes on from, whole or not at all.

    :param path: of the file, replaced if it is there
    :param model: SSD300 whose label_map is set
    :param optimizer, scaler: its optimizer and gradient scaler
    :param progress: dict of plain values: "iteration", the number of updates made, "best_loss", the lowest validation
        loss so far, and more that the training goes on from
    :param settings: dict of plain values that describe the run
    """
    state = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "settings": settings}
    _save(path, model, {**state, **progress})


def _save(path, model, training):
    checkpoint = {
        "format": FORMAT,
        "model": model.state_dict(),
        "label_map": model.label_map,
        "priors": model.priors,
        "pixel_mean": model.pixel_mean,
        **training,
    }
    with atomic_writer(path) as file:
        torch.save(checkpoint, file)


def load_checkpoint(path):
    """Read what `save_checkpoint` wrote, on the CPU, without running any code from the file.

    :return: the dictionary
    :raises InputError: naming the file, where it is missing, broken, or not such a checkpoint
    """
    checkpoint = _read(path)
    if not isinstance(checkpoint, dict) or "format" not in checkpoint or "optimizer" not in checkpoint:
        raise InputError(f"{path}: no checkpoint to go on from; give one that train.py wrote, or use --init-from")
    _check(checkpoint, ("optimizer", "iteration", "best_loss", "settings"), path)
    return checkpoint


def _check(checkpoint, keys, path):
    """Raise InputError unless a file of our own has what describes a model, and these keys."""
    if checkpoint["format"] != FORMAT:
        raise InputError(f"{path}: of format {checkpoint['format']}, not {FORMAT}; use the code that wrote it")
    missing = [key for key in ("model", "label_map", "priors", "pixel_mean", *keys) if key not in checkpoint]
    if missing or str(checkpoint["priors"]) not in PRIOR_FAMILIES:
        raise InputError(f"{path}: damaged checkpoint, without {', '.join(missing) or 'known priors'}; give another")
    kinds = {"iteration": int, "best_loss": float, "settings": dict}
    wrong = [key for key in keys if not isinstance(checkpoint[key], kinds.get(key, object))]
    if wrong:
        raise InputError(f"{path}: damaged checkpoint, wrong {', '.join(wrong)}; give another")
    check_label_map(checkpoint["label_map"], path)


def load_optimizer(optimizer, scaler, checkpoint, path):
    """Load the momenta of a checkpoint, not its settings, and the gradient scaler where both have one.

    :raises InputError: naming `path`, where they do not fit
    """
    try:
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": checkpoint["optimizer"]["state"], "param_groups": groups})
        for parameter, state in optimizer.state.items():  # laid out as the parameter is here, which fused SGD expects
            state["momentum_buffer"] = torch.empty_like(parameter).copy_(state["momentum_buffer"])
        if scaler.is_enabled() and checkpoint.get("scaler"):
            scaler.load_state_dict(checkpoint["scaler"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"{path}: damaged checkpoint, its optimizer state does not fit; give another") from error


def make_model(description, path):
    """Return the SSD300 of a dict with "model", "label_map", "priors", "pixel_mean"; InputError if they do not fit."""
    label_map, priors, pixel_mean = (description[key] for key in ("label_map", "priors", "pixel_mean"))
    try:
        model = SSD300(len(label_map), pretrained=False, priors=priors, pixel_mean=pixel_mean)
        model.load_state_dict(description["model"])
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: its weights do not fit an SSD300 of {len(label_map)} classes, background included; "
            f"expected {_NETWORKS}"
        ) from error
    model.label_map = label_map
    return model


def load_model(source, device="cpu", label_map=None):
    """Return the SSD300 of a file in eval mode, with its `.label_map` (name -> index, background 0).

    The file is recognised by what it holds, and none of its code is run. It may be a checkpoint or exported weights
    of our own; the public tutorial's checkpoint with the whole model pickled, or a state dict in its names;
    a state dict of ssd.pytorch's or of torchvision's ssd300_vgg16, of whose 91 COCO classes VOC's 20 are taken.

    :param source: path of the file, or "coco" for torchvision's weights, fetched once
    :param device: where the model is put
    :param label_map: class names for a file that holds none and has as many classes; with 21 classes it is VOC's,
        and without this parameter names are made up
    :raises InputError: naming the file, where it cannot be used
    """
    if source == "coco":
        contents = fetch_weights(SSD300_VGG16_Weights.COCO_V1, "give a file of weights instead of coco")
    else:
        contents = _read(source)
    if isinstance(contents, dict) and "format" in contents:
        _check(contents, (), source)
        return make_model(contents, source).to(device).eval()
    try:
        description = _describe(contents)
        n_classes = len(description["model"]["pred_convs.cl_conv4_3.bias"]) // 4
    except Exception as error:  # anything may be in a file, nested in any way
        raise InputError(f"{source}: holds no weights of a known system; expected {_NETWORKS}") from error
    if n_classes == len(voc_label_map):
        label_map = voc_label_map
    elif label_map is None or len(label_map) != n_classes:
        label_map = make_label_map(f"class {number}" for number in range(1, n_classes))
    return make_model({**description, "label_map": label_map}, source).to(device).eval()


def load_base(model, path):
    """Load the paper's reduced VGG-16 (vgg16_reducedfc.pth), a state dict with names 0.weight ... 33.bias, as base.

    The model takes on that network's input, RGB of 0-255 minus (123, 117, 104).

    :raises InputError: naming the file, where it is none
    """
    expected = "vgg16_reducedfc.pth, the reduced VGG-16 with names 0.weight ... 33.bias"
    contents = _read(path, expected)
    try:
        names = sorted(contents, key=lambda name: _place(name, ("",)))
        model.base.load_state_dict(dict(zip(model.base.state_dict(), (contents[n] for n in names), strict=True)))
    except Exception as error:  # anything may be in a file
        raise InputError(f"{path}: not the reduced VGG-16; expected {expected}") from error
    model.set_pixel_mean(_CAFFE_MEAN)


def transfer(source, label_map):
    """Return an SSD300 for other classes that starts from a model, and the names of the classes carried over.

    All layers are taken; of the class heads the filters of classes that both know by name, the others are fresh.
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


class _Remains:
    """Stands for a class of a pickled model or optimizer: keeps the attributes, has none of the code."""


def _nothing(*_):
    return {}


# What the tutorial's checkpoints pickle beside tensors, and older PyTorch with it.
_ALLOWED = [
    *((_Remains, f"model.{name}") for name in ("SSD300", "VGGBase", "AuxiliaryConvolutions", "PredictionConvolutions")),
    (_Remains, "torch.nn.modules.conv.Conv2d"),
    (_Remains, "torch.nn.modules.pooling.MaxPool2d"),
    (_Remains, "torch.optim.sgd.SGD"),
    *((_nothing, f"{module}.{name}") for module in ("builtins", "__builtin__") for name in ("dict", "set")),
    (_nothing, "collections.defaultdict"),
    (_nothing, "torch.nn.backends.thnn._get_thnn_function_backend"),
]


class _AllowListUnpickler(pickle._Unpickler):
    """Unpickles tensors and what is allowed, nothing else; in Python, to look at single instructions."""

    dispatch = dict(pickle._Unpickler.dispatch)

    allowed = {name: stand_in for stand_in, name in _ALLOWED} | {
        "collections.OrderedDict": OrderedDict,
        "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
        "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
    }

    def find_class(self, module, name):
        """Return what stands for a global; UnpicklingError for all that are not allowed."""
        if f"{module}.{name}" not in self.allowed:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return self.allowed[f"{module}.{name}"]

    def load_build(self):
        """Give an object its attributes, but never a class or a function, which outlive the file."""
        if type(self.stack[-2]) not in (_Remains, OrderedDict):
            raise pickle.UnpicklingError(f"attributes of a {type(self.stack[-2]).__name__} are not allowed")
        super().load_build()

    def load_binpersid(self):
        """Take a class alone of ('module', class, file, source); torch.load would compare and even write source."""
        if self.stack[-1][0] == "module":
            self.stack[-1] = self.stack[-1][1]
        else:
            super().load_binpersid()

    dispatch[pickle.BUILD[0]], dispatch[pickle.BINPERSID[0]] = load_build, load_binpersid

    @classmethod
    def load_file(cls, file, **options):
        """Do what pickle.load does."""
        return cls(file, **options).load()


def _read(path, expected=_NETWORKS):
    """Return what a file of torch.save holds, on the CPU, running no code from it; InputError that names it."""
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError as error:
                # Before PyTorch 1.6 a whole model was pickled with references to its classes, which weights_only
                # does not know. Such a file gets the same allow-list from an unpickler of our own.
                if "persistent_load of storage" not in str(error):
                    raise
                unpickler = SimpleNamespace(
                    __name__="pickle", Unpickler=_AllowListUnpickler, load=_AllowListUnpickler.load_file
                )  # fmt: skip
                return torch.load(path, map_location="cpu", weights_only=False, pickle_module=unpickler)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; give the path of a checkpoint") from error
    except Exception as error:  # torch.load raises a dozen types on truncated, foreign and hostile files
        raise InputError(f"{path}: cannot be read, it is truncated, foreign or unsafe; expected {expected}") from error


def _describe(contents):
    """Return {"model", "priors", "pixel_mean"} of another system's file, the weights in our names."""
    weights = contents.get("model", contents.get("state_dict", contents))
    weights = _state_dict(weights) if isinstance(weights, _Remains) else weights
    weights = {name.removeprefix("module."): value for name, value in weights.items()}  # of DataParallel
    for name, system in _OTHER_SYSTEMS.items():
        if name in weights:
            weights = _in_our_names(weights, system["prefixes"])
            return {"model": weights, "priors": system["priors"], "pixel_mean": system["pixel_mean"]}
    return {"model": weights, "priors": "paper", "pixel_mean": None}


def _state_dict(module, prefix=""):
    """Return the state dict of what remains of a pickled module."""
    weights = {prefix + name: value for name, value in module._parameters.items() if value is not None}
    for name, child in module._modules.items():
        weights |= _state_dict(child, f"{prefix}{name}.")
    return weights


def _place(name, prefixes):
    """Return what sorts another system's names: by prefix, then by the numbers in them, weight before bias."""
    place = next(place for place, prefix in enumerate(prefixes) if name.startswith(prefix))
    return place, [int(number) for number in re.findall(r"\d+", name)], name.endswith("bias")


def _in_our_names(weights, prefixes):
    """Return another system's weights in our names; of COCO's 91 classes those of VOC."""
    with torch.device("meta"):
        own = list(SSD300(2, pretrained=False).state_dict())
    names = sorted(weights, key=lambda name: _place(name, prefixes))
    renamed = dict(zip(own, (weights[name] for name in names), strict=True))
    renamed["rescale_factors"] = renamed["rescale_factors"].reshape(1, -1, 1, 1)

    categories = SSD300_VGG16_Weights.COCO_V1.meta["categories"]
    if len(renamed["pred_convs.cl_conv4_3.bias"]) == 4 * len(categories):
        categories = [_COCO_TO_VOC.get(category, category) for category in categories]
        chosen = [categories.index(name) for name in voc_label_map]
        for name in own:
            if name.startswith("pred_convs.cl_"):
                renamed[name] = renamed[name].unflatten(0, (-1, len(categories)))[:, chosen].flatten(0, 1)
    return renamed
