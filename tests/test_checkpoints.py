"""Weights of other systems are recognised by their contents and load exactly; code in a file is never executed."""

import io
import pickle
import struct
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, launch
from published import images, seeded, shapes
from test_published import DATA
from torch import nn
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION
from torchvision.models.detection import SSD300_VGG16_Weights, ssd300_vgg16
from torchvision.models.detection.image_list import ImageList

from model import NETWORKS, PRIOR_FAMILIES, SSD300, SSD512, Priors, load_model
from support import checkpoints
from support.checkpoints import read_base, read_checkpoint, save_checkpoint, save_weights
from support.files import InputError
from support.labels import find_label, label_map, make_label_map
from train import transfer
from utils import IMAGENET_MEAN, IMAGENET_STD, cxcy_to_xy

CATEGORIES = SSD300_VGG16_Weights.COCO_V1.meta["categories"]
COCO_LABEL_MAP = make_label_map(
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,"
    "refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush".split(",")
)
NUMBERED = make_label_map(f"class {number}" for number in range(1, 201))

CAFFE_512 = PRIOR_FAMILIES[512]["caffe"]

# name in tests/data -> size, family of priors, classes
RECORDED = {
    "ssdpytorch_reference": (300, "caffe", label_map),
    "ssdpytorch_coco_reference": (300, "coco-clipped", NUMBERED),
    "lufficc_ssd300_voc": (300, "caffe", label_map),
    "lufficc_ssd300_coco": (300, "coco-clipped", COCO_LABEL_MAP),
    # Caffe's last size is 537.6 pixels.
    "lufficc_ssd512_voc": (512, CAFFE_512._replace(scales=(*CAFFE_512.scales[:-1], 537.65 / 512)), label_map),
    "lufficc_ssd512_coco": (512, "coco", COCO_LABEL_MAP),
}


def from_pixels(pixels, mean, std=(1, 1, 1)):
    """ImageNet-normalised images that equal another system's input `pixels`, which is (RGB in 0-255 - mean) / std."""
    mean, std, ours, deviation = (
        torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (mean, std, IMAGENET_MEAN, IMAGENET_STD)
    )
    return ((pixels * std + mean) / 255 - ours) / deviation


def outputs(model, inputs):
    with torch.no_grad():
        return model(inputs)


def assert_same_outputs(model, other, tolerance=0.0):
    for ours, theirs in zip(outputs(model, images()[:1]), outputs(other, images()[:1]), strict=True):
        assert (ours - theirs).abs().max() <= tolerance


def published_shapes(name):
    """Parameter name -> shape in a file of each known system, by its name in tests/data or by "torchvision" etc."""
    if name in RECORDED:
        return shapes(np.load(DATA / f"{name}.npz"))
    networks = {"tutorial": lambda: SSD300(21, False), "own SSD512": lambda: SSD512(21, False)}
    networks["torchvision"] = lambda: ssd300_vgg16(weights=None, weights_backbone=None)
    with torch.device("meta"):
        return {parameter: tuple(value.shape) for parameter, value in networks[name]().state_dict().items()}


def zeros(shapes):
    """Weights that take no space in a file: each tensor is a single number, expanded."""
    return {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def torchvision_model():
    """torchvision's network with 91 classes and with random weights that differ between classes."""
    torch.manual_seed(1)
    network = ssd300_vgg16(weights=None, weights_backbone=None).eval()
    for parameter in network.head.parameters():
        nn.init.normal_(parameter, std=0.02)
    return network


def torchvision_outputs(network, pixels):
    """Head outputs, transformed images and features of torchvision's network for RGB (N, 3, 300, 300) in 0-1."""
    with torch.no_grad():
        prepared, _ = network.transform(list(pixels))
        features = list(network.backbone(prepared.tensors).values())
        return network.head(features), prepared, features


@pytest.mark.parametrize("mean", [None, (123.0, 117.0, 104.0)])
def test_our_own_checkpoints_and_exported_weights_load_exactly(tmp_path, mean):
    torch.manual_seed(2)
    model = SSD300(4, pretrained=False, priors="coco", pixel_mean=mean).eval()
    model.label_map = make_label_map(["a", "b", "c"])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    model(images()[:1])[0].sum().backward()
    optimizer.step()
    training = {"optimizer": optimizer.state_dict(), "scaler": {}, "settings": {"seed": 3}, "iteration": 7}
    save_checkpoint(tmp_path / "all.pth", model, {**training, "best_loss": 1.5})
    save_weights(tmp_path / "small.any", model)
    for name in ("all.pth", "small.any"):
        loaded = load_model(tmp_path / name)
        assert not loaded.training
        assert loaded.label_map == model.label_map
        assert (loaded.priors, loaded.pixel_mean) == ("coco", mean)
        assert_same_outputs(loaded, model)
    assert (tmp_path / "small.any").stat().st_size < 0.6 * (tmp_path / "all.pth").stat().st_size
    assert read_checkpoint(tmp_path / "all.pth")["iteration"] == 7
    with pytest.raises(InputError, match=r"small\.any: not a checkpoint of train.py"):
        read_checkpoint(tmp_path / "small.any")


@pytest.mark.parametrize("network", [SSD300, SSD512])
def test_the_size_and_ones_own_priors_are_saved(tmp_path, network):
    family = PRIOR_FAMILIES[network.size]["caffe"]
    own = Priors(tuple(0.8 * scale for scale in family.scales), family.steps, (2, 0.5, 2.5, 0.4), clip_centers=True)
    model = network(3, pretrained=False, priors=own)
    model.label_map = make_label_map(["a", "b"])
    save_weights(tmp_path / "weights", model)
    loaded = load_model(tmp_path / "weights")
    assert (type(loaded), loaded.size, loaded.priors) == (network, network.size, own)
    assert torch.equal(loaded.priors_cxcy, model.priors_cxcy)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_a_checkpoint_of_an_earlier_version_has_no_size_and_is_an_ssd300(tmp_path, model):
    weights = {"format": "ssd300-1", "model": model.state_dict(), "priors": "coco", "pixel_mean": None}
    torch.save({**weights, "label_map": label_map}, tmp_path / "weights")
    loaded = load_model(tmp_path / "weights")
    assert (type(loaded), loaded.priors) == (SSD300, "coco")


def test_a_loaded_network_draws_no_random_numbers_and_shares_nothing_with_its_file(tmp_path, model):
    weights = {name: value.half() for name, value in model.state_dict().items()}
    for name in list(weights)[1::2]:  # of the convolutions
        weights[name] = weights[name].contiguous(memory_format=torch.channels_last)
    description = {"label_map": label_map, "priors": "coco", "pixel_mean": (123.0, 117.0, 104.0)}
    path = tmp_path / "weights"
    torch.save({"format": "ssd300-1", "model": weights, **description}, path)
    random_state = torch.get_rng_state()
    loaded = load_model(path)
    assert torch.equal(torch.get_rng_state(), random_state)
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, weights[name].float())
        assert (parameter.dtype, parameter.device.type) == (torch.float32, "cpu")
        assert parameter.requires_grad
        assert parameter.is_contiguous()
    built = SSD300(21, False, description["priors"], description["pixel_mean"])
    buffers = dict(loaded.named_buffers())
    assert buffers.keys() == dict(built.named_buffers()).keys()
    assert all(torch.equal(buffers[name], value) for name, value in built.named_buffers())


def test_detection_imports_neither_the_compiler_nor_torchvision(tmp_path, model):
    """Both take as long as importing PyTorch."""
    torch.save(model.state_dict(), tmp_path / "weights")
    code = (
        "import sys; from PIL import Image; from detect import find_objects; from model import load_model\n"
        "detections = find_objects(Image.new('RGB', (40, 40)), load_model(sys.argv[1]), 0.01, 0.45, 5)\n"
        "print(len(detections), [name for name in ('torch._dynamo', 'sympy', 'torchvision') if name in sys.modules])"
    )
    printed, _ = launch("-c", code, tmp_path / "weights", env={"PYTHONPATH": str(ROOT)})
    assert printed == "5 []\n"


def test_weights_without_values_are_refused(tmp_path, model):
    torch.save({name: value.to("meta") for name, value in model.state_dict().items()}, tmp_path / "weights")
    with pytest.raises(InputError, match="its weights or priors .* do not fit"):
        load_model(tmp_path / "weights")


def test_a_file_in_memory_loads_exactly(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = load_model(file).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


def test_a_compressed_archive_of_weights_loads_exactly(tmp_path, model):
    torch.save(model.state_dict(), tmp_path / "weights")
    with zipfile.ZipFile(tmp_path / "weights") as plain, zipfile.ZipFile(tmp_path / "compressed", "w") as compressed:
        for part in plain.infolist():
            compressed.writestr(part.filename, plain.read(part), zipfile.ZIP_DEFLATED, compresslevel=1)
    loaded = load_model(tmp_path / "compressed").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


@pytest.fixture
def tutorial_classes(monkeypatch):
    """Classes as the tutorial pickles them: in a module `model`, under its names, without our code."""
    module = types.ModuleType("model")
    for name in ("SSD300", "VGGBase", "AuxiliaryConvolutions", "PredictionConvolutions"):
        setattr(module, name, type(name, (nn.Module,), {"__module__": "model"}))
    monkeypatch.setitem(sys.modules, "model", module)
    return module


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_of_the_tutorial_with_its_pickled_model_loads_exactly(tmp_path, model, tutorial_classes, zipped):
    whole = tutorial_classes.SSD300()
    parts = {"base": "VGGBase", "aux_convs": "AuxiliaryConvolutions", "pred_convs": "PredictionConvolutions"}
    for name, kind in parts.items():
        setattr(whole, name, getattr(tutorial_classes, kind)())
        for layer, convolution in model.get_submodule(name).named_children():
            setattr(whole.get_submodule(name), layer, convolution)
    whole.rescale_factors = model.rescale_factors
    whole.priors_cxcy = model.priors_cxcy.clone()
    whole._backend = {}
    whole.n_classes = 21
    optimizer = torch.optim.SGD(
        [{"params": [whole.rescale_factors], "lr": 2e-3}, {"params": list(whole.base.parameters())}],
        lr=1e-3,
        momentum=0.9,
    )
    for parameter in whole.base.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    contents = {"epoch": 231, "model": whole, "optimizer": optimizer}
    torch.save(contents, tmp_path / "checkpoint.pth.tar", _use_new_zipfile_serialization=zipped)
    loaded = load_model(tmp_path / "checkpoint.pth.tar")
    assert loaded.label_map == label_map
    assert (loaded.priors, loaded.pixel_mean) == ("paper", None)
    assert_same_outputs(loaded, model)


@pytest.mark.parametrize(
    "wrap", [lambda w: w, lambda w: {"model": w}, lambda w: {f"module.{n}": v for n, v in w.items()}]
)
def test_a_state_dict_with_the_tutorials_names_loads_exactly(tmp_path, model, wrap):
    torch.save(wrap(model.state_dict()), tmp_path / "weights")
    loaded = load_model(tmp_path / "weights")
    assert loaded.label_map == label_map
    assert_same_outputs(loaded, model)


def test_a_file_without_class_names_takes_the_given_label_map(tmp_path):
    torch.save(SSD300(4, pretrained=False).state_dict(), tmp_path / "weights")
    names = make_label_map(["x", "y", "z"])
    assert load_model(tmp_path / "weights", label_map=names).label_map == names
    assert load_model(tmp_path / "weights").label_map == make_label_map(["class 1", "class 2", "class 3"])


@pytest.mark.parametrize("name", RECORDED)
def test_weights_of_other_systems_reproduce_their_recorded_priors_and_outputs(tmp_path, name):
    recorded = np.load(DATA / f"{name}.npz")
    size, priors, names = RECORDED[name]
    weights = {parameter: seeded(parameter, shape) for parameter, shape in shapes(recorded).items()}
    checkpoint = {"model": weights, "optimizer": {}, "scheduler": {"last_epoch": 5}, "iteration": 5}
    torch.save(checkpoint if name.startswith("lufficc") else weights, tmp_path / "weights.pth")
    loaded = load_model(tmp_path / "weights.pth")
    assert (type(loaded), loaded.priors, loaded.label_map) == (NETWORKS[size], priors, names)
    assert np.abs(loaded.priors_cxcy.numpy() - recorded["priors"]).max() < 1e-6
    locs, scores = outputs(loaded, from_pixels(images(size), (123, 117, 104)))
    index = recorded["idx"]
    assert np.abs(locs[:, index].numpy() - recorded["locs"]).max() < 1e-3
    assert np.abs(scores[:, index].numpy() - recorded["scores"]).max() < 1e-3


def with_classes(name, n_classes):
    """Parameter name -> shape as in a recorded system for VOC, but for another number of classes."""
    return {
        parameter: (shape[0] // 21 * n_classes, *shape[1:]) if "conf." in parameter or "cls_" in parameter else shape
        for parameter, shape in published_shapes(name).items()
    }


def test_ssd_pytorchs_files_of_any_other_number_of_classes_have_cocos_priors(tmp_path):
    torch.save(zeros(with_classes("ssdpytorch_reference", 4)), tmp_path / "weights")
    names = make_label_map(["x", "y", "z"])
    loaded = load_model(tmp_path / "weights", label_map=names)
    assert (loaded.priors, loaded.label_map) == ("coco-clipped", names)


def test_a_file_of_lufficc_whose_priors_are_not_known_is_refused(tmp_path):
    torch.save({"model": zeros(with_classes("lufficc_ssd300_voc", 5))}, tmp_path / "weights")
    with pytest.raises(InputError, match=r"weights of lufficc/SSD for 5 classes.* known only for 21 and 81"):
        load_model(tmp_path / "weights")


def test_torchvisions_coco_weights_reproduce_its_outputs_for_the_80_classes(tmp_path, torchvision_model):
    torch.save(torchvision_model.state_dict(), tmp_path / "coco")
    loaded = load_model(tmp_path / "coco")
    pixels = torch.rand(2, 3, 300, 300, generator=torch.Generator().manual_seed(0))
    theirs, _, _ = torchvision_outputs(torchvision_model, pixels)
    locs, scores = outputs(loaded, from_pixels(pixels * 255, (0, 0, 0)))
    chosen = [CATEGORIES.index(name) for name in ["__background__", *list(COCO_LABEL_MAP)[1:]]]
    assert loaded.label_map == COCO_LABEL_MAP
    assert (locs - theirs["bbox_regression"]).abs().max() < 1e-3
    assert (scores - theirs["cls_logits"][..., chosen]).abs().max() < 1e-3
    assert theirs["cls_logits"].std() > 0.1
    # The share of the classes that are left out goes to the others, in proportion.
    probabilities = theirs["cls_logits"].softmax(2)[..., chosen]
    assert torch.allclose(scores.softmax(2), probabilities / probabilities.sum(2, keepdim=True), atol=1e-5)


def test_a_class_is_found_by_cocos_and_by_vocs_spelling():
    spellings = {
        "airplane": "aeroplane", "couch": "sofa", "dining table": "diningtable", "motorcycle": "motorbike",
        "potted plant": "pottedplant", "tv": "tvmonitor",
    }  # fmt: skip
    for coco, voc in spellings.items():
        assert find_label(coco, label_map) == find_label(voc, label_map) == label_map[voc]
        assert find_label(coco, COCO_LABEL_MAP) == find_label(voc, COCO_LABEL_MAP) == COCO_LABEL_MAP[coco]
    assert None not in [find_label(name, COCO_LABEL_MAP) for name in label_map]  # COCO has all of VOC's classes
    assert find_label("zebra", label_map) is None
    assert find_label("tv", {"background": 0, "tvmonitor": 1, "tv": 2}) == 2  # the name itself comes first


def test_detections_equal_torchvisions_without_its_clipping_and_candidate_limit(tmp_path):
    torch.manual_seed(4)
    network = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=21, topk_candidates=8732).eval()
    for head in (network.head.classification_head, network.head.regression_head):
        for parameter in head.parameters():
            nn.init.normal_(parameter, std=0.002)
    torch.save(network.state_dict(), tmp_path / "torchvision")
    loaded = load_model(tmp_path / "torchvision")
    pixels = torch.rand(2, 3, 300, 300, generator=torch.Generator().manual_seed(0))
    head_outputs, prepared, features = torchvision_outputs(network, pixels)
    anchors = network.anchor_generator(ImageList(prepared.tensors, [(300, 300)] * 2), features)
    assert torch.allclose(anchors[0] / 300, cxcy_to_xy(loaded.priors_cxcy), atol=1e-5)
    with torch.no_grad():
        # Before NMS, torchvision clips boxes to the image and keeps the best 400 of a class; we do neither. Boxes in
        # the middle of a larger image are not clipped, and topk_candidates keeps all of them.
        shifted = [anchor + 300 for anchor in anchors]
        expected = network.postprocess_detections(head_outputs, shifted, [(900, 900)] * 2)
    detections = loaded.detect_objects(
        *outputs(loaded, from_pixels(pixels * 255, (0, 0, 0))),
        network.score_thresh, network.nms_thresh, network.detections_per_img,
    )  # fmt: skip
    for image, theirs in enumerate(expected):
        assert len(theirs["labels"]) > 20
        assert detections[1][image].tolist() == theirs["labels"].tolist()
        assert torch.allclose(detections[2][image], theirs["scores"], atol=1e-5)
        assert torch.allclose(detections[0][image] * 300, theirs["boxes"] - 300, atol=1e-2)


def test_coco_is_read_from_torchvisions_cache_or_fails_in_one_line(tmp_path, monkeypatch, torchvision_model):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints" / "ssd300_vgg16_coco-b556d3b4.pth"
    cache.parent.mkdir(parents=True)
    torch.save(torchvision_model.state_dict(), cache)
    assert load_model("coco").label_map == COCO_LABEL_MAP
    cache.unlink()
    assert SSD300_VGG16_Weights.COCO_V1.url == checkpoints.COCO_WEIGHTS
    monkeypatch.setattr(checkpoints, "COCO_WEIGHTS", "http://127.0.0.1:9/ssd300_vgg16_coco-b556d3b4.pth")
    with pytest.raises(InputError, match="name a file of weights instead of coco") as caught:
        load_model("coco")
    assert str(cache) in str(caught.value)
    assert "\n" not in str(caught.value)


def reduced_vgg(path):
    shapes = {name: value.shape for name, value in SSD300(2, pretrained=False).base.state_dict().items()}
    numbers = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28, 31, 33)
    names = [f"{number}.{part}" for number in numbers for part in ("weight", "bias")]
    weights = {name: seeded(name, tuple(shape)) for name, shape in zip(names, shapes.values(), strict=True)}
    torch.save(dict(reversed(weights.items())), path)  # the order in the file does not matter
    return weights


def test_training_starts_from_the_reduced_vgg_with_its_input_normalisation(tmp_path, sample, run):
    weights = reduced_vgg(tmp_path / "base.bin")
    command = (
        "--data-folder",
        sample,
        "--output-folder",
        tmp_path / "run",
        "--batch-size",
        1,
        "--workers",
        0,
        "--lr",
        0,
    )
    run("train.py", *command, "--iterations", 1, "--base", tmp_path / "base.bin", "--weights-only", tmp_path / "out")
    loaded = load_model(tmp_path / "out")
    assert loaded.pixel_mean == (123, 117, 104)
    assert loaded.label_map["disc"] == 1
    assert torch.equal(loaded.base.conv5_3.weight, weights["28.weight"])
    assert torch.equal(loaded.base.conv7.bias, weights["33.bias"])
    pixels = torch.rand(1, 3, 300, 300) * 255 - 100  # the input of the reduced VGG: RGB minus the mean
    seen = []
    loaded.base.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    outputs(loaded, from_pixels(pixels, (123, 117, 104)))
    assert (seen[0] - pixels).abs().max() < 1e-3
    message = run("train.py", *command, "--iterations", 1, "--base", tmp_path / "out", "--overwrite", status=2)
    assert "out: not the reduced VGG-16" in message


def test_a_reduced_vgg_with_one_damaged_tensor_is_a_one_line_error(tmp_path, model):
    weights = reduced_vgg(tmp_path / "base.bin")
    parameters = model.base.state_dict()
    assert torch.equal(read_base(tmp_path / "base.bin", parameters)["conv7.bias"], weights["33.bias"])
    weights = zeros({name: value.shape for name, value in weights.items()})
    for damage in DAMAGE.values():
        torch.save(damage(weights, "28.bias"), tmp_path / "bad")
        with pytest.raises(InputError, match="bad: not the reduced VGG-16"):
            read_base(tmp_path / "bad", parameters)
    torch.save(weights | {"35.weight": torch.zeros(3)}, tmp_path / "bad")
    with pytest.raises(InputError, match="bad: not the reduced VGG-16"):
        read_base(tmp_path / "bad", parameters)


def test_class_filters_are_copied_by_class_name():
    torch.manual_seed(5)
    source = SSD300(4, pretrained=False, priors="caffe", pixel_mean=(1.0, 2.0, 3.0)).eval()
    source.label_map = make_label_map(["cat", "dog", "cow"])
    wanted = make_label_map(["cow", "newt", "cat"])
    model, shared = transfer(source, wanted)
    assert sorted(shared) == ["background", "cat", "cow"]
    assert (model.priors, model.pixel_mean) == ("caffe", (1.0, 2.0, 3.0))
    locs, scores = outputs(model.eval(), images()[:1])
    their_locs, their_scores = outputs(source, images()[:1])
    assert torch.allclose(locs, their_locs, atol=1e-5)
    assert torch.allclose(scores[..., [0, 1, 3]], their_scores[..., [0, 3, 1]], atol=1e-4)
    assert not torch.allclose(scores[..., 2], their_scores[..., 2], atol=1e-2)


def test_training_starts_from_another_network_and_prints_what_it_copied(tmp_path, sample, model, run):
    torch.save(model.state_dict(), tmp_path / "tutorial")
    printed = run(
        "train.py", "--data-folder", sample, "--output-folder", tmp_path / "run", "--batch-size", 1, "--workers", 0,
        "--iterations", 1, "--lr", 0, "--init-from", tmp_path / "tutorial",
    )  # fmt: skip
    assert "took all layers and the class filters of background" in printed
    assert "freshly initialised: the class filters of disc, rectangle, triangle, star, ring" in printed
    trained = load_model(tmp_path / "run" / "checkpoint.pth")
    assert torch.equal(trained.aux_convs.conv9_1.weight, model.aux_convs.conv9_1.weight)
    assert torch.equal(trained.pred_convs.loc_conv7.weight, model.pred_convs.loc_conv7.weight)


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_a_hostile_checkpoint_in_the_tutorials_old_format_is_not_executed(tmp_path, tutorial_classes):
    whole = tutorial_classes.SSD300()
    whole.harm = Hostile(tmp_path / "harm")
    torch.save({"model": whole}, tmp_path / "bad.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"bad\.pth: cannot be read") as caught:
        load_model(tmp_path / "bad.pth")
    assert "not allowed" in str(caught.value.__cause__)
    assert not (tmp_path / "harm").exists()


def test_a_file_in_the_old_format_cannot_change_classes_or_write_files(tmp_path, monkeypatch):
    """Load a pickle that sets attributes of the stand-in class to make torch.load write a patch of its source."""

    def text(value):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()

    opcode = b"cmodel\nSSD300\n"
    build = (
        opcode + b"N}(" + text("dump_patches") + b"\x88" + text("__name__") + text(str(tmp_path / "harm")) + b"u\x86b0"
    )
    source = b"(" + text("module") + opcode + text("x.py") + text("harm\n") + b"tQ"
    for number, body in enumerate((source + b"0" + build + source, source + b"0" + source)):
        path = tmp_path / f"bad{number}.pth"
        with open(path, "wb") as file:
            sizes = {"short": 2, "int": 4, "long": 4}
            header = (
                MAGIC_NUMBER,
                PROTOCOL_VERSION,
                {"protocol_version": 1001, "little_endian": True, "type_sizes": sizes},
            )
            for value in header:
                pickle.dump(value, file, protocol=2)
            file.write(b"\x80\x02" + body + b".")
            pickle.dump([], file, protocol=2)
        with pytest.raises(InputError, match=path.name):
            load_model(path)
        assert not list(tmp_path.glob("harm*"))
    assert not hasattr(checkpoints._StandIn, "dump_patches")


class Hostile:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def truncated(path, weights):
    torch.save(weights, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# How to damage one tensor of a file.
DAMAGE = {
    "removed": lambda weights, name: {n: value for n, value in weights.items() if n != name},
    "renamed": lambda weights, name: {n + "_" * (n == name): value for n, value in weights.items()},
    "one filter fewer": lambda weights, name: {**weights, name: weights[name][1:]},
    "one dimension more": lambda weights, name: {**weights, name: weights[name][None]},
}


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("system", [*RECORDED, "torchvision", "tutorial", "own SSD512"])
def test_a_file_with_one_damaged_tensor_is_a_one_line_error(tmp_path, system, kind):
    weights = zeros(published_shapes(system))
    for name in list(weights)[::10]:
        torch.save(DAMAGE[kind](weights, name), tmp_path / "bad.pth")
        # On the meta device no network is initialised, which is slow.
        with torch.device("meta"), pytest.raises(InputError, match=r"^\S*bad\.pth: ") as caught:
            load_model(tmp_path / "bad.pth")
        assert "\n" not in str(caught.value)
        if kind in ("removed", "renamed"):
            assert f"lacks {name}" in str(caught.value)
            assert f"SSD{512 if '512' in system else 300} of" in str(caught.value)


BAD = {
    "truncated": truncated,
    "empty": lambda path, weights: path.write_bytes(b""),
    "text": lambda path, weights: path.write_text("weights"),
    "a tensor": lambda path, weights: torch.save(torch.zeros(3), path),
    "a list": lambda path, weights: torch.save([1, 2], path),
    "foreign": lambda path, weights: torch.save(torchvision.models.vgg11().features.state_dict(), path),
    "hostile": lambda path, weights: torch.save({"model": Hostile(path.parent / "harm")}, path),
    "newer format": lambda path, weights: torch.save({"format": "ssd300-9", "model": weights}, path),
    "no labels": lambda path, weights: torch.save({"format": "ssd300-1", "model": weights}, path),
    "wrong labels": lambda path, weights: torch.save(
        {"format": "ssd300-1", "model": weights, "label_map": label_map, "priors": "paper", "pixel_mean": None}, path
    ),
    "unknown priors": lambda path, weights: torch.save(
        {"format": "ssd300-1", "model": weights, "label_map": label_map, "priors": "x", "pixel_mean": None}, path
    ),
    "hostile labels": lambda path, weights: torch.save(
        {"format": "ssd300-1", "model": weights, "label_map": [1], "priors": {}, "pixel_mean": "x"}, path
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_file_without_a_network_is_a_one_line_error_and_is_not_executed(kind, tmp_path):
    BAD[kind](tmp_path / "bad.pth", zeros(published_shapes("ssdpytorch_reference")))
    with pytest.raises(InputError, match=r"bad\.pth") as caught:
        load_model(tmp_path / "bad.pth")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "harm").exists()


def test_detection_names_an_unusable_file_and_writes_nothing(tmp_path, sample, run):
    (tmp_path / "bad.pth").write_text("weights")
    image = next((sample / "VOCsample" / "JPEGImages").glob("*.jpg"))
    message = run("detect.py", image, "--checkpoint", tmp_path / "bad.pth", "--output", tmp_path / "out.png", status=2)
    assert message.startswith(f"error: {tmp_path / 'bad.pth'}: cannot be read")
    assert not (tmp_path / "out.png").exists()
