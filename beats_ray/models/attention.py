"""Self-attention with a gated relative position bias, in three backends that agree.

`sdpa` is the fused kernel with the gated bias as its mask; `matmul` spells the formula out; `flex` gates the bias
inside the kernel of FlexAttention, so that it is never in memory (compiled on CUDA; on a CPU good for comparison only).

Shapes: B clips, N patches, D width, H heads, K features a head, O = 2 N offsets; R time steps, C patches along
frequency, N = R x C.
Source: paper section 3.1 (gated relative position bias of WavLM), released checkpoints.

The released code divides queries by 32 and multiplies the scores again after subtracting their maximum: a range guard
for fp16 without effect on the result. Here the scores are accumulated in fp32 instead (in the fused kernels, or by an
explicit upcast), which serves the same purpose.
"""

import math
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

AttentionBackend = Literal["auto", "sdpa", "matmul", "flex"]
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
        x_BND: Tensor,
        bias_BHNN: Tensor,
        is_pad_BN: Tensor | None,
        *,
        backend: AttentionBackend = "auto",
        recompute: bool = False,
        first_query: int = 0,
    ) -> Tensor:
        """Returns what each patch from `first_query` on gathers from the real patches.

        bias_BHNN may have one clip for all. With `recompute`, neither the gated bias nor the attention weights are
        kept for the backward pass. A clip of padding alone attends to itself, so that no value is ever NaN.
        """
        q_BND = self.q_proj(x_BND[:, first_query:])
        q_BHNK = self._split(q_BND)
        bias_BHNN = bias_BHNN[:, :, first_query:]
        k_BHNK = self._split(self.k_proj(x_BND))
        v_BHNK = self._split(self.v_proj(x_BND))
        gate_BHN1 = self._gate(q_BND) if self.gated else None
        if backend == "auto":
            needs_grad = torch.is_grad_enabled() and (q_BHNK.requires_grad or bias_BHNN.requires_grad)
            backend = "matmul" if needs_grad and x_BND.device.type == "cpu" else "sdpa"
        dropout = self.dropout if self.training else 0.0
        if backend == "flex" and dropout:
            raise ValueError(f"attention_dropout={self.dropout} is not possible with backend='flex'; use 'sdpa', or 0")
        attend = {"matmul": _attend_matmul, "flex": _attend_flex}.get(backend, _attend_sdpa)
        inputs = (q_BHNK, k_BHNK, v_BHNK, gate_BHN1, bias_BHNN, is_pad_BN, dropout)
        if recompute and torch.is_grad_enabled():
            out_BHNK = checkpoint(attend, inputs, use_reentrant=False, preserve_rng_state=dropout > 0)
        else:
            out_BHNK = attend(inputs)
        out: Tensor = self.out_proj(out_BHNK.transpose(1, 2).flatten(2))
        return out

    def _split(self, x_BND: Tensor) -> Tensor:
        return x_BND.unflatten(-1, (self.num_heads, self.head_width)).transpose(1, 2)

    def _gate(self, q_BND: Tensor) -> Tensor:
        q_BNHK = q_BND.unflatten(-1, (self.num_heads, self.head_width))  # heads last but one: nothing is copied
        halves = self.grep_linear(q_BNHK).unflatten(-1, (2, 4)).sum(-1).sigmoid().transpose(1, 2)
        gate_a, gate_b = halves.split(1, dim=-1)
        gate: Tensor = gate_a * (gate_b * self.grep_a - 1.0) + 2.0
        return gate


def _bias_and_padding(gate_BHN1: Tensor | None, bias_BHNN: Tensor, is_pad_BN: Tensor | None) -> Tensor:
    bias_BHNN = bias_BHNN if gate_BHN1 is None else gate_BHN1 * bias_BHNN
    if is_pad_BN is None:
        return bias_BHNN
    hidden_BN = is_pad_BN & ~is_pad_BN.all(dim=1, keepdim=True)
    return bias_BHNN.masked_fill(hidden_BN[:, None, None, :], torch.finfo(bias_BHNN.dtype).min)


def _attend_sdpa(inputs: AttentionInputs) -> Tensor:
    q_BHNK, k_BHNK, v_BHNK, gate_BHN1, bias_BHNN, is_pad_BN, dropout = inputs
    mask_BHNN = _bias_and_padding(gate_BHN1, bias_BHNN, is_pad_BN).to(q_BHNK.dtype)
    mask_BHNN = mask_BHNN.expand(*q_BHNK.shape[:3], -1)
    return F.scaled_dot_product_attention(q_BHNK, k_BHNK, v_BHNK, attn_mask=mask_BHNN, dropout_p=dropout)


def _attend_flex(inputs: AttentionInputs) -> Tensor:
    q_BHNK, k_BHNK, v_BHNK, gate_BHN1, bias_BHNN, is_pad_BN, _ = inputs
    shared = bias_BHNN.shape[0] == 1
    hidden_BN = None if is_pad_BN is None else is_pad_BN & ~is_pad_BN.all(dim=1, keepdim=True)

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
    # The formula spelled out; also the fastest in training on the CPU, whose fused kernel has no gradient for a bias.
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
