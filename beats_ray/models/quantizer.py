"""Cosine vector quantiser whose codebook is a moving average in fp32 buffers, the same on all workers.

Shapes: N vectors of a batch, D code dimensions, V codes.
Source: paper section 3.3.2; the released tokenizers (1024 codes of 256 dimensions, decay 0.99, k-means start).
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from beats_ray.models.config import ModelConfig
from beats_ray.models.fp32_buffers import Float32Buffers


class QuantizerConfig(ModelConfig):
    """Settings of the codebook and of its update."""

    num_codes: int = 1024
    """Codes. Paper: 1024."""
    code_dim: int = 256
    """Dimensions of a code. Paper: 256."""
    ema_decay: float = 0.99
    """Weight of the old code in each update. Paper: 0.99."""
    kmeans_iterations: int = 10
    """Cosine k-means iterations at the start. Release: 10."""
    init_batches: int = 4
    """Training batches that k-means is run on; on each, the codebook is fitted anew to all batches since the start of
    training, or since a restart. Release: 1."""
    restart_below: float = 0.0
    """A code whose moving-average count falls below this takes a vector of the batch; 0 keeps dead codes (paper)."""
    seed: int = 0
    """Seed of k-means' first centres and of restarts."""


class Quantized(NamedTuple):
    """Codes of a batch. Padding enters neither the loss nor the statistics.

    A vector that is no finite number enters the loss, which then is none either, but neither statistics nor codebook.
    """

    vectors_ND: Tensor
    """The chosen codes; the gradient passes straight to the normalised input."""
    labels_N: Tensor
    """Index of the chosen code, int64; -1 at padding and where the vector is no finite number."""
    commitment_sum: Tensor
    """Sum over real vectors of the squared distance between normalised input and code, divided by D (fp32)."""
    counts_V: Tensor
    """How often each code was chosen on this worker (fp32)."""


class CosineQuantizer(Float32Buffers):
    """Replaces each vector by the code at the smallest angle and moves the codes towards the vectors they got."""

    codebook_VD: Tensor
    usage_V: Tensor
    batches_seen: Tensor

    def __init__(self, config: QuantizerConfig | None = None) -> None:
        super().__init__()
        self.config = config or QuantizerConfig()
        self.register_buffer("codebook_VD", torch.zeros(self.config.num_codes, self.config.code_dim))
        self.register_buffer("usage_V", torch.zeros(self.config.num_codes))
        self.register_buffer("batches_seen", torch.zeros((), dtype=torch.int64))
        self._pool: list[Tensor] = []
        self._fitted = False

    def forward(self, vectors_ND: Tensor, is_pad_N: Tensor | None = None) -> Quantized:
        """Quantises in fp32 whatever the input's type. In training mode the codebook is fitted or updated first."""
        with torch.autocast(vectors_ND.device.type, enabled=False):
            unit_ND = F.normalize(vectors_ND.float(), dim=-1)
            is_real_N = torch.ones_like(unit_ND[:, 0], dtype=torch.bool) if is_pad_N is None else ~is_pad_N
            # The codebook moves here, before anybody can look at the loss: one such vector would spoil it for good.
            is_sound_N = is_real_N & unit_ND.isfinite().all(dim=-1)
            fitting = self.training and not self._is_fitted()
            if fitting:
                self._fit(unit_ND.detach()[is_sound_N])
            labels_N = self._nearest(unit_ND.detach())
            counts_V = torch.zeros_like(self.usage_V).index_add_(0, labels_N, is_sound_N.float())
            code_ND = self.codebook_VD[labels_N]
            if self.training and not fitting:
                self._update(unit_ND.detach(), is_sound_N, labels_N, counts_V)
            distance_N = (unit_ND - code_ND).square().mean(dim=-1)
            commitment = torch.where(is_real_N, distance_N, 0.0).sum()
            straight_ND = unit_ND + (code_ND - unit_ND).detach()
        return Quantized(straight_ND, labels_N.masked_fill(~is_sound_N, -1), commitment, counts_V)

    @torch.no_grad()
    def labels(self, vectors_ND: Tensor) -> Tensor:
        """Returns the nearest code of each vector and changes nothing."""
        with torch.autocast(vectors_ND.device.type, enabled=False):
            return self._nearest(F.normalize(vectors_ND.float(), dim=-1))

    def _nearest(self, unit_ND: Tensor) -> Tensor:
        return (unit_ND @ self.codebook_VD.t()).argmax(dim=-1)

    @torch.no_grad()
    def _update(self, unit_ND: Tensor, is_sound_N: Tensor, labels_N: Tensor, counts_V: Tensor) -> None:
        decay = self.config.ema_decay
        sound_ND = torch.where(is_sound_N.unsqueeze(1), unit_ND, 0.0)
        sums_VD = _sum_over_workers(torch.zeros_like(self.codebook_VD).index_add_(0, labels_N, sound_ND))
        all_counts_V = _sum_over_workers(counts_V)
        self.usage_V.mul_(decay).add_(all_counts_V, alpha=1.0 - decay)
        moved_VD = F.normalize(self.codebook_VD * decay + F.normalize(sums_VD, dim=-1) * (1.0 - decay), dim=-1)
        self.codebook_VD.copy_(torch.where((all_counts_V > 0).unsqueeze(1), moved_VD, self.codebook_VD))
        self.batches_seen += 1
        if self.config.restart_below > 0:
            self._restart_dead(unit_ND[is_sound_N])

    @torch.no_grad()
    def _fit(self, unit_ND: Tensor) -> None:
        vectors_ND = _gather_from_workers(unit_ND)
        if len(vectors_ND) == 0:
            return
        self._pool.append(vectors_ND)
        pool_ND = torch.cat(self._pool)
        generator = torch.Generator().manual_seed(self.config.seed)
        codes_VD = cosine_kmeans(pool_ND, self.config.num_codes, self.config.kmeans_iterations, generator)
        self.codebook_VD.copy_(_from_first_worker(codes_VD))
        self.usage_V.copy_(torch.bincount(self._nearest(pool_ND), minlength=self.config.num_codes) / len(self._pool))
        self.batches_seen += 1

    def _is_fitted(self) -> bool:
        # Asking the buffer makes the host wait for the device, so the answer is kept once it is yes.
        if not self._fitted and int(self.batches_seen) >= self.config.init_batches:
            self._fitted = True
            self._pool.clear()
        return self._fitted

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._fitted = False
        self._pool.clear()

    def _restart_dead(self, unit_ND: Tensor) -> None:
        candidates_ND = _gather_from_workers(unit_ND)
        is_dead_V = self.usage_V < self.config.restart_below
        if len(candidates_ND) == 0 or not is_dead_V.any():
            return
        generator = torch.Generator().manual_seed(self.config.seed + int(self.batches_seen))
        pick_V = torch.randint(len(candidates_ND), (self.config.num_codes,), generator=generator)
        fresh_VD = candidates_ND[pick_V.to(candidates_ND.device)]
        self.codebook_VD.copy_(torch.where(is_dead_V.unsqueeze(1), fresh_VD, self.codebook_VD))
        self.usage_V.masked_fill_(is_dead_V, 1.0)


def cosine_kmeans(unit_ND: Tensor, num_codes: int, iterations: int, generator: torch.Generator) -> Tensor:
    """Returns `num_codes` unit vectors fitted by k-means under the angle; a centre without vectors stays where it is.

    With fewer vectors than codes, vectors are drawn again, and equal centres share one label.
    """
    count = len(unit_ND)
    if count >= num_codes:
        start = torch.randperm(count, generator=generator)[:num_codes]
    else:
        start = torch.randint(count, (num_codes,), generator=generator)
    centre_VD = unit_ND[start.to(unit_ND.device)].clone()
    for _ in range(iterations):
        label_N = (unit_ND @ centre_VD.t()).argmax(dim=-1)
        sum_VD = torch.zeros_like(centre_VD).index_add_(0, label_N, unit_ND)
        got_V = torch.bincount(label_N, minlength=num_codes) > 0
        centre_VD = torch.where(got_V.unsqueeze(1), F.normalize(sum_VD, dim=-1), centre_VD)
    return centre_VD


def codebook_usage(counts_V: Tensor) -> tuple[float, float]:
    """Returns (used_fraction, perplexity): codes chosen at least once over all codes, and exp of the entropy of use.

    Perplexity is 1 when one code takes everything and V when all are used alike. Both are 0 for no counts at all.
    """
    total = float(counts_V.sum())
    if total <= 0:
        return 0.0, 0.0
    share_V = counts_V.double() / total
    entropy = -torch.special.xlogy(share_V, share_V).sum()
    return float((counts_V > 0).double().mean()), float(entropy.exp())


def _sum_over_workers(values: Tensor) -> Tensor:
    if not (dist.is_available() and dist.is_initialized()):
        return values
    summed = values.clone()
    dist.all_reduce(summed)
    return summed


def _from_first_worker(values: Tensor) -> Tensor:
    # Sums on a GPU may differ in the last bit from worker to worker; the codebook must not.
    if dist.is_available() and dist.is_initialized():
        dist.broadcast(values, src=0)
    return values


def _gather_from_workers(rows_ND: Tensor) -> Tensor:
    """Returns the rows of all workers in the order of their ranks, the same everywhere."""
    if not (dist.is_available() and dist.is_initialized()):
        return rows_ND
    count = torch.tensor([len(rows_ND)], device=rows_ND.device)
    counts = [torch.zeros_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    longest = max(int(one) for one in counts)
    padded_ND = F.pad(rows_ND, (0, 0, 0, longest - len(rows_ND)))
    parts = [torch.zeros_like(padded_ND) for _ in counts]
    dist.all_gather(parts, padded_ND)
    return torch.cat([part[: int(one)] for part, one in zip(parts, counts, strict=True)])
