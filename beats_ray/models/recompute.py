"""Cheap outputs that are not kept for the backward pass, but computed again from what their own operation keeps.

    hidden = F.gelu(before)
    with gelu_again(hidden):
        out = fc2(hidden)           # would keep `hidden`; GELU keeps `before`

Both do nothing where the output is of another operation (of dropout, say), and while PyTorch compiles, which decides by
itself what it keeps.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def gelu_again(output: Tensor) -> AbstractContextManager[object]:
    """Within the block `output`, of GELU, is not kept."""
    if not _is_of(output, "GeluBackward0"):
        return nullcontext()
    return _computed_again(output, "_saved_self", F.gelu)


def norm_again(output: Tensor, norm: nn.LayerNorm | None) -> AbstractContextManager[object]:
    """Within the block `output`, of this norm, is not kept; its weights are those of now."""
    # Under ZeRO-3, which has put the weights away by now, the output is that of a hook.
    if norm is None or not _is_of(output, "NativeLayerNormBackward0"):
        return nullcontext()
    weight, bias, shape, eps = norm.weight.detach().clone(), norm.bias.detach().clone(), norm.normalized_shape, norm.eps
    return _computed_again(
        output,
        "_saved_input",
        lambda source: F.layer_norm(source, shape, weight, bias, eps),
    )


def _is_of(output: Tensor, operation: str) -> bool:
    return not torch.compiler.is_compiling() and output.grad_fn is not None and output.grad_fn.name() == operation


def _computed_again(
    output: Tensor, kept_input: str, function: Callable[[Tensor], Tensor]
) -> AbstractContextManager[object]:
    node, address = output.grad_fn, output.data_ptr()

    def pack(kept: Tensor) -> Tensor | torch.Size:
        return kept.shape if kept.data_ptr() == address else kept

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        return kept if isinstance(kept, Tensor) else function(getattr(node, kept_input).detach()).view(kept)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
