"""The families that people fine-tune, two blocks of each, in float64: every estimator against its oracle.

The oracles differentiate a copy whose norms and attention are written out (`oracles.decomposed`).
"""

import copy
import re
from itertools import product

import pytest
import timm
import torch
from cases import wrapped
from oracles import decomposed, dense_hessian, exact_gauss_newton_trace, gradients
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn

from wcitrain import create_model, optim
from wcitrain.curvature import GaussNewton, Hutchinson, TopLayer, cross_entropy
from wcitrain.curvature.estimator import Estimator
from wcitrain.curvature.hutchinson import hutchinson_samples
from wcitrain.curvature.loss import Loss, signs
from wcitrain.curvature.passes import Passes
from wcitrain.measures import MEASURES, Problem
from wcitrain.optim import perturbation
from wcitrain.params import Layers, select_layers

VIT = {"img_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 12, "num_heads": 2}
SWIN = {"img_size": 16, "patch_size": 2, "window_size": 2, "embed_dim": 8, "depths": (2, 1)}
FAMILIES: dict[str, tuple[str, dict]] = {
    "vit": ("vit_tiny_patch16_224", VIT),
    "vit, average": ("vit_tiny_patch16_224", VIT | {"global_pool": "avg", "class_token": False}),
    "swin, drop path": ("swin_tiny_patch4_window7_224", SWIN | {"num_heads": (1, 2), "drop_path_rate": 0.5}),
    "convnext": ("convnext_atto", {"depths": (1,) * 4, "dims": (4, 4, 8, 8), "patch_size": 1}),
    "xcit": ("xcit_nano_12_p16_224", VIT),
    "efficientnet": ("test_efficientnet", {"output_stride": 8}),
    "mixer": ("", {"img_size": 16, "patch_size": 8, "num_blocks": 2, "embed_dim": 12}),
}
X = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3)).double()
Y = torch.tensor([0, 1])


def make(name: str, kwargs: dict) -> nn.Module:
    """A network in train mode, away from its start, where biases are zero and blocks the identity."""
    torch.manual_seed(0)
    own = {"num_classes": 2, **kwargs}
    model = (create_model(name, **own) if name else MlpMixer(**own)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5 if p.ndim > 1 else 1.0).add_(0.05 * torch.randn_like(p))
    return model.train()


@pytest.fixture(params=FAMILIES)
def model(request) -> nn.Module:
    return make(*FAMILIES[request.param])


@pytest.fixture
def vit() -> nn.Module:
    return make(*FAMILIES["vit"])


def replayed(model: nn.Module, state: Tensor) -> Loss:
    """The loss at the random numbers that every pass sees."""
    torch.set_rng_state(state)
    return cross_entropy(model(X), Y)


def flat(tensors) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def close(left: Tensor, right: Tensor, relative: float) -> bool:
    """Whether two tensors differ by at most ``relative`` of the second's size, which is not zero."""
    size = float(right.detach().norm())
    return size > 0 and float((left - right).detach().norm()) <= relative * size


def penalised(estimator: Estimator, model: nn.Module, layers: Layers, c: Tensor) -> tuple[Tensor, Tensor]:
    """What the estimator adds to the gradient, ∇ Σ c_l t_l over all parameters, and its t_l."""
    passes, found = Passes(model, layers, lambda: cross_entropy(model(X), Y)), []
    for step in (lambda: estimator.add_gradient(passes, c, 1.0).traces, passes.plain):
        model.zero_grad()
        traces = step()
        found.append(flat(torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()))
        if len(found) == 1:
            drawn = traces
    return found[0] - found[1], drawn


def some_coefficients(layers: Layers) -> Tensor:
    return 0.5 + torch.rand(len(layers), generator=torch.Generator().manual_seed(5)).double()


ROUNDING = 1e-10


def test_gauss_newton_has_the_exact_traces_and_gradient_on_every_family(model, monkeypatch):
    """Over all 16 sign sets of two examples: norms, attention, gates and drop path are derived twice."""
    layers, twin, state = select_layers(model), decomposed(model), torch.get_rng_state()
    c = some_coefficients(layers)
    sets = iter([(torch.tensor(bits)).view(2, 2) for bits in product((0, 1), repeat=4)])
    with monkeypatch.context() as patched:
        patched.setattr(torch, "randint", lambda low, high, size, **_: next(sets))
        gradient, traces = penalised(GaussNewton(16), model, layers, c)
    assert next(sets, None) is None
    exact = exact_gauss_newton_trace(replayed(twin, state), select_layers(twin), create_graph=True)
    assert close(traces, exact, ROUNDING)
    assert close(gradient, flat(gradients(c @ exact, list(twin.parameters()))), ROUNDING)


def third_order(model: nn.Module, state: Tensor, u: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """H u of the layers, and ∇ uᵀ H u over all parameters, by three backward passes."""
    layers = select_layers(model)
    g = gradients(replayed(model, state).total, layers.tensors, create_graph=True)
    products = gradients(sum((a * b).sum() for a, b in zip(g, u, strict=True)), layers.tensors, True)
    form = sum((a * b).sum() for a, b in zip(products, u, strict=True))
    return products, flat(gradients(form, list(model.parameters())))


def test_hutchinson_has_the_third_derivatives_on_every_family(model):
    """Its differences replay drop path on both sides and leave BatchNorm's statistics where they were."""
    layers, twin, state = select_layers(model), decomposed(model), torch.get_rng_state()
    c = some_coefficients(layers)
    u, sigma = Passes(model, layers, lambda: None).random_direction(c.sqrt())
    # truncation 1e-10 and rounding 1e-16 / 1e-5, each times higher derivatives
    gradient, traces = penalised(Hutchinson(radius=1e-5), model, layers, c)
    products, exact = third_order(twin, state, u)
    assert close(gradient, exact, 1e-5)
    forms = layers.dots(u, [p.detach() for p in products]) / sigma.square()
    assert close(traces, forms, 1e-5)
    torch.set_rng_state(state)
    measured = Passes(model, layers, lambda: cross_entropy(model(X), Y))
    assert close(Hutchinson().add_gradient(measured, c, 0.0).traces, forms, ROUNDING)


def test_native_layer_norm_has_wrong_third_derivatives(vit):
    """Why the penalty takes differences. If this fails torch has mended it."""
    layers, state = select_layers(vit), torch.get_rng_state()
    u, _ = Passes(vit, layers, lambda: None).random_direction(some_coefficients(layers).sqrt())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        (found, by_torch), (expected, exact) = (third_order(m, state, u) for m in (vit, decomposed(vit)))
    assert close(flat(found), flat(expected), ROUNDING)
    assert not close(by_torch, exact, 1e-2)


def test_the_closed_form_of_the_head_is_exact_on_every_family(model):
    """Features come out of pooling, norms and class tokens of every kind."""
    (layer,), twin, state = (
        (own := TopLayer().layers(model, "weights")),
        decomposed(model),
        torch.get_rng_state(),
    )
    gradient, trace = penalised(TopLayer(), model, own, torch.ones(1).double())
    head = {layer: dict(twin.named_parameters())[layer]}
    exact = exact_gauss_newton_trace(replayed(twin, state), head, create_graph=True)
    assert close(trace, exact, ROUNDING)
    assert close(gradient, flat(gradients(exact.sum(), list(twin.parameters()))), ROUNDING)


def test_hutchinson_draws_are_forms_of_the_dense_hessian(vit):
    """Layer by layer, so that no other block is in them; the fused projection's block too."""
    twin, state, parts = decomposed(vit), torch.get_rng_state(), {"backbone.blocks.1.attn.qkv.weight": "qkv"}
    for name in ("backbone.blocks.1.attn.qkv.weight", "backbone.blocks.0.attn.proj.weight"):
        layers, own = (Layers({name: m.get_parameter(name)}, parts) for m in (vit, twin))
        blocks = dense_hessian(replayed(twin, state), own)
        g = torch.Generator().manual_seed(4)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            draws = hutchinson_samples(replayed(vit, state), layers, num_probes=100, generator=g)
        exact = torch.stack([block.trace() for block in blocks.values()])
        assert ((draws.mean(0) - exact).abs() < 4 * draws.std(0) / 10).all()
        if len(layers) == 1:
            v = signs_of(layers, 4)
            assert close(draws[0, 0], v @ blocks[name] @ v, ROUNDING)


def signs_of(layers: Layers, seed: int) -> Tensor:
    """The first draw of signs by a generator of this seed, flat."""
    return flat(signs(layers.tensors, torch.Generator().manual_seed(seed)))


def test_dropout_of_every_kind_is_replayed_on_both_sides():
    """Of attention, projections, patches and whole blocks: another mask would be noise over a small step."""
    rates = {"drop_path_rate": 0.4, "proj_drop_rate": 0.3, "attn_drop_rate": 0.3, "patch_drop_rate": 0.25}
    model = make("vit_tiny_patch16_224", VIT | rates)
    layers, twin, state = select_layers(model), decomposed(model), torch.get_rng_state()
    for module in twin.modules():  # the plain formula of torch draws its masks otherwise than timm's
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
    u, _ = Passes(model, layers, lambda: None).random_direction(some_coefficients(layers).sqrt())
    gradient, _ = penalised(Hutchinson(radius=1e-5), model, layers, some_coefficients(layers))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, exact = third_order(twin, state, u)
    assert close(gradient, exact, 1e-5)


def kernels() -> tuple[bool, ...]:
    """Which fused kernels of attention torch may use now."""
    cuda = torch.backends.cuda
    return cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("estimator", [GaussNewton(), Hutchinson()])
def test_attention_is_unfused_only_where_it_is_differentiated_twice(vit, estimator):
    """Plain passes keep the fast kernels; torch's switches and timm's flags are as before, on errors too."""
    before, flags = kernels(), [m.fused_attn for m in vit.modules() if hasattr(m, "fused_attn")]
    assert all(before)
    assert flags == [True, True]
    seen, fails = [], []

    def loss_fn() -> Loss:
        seen.append(kernels())
        if len(seen) in fails:
            raise KeyboardInterrupt
        return cross_entropy(vit(X), Y)

    every_other = optim.StrengthSchedule(every=2)
    optimizer = wrapped(vit, penalty=optim.TracePenalty(1e-3, estimator, every_other))
    optimizer.choose_estimator(loss_fn)
    for _ in range(2):
        seen.clear()
        optimizer.step(loss_fn)
    assert seen == [before]  # the second step is an ordinary one, bit for bit
    plain = torch.autograd.grad(cross_entropy(vit(X), Y).total, list(vit.parameters()))
    assert all(torch.equal(p.grad, g) for p, g in zip(vit.parameters(), plain, strict=True))
    seen.clear()
    optimizer.step(loss_fn)
    assert [any(one) for one in seen] == ([False] if estimator == GaussNewton() else [False, False, True])
    optimizer.step(loss_fn)
    seen.clear()
    fails.append(1)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(loss_fn)
    assert kernels() == before
    assert [m.fused_attn for m in vit.modules() if hasattr(m, "fused_attn")] == flags


@pytest.mark.parametrize("estimator", [GaussNewton(), Hutchinson()])
def test_checkpoints_repeat_attention_as_it_was(vit, estimator):
    """They compute it again in the backward pass: with the fused kernels there every ViT was refused."""
    layers, state, found = select_layers(vit), torch.get_rng_state(), []
    for uses_checkpoints in (False, True):
        vit.backbone.set_grad_checkpointing(uses_checkpoints)
        torch.set_rng_state(state)
        found.append(penalised(estimator, vit, layers, some_coefficients(layers)))
    assert all(close(a, b, ROUNDING) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["wci", "hessian_trace", "lambda_max"])
def test_measures_of_the_hessian_are_the_same_through_checkpoints(vit, name):
    """They compute it again in the backward pass, as the penalties do."""
    values = []
    for uses_checkpoints in (False, True):
        vit.backbone.set_grad_checkpointing(uses_checkpoints)
        values.append(MEASURES[name]().measure(Problem(vit, [(X, Y)])).value)
    assert values[0] == pytest.approx(values[1], rel=ROUNDING)


VISITING = {
    "sam": optim.SAM(0.05),
    "cr-sam": optim.CRSAM(),
    "posterior": optim.WCIPosterior(0.5),
    "one pass": optim.WCIPosterior(0.5, passes=1),
    "gauss_newton": optim.WCIPosterior(0.5, traces="gauss_newton"),
}


@pytest.mark.parametrize("name", ["vit", "swin, drop path", "efficientnet"])
def test_rules_combine_plain_gradients_at_the_weights_they_visit(name, monkeypatch):
    """With drop path and BatchNorm in train mode: every pass has the same masks, statistics move once."""
    visited, original = [], perturbation.perturbed
    watched = lambda w, u: (visited.append([t.clone() for t in u]), original(w, u))[1]  # noqa: E731
    monkeypatch.setattr(perturbation, "perturbed", watched)
    for rule in VISITING.values():
        model = make(*FAMILIES[name])
        optimizer, before, state = (
            wrapped(model, perturbation=rule),
            copy.deepcopy(model),
            torch.get_rng_state(),
        )
        optimizer.step(lambda model=model: cross_entropy(model(X), Y))
        expected = torch.zeros(())
        for sign, weight in zip((0, 1, -1), rule.combination(), strict=True):
            moved = copy.deepcopy(before)
            with torch.no_grad():
                for layer, u in zip(optimizer.layers.names, visited[-1], strict=True):
                    moved.get_parameter(layer).add_(u, alpha=sign)
            loss = replayed(moved, state).total
            expected = expected + weight * flat(gradients(loss, list(moved.parameters())))
        assert close(flat(p.grad for p in model.parameters()), expected, ROUNDING)
        replayed(before, state)  # one pass moves statistics
        counters = [[b for n, b in m.named_buffers() if "tracked" in n] for m in (model, before)]
        assert counters[0] == counters[1]


class Separate(nn.Module):
    """The maps of a fused projection as modules of their own."""

    def __init__(self, fused: nn.Linear, letters: str) -> None:
        super().__init__()
        for letter, w in zip(letters, fused.weight.chunk(len(letters)), strict=True):
            own = nn.Linear(w.shape[1], len(w), bias=False, dtype=w.dtype)
            own.weight = nn.Parameter(w.detach().clone())
            self.add_module(letter, own)
        self.bias = fused.bias

    def forward(self, x: Tensor) -> Tensor:
        whole = torch.cat([own(x) for own in self.children()], -1)
        return whole if self.bias is None else whole + self.bias


def separated(model: nn.Module) -> nn.Module:
    """A copy whose fused projections are separate maps."""
    twin = copy.deepcopy(model)
    for owner in list(twin.modules()):
        for name in ("qkv", "kv"):
            if hasattr(owner, name):
                setattr(owner, name, Separate(getattr(owner, name), name))
        if isinstance(owner, nn.MultiheadAttention):  # torch's own form of it
            owner._qkv_same_embed_dim = False
            for letter, w in zip("qkv", owner.in_proj_weight.chunk(3), strict=True):
                setattr(owner, f"{letter}_proj_weight", nn.Parameter(w.detach().clone()))
            owner.in_proj_weight = None
    return twin


class TorchAttention(nn.Module):
    """Images in rows, attention by torch, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean(1).reshape(len(x), -1, 16)[..., :6]
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


PVT = {"embed_dims": (4,) * 4, "num_heads": (1, 2, 2, 2), "depths": (1,) * 4, "sr_ratios": (1,) * 4}
SPLIT = {"vit": FAMILIES["vit"], "swin": FAMILIES["swin, drop path"], "xcit": FAMILIES["xcit"]}
SPLIT |= {"pvt": ("pvt_v2_b0", PVT), "cait": ("cait_xxs24_224", VIT)}
RULES = {
    "penalty": {"penalty": optim.WCIPenalty(0.1, estimator="gauss_newton")},
    "posterior": {"perturbation": optim.WCIPosterior(0.5, traces="gauss_newton")},
    "awp": {"perturbation": optim.AWP(0.1)},
}


@pytest.mark.parametrize("name", [*SPLIT, "torch"])
def test_a_split_projection_is_its_separate_maps(name):
    """Index, gradient of the penalty, noise of the posterior: in equal numbers, from equal random ones."""
    torch.manual_seed(0)
    fused = make(*SPLIT[name]) if name in SPLIT else TorchAttention().double()
    twin, state = separated(fused), torch.get_rng_state()
    layers, own = select_layers(fused, split_qkv=True), select_layers(twin)
    assert len(layers) == len(own) > len(select_layers(fused))
    traces = [exact_gauss_newton_trace(replayed(m, state), at) for m, at in ((fused, layers), (twin, own))]
    sizes = [at.squared_norms() * t for at, t in zip((layers, own), traces, strict=True)]
    assert close(sizes[0], sizes[1], ROUNDING)
    for rule in RULES.values():
        found = []
        for model, split in ((fused, True), (twin, False)):
            torch.set_rng_state(state)
            optimizer = wrapped(model, split_qkv=split, seed=1, **rule)
            for _ in range(2):  # the second has traces to go by
                optimizer.step(lambda model=model: cross_entropy(model(X), Y))
            found.append((flat(t.grad for t in optimizer.layers.tensors), optimizer.metrics()))
        assert close(found[0][0], found[1][0], 1e-9)
        assert found[0][1]["relative_size"] == pytest.approx(found[1][1]["relative_size"], rel=1e-9)


OTHER_ROWS = ["tiny_vit_5m_224", "efficientformer_l1", "gcvit_xxtiny", "test_maxvit", "lambda_resnet26t"]


@pytest.mark.parametrize("name", [*OTHER_ROWS, "halonet26t"])
def test_projections_with_other_rows_are_refused(name):
    """Thirds of rows that are interleaved by head, or of unequal maps, are no maps; some were cut so."""
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ValueError, match=r"got rows of \S*kv\.weight interleaved .* Set it to False"):
        select_layers(model, split_qkv=True)
    assert len(select_layers(model)) > 10


BLOCKS = "blocks.#.attn.proj blocks.#.attn.qkv blocks.#.mlp.fc#"
LISTED = {  # the layers of every family, and its tables, tokens and scales of more than one dimension
    "vit": (f"{BLOCKS} head patch_embed.proj", "cls_token pos_embed"),
    "vit, average": (f"{BLOCKS} head patch_embed.proj", "pos_embed"),
    "swin, drop path": (
        " ".join(f"layers.#.{name}" for name in f"{BLOCKS} downsample.reduction".split())
        + " head.fc patch_embed.proj",
        "layers.#.blocks.#.attn.relative_position_bias_table",
    ),
    "convnext": (
        "stem.# stages.#.downsample.# stages.#.blocks.#.conv_dw stages.#.blocks.#.mlp.fc# head.fc",
        "",
    ),
    "xcit": (
        f"{BLOCKS} blocks.#.local_mp.conv# cls_attn_blocks.#.attn.k cls_attn_blocks.#.attn.proj "
        "cls_attn_blocks.#.attn.q cls_attn_blocks.#.attn.v cls_attn_blocks.#.mlp.fc# head "
        "patch_embed.proj.#.# pos_embed.token_projection",
        "blocks.#.attn.temperature cls_token",
    ),
    "efficientnet": (
        "blocks.#.#.conv blocks.#.#.conv_dw blocks.#.#.conv_exp blocks.#.#.conv_pw blocks.#.#.conv_pwl "
        "blocks.#.#.se.conv_expand blocks.#.#.se.conv_reduce classifier conv_head conv_stem",
        "",
    ),
    "mixer": ("blocks.#.mlp_channels.fc# blocks.#.mlp_tokens.fc# head stem.proj", ""),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_layers_of_every_family_are_its_maps(name):
    """Tables of positions, tokens and temperatures are tensors of two dimensions and more, but no maps."""
    model = make(*FAMILIES[name])
    layers, left = select_layers(model), set()
    for tensor, p in model.named_parameters():
        if tensor not in layers and p.ndim > 1:
            left.add(numbered(tensor))
    assert {numbered(tensor.removesuffix(".weight")) for tensor in layers} == set(LISTED[name][0].split())
    assert left == set(LISTED[name][1].split())


def numbered(name: str) -> str:
    return re.sub(r"\d+", "#", name.removeprefix("backbone."))


class LoRA(nn.Module):
    """(W + B A) x with W frozen."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base, sizes = base.requires_grad_(False), {"bias": False, "dtype": base.weight.dtype}
        self.down = nn.Linear(base.in_features, rank, **sizes)
        self.up = nn.Linear(rank, base.out_features, **sizes)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.fixture
def adapted(vit) -> nn.Module:
    """A frozen network with adapters in its projections."""
    vit.requires_grad_(False)
    for block in vit.backbone.blocks:
        block.attn.qkv, block.attn.proj = LoRA(block.attn.qkv), LoRA(block.attn.proj)
    return vit


def index_of(model: nn.Module) -> Tensor:
    layers = select_layers(model)
    return (layers.squared_norms() * exact_gauss_newton_trace(model(X), layers)).sqrt()


def merged(model: nn.Module) -> nn.Module:
    """A copy with W + B A in place of the adapters, trainable."""
    twin = copy.deepcopy(model)
    for block in twin.backbone.blocks:
        for name in ("qkv", "proj"):
            lora = getattr(block.attn, name)
            with torch.no_grad():
                lora.base.weight += lora.up.weight @ lora.down.weight
            setattr(block.attn, name, lora.base.requires_grad_(True))
    return twin


def test_the_index_of_adapters_is_that_of_their_factors(adapted):
    """It does not see how a scale is split, but their basis; the merged one sees neither."""
    factors = [n.rpartition("attn.")[2] for n in select_layers(adapted)]
    assert factors[:4] == [f"{own}.{end}.weight" for own in ("qkv", "proj") for end in ("down", "up")]
    for kind, G in {"scale": [[3.0, 0.0], [0.0, 3.0]], "basis": [[1.0, 2.0], [0.0, 1.0]]}.items():
        other, change = copy.deepcopy(adapted), torch.tensor(G).double()
        for lora in (m for m in other.modules() if isinstance(m, LoRA)):
            with torch.no_grad():
                lora.down.weight.copy_(change @ lora.down.weight)
                lora.up.weight.copy_(lora.up.weight @ change.inverse())
        assert close(index_of(other), index_of(adapted), ROUNDING) == (kind == "scale")
        assert close(index_of(merged(other)), index_of(merged(adapted)), ROUNDING)
    assert len(select_layers(merged(adapted))) == len(factors) / 2


@pytest.mark.parametrize("name", ["gauss_newton", "posterior"])
def test_adapters_that_start_at_zero_train(adapted, name):
    """Half of the factors are zero at first: no norm, no noise, a trace of zero in the others, but no NaN."""
    for lora in (m for m in adapted.modules() if isinstance(m, LoRA)):
        nn.init.zeros_(lora.up.weight)
    rules = {
        "gauss_newton": {"penalty": optim.WCIPenalty(0.1, estimator="gauss_newton")},
        "posterior": {"perturbation": optim.WCIPosterior(0.5)},
    }
    optimizer = wrapped(adapted, lr=0.1, **rules[name])
    for _ in range(4):
        assert torch.isfinite(optimizer.step(lambda: cross_entropy(adapted(X), Y)))
    assert all(t.isfinite().all() and bool(t.any()) for t in optimizer.layers.tensors)
    assert torch.isfinite(optimizer.traces()).all()


def test_the_adapters_of_peft_are_found_and_merged(vit):
    """Its own names and modules; what it trains beside them (the head) counts too."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["head"], init_lora_weights=False)
    model = peft.get_peft_model(vit, config).double()
    names = [name.rpartition("backbone.")[2] for name in select_layers(model)]
    expected = [f"blocks.{i}.attn.qkv.lora_{factor}.default.weight" for i in (0, 1) for factor in "AB"]
    assert names == [*expected, "head.modules_to_save.default.weight"]
    logits = model(X)
    merged = model.merge_and_unload().requires_grad_(True)
    assert close(merged(X), logits, ROUNDING)
    assert list(select_layers(merged)) == list(select_layers(make(*FAMILIES["vit"])))


def test_gauss_newton_holds_under_bfloat16_autocast_and_differences_are_refused(vit):
    """Eight bits of mantissa: a relative error of 4e-3 an operation, of which some ten follow one another."""
    layers, c = select_layers(vit), some_coefficients(select_layers(vit))
    exact = penalised(GaussNewton(8), vit, layers, c)
    low = vit.float()
    found = []
    low_layers = select_layers(low)

    def loss_fn() -> Loss:
        with torch.autocast("cpu", torch.bfloat16):
            return cross_entropy(low(X.float()), Y)

    for step in (lambda p: GaussNewton(8).add_gradient(p, c.float(), 1.0).traces, lambda p: p.plain()[0]):
        low.zero_grad()
        traces = step(Passes(low, low_layers, loss_fn))
        found.append(flat(torch.zeros_like(p) if p.grad is None else p.grad for p in low.parameters()))
        if len(found) == 1:
            assert close(traces.double(), exact[1], 0.05)
    assert close((found[0] - found[1]).double(), exact[0], 0.1)
    optimizer = wrapped(low, penalty=optim.TracePenalty(0.1, Hutchinson()))
    with pytest.raises(ValueError, match=r"hutchinson is not possible here.*autocast"):
        optimizer.step(loss_fn)
