"""The layers' Hessian blocks and traces entry by entry, in float64: what the estimators are tested against.

Legend: N examples, C outputs, z [N, C] network outputs, Λ_n = ∂²ℓ/∂z_n² [C, C], J_nl = ∂z_n/∂W_l.

    (H_ll)_i,: = ∂(g_l)_i / ∂W_l,   g_l = ∂L/∂W_l                                                          (1)
    Tr(G_l) = (1/N) Σ_n w_n Tr(J_nlᵀ Λ_n J_nl)                                                             (2)
"""

import copy
from functools import partial

import torch
from timm.layers import BatchNormAct2d, LayerNorm2d
from torch import Tensor, nn

from wcitrain.curvature.loss import as_loss, outputs_of
from wcitrain.params import Layers


def gradients(value, tensors, create_graph=False):
    """Gradients of a number, zero where it does not depend on a tensor; its graph is kept."""
    options = {"retain_graph": True, "create_graph": create_graph, "materialize_grads": True}
    return torch.autograd.grad(value, tensors, **options)


def dense_hessian(loss, layers, create_graph=False) -> dict[str, Tensor]:
    """Every layer's own block H_ll [d_l, d_l] by (1); differentiable with ``create_graph``."""
    sized, blocks = Layers(layers), []
    for tensor, num_parts in zip(sized.tensors, sized.num_parts, strict=True):
        (g,) = gradients(as_loss(loss).total, [tensor], create_graph=True)
        rows = torch.zeros(g.numel(), g.numel()).to(g)
        if g.requires_grad:
            rows = torch.stack([gradients(e, [tensor], create_graph)[0].flatten() for e in g.flatten()])
        for part in torch.arange(g.numel()).chunk(num_parts):
            blocks.append(rows[part][:, part])
    return dict(zip(sized, blocks, strict=True))


def exact_trace(loss, layers, create_graph=False) -> Tensor:
    """Tr(H_ll) [L]."""
    return torch.stack([block.trace() for block in dense_hessian(loss, layers, create_graph).values()])


def exact_gauss_newton_trace(outputs, layers, create_graph=False) -> Tensor:
    """Tr(G_l) [L] of the mean loss by (2), from Λ itself, not from its factors."""
    sized, total = Layers(layers), torch.zeros(len(layers)).double()
    for logits, kind, weight in outputs_of(outputs, "exact_gauss_newton"):
        for z, w in zip(logits, torch.as_tensor(weight, dtype=logits.dtype).expand(len(logits)), strict=True):
            Λ = output_hessian(z if create_graph else z.detach(), kind)
            rows = [gradients(z_c, sized.tensors, create_graph) for z_c in z]
            J = [torch.stack(row) for row in zip(*rows, strict=True)]  # [C, ...] for each tensor
            for c, λ in enumerate(Λ):
                ΛJ = [torch.tensordot(λ, j, 1) for j in J]
                total = total + w * sized.dots([j[c] for j in J], ΛJ) / len(logits)
    return total


def output_hessian(z: Tensor, kind: str) -> Tensor:
    """Λ [C, C] of one kind of loss (the table in ``loss``)."""
    if kind == "cross_entropy":
        p = z.softmax(-1)
        return p.diag() - torch.outer(p, p)
    return torch.diag(z.sigmoid() * (-z).sigmoid() if kind == "bce" else 2 * torch.ones_like(z))


def decomposed(model: nn.Module) -> nn.Module:
    """A copy with norms and attention written out: torch has their third derivatives right (or at all)."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, nn.LayerNorm | nn.modules.batchnorm._BatchNorm):
            module.forward = partial(_normalised, module)
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return twin


def _normalised(norm: nn.Module, x: Tensor) -> Tensor:
    """(x − mean) / sqrt(variance + ε) · weight + bias; over features, or over all but the channels."""
    over_batch = isinstance(norm, nn.modules.batchnorm._BatchNorm)
    channels = 1 if over_batch or isinstance(norm, LayerNorm2d) else x.ndim - 1
    shape = [-1 if dim == channels else 1 for dim in range(x.ndim)]
    if over_batch and not norm.training:
        mean, variance = norm.running_mean.view(shape), norm.running_var.view(shape)
    else:
        dims = [dim for dim in range(x.ndim) if dim != channels] if over_batch else [channels]
        mean = x.mean(dims, keepdim=True)
        variance = (x - mean).square().mean(dims, keepdim=True)
    x = (x - mean) / (variance + norm.eps).sqrt() * norm.weight.view(shape) + norm.bias.view(shape)
    return norm.act(norm.drop(x)) if isinstance(norm, BatchNormAct2d) else x
