"""Backbones: normalisation inside, the CIFAR stem, PreActResNet-18, names that do not exist."""

import pytest
import timm
import torch

from wcitrain.models import create_model, load_exported


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
