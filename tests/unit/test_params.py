"""What counts as a layer, and the sums over layers."""

import pytest
import torch
from torch import nn

from wcitrain import create_model
from wcitrain.curvature.gauss_newton import gauss_newton_samples
from wcitrain.optim import AWP, RegularizedOptimizer, WCIPosterior
from wcitrain.params import Layers, select_layers


@pytest.fixture
def vit():
    """A two-block transformer."""
    sizes = {"img_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 12, "num_heads": 2}
    return create_model("vit_tiny_patch16_224", num_classes=3, **sizes)


def test_split_qkv_counts_three_maps_and_loses_nothing(vit):
    """Query, key and value are three maps in one tensor: norms and traces must add up to the tensor's."""
    whole, parts = select_layers(vit), select_layers(vit, split_qkv=True)
    assert len(parts) == len(whole) + 2 * 2
    name = "backbone.blocks.0.attn.qkv.weight"
    thirds = [f"{name}[{part}]" for part in "qkv"]
    assert [n for n in parts if n.startswith(name)] == thirds
    assert torch.equal(torch.cat([parts[n] for n in thirds]), whole[name])
    x = torch.rand(2, 3, 16, 16)
    traces = []
    for layers in (whole, parts):
        generator = torch.Generator().manual_seed(0)
        values = gauss_newton_samples(vit(x), layers, generator=generator)[0]
        traces.append(dict(zip(layers, values.tolist(), strict=True)))
    assert sum(traces[1][n] for n in thirds) == pytest.approx(traces[0][name], rel=1e-6)
    torch_attention = nn.Sequential(nn.MultiheadAttention(6, 2))
    names = [n for n in select_layers(torch_attention, split_qkv=True) if "in_proj" in n]
    assert names == [f"0.in_proj_weight[{part}]" for part in "qkv"]


@pytest.mark.parametrize("rule", [AWP(0.1), WCIPosterior(0.5)])
def test_perturbations_respect_the_parts(vit, rule):
    """Each third gets its own radius: broadcasting one factor over the tensor would give it the mean."""
    base = torch.optim.SGD(vit.parameters(), lr=0.0)
    optimizer = RegularizedOptimizer(base, vit, perturbation=rule, split_qkv=True)
    x, y = torch.rand(4, 3, 16, 16), torch.arange(4) % 3
    before = {n: t.detach().clone() for n, t in optimizer.layers.items()}
    moved = {}

    def loss_fn():
        for n, t in optimizer.layers.items():
            moved[n] = max(moved.get(n, 0.0), float((t.detach() - before[n]).norm()))
        return nn.functional.cross_entropy(vit(x), y)

    optimizer.step(loss_fn)
    if isinstance(rule, AWP):
        for n in optimizer.layers:
            assert moved[n] == pytest.approx(0.1 * float(before[n].norm()), rel=1e-4), n
    else:
        assert len({round(moved[n], 9) for n in optimizer.layers if "qkv" in n}) == 6
        total = sum(m**2 for m in moved.values()) ** 0.5
        assert total == pytest.approx(0.5 * float(optimizer.layers.squared_norms().sum()) ** 0.5, rel=1e-4)


def test_what_cannot_be_split_is_refused(vit):
    """A setting without effect, or one that would cut across heads, must not pass in silence."""
    with pytest.raises(ValueError, match="none of the"):
        select_layers(nn.Linear(3, 3), split_qkv=True)
    vit.backbone.blocks[1].attn.head_first = True
    with pytest.raises(ValueError, match="interleaved by head"):
        select_layers(vit, split_qkv=True)


def test_sums_agree_with_plain_loops_and_missing_gradients_count_as_zero():
    """All sums over layers go through these few methods."""
    tensors = {"a": torch.randn(6, 2), "b": torch.randn(4), "scalar": torch.randn(())}
    layers = Layers(tensors, {"a": ("x", "y", "z")})
    assert list(layers) == ["a[x]", "a[y]", "a[z]", "b", "scalar"]
    right = [torch.randn(6, 2), None, torch.randn(())]
    expected = [(tensors["a"][i : i + 2] * right[0][i : i + 2]).sum() for i in (0, 2, 4)]
    expected += [torch.tensor(0.0), tensors["scalar"] * right[2]]
    assert torch.allclose(layers.dots(layers.tensors, right), torch.stack(expected).double(), atol=1e-6)
    squares = torch.stack([t.square().sum() for t in layers.values()]).double()
    assert torch.allclose(layers.squared_norms(), squares, rtol=1e-6)
    assert layers.missing(right).tolist() == [False] * 3 + [True, False]
    assert layers.sizes().tolist() == [4, 4, 4, 4, 1]
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    a, b, scalar = layers.spread(values)
    assert (a * torch.ones(6, 2))[:, 0].tolist() == [1, 1, 2, 2, 3, 3]
    assert (float(b), float(scalar)) == (4.0, 5.0)
    assert list(Layers(layers)) == list(layers)
    assert list(layers.only({id(tensors["b"])})) == ["b"]
