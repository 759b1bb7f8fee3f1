"""Backbones: normalisation inside, the CIFAR stem, PreActResNet-18, names that do not exist."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from wcitrain.models import (
    Classifier,
    checkpoint_activations,
    create_model,
    enlarged,
    load_exported,
    try_forward,
)


def test_normalisation_is_inside_and_comes_from_the_pretrained_config():
    """Attacks live in [0, 1]; a model that expects normalised input makes every eps wrong."""
    model = create_model("resnet18", num_classes=3)
    config = timm.get_pretrained_cfg("resnet18")
    x = torch.rand(2, 3, 32, 32)
    model.eval()
    by_hand = (x - torch.tensor(config.mean).view(1, 3, 1, 1)) / torch.tensor(config.std).view(1, 3, 1, 1)
    assert torch.equal(model(x), model.backbone(by_hand))
    gray = create_model("resnet18", num_classes=3, in_chans=1)  # three means would give three channels
    assert gray.mean.flatten().tolist() == pytest.approx([sum(config.mean) / 3])
    assert gray(torch.rand(2, 1, 32, 32)).shape == (2, 3)


def enlarging(side: int = 9) -> Classifier:
    """A smooth network of 9x9 features behind images of any smaller size, in float64."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(2 * side * side, 6), nn.Tanh(), nn.Linear(6, 3))
    return Classifier(backbone, [0.4, 0.6], [0.2, 0.3], resize_inside=side).double()


def test_images_are_enlarged_inside_by_bicubic_interpolation_before_or_after_the_normalisation():
    """Another kernel, or a shifted grid, is another input than the weights were pretrained on."""
    model, seen = enlarging(), []
    model.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(3, 2, 4, 5, generator=generator, dtype=torch.float64)
    model(x)
    by_torch = F.interpolate(x, (9, 9), mode="bicubic")
    assert torch.allclose(seen[0], (by_torch - model.mean) / model.std, rtol=0, atol=1e-13)  # float64 sums
    edge = torch.zeros(1, 2, 4, 4, dtype=torch.float64)
    edge[..., 2:] = 1
    model(edge)
    assert float((seen[1] * model.std + model.mean).max()) > 1.01  # overshoots, unclamped
    with torch.autocast("cpu", torch.bfloat16):
        assert (enlarged(x.float(), 9) - by_torch).abs().max() < 1e-6  # a dozen float32 roundings


def test_gradients_pass_the_enlargement_exactly_to_the_second_order():
    """An attack climbs the gradient in the original pixels; a detached or clamped resize would mask it."""
    model = enlarging()
    x = torch.rand(2, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = x.round().requires_grad_()  # black and white: where the interpolation overshoots most
    assert torch.autograd.gradcheck(model, x)
    assert torch.autograd.gradgradcheck(model, x)


@pytest.mark.parametrize("size", [(9, 9), (4, 9), (12, 12)])
def test_images_that_would_not_grow_are_refused(size):
    """A setting without effect, or images shrunk without a low-pass filter."""
    model = enlarging().float()
    for call in (lambda: model(torch.rand(1, 2, *size)), lambda: try_forward(model, 2, size)):
        with pytest.raises(
            ValueError, match=rf"model.resize_inside: got 9 for images of {size[0]}x{size[1]}"
        ):
            call()


def test_models_without_activation_checkpoints_are_refused_by_name(monkeypatch):
    """The run would need all the memory, or with a reentrant timm lose gradients."""
    small = {"width": 4, "layers": [1] * 4, "channels": [4] * 4, "img_size": 32, "depth": 1}
    for name, keys in {"preact_resnet18": ["width"], "convit_tiny": ["img_size"]}.items():
        model = create_model(name, num_classes=3, **{key: small[key] for key in keys})
        with pytest.raises(ValueError, match=rf"gradient_checkpointing: got true with {name}; expected"):
            checkpoint_activations(model, name)
    monkeypatch.setattr(timm.layers.config, "_USE_REENTRANT_CKPT", True)
    model = create_model("resnet18", num_classes=3, layers=small["layers"], channels=small["channels"])
    with pytest.raises(ValueError, match=r"expected .* 1.0.14 or newer without TIMM_REENTRANT_CKPT"):
        checkpoint_activations(model, "resnet18")


def test_the_cifar_stem_keeps_the_resolution():
    """The ImageNet stem shrinks 32x32 to 8x8 before the first block."""
    small = {"layers": [1, 1, 1, 1], "channels": [4, 8, 16, 32]}
    model = create_model("resnet18", num_classes=3, stem="cifar", **small)
    seen = []
    model.backbone.layer1.register_forward_hook(lambda m, args, out: seen.append(out.shape[-2:]))
    model(torch.rand(2, 3, 16, 16))
    assert seen == [(16, 16)]


def test_preact_resnet18_is_the_published_network():
    """11,172,170 parameters with the last BatchNorm (He et al. 2016, CIFAR form); registered with timm."""
    model = timm.create_model("preact_resnet18", num_classes=10)
    convs = 3 * 64 * 9 + 4 * 64 * 64 * 9
    for w in (128, 256, 512):
        convs += (w // 2) * w * 9 + 3 * w * w * 9 + (w // 2) * w
    norms = 2 * (4 * 64 + sum((w // 2) + 3 * w for w in (128, 256, 512)) + 512)
    assert sum(p.numel() for p in model.parameters()) == convs + norms + 512 * 10 + 10
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    wrapped = create_model("preact_resnet18", num_classes=10)
    assert wrapped.mean.flatten().tolist() == pytest.approx([0.4914, 0.4822, 0.4465])


HEADED = {
    "preact_resnet18": {"width": 4},
    "resnet18": {"layers": [1, 1, 1, 1], "channels": [4, 8, 16, 32], "stem": "cifar"},
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 1},
    "mobilenetv3_small_050": {},  # its head has a hidden layer: pre-logits are not num_features wide
}


@pytest.mark.parametrize("name", HEADED)
def test_a_rotation_head_changes_nothing_for_the_classes(name):
    """Same initialisation, state dict and logits, bit for bit; and it reads the features of the classes."""
    models = []
    for rotation_head in (False, True):
        torch.manual_seed(0)
        models.append(create_model(name, num_classes=4, rotation_head=rotation_head, **HEADED[name]).eval())
    plain, headed = models
    assert plain.backbone.state_dict().keys() == headed.backbone.state_dict().keys()
    own = {"rotation_head.weight", "rotation_head.bias"}
    assert set(headed.state_dict()) - set(plain.state_dict()) == own
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(plain(x), headed(x))
    head = getattr(headed.backbone, "fc", None) or headed.backbone.get_classifier()
    headed.rotation_head.load_state_dict(head.state_dict())
    # float32, another order of operations
    assert torch.allclose(headed(x), headed(x, head="rotation"), atol=1e-6)
    with pytest.raises(ValueError, match=r"got head='rotation'.*rotation_head=True\) adds"):
        plain(x, head="rotation")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"name": "resnet81"}, r"could not build 'resnet81'.*Unknown model"),
        ({"name": "vit_tiny_patch16_224", "stem": "cifar"}, "expected a timm ResNet"),
        ({"name": "resnet18", "stem": "Cifar"}, "model.stem: got 'Cifar'; expected default or cifar"),
        ({"name": "resnet18", "mean": [0.1, 0.2]}, "model.mean: got 2 values; expected 3"),
        ({"name": "resnet18", "std": [0.0]}, "model.std"),
        ({"name": "preact_resnet18", "pretrained": True}, "no weights are published"),
        ({"name": "resnet18", "checkpoint_path": "nowhere.safetensors"}, "nowhere.safetensors"),
    ],
)
def test_what_cannot_be_built_is_refused_with_a_way_out(kwargs, message):
    """Otherwise the error comes from deep inside timm, or after the data have been read."""
    with pytest.raises(ValueError, match=message):
        create_model(**kwargs, num_classes=3)


def test_a_damaged_description_of_an_export_is_one_clear_error(tmp_path):
    """A traceback about a key says neither which folder nor what was expected there."""
    (tmp_path / "metadata.json").write_text("{}")
    with pytest.raises(ValueError, match=r"got KeyError\('num_classes'\); expected an export"):
        load_exported(tmp_path)
