"""Self-attention with a gated relative position bias, in four backends that agree.

`sdpa` is the fused kernel with the gated bias as its mask; `matmul` spells the formula out; `clipwise` is the same
formula with a backward pass of its own, one clip after the other, for training on a CPU; `flex` gates the bias
inside the kernel of FlexAttention, so that it is never in memory (compiled on CUDA; on a CPU good for comparison only).

Shapes: B clips, N patches, D width, H heads, K features a head, O = 2 N offsets; R time steps, C patches along
frequency, N = R x C.
Source: paper section 3.1 (gated relative position bias of WavLM), released checkpoints.

The released code divides queries by 32 and multiplies the scores again after subtracting their maximum: a range guard
for fp16 without effect on the result. Here the scores are accumulated in fp32 instead (in the fused kernels, or by an
explicit upcast), which serves the same purpose.
"""

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from beats_ray.models.layout import EVERY_PLACE, Layout

AttentionBackend = Literal["auto", "sdpa", "matmul", "clipwise", "flex"]
AttentionInputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor | None, float]
"""Queries, keys and values (B, H, N, K), gates (B, H, N, 1), bias (B or 1, H, N, N), padding (B, N), dropout."""


def relative_bucket(offset: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """Bucket of each key-minus-query offset: exact if near, logarithmic if far, the upper half for positive ones."""
    per_direction = num_buckets // 2
    num_exact = per_direction // 2
    distance = offset.abs()
    ratio = (distance.clamp(min=1).float() / num_exact).log() / math.log(max_distance / num_exact)
    far = num_exact + (ratio * (per_direction - num_exact)).long()
    bucket = torch.where(distance < num_exact, distance, far.clamp(max=per_direction - 1))
    return bucket + (offset > 0).long() * per_direction


class RelativeBias(nn.Embedding):
    """One learned bias for each bucket and head, shared by all layers of a stack."""

    def __init__(self, num_buckets: int, num_heads: int, max_distance: int) -> None:
        super().__init__(num_buckets, num_heads)
        self.max_distance = max_distance

    def forward(self, num_patches: int, position_BN: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Returns the bias (1, H, N, N) of the whole grid, or (B, H, M, M) of the patches at the given grid indices."""
        # Offsets as a cycle of length 2 N: 0, 1, ..., N-1, (unused), -(N-1), ..., -1.
        cycle_O = torch.arange(2 * num_patches, device=self.weight.device)
        offset_O = torch.where(cycle_O < num_patches, cycle_O, cycle_O - 2 * num_patches)
        table_OH = super().forward(relative_bucket(offset_O, self.num_embeddings, self.max_distance))
        if position_BN is None and torch.compiler.is_exporting():  # a Toeplitz view asks for one fixed length
            position_BN = torch.arange(num_patches, device=self.weight.device).unsqueeze(0)
        if position_BN is None:
            return _toeplitz(table_OH.t(), num_patches).unsqueeze(0)
        offset_BNN = position_BN.unsqueeze(1) - position_BN.unsqueeze(2)
        return _look_up(table_OH, torch.where(offset_BNN < 0, offset_BNN + 2 * num_patches, offset_BNN))


class GridRelativeBias(nn.Module):
    """A bias of the distance in time plus one of the distance in frequency, learned for each head; not the paper's.

    By the distance between grid indices, the release's, the highest patch of one time step and the lowest of the next
    are neighbours; here they are a time step and the whole spectrum apart.
    """

    def __init__(self, num_buckets: int, num_heads: int, max_distance: int, patches_per_row: int) -> None:
        super().__init__()
        self.patches_per_row = patches_per_row
        self.time = RelativeBias(num_buckets, num_heads, max_distance)
        self.frequency = RelativeBias(4 * patches_per_row, num_heads, 2 * patches_per_row)  # one bucket a distance

    def forward(self, num_patches: int, position_BN: Tensor | None = None) -> Tensor:
        """Returns the bias (1, H, N, N) of the whole grid, or (B, H, M, M) of the patches at the given grid indices."""
        columns = self.patches_per_row
        rows = num_patches // columns
        if position_BN is not None:
            by_time: Tensor = self.time(rows, position_BN // columns)
            by_frequency: Tensor = self.frequency(columns, position_BN % columns)
            return by_time + by_frequency
        time_HRR, frequency_HCC = self.time(rows)[0], self.frequency(columns)[0]
        bias_HRCRC = time_HRR[:, :, None, :, None] + frequency_HCC[:, None, :, None, :]
        return bias_HRCRC.reshape(1, -1, rows * columns, rows * columns)


def _look_up(table_OH: Tensor, index_BNN: Tensor) -> Tensor:
    if table_OH.device.type == "cpu":  # nine times faster in backward than the embedding
        bias_HX = table_OH.t().contiguous().index_select(1, index_BNN.flatten())
        return bias_HX.view(table_OH.shape[1], *index_BNN.shape).transpose(0, 1).contiguous()
    return F.embedding(index_BNN, table_OH).permute(0, 3, 1, 2).contiguous()  # no atomic sums: deterministic


def _toeplitz(cycle_HO: Tensor, num_patches: int) -> Tensor:
    # Repeating a cycle of length O and reading it in rows of O - 1 moves each row by one: backward needs no scatter.
    heads, length = cycle_HO.shape
    flat = cycle_HO.unsqueeze(1).expand(heads, num_patches, length).reshape(heads, -1)
    rows = flat[:, : num_patches * (length - 1)].view(heads, num_patches, length - 1)
    return rows[..., :num_patches].contiguous()


class GatedSelfAttention(nn.Module):
    """Multi-head self-attention whose relative bias each query scales by a gate of its own."""

    def __init__(self, width: int, num_heads: int, dropout: float, gated: bool, bias: nn.Module) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_width = width // num_heads
        self.dropout = dropout
        self.gated = gated
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.relative_attention_bias = bias
        if gated:
            self.grep_linear = nn.Linear(self.head_width, 8)
            self.grep_a = nn.Parameter(torch.ones(1, num_heads, 1, 1))

    def forward(
        self,
        x: Tensor,
        bias_BHNN: Tensor,
        is_pad_BN: Tensor | None,
        *,
        backend: AttentionBackend = "auto",
        recompute: bool = False,
        layout: Layout = EVERY_PLACE,
    ) -> Tensor:
        """Returns what each of the wanted patches gathers from the real ones.

        x, result: (B, N, D), or as the layout has it. bias_BHNN may have one clip for all. With `recompute`, neither
        the gated bias nor the attention weights are kept for the backward pass. A clip of padding alone attends to
        itself, so that no value is ever NaN.
        """
        q_BND = layout.wanted_grid(self.q_proj(layout.wanted(x)))
        q_BHNK = self._split(q_BND)
        bias_BHNN = bias_BHNN[:, :, layout.first :]
        k_BHNK = self._split(layout.grid(self.k_proj(x)))
        v_BHNK = self._split(layout.grid(self.v_proj(x)))
        gate_BHN1 = self._gate(q_BND) if self.gated else None
        dropout = self.dropout if self.training else 0.0
        if backend == "auto":
            needs_grad = torch.is_grad_enabled() and (q_BHNK.requires_grad or bias_BHNN.requires_grad)
            spelled_out: AttentionBackend = "matmul" if dropout or torch.compiler.is_compiling() else "clipwise"
            backend = spelled_out if needs_grad and x.device.type == "cpu" else "sdpa"
        if backend in ("flex", "clipwise") and dropout:
            raise ValueError(
                f"attention_dropout={self.dropout} is not possible with backend={backend!r}; use 'sdpa', or 0"
            )
        attend = _ATTEND[backend]
        inputs = (q_BHNK, k_BHNK, v_BHNK, gate_BHN1, bias_BHNN, is_pad_BN, dropout)
        if recompute and torch.is_grad_enabled() and backend not in ("clipwise", "flex"):  # which keep nothing large
            out_BHNK = checkpoint(attend, inputs, use_reentrant=False, preserve_rng_state=dropout > 0)
        else:
            out_BHNK = attend(inputs)
        out: Tensor = self.out_proj(layout.from_wanted_grid(out_BHNK.transpose(1, 2).flatten(2)))
        return out

    def _split(self, x_BND: Tensor) -> Tensor:
        return x_BND.unflatten(-1, (self.num_heads, self.head_width)).transpose(1, 2)

    def _gate(self, q_BND: Tensor) -> Tensor:
        q_BNHK = q_BND.unflatten(-1, (self.num_heads, self.head_width))  # heads last but one: nothing is copied
        halves = self.grep_linear(q_BNHK).unflatten(-1, (2, 4)).sum(-1).sigmoid().transpose(1, 2)
        gate_a, gate_b = halves.split(1, dim=-1)
        gate: Tensor = gate_a * (gate_b * self.grep_a - 1.0) + 2.0
        return gate


def _hidden(is_pad_BN: Tensor | None) -> Tensor | None:
    return None if is_pad_BN is None else is_pad_BN & ~is_pad_BN.all(dim=1, keepdim=True)


def _bias_and_padding(gate_BHN1: Tensor | None, bias_BHNN: Tensor, is_pad_BN: Tensor | None) -> Tensor:
    bias_BHNN = bias_BHNN if gate_BHN1 is None else gate_BHN1 * bias_BHNN
    hidden_BN = _hidden(is_pad_BN)
    if hidden_BN is None:
        return bias_BHNN
    return bias_BHNN.masked_fill(hidden_BN[:, None, None, :], torch.finfo(bias_BHNN.dtype).min)


def _attend_sdpa(inputs: AttentionInputs) -> Tensor:
    q_BHNK, k_BHNK, v_BHNK, gate_BHN1, bias_BHNN, is_pad_BN, dropout = inputs
    mask_BHNN = _bias_and_padding(gate_BHN1, bias_BHNN, is_pad_BN).to(q_BHNK.dtype)
    mask_BHNN = mask_BHNN.expand(*q_BHNK.shape[:3], -1)
    return F.scaled_dot_product_attention(q_BHNK, k_BHNK, v_BHNK, attn_mask=mask_BHNN, dropout_p=dropout)


def _attend_flex(inputs: AttentionInputs) -> Tensor:
    q_BHNK, k_BHNK, v_BHNK, gate_BHN1, bias_BHNN, is_pad_BN, _ = inputs
    shared = bias_BHNN.shape[0] == 1
    hidden_BN = _hidden(is_pad_BN)

    def add_bias(score: Tensor, clip: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        bias = bias_BHNN[0, head, query, key] if shared else bias_BHNN[clip, head, query, key]
        if gate_BHN1 is not None:
            bias = bias * gate_BHN1[clip, head, query, 0]
        score = score + bias
        return score if hidden_BN is None else torch.where(hidden_BN[clip, key], -float("inf"), score)

    out: Tensor = _flex_attention(q_BHNK.is_cuda)(q_BHNK, k_BHNK, v_BHNK, score_mod=add_bias)
    return out


@lru_cache(maxsize=2)
def _flex_attention(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if compiled else flex_attention


def _attend_matmul(inputs: AttentionInputs) -> Tensor:
    # The formula spelled out, for where nothing faster can be had: a CPU's fused kernel has no gradient for a bias.
    q_BHNK, k_BHNK, v_BHNK, gate_BHN1, bias_BHNN, is_pad_BN, dropout = inputs
    batch, heads, patches, width = q_BHNK.shape
    with torch.autocast(q_BHNK.device.type, enabled=False):
        mask_BHNN = _bias_and_padding(gate_BHN1, bias_BHNN, is_pad_BN).float()
        scores = torch.baddbmm(
            mask_BHNN.expand(batch, heads, patches, -1).reshape(batch * heads, patches, -1),
            q_BHNK.reshape(batch * heads, patches, width).float(),
            k_BHNK.reshape(batch * heads, -1, width).float().transpose(1, 2),
            alpha=width**-0.5,
        )
        weights = F.dropout(scores.softmax(dim=-1), dropout) if dropout else scores.softmax(dim=-1)
        out = torch.bmm(weights, v_BHNK.reshape(batch * heads, -1, width).float())
        return out.view(batch, heads, patches, width).to(q_BHNK.dtype)


def _attend_clipwise(inputs: AttentionInputs) -> Tensor:
    q_BHNK, k_BHNK, v_BHNK, gate_BHN1, bias_BHNN, is_pad_BN, _ = inputs
    with torch.autocast(q_BHNK.device.type, enabled=False):
        out: Tensor = _Clipwise.apply(v_BHNK, q_BHNK, k_BHNK, gate_BHN1, bias_BHNN, _hidden(is_pad_BN))
        return out


class _Clipwise(torch.autograd.Function):
    """`_attend_matmul` for one clip after the other, in two buffers of a clip's weights (H, N, N), which stay in cache.

    Keeps nothing of that size. The backward pass computes the weights again but not the output, whose product with its
    gradient, summed over features, is all that the softmax's own gradient asks for.
    """

    @staticmethod
    def forward(ctx: Any, v_BHNK: Tensor, *inputs: Tensor | None) -> Tensor:
        """Returns (B, H, N, K) in the queries' type. inputs: those of `_weigh`."""
        q_BHNK, k_BHNK, *_ = inputs
        assert q_BHNK is not None and k_BHNK is not None  # noqa: PT018
        out_BHNK = _like(q_BHNK)
        weights_HNN = _weights_of_a_clip(q_BHNK, k_BHNK)
        for clip in range(len(q_BHNK)):
            _weigh(inputs, clip, weights_HNN)
            out_BHNK[clip] = torch.bmm(weights_HNN, v_BHNK[clip].float())
        ctx.save_for_backward(v_BHNK, out_BHNK, *inputs)
        return out_BHNK

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BHNK: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast("cpu", enabled=False):
            return _clipwise_gradients(ctx.saved_tensors, grad_BHNK, needs_bias=ctx.needs_input_grad[4])


def _clipwise_gradients(saved: Any, grad_BHNK: Tensor, needs_bias: bool) -> tuple[Tensor | None, ...]:
    v_BHNK, out_BHNK, *inputs = saved
    q_BHNK, k_BHNK, gate_BHN1, bias_BHNN, _ = inputs
    scale = q_BHNK.shape[-1] ** -0.5
    dv_BHNK, dq_BHNK, dk_BHNK = _like(v_BHNK), _like(q_BHNK), _like(k_BHNK)
    dgate_BHN1 = None if gate_BHN1 is None else torch.empty_like(gate_BHN1)
    dbias_BHNN = torch.zeros_like(bias_BHNN, dtype=torch.float32) if needs_bias else None
    weights_HNN = _weights_of_a_clip(q_BHNK, k_BHNK)
    dscore_HNN = torch.empty_like(weights_HNN)
    for clip in range(len(q_BHNK)):
        bias_HNN = _weigh(inputs, clip, weights_HNN)
        grad_HNK = grad_BHNK[clip].float()
        dv_BHNK[clip] = torch.bmm(weights_HNN.transpose(1, 2), grad_HNK)
        torch.bmm(grad_HNK, v_BHNK[clip].float().transpose(1, 2), out=dscore_HNN)
        if out_BHNK.dtype == torch.float32:
            mean_HN1 = (grad_HNK * out_BHNK[clip]).sum(-1, keepdim=True)
        else:  # a rounded output is not what the weights give
            mean_HN1 = (dscore_HNN * weights_HNN).sum(-1, keepdim=True)
        dscore_HNN.sub_(mean_HN1).mul_(weights_HNN)
        dq_BHNK[clip] = torch.bmm(dscore_HNN, k_BHNK[clip].float()).mul_(scale)
        dk_BHNK[clip] = torch.bmm(dscore_HNN.transpose(1, 2), q_BHNK[clip].float()).mul_(scale)
        if dgate_BHN1 is not None:
            dgate_BHN1[clip] = torch.mul(dscore_HNN, bias_HNN, out=weights_HNN).sum(-1, keepdim=True)
            dscore_HNN.mul_(gate_BHN1[clip])
        if dbias_BHNN is not None:
            dbias_BHNN[clip if len(bias_BHNN) > 1 else 0] += dscore_HNN
    bias_grad = None if dbias_BHNN is None else dbias_BHNN.to(bias_BHNN.dtype)
    return dv_BHNK, dq_BHNK, dk_BHNK, dgate_BHN1, bias_grad, None


def _weights_of_a_clip(q_BHNK: Tensor, k_BHNK: Tensor) -> Tensor:
    return q_BHNK.new_empty(q_BHNK.shape[1:3] + k_BHNK.shape[2:3], dtype=torch.float32)


def _weigh(inputs: Any, clip: int, weights_HNN: Tensor) -> Tensor:
    """Puts a clip's attention weights into the buffer; returns its bias (H, N, N).

    inputs: queries and keys (B, H, N, K), gates (B, H, N, 1) or None, bias (B or 1, H, N, N), hidden patches (B, N) or
    None.
    """
    q_BHNK, k_BHNK, gate_BHN1, bias_BHNN, hidden_BN = inputs
    bias_HNN = bias_BHNN[clip if len(bias_BHNN) > 1 else 0]
    if gate_BHN1 is None:
        weights_HNN.copy_(bias_HNN)
    else:
        torch.mul(gate_BHN1[clip].float(), bias_HNN.float(), out=weights_HNN)
    if hidden_BN is not None:
        weights_HNN.masked_fill_(hidden_BN[clip], torch.finfo(weights_HNN.dtype).min)
    scale = q_BHNK.shape[-1] ** -0.5
    weights_HNN.baddbmm_(q_BHNK[clip].float(), k_BHNK[clip].float().transpose(1, 2), alpha=scale)
    torch.softmax(weights_HNN, dim=-1, out=weights_HNN)
    return bias_HNN


def _like(x_BHNK: Tensor) -> Tensor:
    """Empty, of this shape, its memory in the order (B, N, H, K): joining heads copies nothing."""
    return torch.empty_like(x_BHNK.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


_ATTEND: Mapping[str, Callable[[AttentionInputs], Tensor]] = {
    "sdpa": _attend_sdpa, "matmul": _attend_matmul, "clipwise": _attend_clipwise, "flex": _attend_flex,
}  # fmt: skip
