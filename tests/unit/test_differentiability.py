"""The module-wise check must name what autograd refuses on this version of torch, and nothing else."""

import pytest
import timm
import torch
import torch.nn.functional as F
from cases import BatchNormNet, assert_same, everything, image_batch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from wcitrain.curvature.differentiability import Unsupported, explain, failing_modules

VIT = {"img_size": 32, "patch_size": 16, "embed_dim": 12, "num_heads": 2, "num_classes": 3}


def images(n: int = 5) -> Tensor:
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def vit(depth: int = 1) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", depth=depth, **VIT).eval()


def between_linears(module: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), module, nn.Linear(8, 3))


def names(model: nn.Module, x: Tensor, order: int) -> list[str]:
    return [f.name for f in failing_modules(model, lambda: model(x), order=order)]


def test_fused_attention_is_named_and_the_way_out_works():
    """Every ViT: without a name the user reads an aten symbol; the context must reach the tests."""
    model, x = vit(depth=2), images()
    failures = failing_modules(model, lambda: model(x), order=2)
    assert [f.name for f in failures] == ["blocks.0.attn", "blocks.1.attn"]
    assert failures[0].kind == "Attention"
    assert "scaled_dot_product" in failures[0].reason

    def with_math() -> None:
        with sdpa_kernel(SDPBackend.MATH):
            model(x)

    assert failing_modules(model, with_math, order=2) == []


def test_the_other_way_out_of_fused_attention_works_too():
    """``explain`` recommends it."""
    timm.layers.set_fused_attn(False)
    try:
        model = vit()
    finally:
        timm.layers.set_fused_attn(True)
    assert names(model, images(), 2) == []


def test_four_examples_of_the_batch_are_enough():
    """A batch that just fits in memory must not run out of it while the culprit is looked for."""
    sizes = []
    layer = nn.Linear(6, 8)
    layer.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    model = nn.Sequential(layer, nn.Hardsigmoid())
    assert names(model, torch.rand(64, 6), 2) == ["1"]
    assert sorted(set(sizes)) == [4, 64]  # what is tried, and the caller's own pass


class SelfAttention(nn.Module):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.attention(x, x, x, need_weights=self.need_weights)[0]


def test_multihead_attention_fails_where_it_is_fused():
    """With need_weights it computes them step by step, so keyword arguments must be replayed as recorded."""
    x = torch.randn(5, 4, 8)
    assert names(SelfAttention(False), x, 2) == ["attention"]
    assert names(SelfAttention(True), x, 3) == []


def test_hardsigmoid_is_named_inside_mobilenet():
    """A leaf deep inside a model, reported by itself and not with every block around it."""
    model = timm.create_model("mobilenetv3_small_050", num_classes=3).eval()
    failures = failing_modules(model, lambda: model(images(2)), order=2)
    assert failures
    assert {f.kind for f in failures} == {"Hardsigmoid"}
    assert all("hardsigmoid" in f.reason for f in failures)
    assert failures[0].name == "blocks.0.0.se.gate"


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize(
    "module",
    [
        nn.ReLU(),
        nn.ReLU(inplace=True),
        nn.GELU(),
        nn.SiLU(inplace=True),
        nn.Hardswish(),
        nn.Softmax(-1),
        nn.GroupNorm(2, 8),
        nn.RMSNorm(8),
        nn.BatchNorm1d(8).eval(),
        nn.Dropout(0.3),
    ],
    ids=lambda m: type(m).__name__,
)
def test_modules_that_can_are_not_named(module, order):
    """Kinks, in-place operations and dropout must raise no false alarm about a model that works."""
    assert names(between_linears(module), torch.randn(6, 6), order) == []


def test_batch_norm_refuses_third_derivatives_in_train_mode_only():
    """The mode that counts is the caller's."""
    model, x = BatchNormNet(), image_batch(8)[0]
    assert names(model, x, 2) == []
    assert names(model, x, 3) == ["bn"]
    assert names(model.eval(), x, 3) == []


def test_a_small_residual_network_passes_at_order_three():
    """Max pooling, in-place ReLU and zero-initialised scales must raise no alarm."""
    model = timm.create_model("resnet18", num_classes=3, layers=[1, 1, 1, 1], channels=[4, 4, 4, 8]).eval()
    assert names(model, images(2), 3) == []


def test_modules_that_work_in_place_are_tested_like_others():
    """In place on a leaf raises in the forward pass already, as if the module could not run alone."""
    assert names(between_linears(nn.Hardsigmoid(inplace=True)), torch.randn(6, 6), 2) == ["1"]


class Functional(nn.Module):
    """Fails in its own forward, not in a part."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.hardsigmoid(self.first(x))


def test_operations_of_the_model_itself_are_found():
    """They belong to no submodule: the parent must be tested as well, also where its inputs are images."""
    assert names(Functional(), torch.randn(6, 6), 2) == ["(model)"]
    assert names(nn.Sequential(Functional(), nn.ReLU()), torch.randn(6, 6), 2) == ["0"]


def test_a_path_without_weights_behind_it_does_not_count():
    """Derivatives in images are not needed: an augmentation without double backward is no obstacle."""
    model = nn.Sequential(nn.Hardsigmoid(), nn.Linear(6, 3))
    assert names(model, torch.randn(6, 6), 2) == []
    assert names(model, torch.randn(6, 6).requires_grad_(), 2) == ["0"]


def test_a_compiled_model_is_reported_as_one():
    """AOTAutograd refuses double backward; running every part uncompiled would find nothing to blame."""
    model = torch.compile(between_linears(nn.Tanh()), backend="aot_eager")

    def never() -> None:
        raise AssertionError("a compiled model is not run")

    assert failing_modules(model, never, order=2) == [
        Unsupported("(model)", "OptimizedModule", "torch.compile refuses double backward")
    ]


def test_nothing_is_left_changed():
    """A check must not move running statistics, random numbers, modes, gradients or weights."""
    model = BatchNormNet()
    model.bn.eval()
    model.drop.train()
    before, state = everything(model), torch.get_rng_state()
    failing_modules(model, lambda: model(image_batch(8)[0]), order=3)
    model.bn.train()
    failing_modules(model, lambda: model(image_batch(8)[0]), order=3)
    assert_same(everything(model), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.drop.training
    assert all(p.grad is None and p.requires_grad and p.is_leaf for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_the_message_names_three_and_every_way_out_once():
    """What the user reads when an estimator is impossible."""
    attention = [
        Unsupported(f"blocks.{i}.attn", "Attention", "aten::_scaled_dot_product_x") for i in range(4)
    ]
    norm = Unsupported("bn1", "BatchNormAct2d", "batch_norm does not support 3rd+ order derivatives.")
    text = explain([*attention, norm, norm], 'gradient="autograd" needs third derivatives')
    assert text.startswith('gradient="autograd" needs third derivatives, but blocks.0.attn (Attention: aten')
    assert "blocks.2.attn" in text
    assert "blocks.3.attn" not in text
    assert "(+3) have none. Run the forward pass under torch.nn.attention.sdpa_kernel" in text
    assert text.count("set_fused_attn(False)") == 1
    assert 'gradient="finite_difference", or normalisation layers in eval mode' in text
    assert "two_point" not in text
    compiled = Unsupported("(model)", "OptimizedModule", "torch.compile refuses double backward")
    assert "before torch.compile" in explain([compiled], "x")
    assert "two_point" in explain([Unsupported("act", "Hardsigmoid", "no derivative")], "x")
