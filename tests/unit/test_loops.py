"""The table of loops and rules: a cell equals the reference, or is refused by name; none is silently off."""

import copy
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from cases import BASES, RULES, BatchNormNet, everything, image_batch, make
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader

from wcitrain import optim
from wcitrain.curvature import cross_entropy
from wcitrain.curvature.passes import Passes, Step
from wcitrain.optim import RegularizedOptimizer, WCIPenalty, WCIPosterior, wrapper
from wcitrain.optim.ascent import Ascent
from wcitrain.optim.random_directions import Noise
from wcitrain.optim.window import Window
from wcitrain.params import Layers
from wcitrain.preserve import module_mode

pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec:FutureWarning"),  # Lightning's own
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]
BATCHES = [(x.double(), y) for x, y in (image_batch(8, seed) for seed in range(6))]
MAX_NORM = 0.3  # the gradients' norms are about 1 to 3: clipping acts

KINDS = {  # of rule; a name in none of these makes several plain passes
    "none": ["none"],
    "one pass": ["rwp, unmixed", "wci, one pass", "noise, one pass", "wci from initial, one pass"],
    "one pass and norms": [
        "frobenius penalty",
        "frobenius penalty from initial",
        "wci, one pass, frobenius",
    ],
    "graph": ["wci adversary", "top layer penalty", "wci, gauss_newton", "wci, both"]
    + [name for name in RULES if "wci penalty" in name or "trace penalty" in name],
}
ALL = {name: rule.kwargs for name, rule in RULES.items()}
ALL["wci, one pass, frobenius"] = {"perturbation": WCIPosterior(0.5, passes=1, frobenius=True)}


def kind_of(rule: str) -> str:
    """Return the kind of a rule, as the table of refusals knows it."""
    return next((kind for kind, names in KINDS.items() if rule in names), "several passes")


@dataclass
class Setting:
    """What a loop trains: a fresh network in float64, and its rule to be wrapped around SGD."""

    rule: dict
    folder: object = None
    model: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = BatchNormNet().double()
        self.model.drop.p = 0.0

    def wrap(self, **options) -> RegularizedOptimizer:
        """Return the wrapped optimizer, and keep it."""
        base = BASES["sgd"](self.model.parameters())
        self.optimizer = RegularizedOptimizer(base, self.model, **self.rule, **options)
        return self.optimizer

    def loss(self, x=BATCHES[0][0], y=BATCHES[0][1]):
        """Return the mean loss of a batch, as plain PyTorch does."""
        return F.cross_entropy(self.model(x), y)

    def told_loss(self, x, y):
        """Return the same loss, which says its outputs."""
        return cross_entropy(self.model(x), y)

    def outcome(self) -> dict[str, torch.Tensor]:
        """Return weights, statistics and, if there is a rule, its record."""
        found = everything(self.model)
        if self.rule:
            own = self.optimizer.param_groups[0]["regularizer"]
            found |= {f"memory.{i}": m for i, m in enumerate(own.get("memory", ()))}
            found |= {k: torch.as_tensor(v) for k, v in own.items() if isinstance(v, Tensor | int)}
            traces = self.optimizer.traces()
            found |= {} if traces is None else {"traces": traces}
        return found


@cache
def reference(rule: str, parts: int = 1, clips: bool = False) -> dict[str, torch.Tensor]:
    """Return what `backward(loss_fn)` a micro-batch, clipping, `step` and `zero_grad` lead to."""
    own = Setting(ALL[rule])
    optimizer = own.wrap(num_micro_batches=parts)
    for number, (x, y) in enumerate(BATCHES):
        optimizer.backward(lambda x=x, y=y: cross_entropy(own.model(x), y))
        if (number + 1) % parts == 0:
            if clips:
                clip_grad_norm_(own.model.parameters(), MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
    return own.outcome()


def difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of what differs.

    Float64 in another order: differences at a radius multiply its rounding by up to 1e4.
    """
    pairs = {key: (found[key].double(), expected[key].double()) for key in found.keys() & expected.keys()}
    others = [key for key, pair in pairs.items() if not torch.allclose(*pair, 1e-9, 1e-11, equal_nan=True)]
    return [*(found.keys() ^ expected.keys()), *others]


# ---- the loops --------------------------------------------------------------------------------------------


def step_closure(own: Setting) -> None:
    optimizer = own.wrap()
    for x, y in BATCHES:
        optimizer.step(lambda x=x, y=y: cross_entropy(own.model(x), y))


def torch_closure(own: Setting, attacks: bool = False) -> None:
    optimizer, calls = own.wrap(), round(1 + own.optimizer.extra_passes()[0])

    def closure(x, y):
        if attacks:  # of size zero, else every pass has its own images
            with module_mode(own.model, training=False):
                x = x.clone().requires_grad_()
                x = (x + 0 * torch.autograd.grad(own.loss(x, y), x)[0].sign()).detach()
        optimizer.zero_grad()
        loss = own.loss(x, y)
        loss.backward()
        return loss

    for number, (x, y) in enumerate(BATCHES):
        if attacks and calls > 1 and number == 0:
            with pytest.warns(UserWarning, match=rf"an attack\?\), and is called {calls} times a step"):
                optimizer.step(lambda x=x, y=y: closure(x, y))
        else:
            optimizer.step(lambda x=x, y=y: closure(x, y))


def perturbed(own: Setting, parts: int = 1, loss: Callable | None = None) -> None:
    optimizer, loss = own.wrap(num_micro_batches=parts), loss or own.loss
    for number, (x, y) in enumerate(BATCHES):
        with optimizer.perturbed():
            (loss(x, y) / parts).backward()
        if (number + 1) % parts == 0:
            optimizer.step()
            optimizer.zero_grad()


def unaware(own: Setting) -> None:
    optimizer = own.wrap()
    for x, y in BATCHES:
        own.loss(x, y).backward()
        optimizer.step()
        optimizer.zero_grad()


def grad_scaler(own: Setting, inside: bool = False, told: bool = True, enabled: bool = True) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled)
    optimizer = own.wrap(scaler=scaler if told else None)
    for x, y in BATCHES:
        if inside:
            with optimizer.perturbed():
                scaler.scale(own.loss(x, y)).backward()
        else:
            loss_fn = partial(own.told_loss if told else lambda x, y: scaler.scale(own.loss(x, y)), x, y)
            optimizer.backward(loss_fn)
        scaler.unscale_(optimizer)
        clip_grad_norm_(own.model.parameters(), MAX_NORM)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def timm_scaler(own: Setting) -> None:
    from timm.utils import NativeScaler

    scaler = NativeScaler("cpu")
    optimizer = own.wrap(scaler=scaler)
    for x, y in BATCHES:
        with optimizer.perturbed():
            scaler(own.loss(x, y), optimizer, clip_grad=MAX_NORM, parameters=own.model.parameters())
        optimizer.zero_grad()


def accelerate(own: Setting, inside: bool = False) -> None:
    accelerator, optimizer = Accelerator(cpu=True, gradient_accumulation_steps=2), own.wrap()
    model, prepared = accelerator.prepare(own.model, optimizer)
    optimizer.attach(accelerator, model)
    for x, y in BATCHES:
        with accelerator.accumulate(model):
            if inside:
                with optimizer.perturbed():
                    accelerator.backward(own.loss(x, y))
            else:
                optimizer.backward(lambda x=x, y=y: cross_entropy(model(x), y))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
            prepared.step()
            prepared.zero_grad()


def lightning(own: Setting, way: str = "automatic", **options) -> None:
    pl = pytest.importorskip("lightning.pytorch")

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.automatic_optimization = own.model, way == "automatic"

        def configure_optimizers(self):
            return own.wrap()

        def training_step(self, batch, number):
            x, y = batch
            if way == "automatic":
                return own.loss(x, y)
            optimizer = self.optimizers()
            if way == "backward":
                optimizer.backward(lambda: cross_entropy(own.model(x), y))
            else:
                with optimizer.perturbed():
                    self.manual_backward(own.loss(x, y))
            optimizer.step()
            optimizer.zero_grad()

    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options |= {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "default_root_dir": own.folder}
    trainer = pl.Trainer(**dict.fromkeys(quiet, False), **options)
    trainer.fit(Module(), DataLoader(BATCHES, batch_size=None))


def hugging_face(own: Setting, way: str = "perturbed", parts: int = 1) -> None:
    transformers = pytest.importorskip("transformers")
    optimizer = own.wrap(num_micro_batches=parts)

    class Trainer(transformers.Trainer):
        def get_train_dataloader(self):
            return DataLoader([{"x": x, "labels": y} for x, y in BATCHES], batch_size=None)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return F.cross_entropy(model(inputs["x"]), inputs["labels"])

        def training_step(self, *args, **kwargs):
            if way != "perturbed":
                return super().training_step(*args, **kwargs)
            with optimizer.perturbed():
                return super().training_step(*args, **kwargs)

    class Callback(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            optimizer.perturb()

        def on_pre_optimizer_step(self, *args, **kwargs):
            optimizer.restore()

    options = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    options |= {"use_cpu": True, "num_train_epochs": 1, "max_grad_norm": MAX_NORM}
    args = transformers.TrainingArguments(str(own.folder), gradient_accumulation_steps=parts, **options)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    given = {"optimizers": (optimizer, constant), "callbacks": [Callback()] * (way == "callbacks")}
    Trainer(own.model, args, train_dataset=BATCHES, **given).train()


@dataclass(frozen=True)
class Loop:
    """A loop, what its reference does, and the kinds of rule that it refuses, by their message."""

    train: Callable
    refused: dict[str, str] = field(default_factory=dict)
    parts: int = 1
    clips: bool = False


SEVERAL = r"perturbed: got .* is more than one pass; expected .*WCIPosterior\(passes=1\)"
UNSEEN = r"got gradients that .* has not seen; expected step\(closure\) alone, backward\(loss_fn\)"
GRAPH = r"loss_fn called backward\(\)|got a loss that does not say which outputs"
SCALER = r"scaler: got a GradScaler with .* fp16 cannot hold its derivatives"
UNTOLD = r"got a GradScaler; expected one it knows\. Write RegularizedOptimizer\(\.\.\., scaler=scaler\)"
CLIPS = r"closure that changes gradients after backward \(clipping\?\).*Call backward\(loss_fn\), clip"
WITH_PASS = dict.fromkeys(("one pass and norms", "several passes", "graph"), SEVERAL)
RULED = ("one pass", "one pass and norms", "several passes", "graph")
ALONE, CLIPPED = dict.fromkeys(RULED, UNSEEN), dict.fromkeys(RULED[1:], CLIPS) | {"graph": f"{CLIPS}|{GRAPH}"}
UNTOLD_OF = dict.fromkeys(("none", *RULED), UNTOLD) | {"graph": f"{UNTOLD}|{GRAPH}"}
SCALED = WITH_PASS | {"graph": SCALER}
LOOPS = {
    "step(closure)": Loop(step_closure),
    "torch's closure": Loop(torch_closure, {"graph": GRAPH}),
    "torch's closure, attack inside": Loop(partial(torch_closure, attacks=True), {"graph": GRAPH}),
    "perturbed": Loop(perturbed, WITH_PASS),
    "perturbed, two micro-batches": Loop(partial(perturbed, parts=2), WITH_PASS, parts=2),
    "none of the ways": Loop(unaware, ALONE),
    "GradScaler": Loop(grad_scaler, {"graph": SCALER}, clips=True),
    "GradScaler, off": Loop(partial(grad_scaler, enabled=False), clips=True),
    "GradScaler, perturbed": Loop(partial(grad_scaler, inside=True), SCALED, clips=True),
    "GradScaler, not told": Loop(partial(grad_scaler, told=False), UNTOLD_OF, clips=True),
    "timm's NativeScaler, perturbed": Loop(timm_scaler, SCALED, clips=True),
    "Accelerate": Loop(accelerate, parts=2, clips=True),
    "Accelerate, perturbed": Loop(partial(accelerate, inside=True), WITH_PASS, parts=2, clips=True),
    "Lightning": Loop(lightning, {"graph": GRAPH}),
    "Lightning, clipping": Loop(partial(lightning, gradient_clip_val=MAX_NORM), CLIPPED, clips=True),
    "Lightning, accumulating": Loop(partial(lightning, accumulate_grad_batches=2), ALONE, 2),
    "Lightning, manual": Loop(partial(lightning, way="backward")),
    "Lightning, manual, perturbed": Loop(partial(lightning, way="perturbed"), WITH_PASS),
    "Trainer, perturbed": Loop(hugging_face, WITH_PASS, clips=True),
    "Trainer, accumulating": Loop(partial(hugging_face, parts=2), WITH_PASS, 2, clips=True),
    "Trainer, callbacks": Loop(partial(hugging_face, way="callbacks"), WITH_PASS, clips=True),
    "Trainer, none of the ways": Loop(partial(hugging_face, way="alone"), ALONE, clips=True),
}
EXAMPLES = ["none", "wci, one pass", "wci, one pass, frobenius", "rwp, unmixed", "sam", "wci penalty, auto"]
IN_FULL = ["step(closure)", "perturbed", "GradScaler", "Accelerate"]  # the others' other rules are slow


def cell(loop, rule):
    is_slow = loop not in IN_FULL and rule not in EXAMPLES
    return pytest.param(loop, rule, marks=[pytest.mark.slow] * is_slow)


@pytest.fixture(autouse=True)
def _quiet_and_clean():
    """Lightning and Accelerate leave loggers and a global state behind."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def check(loop: str, rule: str, folder: object) -> None:
    """Raise AssertionError unless this cell equals the reference, or is refused with nothing stepped."""
    own, row = Setting(ALL[rule], folder), LOOPS[loop]
    start, refusal = everything(own.model), row.refused.get(kind_of(rule))
    if refusal is None:
        row.train(own)
        found, expected = own.outcome(), reference(rule, row.parts, row.clips)
        if rule == "none":  # a step without a rule is not counted in loops that use none of the ways
            assert not difference(everything(own.model), {k: expected[k] for k in start})
        else:
            assert not difference(found, expected)
        assert any(not torch.equal(start[k], found[k]) for k in start)
        return
    with pytest.raises((RuntimeError, ValueError), match=refusal):
        row.train(own)
    assert all(torch.equal(p, start[name]) for name, p in own.model.named_parameters())


@pytest.mark.parametrize(("loop", "rule"), [cell(loop, rule) for loop in LOOPS for rule in ALL])
def test_every_loop_with_every_rule_equals_the_reference_or_is_refused(loop, rule, tmp_path):
    """A cell that is silently off trains without the rule, or with half of it, in somebody's loop."""
    check(loop, rule, tmp_path)


def _plain(self, passes, factor, last_pass):
    return Step(passes.plain()[0])


def _still(self, passes, factor):
    return displace(self, passes, factor)._replace(u=[torch.zeros_like(t) for t in passes.layers.tensors])


displace = Noise.displace
BREAKS = [  # what is broken, by what; a loop and a rule that must see it
    (Noise, "gradient", _plain, "step(closure)", "wci"),
    (Ascent, "gradient", _plain, "torch's closure", "sam"),
    (Noise, "displace", _still, "perturbed", "wci, one pass"),
    (Noise, "displace", _still, "Lightning, manual, perturbed", "noise, one pass"),
    (Window, "count", lambda *args: None, "perturbed", "wci, one pass"),
    (RegularizedOptimizer, "_refuse_unseen_gradients", lambda *args, **kw: None, "none of the ways", "awp"),
    (RegularizedOptimizer, "_finish_step", lambda self: None, "Accelerate", "wci"),
    (Passes, "add_norm_gradients", lambda *args: None, "step(closure)", "frobenius penalty"),
    (wrapper, "slopes", lambda *args: nullcontext([None, None]), "perturbed", "wci, one pass"),
    (Layers, "sum_parts", lambda self, i, x: x.sum().reshape(1) * 0, "torch's closure", "wci, one pass"),
    (Passes, "_noting", lambda self, u: nullcontext([None, None]), "Lightning, clipping", "wci"),
]


@pytest.mark.parametrize("broken", BREAKS)
def test_the_table_sees_a_wrapper_that_is_broken_on_purpose(broken, tmp_path, monkeypatch):
    """A comparison that cannot fail shows nothing: the same loops, a rule that silently does nothing."""
    *broken, loop, rule = broken
    reference(rule, LOOPS[loop].parts, LOOPS[loop].clips)  # made before anything breaks
    monkeypatch.setattr(*broken)
    with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception)):
        check(loop, rule, tmp_path)


ONE_PASS = {"perturbation": WCIPosterior(0.5, passes=1)}


@pytest.mark.parametrize("inside", [False, True])
def test_a_step_that_overflows_is_skipped_and_leaves_no_trace(inside):
    """The scaler skips a step without a word to the optimizer: its estimates and its sign must go too."""
    results = []
    for bad in (None, 2):
        own, scaler = Setting(ONE_PASS), torch.amp.GradScaler("cpu", init_scale=2.0**10)
        optimizer = own.wrap(scaler=scaler)
        for number, (x, y) in enumerate(BATCHES):
            for factor in (float("inf"), 1.0) if number == bad else (1.0,):
                if inside:
                    with optimizer.perturbed():
                        scaler.scale(own.loss(x, y) * factor).backward()
                else:
                    optimizer.backward(lambda x=x, y=y, f=factor, own=own: own.loss(x, y) * f)
                scaler.step(optimizer)
                scaler.update()
                own.model.zero_grad() if number % 2 else optimizer.zero_grad()
        names = {*dict(own.model.named_parameters()), "traces", "step", "draws", "trace_sum", "num_estimates"}
        results.append({k: v for k, v in own.outcome().items() if k in names})
        assert scaler.get_scale() == 2.0 ** (10 if bad is None else 9)
    assert not difference(*results)


def test_lightning_in_bf16_equals_plain_autocast(tmp_path):
    """Autocast keeps bf16 copies of the weights: a pass at W + u would be one at W."""
    own, other = Setting(ONE_PASS), Setting(ONE_PASS)
    lightning(own, precision="bf16-mixed")
    perturbed(other, loss=torch.autocast("cpu", torch.bfloat16)(other.loss))
    assert not difference(own.outcome(), other.outcome())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("rule", ["wci, one pass", "vasso", "wci", "wci from initial, one pass"])
def test_torchs_distributed_checkpoint_continues_bitwise(rule, flat, tmp_path):
    """It steps once to make the base's state, and loads only what a fresh optimizer has."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    own, other = Setting(ALL[rule]), Setting(ALL[rule])

    def train(one: Setting, batches: list) -> None:
        for batch in batches:
            one.optimizer.step(partial(one.loss, *batch))

    def states(one: Setting) -> dict:
        return dict(zip("mo", get_state_dict(one.model, one.optimizer, options=options), strict=True))

    own.wrap(), other.wrap()
    train(own, BATCHES[:3])
    dcp.save(states(own), checkpoint_id=tmp_path)
    found = states(other)
    assert other.optimizer.param_groups[0]["regularizer"]["step"] == 0
    dcp.load(found, checkpoint_id=tmp_path)
    kinds = {"model_state_dict": found["m"], "optim_state_dict": found["o"]}
    set_state_dict(other.model, other.optimizer, **kinds, options=options)
    assert not difference(other.outcome(), own.outcome())
    train(own, BATCHES[3:])
    train(other, BATCHES[3:])
    assert not difference(other.outcome(), own.outcome())


def test_exceptions_attacks_and_steps_inside_perturbed_leave_no_trace_and_saving_is_refused():
    """Half a batch, or an attack's gradients, would count as estimates; a checkpoint would be at W + u."""
    own = Setting(ONE_PASS)
    optimizer, before = own.wrap(), everything(own.model)

    def fails() -> None:
        with optimizer.perturbed():
            own.loss().backward()
            assert not torch.equal(own.model.fc.weight, before["fc.weight"])
            for act in (optimizer.metrics, partial(copy.deepcopy, optimizer)):
                with pytest.raises(RuntimeError, match=r"got weights at W \+ u"):
                    act()
            optimizer.state_dict()

    with pytest.raises(RuntimeError, match=r"state_dict: got weights at W \+ u"):
        fails()
    assert all(torch.equal(p, before[name]) for name, p in own.model.named_parameters())
    own.model.load_state_dict(before)  # the statistics, which moved in the user's own forward
    optimizer.zero_grad()

    def stops() -> None:
        with optimizer.perturbed():
            optimizer.step()  # ends it
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stops()
    for number, (x, y) in enumerate(BATCHES):
        with optimizer.perturbed():
            with module_mode(own.model, training=False):
                own.loss(x + 0.1, y).backward()  # an attack that leaves gradients behind
            (own.model if number % 2 else optimizer).zero_grad()
            own.loss(x, y).backward()
            if number == 3:
                optimizer.step()  # ends it
        if number != 3:
            optimizer.step()
        optimizer.zero_grad(set_to_none=number % 2 == 0)
    assert not difference(own.outcome(), reference("wci, one pass"))


def test_compiled_models_see_the_perturbed_weights():
    """A graph that holds copies of the weights would make its passes at W."""
    own = Setting(ONE_PASS)
    compiled = torch.compile(own.model, backend="aot_eager")
    perturbed(own, loss=lambda x, y: F.cross_entropy(compiled(x), y))
    assert not difference(own.outcome(), reference("wci, one pass"))


def test_a_forward_that_rebinds_its_weight_has_w_back():
    """Layers with a norm constraint do so (EEGNet): the noise would stay in the weights for good."""

    class Constrained(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=1.0)
            return super().forward(x)

    torch.manual_seed(0)
    net, x, y = Constrained(4, 3), torch.randn(8, 4), torch.arange(8) % 3
    before = net.weight.detach().clone()
    for passes in (1, 2):
        rule = WCIPosterior(0.5, passes=passes)
        optimizer = RegularizedOptimizer(torch.optim.SGD(net.parameters(), 0.0), net, perturbation=rule)
        optimizer.backward(lambda: F.cross_entropy(net(x), y))
        assert torch.equal(net.weight, before)


@pytest.mark.parametrize("passes", [1, 2])
def test_heads_that_take_turns_have_noise_in_the_steps_that_train_them(passes):
    """A layer counted only after a step with its gradient: noise at every other step, never the right one."""
    torch.manual_seed(0)
    heads = nn.ModuleList([nn.Linear(4, 3) for _ in range(2)])
    x, y, moved = torch.randn(8, 4), torch.arange(8) % 3, []
    before = [head.weight.detach().clone() for head in heads]
    base, rule = torch.optim.SGD(heads.parameters(), lr=0.0), WCIPosterior(0.5, passes=passes)
    optimizer = RegularizedOptimizer(base, heads, perturbation=rule)
    for step in range(6):

        def loss(turn: int = step % 2) -> Tensor:
            moved.append(not torch.equal(heads[turn].weight, before[turn]))
            return F.cross_entropy(heads[turn](x), y)

        optimizer.step(loss)
    assert all(moved[2 * passes :])


def test_a_checkpoint_of_frozen_layers_loads_into_a_model_frozen_after_wrapping():
    """The layers were those of the constructor until the first step."""
    wrapped = []
    for _ in range(2):
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
        wrapped.append(RegularizedOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), net, **ONE_PASS))
        net[0].requires_grad_(False)
    wrapped[0].step(lambda: F.cross_entropy(wrapped[0].model(torch.ones(3, 4)), torch.arange(3)))
    wrapped[1].load_state_dict(wrapped[0].state_dict())
    assert list(wrapped[1].layers) == ["1.weight"]


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("clears_all", [True, False])
def test_a_closure_clears_the_gradients_of_another_optimizer_or_adds_to_them(passes, clears_all):
    """They were put back after every pass, so the other optimizer stepped on the sum of all steps."""
    torch.manual_seed(0)
    net, x, y = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), torch.randn(8, 4), torch.arange(8) % 3
    base = torch.optim.SGD(net[0].parameters(), lr=0.0)
    optimizer = RegularizedOptimizer(base, net, perturbation=WCIPosterior(1e-6, passes=passes))

    def closure() -> Tensor:
        (net if clears_all else optimizer).zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    norms = []
    for _ in range(3):
        optimizer.step(closure)
        norms.append(float(net[1].weight.grad.norm()))
    expected = [1.0, 1.0, 1.0] if clears_all else [1.0, 2.0, 3.0]
    assert [norm / norms[0] for norm in norms] == pytest.approx(expected, rel=1e-3)


def backward_outside(own: Setting) -> None:
    net, (x, y) = nn.Linear(4, 3), (torch.ones(3, 4), torch.arange(3))  # larger ones torch refuses itself
    optimizer = RegularizedOptimizer(torch.optim.SGD(net.parameters(), 0.1), net, **ONE_PASS)
    with optimizer.perturbed():
        loss = F.cross_entropy(net(x), y)
    loss.backward()
    optimizer.step()


def sparse(layers: str) -> RegularizedOptimizer:
    table, y = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 3)), torch.arange(5) % 3
    optimizer = on(torch.optim.SGD(table.parameters(), 0.1), table, layers=layers)
    for _ in "12":
        optimizer.step(lambda: F.cross_entropy(table(y), y))
    return optimizer


def warm_up(own: Setting) -> None:
    own.wrap()
    for lr in (0.0, 0.1):
        own.optimizer.param_groups[0]["lr"] = lr
        own.loss().backward()
        own.optimizer.step()  # the first passes: torch's checkpointing makes states so


def accelerated(own: Setting, model=None, precision="no", kind="NO", static=False) -> RegularizedOptimizer:
    own.rule, own.model.static_graph = {"penalty": PENALTY}, static
    accelerator = SimpleNamespace(mixed_precision=precision, gradient_accumulation_steps=1)
    accelerator.distributed_type = SimpleNamespace(value=kind)
    return own.wrap().attach(accelerator, own.model if model is None else model)


def both(rule: optim.WeightPerturbation, penalty: WCIPenalty) -> None:
    make({"perturbation": rule, "penalty": penalty})


on = partial(RegularizedOptimizer, **ONE_PASS)
PENALTY = WCIPenalty(0.1)
HUTCHINSON, TOP_LAYER = (WCIPenalty(0.1, estimator=name) for name in ("hutchinson", "top_layer"))
ALONE_AT = r"expected a rule that takes the gradient at W \+ u alone"
SCALAR = "expected a scalar loss with its graph"
DECAY = "expected 0 <= trace_decay < 1 and num_micro_batches >= 1"
MISUSES = [
    (lambda own: on(own.wrap(), own.model), "base: got RegularizedOptimizer; expected one wrapper"),
    (lambda own: on(Accelerator(cpu=True).prepare(own.wrap().base), own.model), "got AcceleratedOptimizer"),
    (lambda own: on(torch.optim.LBFGS(own.model.parameters()), own.model), "base: got LBFGS; expected"),
    (lambda own: on(torch.optim.SGD, own.model), "not its class"),
    (lambda own: on(own.wrap().base, nn.Linear(2, 2)), "none of the selected tensors"),
    (lambda own: own.wrap().load_state_dict(make({"layers": "all"})[1].state_dict()), "5 other layers"),
    (lambda own: own.wrap(trace_decay=1.5), DECAY),
    (lambda own: own.wrap(num_micro_batches=0), DECAY),
    (lambda own: sparse("all"), "got a gradient of layout torch.sparse_coo; expected dense ones"),
    (lambda own: (own.wrap(num_micro_batches=2).backward(own.loss), own.optimizer.step()), "after 1 of 2"),
    (lambda own: own.wrap().restore(), r"restore: got weights at W\. Call perturb\(\) first"),
    (lambda own: (own.wrap().perturb(), own.optimizer.perturb()), "perturb: called twice"),
    (lambda own: (own.wrap().perturb(), own.optimizer.backward(own.loss)), r"called inside perturbed\(\)"),
    (lambda own: own.wrap().step(own.optimizer.step), "step called inside the function it was given"),
    (lambda own: (own.wrap().backward(own.loss), own.optimizer.step(own.loss)), "a closure; expected none"),
    (lambda own: own.wrap().backward(lambda: own.loss().backward() or own.loss()), "called backward.*leave"),
    (lambda own: own.wrap().step(lambda: own.loss().backward()), "loss_fn returned None; expected"),
    (lambda own: (own.wrap(), own.loss().backward(), own.optimizer.step(own.loss)), UNSEEN),
    (backward_outside, UNSEEN),
    (warm_up, UNSEEN),
    (lambda own: own.wrap().step(lambda: own.loss().item()), SCALAR),
    (lambda own: own.wrap().step(lambda: own.loss().expand(3)), SCALAR),
    (lambda own: both(WCIPosterior(1.0), PENALTY), ALONE_AT),
    (lambda own: both(optim.GSAM(), PENALTY), ALONE_AT),
    (lambda own: both(optim.GradientNorm(0.05, 0.05), PENALTY), ALONE_AT),  # on a ramp
    (lambda own: both(optim.AWP(), HUTCHINSON), "got hutchinson beside AWP.*expected gauss_newton"),
    (lambda own: both(optim.AWP(), TOP_LAYER), "got top_layer beside AWP.*expected gauss_newton"),
    (lambda own: both(optim.SAM(), PENALTY), "layers: got null with SAM"),
    (lambda own: WCIPosterior(1.0, strength=1.0), r"WCIPosterior\.strength: got 1 beside relative_size=1"),
    (lambda own: accelerated(own).step(own.loss), "closure under Accelerate"),
    (lambda own: accelerated(own, precision="fp16"), "fp16"),
    (lambda own: accelerated(own, kind="FSDP"), "FSDP"),
    (lambda own: accelerated(own, torch.compile(own.model), "bf16"), "compiled bf16"),
    (lambda own: accelerated(own, static=True), "static_graph"),
]


@pytest.mark.parametrize(("misuse", "refusal"), MISUSES)
def test_what_is_none_of_these_loops_is_refused_by_name(misuse, refusal):
    """Each of these is silently wrong in one peer or another."""
    with pytest.raises((RuntimeError, ValueError, TypeError), match=refusal):
        misuse(Setting(ONE_PASS))


def test_sparse_gradients_outside_the_layers_work():
    """An embedding is no layer: language models keep theirs sparse."""
    own = sparse("weights").param_groups[0]["regularizer"]
    assert (own["step"], own["num_estimates"].tolist()) == (2, [1])


def test_what_trains_counts_from_the_next_step_and_unused_layers_get_no_noise():
    """Noise in a frozen layer is a bug; in an unused one it takes its share of the others' size."""
    torch.manual_seed(0)
    net = nn.ModuleDict({name: nn.Linear(4, 4).double() for name in ("a", "b", "unused", "late")})
    base = torch.optim.SGD([p for name in ("a", "b", "unused") for p in net[name].parameters()], lr=0.0)
    optimizer = RegularizedOptimizer(base, net, **ONE_PASS)
    x, y, sizes = torch.randn(8, 4).double(), torch.arange(8) % 4, {}
    start = {name: net[name].weight.detach().clone() for name in net}

    def steps(count: int) -> None:
        for _ in range(count):
            with optimizer.perturbed():
                moved = {name: (net[name].weight.detach() - w).norm() / w.norm() for name, w in start.items()}
                sizes.update({name: float(size) for name, size in moved.items()})
                F.cross_entropy(net["late"](torch.tanh(net["b"](torch.tanh(net["a"](x))))), y).backward()
            optimizer.step()
            optimizer.zero_grad()

    def traces() -> dict[str, float]:
        return dict(zip(optimizer.layers, optimizer.traces().tolist(), strict=True))

    steps(4)
    assert sizes["unused"] == sizes["late"] == 0
    assert (sizes["a"] ** 2 + sizes["b"] ** 2) / 2 == pytest.approx(0.25)
    assert optimizer.metrics()["relative_size"] == pytest.approx(0.5)
    before = traces()
    net["a"].requires_grad_(False)
    optimizer.add_param_group({"params": list(net["late"].parameters())})
    with optimizer.perturbed():
        assert list(traces()) == ["b.weight", "unused.weight", "late.weight"]
        assert traces()["b.weight"] == before["b.weight"]
    optimizer.zero_grad()
    steps(4)
    assert sizes["a"] == 0
    assert sizes["late"] > 0
    net["a"].requires_grad_(True)
    steps(1)
    assert sizes["a"] > 0


def test_one_draw_serves_the_attack_and_the_pass_until_something_changes(monkeypatch):
    """Images adversarial to one noise, trained on with another; or noise for layers frozen since."""
    net, x, y = Setting(ONE_PASS, None).model, *BATCHES[0]
    optimizer = RegularizedOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), net, **ONE_PASS)
    draw, draws, seen = Passes.random_direction, [], []
    monkeypatch.setattr(Passes, "random_direction", lambda *a, **kw: draws.append(1) or draw(*a, **kw))

    def weights() -> list[torch.Tensor]:
        return [t.detach().clone() for t in optimizer.layers.tensors]

    def step(freeze: bool = False) -> None:
        with optimizer.attacking():
            attacked = weights()
        optimizer.layers.tensors[0].requires_grad_(not freeze)
        optimizer.backward(lambda: seen.append(weights()) or F.cross_entropy(net(x), y))
        if not freeze:
            assert all(map(torch.equal, attacked, seen[-1]))
        optimizer.step()
        optimizer.zero_grad()

    step()
    assert len(draws) == 1
    step()
    assert len(draws) == 2
    number = len(optimizer.layers)
    step(freeze=True)
    assert (len(draws), len(optimizer.layers)) == (4, number - 1)
