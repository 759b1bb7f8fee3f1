"""What Accelerate may wrap the model in, and what would silently be wrong."""

from typing import TYPE_CHECKING

from torch import nn

from wcitrain.curvature.differentiability import is_compiled
from wcitrain.optim.penalty import Penalty

if TYPE_CHECKING:
    from accelerate import Accelerator


def check_attachable(
    accelerator: "Accelerator", model: nn.Module, penalty: Penalty | None, num_micro_batches: int
) -> None:
    """Refuse what the wrapper cannot do right.

    Raises:
        ValueError: fp16 (its scaler skips and rescales steps), a static DDP graph, sharded or DeepSpeed models, a compiled
            bfloat16 model with a curvature penalty, or another number of micro-batches than Accelerate's.
    """
    kind = accelerator.distributed_type.value
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(
            f"attach: got mixed_precision={accelerator.mixed_precision!r}; expected 'no' or 'bf16'. Use bf16."
        )
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise ValueError(f"attach: got distributed type {kind}; expected one process or DistributedDataParallel.")
    if getattr(model, "static_graph", False):
        raise ValueError(
            "attach: got a DDP model with static_graph=True; expected False: extra passes change the graph."
        )
    if (
        any(is_compiled(m) for m in model.modules())
        and accelerator.mixed_precision == "bf16"
        and penalty
        and penalty.measures_curvature
    ):
        raise ValueError(
            "attach: got a compiled bf16 model and a curvature penalty, whose differences need float32 passes that the "
            "compiled graph cannot switch to. Use precision 'no', drop compile, or use WCIPosterior."
        )
    if num_micro_batches not in (1, accelerator.gradient_accumulation_steps):
        raise ValueError(
            f"attach: got an optimizer with num_micro_batches={num_micro_batches} and an accelerator with "
            f"gradient_accumulation_steps={accelerator.gradient_accumulation_steps}; expected the same. Set the latter only."
        )
