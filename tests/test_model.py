"""The network, its priors, and its initialisation from ImageNet weights."""

import hashlib
import http.server
import threading

import pytest
import torch
import torchvision
from torch.nn import functional as F

import model as network
from model import SSD300, VGGBase
from support.files import InputError
from utils import IMAGENET_MEAN, IMAGENET_STD, decimate


def test_there_are_8732_priors_and_one_cell_of_each_map_matches_a_hand_computation(model):
    priors = model.priors_cxcy
    assert priors.shape == (8732, 4)
    third = 0.333  # rounded as in the public tutorial
    # map: (first prior, cells per side, row, column, scale, next scale, has ratios 3 and 1/3)
    cells = (
        (0, 38, 3, 5, 0.1, 0.2, False),
        (5776, 19, 18, 0, 0.2, 0.375, True),
        (7942, 10, 4, 9, 0.375, 0.55, True),
        (8542, 5, 2, 2, 0.55, 0.725, True),
        (8692, 3, 1, 2, 0.725, 0.9, False),
        (8728, 1, 0, 0, 0.9, 1 / 0.9, False),
    )
    for start, side, row, column, scale, next_scale, more in cells:
        ratios = (2, 3, 0.5, third) if more else (2, 0.5)
        shapes = [
            (scale, scale),
            ((scale * next_scale) ** 0.5,) * 2,
            *((scale * r**0.5, scale / r**0.5) for r in ratios),
        ]
        expected = [((column + 0.5) / side, (row + 0.5) / side, min(w, 1), min(h, 1)) for w, h in shapes]
        first = start + (row * side + column) * len(shapes)
        assert torch.allclose(priors[first : first + len(shapes)], torch.tensor(expected), atol=1e-6)


def test_priors_move_with_the_model_but_are_not_in_the_state_dict(model):
    assert "priors_cxcy" not in model.state_dict()
    assert SSD300(2, pretrained=False).to(torch.float64).priors_cxcy.dtype == torch.float64
    with pytest.raises(ValueError, match="must be one of paper, caffe, coco, coco-clipped, not 'yolo'"):
        SSD300(2, pretrained=False, priors="yolo")


def test_parameters_keep_their_public_names(model):
    names = set(model.state_dict())
    convolutions = [f"base.conv{b}_{i}" for b, n in enumerate((2, 2, 3, 3, 3), 1) for i in range(1, n + 1)]
    convolutions += ["base.conv6", "base.conv7"]
    convolutions += [f"aux_convs.conv{b}_{i}" for b in (8, 9, 10, 11) for i in (1, 2)]
    maps = ("conv4_3", "conv7", "conv8_2", "conv9_2", "conv10_2", "conv11_2")
    convolutions += [f"pred_convs.{kind}_{name}" for kind in ("loc", "cl") for name in maps]
    assert names == {f"{c}.{part}" for c in convolutions for part in ("weight", "bias")} | {"rescale_factors"}
    assert model.rescale_factors.shape == (1, 512, 1, 1)
    assert (model.rescale_factors == 20).all()


@pytest.mark.parametrize("training", [True, False])
def test_an_image_gets_the_same_predictions_alone_and_in_a_batch(training):
    torch.manual_seed(0)
    model = SSD300(4, pretrained=False).train(training)
    images = torch.randn(2, 3, 300, 300)
    with torch.no_grad():
        locs, scores = model(images)
        alone = model(images[1:])
    assert locs.shape == (2, 8732, 4)
    assert scores.shape == (2, 8732, 4)
    assert torch.allclose(locs[1:], alone[0], atol=1e-4)
    assert torch.allclose(scores[1:], alone[1], atol=1e-4)
    assert locs.std() > 1e-3  # activations of an untrained network neither vanish nor explode
    assert locs.abs().max() < 1e3


@pytest.mark.parametrize("pixel_mean", [None, (123.0, 117.0, 104.0)])
def test_bytes_give_the_predictions_of_the_normalised_image(pixel_mean):
    torch.manual_seed(0)
    model = SSD300(3, pretrained=False, pixel_mean=pixel_mean).eval()
    images = torch.randint(256, (1, 3, 300, 300), dtype=torch.uint8)
    mean, std = (255 * torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        for ours, expected in zip(model(images), model((images - mean) / std), strict=True):
            assert torch.equal(ours, expected) if pixel_mean is None else torch.allclose(ours, expected, atol=1e-3)


def test_a_black_image_gives_finite_gradients():
    model = SSD300(3, pretrained=False)
    for name, parameter in model.base.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    locs, scores = model(torch.zeros(1, 3, 300, 300))  # conv4_3 is 0 everywhere, and so is the norm that divides it
    (locs.sum() + scores.sum()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_predictions_are_ordered_by_row_column_and_prior(model):
    heads = model.pred_convs
    maps = [torch.randn(1, c, s, s) for s, c in ((38, 512), (19, 1024), (10, 512), (5, 256), (3, 256), (1, 256))]
    with torch.no_grad():
        locs, scores = heads(*maps)
        loc_map, score_map = heads.loc_conv8_2(maps[2]), heads.cl_conv8_2(maps[2])
    row, column, prior = 7, 2, 4
    index = 5776 + 2166 + (row * 10 + column) * 6 + prior
    assert torch.allclose(locs[0, index], loc_map[0, prior * 4 : prior * 4 + 4, row, column], atol=1e-5)
    assert torch.allclose(scores[0, index], score_map[0, prior * 21 : prior * 21 + 21, row, column], atol=1e-5)


def test_a_fully_connected_layer_equals_its_convolution_and_decimation_subsamples_it():
    torch.manual_seed(0)
    features, weight, bias = torch.randn(1, 3, 7, 7), torch.randn(8, 3 * 7 * 7), torch.randn(8)
    connected = F.linear(features.flatten(1), weight, bias)
    assert torch.allclose(F.conv2d(features, weight.view(8, 3, 7, 7), bias).flatten(1), connected, atol=1e-4)
    # If a 7x7 filter is 0 except at the values that decimation keeps, a dilated 3x3 convolution gives the same result.
    sparse = torch.zeros(8, 3, 7, 7)
    sparse[:, :, ::3, ::3] = weight.view(8, 3, 7, 7)[:, :, ::3, ::3]
    decimated = decimate(weight.view(8, 3, 7, 7), (4, None, 3, 3))
    assert decimated.shape == (2, 3, 3, 3)
    assert torch.allclose(F.conv2d(features, decimated, dilation=3), F.conv2d(features, sparse)[:, ::4], atol=1e-4)


def stand_in_weights(path):
    """Save and return VGG-16 weights that take little memory: each value of fc6, fc7 and the biases is its column."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in torchvision.models.vgg16().state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes.items():
        if name.startswith("features."):
            weights[name] = torch.randn(shape, generator=generator)
        else:
            weights[name] = torch.arange(shape[-1], dtype=torch.float32).expand(shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(weights, path)
    return weights


def test_imagenet_weights_are_loaded_and_decimated(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = stand_in_weights(tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth")
    base = VGGBase(pretrained=True)
    numbers = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    names = [f"conv{b}_{i}" for b, n in enumerate((2, 2, 3, 3, 3), 1) for i in range(1, n + 1)]
    for number, name in zip(numbers, names, strict=True):
        assert torch.equal(base.get_submodule(name).weight, weights[f"features.{number}.weight"])
        assert torch.equal(base.get_submodule(name).bias, weights[f"features.{number}.bias"])
    for channel, row, column in ((0, 0, 0), (5, 1, 2), (511, 2, 1)):
        assert (base.conv6.weight[:, channel, row, column] == channel * 49 + 3 * row * 7 + 3 * column).all()
    assert torch.equal(base.conv7.weight[17, :, 0, 0], torch.arange(0, 4096, 4).float())
    assert torch.equal(base.conv6.bias, torch.arange(0, 4096, 4).float())
    assert torch.equal(base.conv7.bias, torch.arange(0, 4096, 4).float())


@pytest.fixture
def server(tmp_path):
    """An HTTP server that serves a folder: (folder, address)."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


@pytest.mark.parametrize("case", ["right", "wrong bytes", "missing", "not weights"])
def test_weights_are_downloaded_once_and_a_failure_names_the_remedy(tmp_path, monkeypatch, server, case):
    folder, address = server
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    weights = stand_in_weights(folder / "weights") if case != "not weights" else None
    if weights is None:
        (folder / "weights").write_bytes(b"something else")
    digest = hashlib.sha256((folder / "weights").read_bytes()).hexdigest()[:8]
    name = f"vgg16-{'00000000' if case == 'wrong bytes' else digest}.pth"
    if case != "missing":
        (folder / "weights").rename(folder / name)
    assert torchvision.models.VGG16_Weights.IMAGENET1K_V1.url == network.VGG16_WEIGHTS
    monkeypatch.setattr(network, "VGG16_WEIGHTS", f"{address}/{name}")
    if case == "right":
        assert torch.equal(VGGBase().conv1_1.weight, weights["features.0.weight"])
        (folder / name).unlink()
        assert torch.equal(VGGBase().conv1_1.weight, weights["features.0.weight"])
        return
    with pytest.raises(InputError, match="--no-pretrained") as caught:
        VGGBase()
    assert str(tmp_path / "home" / "hub" / "checkpoints" / name) in str(caught.value)
    assert "\n" not in str(caught.value)
