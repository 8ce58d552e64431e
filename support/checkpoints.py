"""Checkpoints: the only module that knows how files of weights are laid out, ours and those of other systems.

checkpoint = read_checkpoint("runs/voc/checkpoint.pth")  # everything that a training resumes from
description = read_weights("ssd300_mAP_77.43_v2.pth", parameter_names)  # what a network is built from

Nothing here builds a network: `model.load_model` does that from a description. No code in a file is ever run.
"""

import os
import pickle
import zipfile
from collections import OrderedDict
from types import SimpleNamespace

import torch

from support.download import COCO_WEIGHTS, fetch_weights
from support.files import InputError, atomic_writer
from support.labels import check_label_map, coco_labels, make_label_map
from support.labels import label_map as voc_label_map

FORMAT = "ssd300-1"  # of both sizes; changes when older files can no longer be read
KNOWN_SYSTEMS = "an SSD300 or SSD512 of this code, the public PyTorch tutorial, ssd.pytorch, lufficc/SSD or torchvision"
CAFFE_MEAN = (123.0, 117.0, 104.0)  # RGB, 0-255

coco_label_map = make_label_map(coco_labels)

# torchvision's ssd300_vgg16 has background and COCO's 90 ids, ten of which COCO does not use.
_N_CATEGORIES = 91
_USED_CATEGORIES = [index for index in range(_N_CATEGORIES) if index not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]

# VGG-16's convolutions in the numbering of other systems: conv1_1 ... conv5_3, conv6 and conv7.
_VGG_NUMBERS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28, 31, 33)

# The priors of lufficc/SSD's SSD512 for VOC: Caffe's, but for the last size, which is 537.6 pixels in Caffe.
_LUFFICC_VOC_512 = {
    "scales": tuple(side / 512 for side in (35.84, 76.8, 153.6, 230.4, 307.2, 384, 460.8, 537.65)),
    "steps": tuple(step / 512 for step in (8, 16, 32, 64, 128, 256, 512)),
}

# The known systems. "scale" is the name of conv4_3's scale. "base" and "auxiliary" name the layers, in the order of
# ours; "predictions" are the names of the box and of the class predictions, before the number of the feature map. No
# system needs its filters permuted: the order of the prior shapes within a cell is part of the family of priors.
# "priors" are the families (names or fields) for each size of the network, by the number of classes: 21 means VOC,
# another number that is listed means COCO, and None is for all numbers that are not listed.
_SYSTEMS = {
    "this code or the public tutorial": {  # the tutorial's names are ours
        "priors": {300: {None: "paper"}, 512: {None: "caffe"}},
        "pixel_mean": None,
    },
    "ssd.pytorch": {
        "scale": "L2Norm.weight",
        "base": [f"vgg.{number}" for number in _VGG_NUMBERS],
        "auxiliary": [f"extras.{number}" for number in range(8)],
        "predictions": ("loc", "conf"),
        "priors": {300: {21: "caffe", None: "coco-clipped"}},
        "pixel_mean": CAFFE_MEAN,
    },
    "lufficc/SSD": {
        "scale": "backbone.l2_norm.weight",
        "base": [f"backbone.vgg.{number}" for number in _VGG_NUMBERS],
        "auxiliary": [f"backbone.extras.{number}" for number in range(10)],
        "predictions": ("box_head.predictor.reg_headers", "box_head.predictor.cls_headers"),
        "priors": {300: {21: "caffe", 81: "coco-clipped"}, 512: {21: _LUFFICC_VOC_512, 81: "coco"}},
        "pixel_mean": CAFFE_MEAN,
    },
    "torchvision": {  # ssd300_vgg16; the mean is its image_mean
        "scale": "backbone.scale_weight",
        "base": [
            *(f"backbone.features.{number}" for number in _VGG_NUMBERS[:10]),
            *(f"backbone.extra.0.{number}" for number in ("1", "3", "5", "7.1", "7.3")),
        ],
        "auxiliary": [f"backbone.extra.{block}.{layer}" for block in (1, 2, 3, 4) for layer in (0, 2)],
        "predictions": ("head.regression_head.module_list", "head.classification_head.module_list"),
        "priors": {300: {_N_CATEGORIES: "coco", None: "coco"}},
        "pixel_mean": (255 * 0.48235, 255 * 0.45882, 255 * 0.40784),
    },
}


# ---------------------------------------------------------------------------------------------------------
# Our own files
# ---------------------------------------------------------------------------------------------------------


def save_weights(path, model):
    """Write a model, whose label_map is set, without what training resumes from; whole or not at all."""
    save_checkpoint(path, model, {})


def save_checkpoint(path, model, training):
    """Write a model and everything that training resumes from; whole or not at all.

    :param path: file to write or replace
    :param model: SSD300 or SSD512 whose label_map is set
    :param training: "optimizer" and "scaler", their state dicts; "settings", a dict; "iteration", the number of updates
        made; "best_loss", the lowest validation loss; and other plain values that training resumes from
    """
    checkpoint = {
        "format": FORMAT,
        "model": model.state_dict(),
        "label_map": model.label_map,
        "priors": model.priors if isinstance(model.priors, str) else model.priors._asdict(),
        "pixel_mean": model.pixel_mean,
        "size": model.size,
        **training,
    }
    with atomic_writer(path) as file:
        torch.save(checkpoint, file)


def read_checkpoint(path):
    """Read what `save_checkpoint` wrote for a training, on the CPU.

    :return: the dictionary
    :raises InputError: naming the file, if it is missing, damaged or not such a checkpoint
    """
    checkpoint = _read(path)
    if not isinstance(checkpoint, dict) or "format" not in checkpoint or "optimizer" not in checkpoint:
        raise InputError(f"{path}: not a checkpoint of train.py, so it cannot be resumed; use --init-from instead")
    _check_own(checkpoint, {"optimizer": object, "iteration": int, "best_loss": float, "settings": dict}, path)
    return checkpoint


def _check_own(checkpoint, training_keys, path):
    """Raise InputError unless a file of ours has everything that describes a model, and `training_keys`."""
    if checkpoint["format"] != FORMAT:
        raise InputError(f"{path}: has format {checkpoint['format']}, not {FORMAT}; use the code that wrote it")
    missing = [key for key in ("model", "label_map", "priors", "pixel_mean", *training_keys) if key not in checkpoint]
    if missing:
        raise InputError(f"{path}: damaged checkpoint, {', '.join(missing)} missing; use another one")
    wrong = [key for key, kind in training_keys.items() if not isinstance(checkpoint[key], kind)]
    if wrong:
        raise InputError(f"{path}: damaged checkpoint, wrong {', '.join(wrong)}; use another one")
    check_label_map(checkpoint["label_map"], path)


def load_optimizer(optimizer, scaler, checkpoint, path):
    """Load the momenta of a checkpoint, but not its settings, and the gradient scaler if both have one.

    :raises InputError: naming `path`, if they do not fit
    """
    try:
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": checkpoint["optimizer"]["state"], "param_groups": groups})
        for parameter, state in optimizer.state.items():
            # Fused SGD expects each momentum in the memory layout of its parameter.
            state["momentum_buffer"] = torch.empty_like(parameter).copy_(state["momentum_buffer"])
        if scaler.is_enabled() and checkpoint.get("scaler"):
            scaler.load_state_dict(checkpoint["scaler"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"{path}: damaged checkpoint, its optimizer state does not fit; use another one") from error


# ---------------------------------------------------------------------------------------------------------
# Files of any known system
# ---------------------------------------------------------------------------------------------------------


def read_weights(source, parameter_names, label_map=None):
    """Return the description of a network: what any file of weights holds, in our terms.

    The file is recognised by its contents. It may be a checkpoint or exported weights of ours; the public tutorial's
    checkpoint with the whole model pickled, or a state dict with its names; a state dict of ssd.pytorch or of
    torchvision's ssd300_vgg16; a checkpoint of lufficc/SSD's VGG networks. Of torchvision's 91 classes, those that COCO
    does not use are left out.

    :param source: path of the file, or "coco" for torchvision's weights, which are downloaded once
    :param parameter_names: size of the network -> our parameters' names, in the network's order
    :param label_map: class names for a file that has none and is neither VOC's nor COCO's, if their number fits;
        otherwise its classes are called "class 1", "class 2" ... A file of 21 classes counts as VOC's.
    :return: {"model": state dict in our names, "label_map", "priors": name of a family or dict of the fields of one,
        "pixel_mean": (R, G, B) of 0-255 or None for ImageNet-normalised input, "size"}
    :raises InputError: naming the file, if it cannot be used
    """
    if source == "coco":
        contents = fetch_weights(COCO_WEIGHTS, "name a file of weights instead of coco")
    else:
        contents = _read(source)
    if isinstance(contents, dict) and "format" in contents:
        _check_own(contents, {}, source)
        description = {key: contents[key] for key in ("model", "label_map", "priors", "pixel_mean")}
        return {**description, "size": contents.get("size", 300)}  # files of earlier versions have no size
    return _describe(contents, parameter_names, label_map, source)


def read_origin(source):
    """Return what a file of ours says about its training, and None for what is unknown, as in files of other systems.

    :param source: as for `read_weights`
    :return: {"data_folder": that it was trained on, "chosen_on": split whose score chose this network from its run}
    """
    try:
        contents = _read(source)
        return {"data_folder": str(contents["settings"]["data_folder"]), "chosen_on": contents.get("chosen_on")}
    except Exception:  # the file has no such facts, or cannot be read; then load_model says why
        return {"data_folder": None, "chosen_on": None}


def _describe(contents, parameter_names, label_map, source):
    """Return the description of the network in a file without "format"; parameters and errors as for `read_weights`."""
    name, size, weights = _identify(contents, parameter_names, source)
    system, families = _SYSTEMS[name], _SYSTEMS[name]["priors"][size]
    try:
        (n_filters,) = weights["pred_convs.cl_conv4_3.bias"].shape
        n_classes, remainder = divmod(n_filters, 4)
        if remainder:
            raise ValueError("not 4 priors per cell")
        if "scale" in system:
            weights["rescale_factors"] = weights["rescale_factors"][None, :, None, None]
        if n_classes == _N_CATEGORIES and n_classes in families:
            for parameter, value in weights.items():
                if parameter.startswith("pred_convs.cl_"):
                    # (n_priors * 91, ...) -> (n_priors, 91, ...) -> (n_priors * 81, ...)
                    weights[parameter] = value.unflatten(0, (-1, n_classes))[:, _USED_CATEGORIES].flatten(0, 1)
    except Exception as error:  # the values may be of any type and shape
        raise InputError(f"{source}: damaged weights of {name}; use another file") from error
    if n_classes not in families and None not in families:
        raise InputError(
            f"{source}: weights of {name} for {n_classes} classes, background included; the priors are known only for "
            f"{' and '.join(map(str, families))}, so use one of those"
        )

    if n_classes == len(voc_label_map):
        label_map = voc_label_map
    elif n_classes in families:
        label_map = coco_label_map
    elif label_map is None or len(label_map) != n_classes:
        label_map = make_label_map(f"class {number}" for number in range(1, n_classes))
    priors = families.get(n_classes, families.get(None))
    return {
        "model": weights, "label_map": label_map, "priors": priors, "pixel_mean": system["pixel_mean"], "size": size
    }  # fmt: skip


def _identify(contents, parameter_names, source):
    """Return the system of a file, the size of its network, and the weights in our names.

    :raises InputError: if the names of the weights are not exactly those of a known network
    """
    try:
        weights = contents.get("model", contents.get("state_dict", contents))
        weights = _state_dict(weights) if isinstance(weights, _StandIn) else weights
        weights = {name.removeprefix("module."): value for name, value in weights.items()}  # saved from DataParallel
        networks = [
            (system, size, _names_in(layout, parameter_names[size]))
            for system, layout in _SYSTEMS.items()
            for size in layout["priors"]
        ]
        # Choose the network that shares most names with the file: fewest are in only one of the two.
        system, size, names = min(networks, key=lambda network: len(weights.keys() ^ set(network[2])))
        if len(weights.keys() & set(names)) < len(names) / 2:
            raise ValueError("too few known names")
    except Exception as error:  # a file may hold anything, nested in any way
        raise InputError(f"{source}: not the weights of a known system; expected {KNOWN_SYSTEMS}") from error
    missing = [name for name in names if name not in weights]
    unknown = [f"{name!r:.60}" for name in weights if name not in names]
    differences = [f"lacks {', '.join(missing[:3])}"] if missing else []
    differences += [f"has {', '.join(unknown[:3])}"] if unknown else []
    if differences:
        raise InputError(
            f"{source}: looks like an SSD{size} of {system}, but {' and '.join(differences)}; use another file"
        )
    return system, size, {ours: weights[theirs] for ours, theirs in zip(parameter_names[size], names, strict=True)}


def _names_in(system, parameter_names):
    """Return the names that a system gives to our parameters, in our order."""
    if "scale" not in system:
        return parameter_names
    weights = [name for name in parameter_names if name.endswith(".weight")]
    n_auxiliary = sum(name.startswith("aux_convs.") for name in weights)
    n_maps = sum(name.startswith("pred_convs.loc_") for name in weights)
    predictions = [f"{layer}.{number}" for layer in system["predictions"] for number in range(n_maps)]
    layers = [*system["base"], *system["auxiliary"][:n_auxiliary], *predictions]
    return [system["scale"], *_weights_and_biases(layers)]


def _weights_and_biases(layers):
    """Return the names of the parameters of layers."""
    return [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")]


def _state_dict(module, prefix=""):
    """Return the state dict of a pickled module, of which only the attributes were read."""
    weights = {prefix + name: value for name, value in module._parameters.items() if value is not None}
    for name, child in module._modules.items():
        weights |= _state_dict(child, f"{prefix}{name}.")
    return weights


def read_base(path, parameters):
    """Return the state dict of the base network in a file: the paper's reduced VGG-16, vgg16_reducedfc.pth.

    :param parameters: state dict of our base network, for its names, their order and the shapes
    :raises InputError: naming the file, if it holds anything other than weights with names 0.weight ... 33.bias
    """
    expected = "vgg16_reducedfc.pth, the reduced VGG-16 with names 0.weight ... 33.bias"
    contents = _read(path, expected)
    try:
        names = _weights_and_biases(_VGG_NUMBERS)
        weights = {ours: contents[theirs].float() for ours, theirs in zip(parameters, names, strict=True)}
        if len(contents) != len(names) or any(weights[name].shape != value.shape for name, value in parameters.items()):
            raise ValueError("other weights, or of other shapes")
        return weights
    except Exception as error:  # a file may hold anything
        raise InputError(f"{path}: not the reduced VGG-16; expected {expected}") from error


# ---------------------------------------------------------------------------------------------------------
# Reading without running code
# ---------------------------------------------------------------------------------------------------------


class _StandIn:
    """Takes the place of a class in a pickled model or optimizer: keeps the attributes, has none of the code."""


def _empty_dict(*_):
    return {}


# What the tutorial's checkpoints pickle besides tensors, and what older versions of PyTorch add.
_ALLOWED = [
    *((_StandIn, f"model.{name}") for name in ("SSD300", "VGGBase", "AuxiliaryConvolutions", "PredictionConvolutions")),
    (_StandIn, "torch.nn.modules.conv.Conv2d"),
    (_StandIn, "torch.nn.modules.pooling.MaxPool2d"),
    (_StandIn, "torch.optim.sgd.SGD"),
    *((_empty_dict, f"{module}.{name}") for module in ("builtins", "__builtin__") for name in ("dict", "set")),
    (_empty_dict, "collections.defaultdict"),
    (_empty_dict, "torch.nn.backends.thnn._get_thnn_function_backend"),
]


class _AllowListUnpickler(pickle._Unpickler):
    """Unpickles tensors and allowed globals, nothing else. The Python unpickler lets us check single instructions."""

    dispatch = dict(pickle._Unpickler.dispatch)

    allowed = {name: stand_in for stand_in, name in _ALLOWED} | {
        "collections.OrderedDict": OrderedDict,
        "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
        "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
    }

    def find_class(self, module, name):
        """Return the stand-in for a global; raises UnpicklingError if it is not allowed."""
        if f"{module}.{name}" not in self.allowed:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return self.allowed[f"{module}.{name}"]

    def load_build(self):
        """Set attributes of an object, but never of a class or a function: those outlive the file."""
        if type(self.stack[-2]) not in (_StandIn, OrderedDict):
            raise pickle.UnpicklingError(f"attributes of a {type(self.stack[-2]).__name__} are not allowed")
        super().load_build()

    def load_binpersid(self):
        """Reduce ('module', class, file, source) to the class; torch.load would compare and even write the source."""
        if self.stack[-1][0] == "module":
            self.stack[-1] = self.stack[-1][1]
        else:
            super().load_binpersid()

    dispatch[pickle.BUILD[0]], dispatch[pickle.BINPERSID[0]] = load_build, load_binpersid


def _read(path, expected=KNOWN_SYSTEMS):
    """Return the contents of a file of torch.save, on the CPU; raises InputError that names the file."""
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            try:
                # With mmap, tensors that nobody uses, such as momenta, are not read.
                return torch.load(path, map_location="cpu", weights_only=True, mmap=_can_be_mapped(path))
            except pickle.UnpicklingError as error:
                # Before version 1.6 PyTorch pickled a whole model with references to its classes, which weights_only
                # does not support. Such a file is read by an unpickler of our own with the same allow-list.
                if "persistent_load of storage" not in str(error):
                    raise
                ours = SimpleNamespace(__name__="pickle", Unpickler=_AllowListUnpickler)
                ours.load = lambda file, **options: _AllowListUnpickler(file, **options).load()
                return torch.load(path, map_location="cpu", weights_only=False, pickle_module=ours)
    except IsADirectoryError as error:
        raise InputError(f"{path}: is a folder; give {os.path.join(path, 'checkpoint.pth')}") from error
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; give the path of a checkpoint") from error
    except Exception as error:  # torch.load raises a dozen types on truncated, foreign and hostile files
        raise InputError(f"{path}: cannot be read: truncated, foreign or unsafe; expected {expected}") from error


def _can_be_mapped(path):
    """Tell whether a file is as torch.save writes since version 1.6: a zip archive without compression."""
    if not isinstance(path, str | os.PathLike) or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(part.compress_type == zipfile.ZIP_STORED for part in archive.infolist())
