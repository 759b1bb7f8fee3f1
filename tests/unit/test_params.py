"""What counts as a layer, and the sums over layers."""

import pytest
import timm
import torch
from cases import wrapped
from timm.layers import ScaledStdConv2d
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from wcitrain import create_model
from wcitrain.curvature.gauss_newton import gauss_newton_samples
from wcitrain.optim import AWP, WCIPosterior
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
    optimizer = wrapped(vit, perturbation=rule, split_qkv=True)
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


class Gated(nn.Module):
    """A map of someone else's: its matrices, scales and tables are plain parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.gate_weight = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3, 4))
        self.scale_weight, self.bias = nn.Parameter(torch.ones(3, 1, 1)), nn.Parameter(torch.zeros(3))
        self.table = nn.Parameter(torch.randn(5, 4))


ROLES = {  # how to make a module, the tensors of it that are layers, and their biases
    "linear": (lambda: nn.Linear(3, 1), ["weight"], ["bias"]),
    "bilinear": (lambda: nn.Bilinear(2, 3, 4), ["weight"], ["bias"]),
    "convolution": (lambda: nn.Conv2d(4, 4, 1, groups=4), ["weight"], ["bias"]),
    "transposed": (lambda: nn.ConvTranspose1d(1, 1, 3), ["weight"], ["bias"]),
    "standardised": (lambda: ScaledStdConv2d(2, 3, 3), ["weight"], ["bias"]),  # its gain [3, 1, 1, 1] is not
    "attention": (
        lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True),
        ["in_proj_weight", "out_proj.weight"],
        ["in_proj_bias", "out_proj.bias"],
    ),
    "cross_attention": (
        lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5, bias=False),
        ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"],
        [],
    ),
    "recurrent": (lambda: nn.GRU(3, 1), ["weight_ih_l0", "weight_hh_l0"], ["bias_ih_l0", "bias_hh_l0"]),
    "cell": (lambda: nn.LSTMCell(3, 4), ["weight_ih", "weight_hh"], ["bias_ih", "bias_hh"]),
    "foreign": (Gated, ["weight", "gate_weight"], ["bias"]),
    "layer_norm": (lambda: nn.LayerNorm([4, 3, 3]), [], []),
    "rms_norm": (lambda: nn.RMSNorm([4, 3]), [], []),
    "batch_norm": (lambda: nn.BatchNorm2d(3), [], []),
    "embedding": (lambda: nn.Embedding(5, 3), [], []),
    "bag": (lambda: nn.EmbeddingBag(5, 3), [], []),
    "prelu": (lambda: nn.PReLU(3), [], []),
}


@pytest.mark.parametrize("role", ROLES)
def test_a_layer_is_told_by_its_module(role):
    """A scale or a table named like a matrix would enter the index, a matrix named otherwise would not."""
    make, weights, biases = ROLES[role]
    model = nn.ModuleDict({"own": make(), "head": nn.Linear(2, 2)})
    own = [n for n, _ in model.named_parameters() if n.removeprefix("own.") in (*weights, *biases)]
    assert list(select_layers(model)) == [n for n in own if n[4:] in weights] + ["head.weight"]
    assert list(select_layers(model, "weights+biases")) == [*own, "head.weight", "head.bias"]


KNOWN = [("resnet18", 21, 1), ("xcit_nano_12_p16_224", 90, 86), ("levit_128s", 52, 2)]
KNOWN += [("nfnet_l0", 82, 82), ("vit_tiny_patch16_224", 50, 50)]


@pytest.mark.parametrize(("name", "weights", "biases"), KNOWN)
def test_the_layers_of_known_models_stay(name, weights, biases):
    """The index sums over them: another count makes it another number."""
    with torch.device("meta"):
        model = timm.create_model(name)
    assert len(select_layers(model)) == weights
    assert len(select_layers(model, "weights+biases")) == weights + biases


def test_tied_matrices_count_once_and_a_glob_that_selects_none_is_refused():
    """Tied to an embedding it acts as a map too, whatever its first name; its map's bias goes with it."""
    model = nn.ModuleDict({"table": nn.Embedding(5, 3), "head": nn.Linear(3, 5)})
    model["head"].weight = model["table"].weight
    assert list(select_layers(model)) == ["table.weight"]
    assert list(select_layers(model, "weights+biases")) == ["table.weight", "head.bias"]
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Embedding(4, 3))
    tied[1].weight = tied[0].weight
    assert list(select_layers(tied)) == ["0.weight"]
    assert list(select_layers(tied, "weights+biases")) == ["0.weight", "0.bias"]
    assert len(select_layers(tied, "all")) == 4
    assert list(select_layers(tied, "2.*")) == ["2.weight"]
    with pytest.raises(ValueError, match="selects no trainable tensor"):
        select_layers(tied, "*nothing*")


def test_complex_layers_are_refused_by_name():
    """A squared norm of a complex tensor is not the sum of its squares."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.complex64))
    for layers in ("weights", "all", "1.*"):
        with pytest.raises(ValueError, match=r"complex tensors 1\.weight"):
            select_layers(model, layers)
    assert list(select_layers(model, "0.*")) == ["0.weight", "0.bias"]


class Doubled(nn.Module):
    """A parametrization of someone else's."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


COMPUTED = {  # how a weight becomes one that is computed at each call, and how that is undone
    "WeightNorm": (parametrizations.weight_norm, remove_parametrizations),
    "SpectralNorm": (parametrizations.spectral_norm, remove_parametrizations),
    "Orthogonal": (parametrizations.orthogonal, remove_parametrizations),
    "Doubled": (lambda m: register_parametrization(m, "weight", Doubled()), remove_parametrizations),
    "old WeightNorm": (nn.utils.weight_norm, nn.utils.remove_weight_norm),
    "old SpectralNorm": (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
    "L1Unstructured": (lambda m: prune.l1_unstructured(m, "weight", 0.5), prune.remove),
}


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.parametrize("make", [lambda: nn.Conv2d(2, 3, 3), lambda: nn.Linear(3, 3), Gated])
def test_computed_weights_are_refused_by_name_until_undone(kind, make):
    """They were dropped without a word, or the index was that of the stored tensors."""
    compute, undo = COMPUTED[kind]
    model = nn.Sequential(make(), nn.Linear(2, 2))
    compute(model[0])
    for layers in ("weights", "weights+biases"):
        with pytest.raises(ValueError, match=rf"got 0\.weight \({kind.split()[-1]}\); expected stored"):
            select_layers(model, layers)
    assert any("0." in n for n in select_layers(model, "all"))
    model[0].requires_grad_(False)
    assert list(select_layers(model)) == ["1.weight"]
    model[0].requires_grad_(True)
    undo(model[0], "weight")
    assert "0.weight" in select_layers(model)


def test_other_computed_tensors_are_judged_by_their_module():
    """A computed bias is lost only where biases count; a computed embedding is no layer at all."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Embedding(4, 2))
    register_parametrization(model[0], "bias", Doubled())
    parametrizations.spectral_norm(model[1])
    assert list(select_layers(model)) == ["0.weight"]
    with pytest.raises(ValueError, match=r"got 0\.bias \(Doubled\)"):
        select_layers(model, "weights+biases")
    many = nn.Sequential(*[parametrizations.weight_norm(nn.Linear(2, 2)) for _ in range(5)])
    with pytest.raises(ValueError, match=r"2\.weight \(WeightNorm\) \(\+2\); expected"):
        select_layers(many)
    assert [n[0] for n in select_layers(many, "*original1")] == list("01234")
