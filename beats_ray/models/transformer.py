"""The Transformer stack that encoder, label predictor and teacher estimator share.

Shapes: B clips, N patches, D width, H heads; F frequencies, G groups of C input and O output channels, K taps.
Source: paper section 3.1; DeepNorm (arXiv 2203.00555).
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from beats_ray.models.attention import AttentionBackend, GatedSelfAttention, GridRelativeBias, RelativeBias
from beats_ray.models.config import EncoderConfig
from beats_ray.models.layout import EVERY_PLACE, PACKED_BELOW, Layout, PackedLayout, PaddedLayout, count_real
from beats_ray.models.recompute import gelu_again, norm_again
from beats_ray.models.spectral import POSITION_CONVOLUTION, SPECTRAL_CLIPS, transform_length


class TransformerLayer(nn.Module):
    """Self-attention and a feed-forward block, post-norm with DeepNorm's residual scale, or pre-norm."""

    def __init__(self, config: EncoderConfig, bias: nn.Module) -> None:
        super().__init__()
        self.pre_norm = config.pre_norm
        self.dropout = config.dropout
        self.activation_dropout = config.activation_dropout
        self.residual_scale = (2.0 * config.num_layers) ** 0.25 if config.deep_norm else 1.0
        self.self_attn = GatedSelfAttention(
            config.width, config.num_heads, config.attention_dropout, config.gated_relative_bias, bias
        )
        self.self_attn_layer_norm = nn.LayerNorm(config.width)
        self.fc1 = nn.Linear(config.width, config.ffn_width)
        self.fc2 = nn.Linear(config.ffn_width, config.width)
        self.final_layer_norm = nn.LayerNorm(config.width)

    def forward(
        self,
        x: Tensor,
        bias_BHNN: Tensor,
        is_pad_BN: Tensor | None,
        *,
        backend: AttentionBackend = "auto",
        recompute: bool = False,
        layout: Layout = EVERY_PLACE,
        norm_before: nn.LayerNorm | None = None,
    ) -> Tensor:
        """Returns the layer's output for the wanted patches; padding is never attended to.

        x, result: (B, N, D), or as the layout has it. norm_before: the norm whose output x is, if it is one's.
        """
        residual = layout.wanted(x)
        if self.pre_norm:
            x, norm_before = self.self_attn_layer_norm(x), self.self_attn_layer_norm
        # As attention clip by clip, norms again are for a CPU: reading and writing is what a GPU's time goes by.
        norms_again = recompute and backend in ("auto", "clipwise") and x.device.type == "cpu"
        options: Any = {"backend": backend, "recompute": recompute, "layout": layout}
        with norm_again(x, norm_before if norms_again else None):
            attended = self._drop(self.self_attn(x, bias_BHNN, is_pad_BN, **options))
        if self.pre_norm:
            x = residual + attended
            normed = self.final_layer_norm(x)
            return x + self._feed_forward(normed, self.final_layer_norm if norms_again else None, recompute)
        x = self.self_attn_layer_norm(torch.add(attended, residual, alpha=self.residual_scale))
        fed = self._feed_forward(x, self.self_attn_layer_norm if norms_again else None, recompute)
        out: Tensor = self.final_layer_norm(torch.add(fed, x, alpha=self.residual_scale))
        return out

    def _feed_forward(self, x: Tensor, norm_before: nn.LayerNorm | None, recompute: bool) -> Tensor:
        with norm_again(x, norm_before):
            hidden = F.gelu(self.fc1(x))
        if self.training and self.activation_dropout:
            hidden = F.dropout(hidden, self.activation_dropout)
        with gelu_again(hidden) if recompute else nullcontext():
            out = self.fc2(hidden)
        return self._drop(out)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training and self.dropout else x


class TransformerStack(nn.Module):
    """Layers that share one relative bias, computed once a forward pass."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.layer_drop = config.layer_drop
        self.attention_backend: AttentionBackend = "auto"
        self.checkpoint_layers = False
        """Whether the layers' activations are recomputed in the backward pass instead of kept."""
        self.recompute = True  # nothing of the size (B, H, N, N) is kept for the backward pass
        """Whether attention weights, gated bias, GELU and, on a CPU, norms are recomputed in the backward pass."""
        self.packed_below = PACKED_BELOW
        """Padding is left out of the layers where less than this share of the patches is real; 0: never."""
        sizes = (config.relative_buckets, config.num_heads, config.relative_max_distance)
        bias: nn.Module = RelativeBias(*sizes)
        if config.relative_bias_2d:
            bias = GridRelativeBias(*sizes, config.patches_per_row)
        self.layers = nn.ModuleList(TransformerLayer(config, bias) for _ in range(config.num_layers))
        initialise_stack(self, config)

    def relative_bias(self, num_patches: int, position_BN: Tensor | None = None) -> Tensor:
        """The bias of the whole grid (1, H, N, N), or of the patches at `position_BN` (B, H, M, M)."""
        first = self.layers[0]
        assert isinstance(first, TransformerLayer)
        bias: Tensor = first.self_attn.relative_attention_bias(num_patches, position_BN)
        return bias

    def run_layers(
        self,
        x_BND: Tensor,
        bias_BHNN: Tensor,
        is_pad_BN: Tensor | None,
        num_layers: int | None = None,
        *,
        first_wanted: int = 0,
        every_layer: bool = False,
        num_real: int | None = None,
        num_wanted: int | None = None,
        zero_padding: bool = True,
    ) -> list[Tensor]:
        """Returns the output of the last of the first `num_layers` layers alone, or the input and that of each layer.

        The last output has only the patches from `first_wanted` on, which saves work for the others.
        num_real, num_wanted: how many patches are no padding, in all and from `first_wanted` on, where the host knows
        it; see `count_real`. Where it does not, padding goes through the layers.
        zero_padding: what comes out at padding means nothing, and may be zeros.
        """
        clips = x_BND.shape[0]
        if is_pad_BN is not None:
            num_real = count_real(is_pad_BN, num_real)
            if num_real == is_pad_BN.numel():  # a mask that hides nothing costs time in every layer
                is_pad_BN = None
        to_leave_out_BN = is_pad_BN if zero_padding else None
        layout, last_layout = self._layouts(to_leave_out_BN, first_wanted, num_real, num_wanted)
        x = layout.pack(x_BND)
        checkpointed = self.checkpoint_layers and torch.is_grad_enabled()
        layers = list(self.layers)[:num_layers]
        outputs = [x_BND] if every_layer or not layers else []
        norm_before: Any = None
        for number, layer in enumerate(layers, start=1):
            if number == len(layers):
                layout = last_layout
            options: Any = {"backend": self.attention_backend, "layout": layout}
            if checkpointed:
                new = checkpoint(layer, x, bias_BHNN, is_pad_BN, use_reentrant=False, **options)
            else:
                options |= {"recompute": self.recompute, "norm_before": norm_before}
                new = layer(x, bias_BHNN, is_pad_BN, **options)
            norm_before = layer.final_layer_norm
            if self.training and self.layer_drop:
                # Drawn for each clip and applied to the result: every worker runs every layer, as ZeRO-3 requires.
                keep_B = torch.rand(clips, device=x.device) >= self.layer_drop
                new = torch.where(layout.of_clips(keep_B), new, layout.wanted(x))
            x = new
            if every_layer or number == len(layers):
                outputs.append(layout.wanted_grid(x))
        return outputs

    def _layouts(
        self, is_pad_BN: Tensor | None, first_wanted: int, num_real: int | None, num_wanted: int | None
    ) -> tuple[Layout, Layout]:
        """Those of all layers but the last, and of the last."""
        padded = EVERY_PLACE, PaddedLayout(first_wanted)
        if is_pad_BN is None:
            return padded
        num_wanted = count_real(is_pad_BN[:, first_wanted:], num_wanted) if first_wanted else num_real
        if num_real is None or num_wanted is None or not 0 < num_real < self.packed_below * is_pad_BN.numel():
            return padded
        packed = PackedLayout.of(is_pad_BN, num_real)
        return packed, packed.from_place(first_wanted, num_wanted) if first_wanted else packed

    def use(self, attention_backend: AttentionBackend | None = None, checkpoint_layers: bool | None = None) -> Self:
        """Sets how the stack computes, not what it computes."""
        if attention_backend is not None:
            self.attention_backend = attention_backend
        if checkpoint_layers is not None:
            self.checkpoint_layers = checkpoint_layers
        return self


def pack_below(module: nn.Module, share: float) -> None:
    """Sets `packed_below` of all stacks of a module."""
    for stack in stacks_of(module):
        stack.packed_below = share


def stacks_of(module: nn.Module) -> list[TransformerStack]:
    """All stacks in a module, such as those of an encoder and a label predictor."""
    return [one for one in module.modules() if isinstance(one, TransformerStack)]


def initialise_stack(stack: nn.Module, config: EncoderConfig) -> None:
    """Initialises like the release: normal with deviation 0.02, and DeepNorm's Xavier gains where it is on."""
    for module in stack.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    small_gain = (8.0 * config.num_layers) ** -0.25
    seen_bias = None
    for layer in stack.modules():
        if not isinstance(layer, TransformerLayer):
            continue
        attention = layer.self_attn
        if attention.relative_attention_bias is not seen_bias:
            seen_bias = attention.relative_attention_bias
            for table in seen_bias.parameters():
                nn.init.normal_(table, std=0.02)
        if config.deep_norm:
            for linear in (attention.q_proj, attention.k_proj):
                nn.init.xavier_normal_(linear.weight, gain=1.0)
            for linear in (attention.v_proj, attention.out_proj, layer.fc1, layer.fc2):
                nn.init.xavier_normal_(linear.weight, gain=small_gain)


class PositionConv(nn.Module):
    """Grouped convolution along the patch sequence with weight norm: the convolutional position embedding.

    The parameters are the released ones: `weight_v` with one norm `weight_g` for each tap, and `bias`.
    """

    def __init__(self, width: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.groups = groups
        self.spectral_clips = SPECTRAL_CLIPS
        self.bias = nn.Parameter(torch.zeros(width))
        self.weight_g = nn.Parameter(torch.empty(1, 1, kernel))
        self.weight_v = nn.Parameter(torch.empty(width, width // groups, kernel))
        nn.init.normal_(self.weight_v, std=math.sqrt(4.0 / (kernel * width)))
        with torch.no_grad():
            self.weight_g.copy_(self.weight_v.norm(dim=(0, 1), keepdim=True))

    def forward(self, x_BND: Tensor) -> Tensor:
        """Returns the position embedding of every grid place; outside the grid counts as zeros."""
        weight = torch._weight_norm(self.weight_v, self.weight_g, 2)
        if not torch.compiler.is_exporting() and len(x_BND) >= self.spectral_clips:
            return F.gelu(_SpectralConvolution.apply(x_BND, weight, self.groups) + self.bias)
        convolve = self.convolve_on_cpu if x_BND.device.type == "cpu" else self.convolve
        out_BDN = convolve(x_BND.transpose(1, 2), weight)
        # An even kernel yields one place too many: the last one goes, as in the release.
        return F.gelu(out_BDN[..., : x_BND.shape[1]]).transpose(1, 2)

    def convolve(self, x_BDN: Tensor, weight_DCK: Tensor) -> Tensor:
        """Returns the convolution, tap by tap, one place longer than the sequence where the kernel is even."""
        return F.conv1d(x_BDN, weight_DCK, self.bias, padding=self.kernel // 2, groups=self.groups)

    def convolve_on_cpu(self, x_BDN: Tensor, weight_DCK: Tensor) -> Tensor:
        """The same in fp32: oneDNN's bf16 kernel for AMX sums wrongly in groups of 8 channels (PyTorch 2.11)."""
        bias = self.bias.float()
        with torch.autocast("cpu", enabled=False):
            out_BDN = F.conv1d(x_BDN.float(), weight_DCK.float(), bias, padding=self.kernel // 2, groups=self.groups)
        return out_BDN.to(x_BDN.dtype)


class _SpectralConvolution(torch.autograd.Function):
    """The grouped convolution of a sequence with zeros around it as a product of Fourier transforms, in fp32.

    Each group is a small matrix product for each frequency: for the 128 taps of the base encoder a tenth of the
    operations or less. The kernel's spectrum, far larger than the kernel, is computed again for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x_BND: Tensor, weight_DCK: Tensor, groups: int) -> Tensor:
        """Returns (B, N, D); weight_DCK has C channels in a group and K taps, that of the place itself at K // 2."""
        with _annotated():
            patches, before = x_BND.shape[1], weight_DCK.shape[2] // 2
            length = transform_length(patches, weight_DCK.shape[2])
            x_FGBC = _spectrum(F.pad(x_BND, (0, 0, before, 0)), length, groups)
            ctx.save_for_backward(x_FGBC, weight_DCK)
            ctx.length, ctx.patches, ctx.groups, ctx.dtype = length, patches, groups, x_BND.dtype
            weight_FGOC = _kernel_spectrum(weight_DCK, length, groups)
            return _sequence(x_FGBC @ weight_FGOC.mH, length)[:, :patches].to(x_BND.dtype)

    @staticmethod
    def backward(ctx: Any, grad_BND: Tensor) -> tuple[Tensor, Tensor, None]:
        with _annotated():
            x_FGBC, weight_DCK = ctx.saved_tensors
            taps, length = weight_DCK.shape[2], ctx.length
            grad_FGBO = _spectrum(grad_BND, length, ctx.groups)
            weight_FGOC = _kernel_spectrum(weight_DCK, length, ctx.groups)
            x_grad = _sequence(grad_FGBO @ weight_FGOC, length)[:, taps // 2 : taps // 2 + ctx.patches]
            kernel_grad_FGOC = grad_FGBO.mH @ x_FGBC
            weight_grad = torch.fft.irfft(kernel_grad_FGOC.permute(1, 2, 3, 0), n=length)[..., :taps].flatten(0, 1)
            return x_grad.to(ctx.dtype), weight_grad.to(weight_DCK.dtype), None


def _annotated() -> AbstractContextManager[object]:
    """For profiles: a product of spectra looks like any other."""
    return nullcontext() if torch.compiler.is_compiling() else torch.profiler.record_function(POSITION_CONVOLUTION)


def _spectrum(x_BND: Tensor, length: int, groups: int) -> Tensor:
    """Frequencies (F, G, B, C) of sequences that are continued with zeros."""
    return torch.fft.rfft(x_BND.float(), n=length, dim=1).unflatten(2, (groups, -1)).permute(1, 2, 0, 3)


def _sequence(x_FGBC: Tensor, length: int) -> Tensor:
    """The sequences (B, N, D) of these frequencies."""
    return torch.fft.irfft(x_FGBC.permute(2, 0, 1, 3).flatten(2), n=length, dim=1)


def _kernel_spectrum(weight_DCK: Tensor, length: int, groups: int) -> Tensor:
    """Frequencies (F, G, O, C) of the taps."""
    return torch.fft.rfft(weight_DCK.float().unflatten(0, (groups, -1)), n=length).permute(3, 0, 1, 2)
