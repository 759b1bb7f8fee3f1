"""Which modules of a model autograd cannot differentiate twice or three times: why a curvature pass failed.

Each module is tried by itself on the inputs it received in one forward pass, children before parents, so that
the smallest one at fault is named: a smooth scalar of its outputs is differentiated in its own trainable
parameters and in those inputs through which gradients flow (where there are none, as for images, in the
parameters of all its parts). Derivatives that are wrong without a word: see ``hvp``.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from wcitrain.params import unwrapped
from wcitrain.preserve import undisturbed

NUM_EXAMPLES = 4  # with two, train-mode BatchNorm over single values has hardly any derivative
COMPILED = "torch.compile refuses double backward"
TWO_POINT = 'estimator="two_point", which is right for smooth networks only'
WAYS_OUT = {  # what the user can do, by what "class: reason" contains; the first that fits
    COMPILED: f"use the model as it was before torch.compile, or {TWO_POINT}",
    "scaled_dot_product": "run the forward pass under torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or "
    "(timm) call timm.layers.set_fused_attn(False) before creating the model",
    "batch_norm": 'use gradient="finite_difference", or normalisation layers in eval mode',
    "": f"use {TWO_POINT}",
}


class Unsupported(NamedTuple):
    """A module without the derivatives asked for: its name, its class, and what autograd says of it."""

    name: str
    kind: str
    reason: str


def failing_modules(
    model: nn.Module, forward: Callable[[], object], *, order: Literal[2, 3] = 2
) -> list[Unsupported]:
    """Return the smallest modules whose derivatives of that order autograd refuses.

    They are tried inside the call of the model that ``forward`` makes, under whatever surrounds it (autocast,
    ``sdpa_kernel``), on four examples of its batch. Modes, buffers, random state, weights and ``.grad`` are
    left alone. Cost: about ten passes of four examples.

    Args:
        model: Any module; wrappers (DDP) are looked through. Itself it is named ``"(model)"``.
        forward: Calls the model on one batch, in the mode that matters.
        order: 2 for Hessian-vector products, 3 for their gradient.
    """
    compiled = [(name or "(model)", type(m).__name__) for name, m in model.named_modules() if is_compiled(m)]
    if compiled:
        return [Unsupported(name, kind, COMPILED) for name, kind in compiled]
    model = unwrapped(model)
    inputs: dict[str, Any] = {}
    failures: list[Unsupported] = []

    def record(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.setdefault(name, tree_map(_copied, (args, kwargs)))

    def try_all(_: nn.Module, *inputs_of_model: Any) -> None:
        first.remove()  # the first call only, and not those made here
        with ExitStack() as hooks, torch.enable_grad():
            for name, module in model.named_modules():
                hooks.enter_context(module.register_forward_pre_hook(partial(record, name), with_kwargs=True))
            args, kwargs = _first_examples(inputs_of_model)
            model(*args, **kwargs)
        for name, module in reversed(list(model.named_modules())):
            has_failed_part = any(f.name.startswith(f"{name}." if name else "") for f in failures)
            reason = None if has_failed_part or name not in inputs else _refusal(module, inputs[name], order)
            if reason:
                failures.append(Unsupported(name or "(model)", type(module).__name__, reason))

    first = model.register_forward_pre_hook(try_all, with_kwargs=True)
    with undisturbed(model, training=None), first:
        forward()
    return failures[::-1]


def _first_examples(inputs: Any) -> Any:
    """Return the inputs with every tensor of the first one's batch size cut to `NUM_EXAMPLES`."""
    size = next((len(t) for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.ndim), 0)

    def cut(t: Any) -> Any:
        return t[:NUM_EXAMPLES] if isinstance(t, Tensor) and t.ndim and len(t) == size else t

    return tree_map(cut, inputs)


def _copied(x: Any) -> Any:
    """Return a copy that requires gradients where the original did."""
    return x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


def _refusal(module: nn.Module, inputs: Any, order: int) -> str | None:
    """Return why the derivatives of a scalar of the module's outputs fail, or None."""
    paths = [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.requires_grad]
    leaves = [*paths, *(p for p in module.parameters(recurse=not paths) if p.requires_grad)]
    # Copies, since the module may work in place.
    args, kwargs = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs)
    try:
        outputs = [z for z in tree_leaves(module(*args, **kwargs)) if isinstance(z, Tensor)]
    except Exception:  # whatever it raises, it cannot be run by itself on these inputs: nothing to say
        return None
    scalar: Any = sum(z.sin().sum() for z in outputs if z.is_floating_point())
    try:
        for _ in range(order):
            if not getattr(scalar, "requires_grad", False):
                return None
            gradients = torch.autograd.grad(scalar, leaves, create_graph=True, materialize_grads=True)
            scalar = sum(g.square().sum() for g in gradients)
    except torch.OutOfMemoryError:  # says nothing about the derivatives
        return None
    except RuntimeError as error:
        line = str(error).strip().partition("\n")[0]
        return line if len(line) <= 100 else f"{line[:97]}..."
    return None


def explain(failures: Sequence[Unsupported], what: str) -> str:
    """Return one message for the user: ``what`` is needed, up to three modules that cannot, the ways out.

    >>> text = explain([Unsupported("act", "Hardsigmoid", "no derivative")], "second derivatives are needed")
    >>> print(text.replace(". ", ".\\n"))
    second derivatives are needed, but act (Hardsigmoid: no derivative) has none.
    Use estimator="two_point", which is right for smooth networks only.
    """
    said = [f"{f.kind}: {f.reason}" for f in failures]
    names = ", ".join(f"{f.name} ({text})" for f, text in zip(failures[:3], said, strict=False))
    more = f" (+{len(failures) - 3})" if len(failures) > 3 else ""
    have = "has" if len(failures) == 1 else "have"
    fitting = [next(way for sign, way in WAYS_OUT.items() if sign in text) for text in said]
    ways = "; ".join(dict.fromkeys(fitting))
    return f"{what}, but {names}{more} {have} none. {ways[0].upper()}{ways[1:]}."


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile(module)`` made it, or ``module.compile()`` was called."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
