"""Which modules of a model have no second or third derivatives, or wrong ones: the names behind a failed curvature pass.

Legend: θ the tensors that derivatives are taken in: a module's own trainable parameters and those inputs through which
gradients flow (where there are none, as for images, the parameters of all its parts); φ(θ) a smooth scalar of its outputs;
u₁, u₂ random directions; h a step.

Each module is tested by itself on the inputs it received in one forward pass, children before parents, so that the report
names the smallest module at fault. With D_n = ∂ⁿφ[u₁, …, u_{n−1}, ·], a list of tensors like θ, autograd must not refuse
D_n in the module's own dtype, and in float64 it must be the slope of what it says of one order less:

    D_n(θ)  ≈  [ D_{n−1}(θ + h u_{n−1}) − D_{n−1}(θ − h u_{n−1}) ] / (2h),     n = 2, …, order                   (1)

(1) fails for derivative formulas that are wrong (`F.layer_norm` at order three) and for stopped gradients. It says nothing
where two steps of very different size disagree among themselves: a kink (ReLU) was crossed, or the module computes in float32.
The test point is moved off the recorded one at random, since exact zeros (what a ReLU returns, zero-initialised weights) put the
next kink exactly there.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from wcitrain.params import unwrapped, wide
from wcitrain.preserve import kept_random_state, random_state, set_random_state, undisturbed
from wcitrain.seeding import generator_from

NUM_EXAMPLES = 4  # of the batch; with two, train-mode BatchNorm over single values has hardly any derivative
STEPS = (1e-6, 1e-8)  # relative to θ in float64: truncation about 1e-12, rounding about 1e-7, kinks rarely crossed
JITTER = 0.1  # of the test point, relative to θ
TOLERANCE = 1e-3  # relative difference in (1)
ORDINALS = {2: "second", 3: "third"}
# Compositions and maps that are linear in inputs and in weights: nothing to test, and the convolutions cost most.
TRUSTED = (nn.Sequential, nn.Identity, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
COMPILED = "torch.compile refuses double backward"


class Unsupported(NamedTuple):
    """A module without the derivatives asked for: its name in the model, its class, and what autograd says of it."""

    name: str
    kind: str
    reason: str


def failing_modules(model: nn.Module, forward: Callable[[], object], *, order: Literal[2, 3] = 2) -> list[Unsupported]:
    """Return the smallest modules of ``model`` whose derivatives up to ``order`` autograd refuses or gets wrong.

    ``forward`` is called once. The tests run inside its first call of the model, under whatever surrounds that call (autocast,
    ``sdpa_kernel``), on four examples of its batch. Modes, buffers, random state, weights and ``.grad`` are left alone.
    Derivatives with respect to images do not count unless ``forward`` itself passes images that require gradients.

    Cost: for every module some ten backward passes of its own size; for a dry run that has failed, not for every start.

    Args:
        model: Any module; wrappers (DDP) are looked through.
        forward: Calls the model on one batch, in the mode that matters; what it returns is ignored.
        order: 2 for Hessian-vector products, 3 for their gradient.

    Returns:
        In order of registration; empty when no module fails by itself. The model itself is named ``"(model)"``.

    Raises:
        ValueError: ``forward`` does not call the model.
    """
    if order not in ORDINALS:
        raise ValueError(f"failing_modules.order: got {order!r}; expected 2 or 3. Hutchinson needs 2, its gradient 3.")
    compiled = [
        Unsupported(n or "(model)", type(m).__name__, COMPILED) for n, m in model.named_modules() if is_compiled(m)
    ]
    if compiled:
        return compiled
    model = unwrapped(model)
    found: list[list[Unsupported]] = []

    def test_all(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        handle.remove()  # the first call only, and not the one made here
        device = next((t.device for t in model.parameters()), torch.device("cpu"))
        with kept_random_state(device), torch.enable_grad():
            recorded = _recorded_inputs(model, *_first_examples((args, kwargs)))
            found.append(_failures(model, recorded, order))

    handle = model.register_forward_pre_hook(test_all, with_kwargs=True)
    try:
        with undisturbed(model, training=None):
            forward()
    finally:
        handle.remove()
    if not found:
        raise ValueError(
            f"failing_modules.forward: got a function that does not call the {type(model).__name__}; expected one forward pass. "
            "Pass lambda: model(x)."
        )
    return found[0]


def explain(failures: Sequence[Unsupported], what: str) -> str:
    """Return one message for the user: what was asked, up to three modules that cannot, and the ways out.

    Args:
        failures: From ``failing_modules``; may be empty.
        what: What needs the derivatives, ``'estimator="hutchinson" needs second derivatives'``.

    >>> explain([Unsupported("act", "Hardsigmoid", "no derivative")], "hutchinson needs second derivatives")
    'hutchinson needs second derivatives, but act (Hardsigmoid: no derivative) has none or wrong ones. Use estimator="two_point".'
    """
    if not failures:
        return f'{what}, which autograd refuses, although no single module does. Use estimator="two_point".'
    names = ", ".join(f"{f.name} ({f.kind}: {f.reason})" for f in failures[:3])
    more = f" (+{len(failures) - 3})" if len(failures) > 3 else ""
    have = "has" if len(failures) == 1 else "have"
    ways = "; ".join(dict.fromkeys(_way_out(f) for f in failures))
    return f"{what}, but {names}{more} {have} none or wrong ones. {ways[0].upper()}{ways[1:]}."


def _way_out(failure: Unsupported) -> str:
    """Return what the user can do about one failing module."""
    if failure.reason == COMPILED:
        return 'use the model as it was before torch.compile, or estimator="two_point"'
    if "scaled_dot_product" in failure.reason:
        return (
            "run the forward pass under torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or (timm) call "
            "timm.layers.set_fused_attn(False) before creating the model"
        )
    if "batch_norm" in failure.reason or "BatchNorm" in failure.kind:
        return 'use gradient="finite_difference", or normalisation layers in eval mode'
    if failure.reason.startswith(ORDINALS[3]):
        return 'use gradient="finite_difference"'
    return 'use estimator="two_point"'


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile(module)`` made it, or ``module.compile()`` was called."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _first_examples(inputs: Any) -> Any:
    """Cut every tensor with the batch dimension of the first one down to NUM_EXAMPLES."""
    batch = next((t.shape[0] for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.ndim), 0)
    return tree_map(lambda t: t[:NUM_EXAMPLES] if isinstance(t, Tensor) and t.ndim and len(t) == batch else t, inputs)


def _recorded_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return what every module receives in its first call during ``model(*args, **kwargs)``: copies, by module name.

    A copy requires gradients where the original did: nothing else is a path for derivatives with respect to weights.
    """
    recorded: dict[str, Any] = {}

    def copy(x: Any) -> Any:
        return x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x

    def record(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorded.setdefault(name, tree_map(copy, (args, kwargs)))

    handles = [
        module.register_forward_pre_hook(functools.partial(record, name), with_kwargs=True)
        for name, module in model.named_modules()
    ]
    try:
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return recorded


def _failures(model: nn.Module, recorded: dict[str, Any], order: int) -> list[Unsupported]:
    """Test every recorded module of which no part fails, children first."""
    failures: list[Unsupported] = []
    modules = dict(model.named_modules())
    for name in sorted(modules, key=lambda name: -_depth(name)):
        module = modules[name]
        has_failed_part = any(f.name.startswith(f"{name}." if name else "") for f in failures)
        if name in recorded and not has_failed_part and type(module) not in TRUSTED:
            reason = _failure(_Scalar(module, recorded[name], name), order)
            if reason:
                failures.append(Unsupported(name or "(model)", type(module).__name__, reason))
    place = {name or "(model)": i for i, name in enumerate(modules)}
    return sorted(failures, key=lambda f: place[f.name])


def _depth(name: str) -> int:
    return name.count(".") + 1 if name else 0


def _failure(phi: "_Scalar", order: int) -> str | None:
    """Return why the derivatives of ``phi`` fail up to ``order``, or None."""
    try:
        leaves = phi.leaves(None)
        phi(leaves)
    except Exception:  # whatever it raises, it cannot be run by itself on these inputs: nothing to say about it
        return None
    try:
        _derivative(phi, leaves, phi.directions(leaves)[: order - 1])
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return _shortened(str(error))
    for n, relative in enumerate(_slope_errors(phi, order), start=2):
        if relative > TOLERANCE:
            return f"{ORDINALS[n]} derivative silently wrong ({100 * relative:.2g} %)"
    return None


def _slope_errors(phi: "_Scalar", order: int) -> list[float]:
    """Return the relative errors of (1) for n = 2, …, order in float64; 0 where two steps disagree: nothing can be said."""
    errors = []
    try:
        with _no_autocast():
            leaves = phi.leaves(torch.float64)
            directions = phi.directions(leaves)
            exact = [_derivative(phi, leaves, directions[:k]) for k in range(order)]  # D_1, ..., D_order
            for k in range(1, order):
                slopes = []
                for h in STEPS:
                    upper = _derivative(phi, _moved(leaves, directions[k - 1], +h), directions[: k - 1])
                    lower = _derivative(phi, _moved(leaves, directions[k - 1], -h), directions[: k - 1])
                    slopes.append((upper - lower) / (2 * h))
                # In units of θ all D_n are comparable: one far below the last counts as zero.
                scale = max(float(exact[k].norm()), float(slopes[1].norm()), 1e-4 * float(exact[k - 1].norm()), 1e-30)
                error, doubt = float((exact[k] - slopes[1]).norm()), float((slopes[0] - slopes[1]).norm())
                errors.append(error / scale if doubt < 0.1 * error else 0.0)
    except (RuntimeError, TypeError):  # not made for float64
        return errors
    return errors


def _derivative(
    phi: Callable[[Sequence[Tensor]], Tensor], leaves: list[Tensor], directions: Sequence[Sequence[Tensor]]
) -> Tensor:
    """Return D_n(θ) for n − 1 directions, flat; zeros where φ does not depend on a leaf."""
    scalar = phi(leaves)
    for direction in directions:
        if not scalar.requires_grad:
            break
        gradients = torch.autograd.grad(scalar, leaves, create_graph=True, materialize_grads=True)
        scalar = torch.stack([wide((g * u).sum()) for g, u in zip(gradients, direction, strict=True)]).sum()
    if not scalar.requires_grad:
        return torch.zeros(sum(t.numel() for t in leaves), dtype=scalar.dtype, device=scalar.device)
    gradients = torch.autograd.grad(scalar, leaves, materialize_grads=True)
    return torch.cat([wide(g.detach()).flatten() for g in gradients])


class _Scalar:
    """φ(θ) = Σ w·sin(outputs) of one module on its recorded inputs, w random: a scalar with all its derivatives.

    Parameters, buffers and inputs are handed to the module as copies; the module itself is not changed.
    """

    def __init__(self, module: nn.Module, inputs: Any, name: str) -> None:
        self.module, self.name = module, name
        self.flat, self.structure = tree_flatten(inputs)
        self.paths = [x for x in self.flat if isinstance(x, Tensor) and x.requires_grad]
        own = module.named_parameters(recurse=not self.paths)
        self.weights = {n: p for n, p in own if p.requires_grad and p.is_floating_point()}
        self.others = {n: t for n, t in [*module.named_parameters(), *module.named_buffers()] if n not in self.weights}
        tensors = [*self.weights.values(), *self.paths, torch.zeros(())]
        self.device = tensors[0].device
        self.states = random_state(self.device)

    def leaves(self, dtype: torch.dtype | None) -> list[Tensor]:
        """Return θ, moved by JITTER off the recorded point, in ``dtype`` (None: each in its own)."""
        recorded = [*self.weights.values(), *self.paths]
        moved = [t.detach() + JITTER * u for t, u in zip(recorded, self._noise(recorded, "jitter"), strict=True)]
        return [t.to(dtype or t.dtype).requires_grad_() for t in moved]

    def directions(self, leaves: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return u₁ and u₂, of the size of θ."""
        return [self._noise(leaves, which) for which in ("first", "second")]

    def __call__(self, leaves: Sequence[Tensor]) -> Tensor:
        dtype = torch.float64 if leaves and all(t.dtype == torch.float64 for t in leaves) else None
        inputs = iter(leaves[len(self.weights) :])
        flat = [
            x if not isinstance(x, Tensor) else (next(inputs) if x.requires_grad else _cast(x, dtype)).clone()
            for x in self.flat
        ]
        args, kwargs = tree_unflatten(flat, self.structure)
        tensors = {n: _cast(t.detach(), dtype).clone() for n, t in self.others.items()}
        tensors |= dict(zip(self.weights, leaves, strict=False))
        set_random_state(self.states, self.device)
        outputs = [t for t in tree_leaves(functional_call(self.module, tensors, args, kwargs)) if isinstance(t, Tensor)]
        generator = generator_from("cpu", "differentiability", self.name, "outputs")
        terms = [
            (torch.randn(t.shape, generator=generator).to(t.device) * wide(t).sin()).sum()
            for t in outputs
            if t.is_floating_point()
        ]
        return torch.stack(terms).sum() if terms else torch.zeros(())

    def _noise(self, tensors: Sequence[Tensor], which: str) -> list[Tensor]:
        """Return normal numbers shaped like ``tensors``, as large as each of them on average (one where it is all zero)."""
        generator = generator_from("cpu", "differentiability", self.name, which)
        noise = []
        for t in tensors:
            size = t.detach().square().mean().sqrt()
            size = torch.where(size > 0, size, torch.ones_like(size))
            noise.append(torch.randn(t.shape, generator=generator).to(t) * size)
        return noise


def _moved(leaves: Sequence[Tensor], direction: Sequence[Tensor], h: float) -> list[Tensor]:
    """Return leaves at θ + h u."""
    return [(t.detach() + h * u).requires_grad_() for t, u in zip(leaves, direction, strict=True)]


def _cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return ``x`` in ``dtype`` if it holds real numbers."""
    return x.to(dtype) if dtype is not None and x.is_floating_point() else x


def _shortened(message: str) -> str:
    """Return the first line of an error message, at most 100 characters of it."""
    line = message.strip().partition("\n")[0]
    return line if len(line) <= 100 else f"{line[:97]}..."


@contextmanager
def _no_autocast() -> Iterator[None]:
    """Switch off autocast on every kind of device."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield
