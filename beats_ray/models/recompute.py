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
    return _computed_again(output, "GeluBackward0", "_saved_self", F.gelu)


def norm_again(output: Tensor, norm: nn.LayerNorm | None) -> AbstractContextManager[object]:
    """Within the block `output`, of this norm, is not kept; its weights are those of now."""
    if norm is None or norm.weight.shape != norm.normalized_shape:  # ZeRO-3 has put its weights away
        return nullcontext()
    weight, bias, shape, eps = norm.weight.detach().clone(), norm.bias.detach().clone(), norm.normalized_shape, norm.eps
    return _computed_again(
        output,
        "NativeLayerNormBackward0",
        "_saved_input",
        lambda source: F.layer_norm(source, shape, weight, bias, eps),
    )


def _computed_again(
    output: Tensor, operation: str, kept_input: str, function: Callable[[Tensor], Tensor]
) -> AbstractContextManager[object]:
    node = None if torch.compiler.is_compiling() else output.grad_fn
    if node is None or node.name() != operation:
        return nullcontext()
    address = output.data_ptr()

    def pack(kept: Tensor) -> Tensor | torch.Size:
        return kept.shape if kept.data_ptr() == address else kept

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        return kept if isinstance(kept, Tensor) else function(getattr(node, kept_input).detach()).view(kept)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
