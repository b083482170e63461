"""Cosine vector quantiser whose codebook is a moving average in fp32 buffers, the same on all workers.

    quantized = quantizer(vectors_ND, is_pad_N)  # for each micro-batch; in training mode it collects statistics
    quantizer.end_step(moved=True)               # once for each optimizer step: moves the codebook by them

Shapes: N vectors of a micro-batch, D code dimensions, V codes.
Source: paper section 3.3.2; the released tokenizers (1024 codes of 256 dimensions, decay 0.99, k-means start).
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from beats_ray.models.config import ModelConfig
from beats_ray.models.fp32_buffers import Float32Buffers

NEAREST_ROWS = 65_536
"""Vectors that are compared with all codes at one time: 256 MiB of scores for 1024 codes."""


class QuantizerConfig(ModelConfig):
    """Settings of the codebook and of its update."""

    num_codes: int = 1024
    """Codes. Paper: 1024."""
    code_dim: int = 256
    """Dimensions of a code. Paper: 256."""
    ema_decay: float = 0.99
    """Weight of the old code in each optimizer step. Paper: 0.99."""
    kmeans_iterations: int = 10
    """Cosine k-means iterations at the start. Release: 10."""
    init_batches: int = 4
    """Global batches that k-means is run on; after each, the codebook is fitted anew to all batches since the start of
    training, or since a restart. Release: 1."""
    restart_below: float = 0.0
    """A code whose moving-average count in a global batch falls below this takes a vector of the batch; 0 keeps dead
    codes (paper)."""
    seed: int = 0
    """Seed of k-means' first centres and of restarts."""


class Quantized(NamedTuple):
    """Codes of a micro-batch. Padding enters neither the loss nor the statistics.

    A vector that is no finite number enters the loss, which then is none either, but neither statistics nor codebook.
    """

    vectors_ND: Tensor
    """The chosen codes; the gradient passes straight to the normalised input. Before the codebook was ever fitted the
    normalised inputs themselves."""
    labels_N: Tensor
    """Index of the chosen code, int64; -1 at padding, where the vector is no finite number, and without a codebook."""
    commitment_sum: Tensor
    """Sum over real vectors of the squared distance between normalised input and code, divided by D (fp32)."""
    counts_V: Tensor
    """How often each code was chosen on this worker (fp32)."""


@dataclass
class _StepStatistics:
    """What the micro-batches of an optimizer step on this worker have seen so far."""

    sums_VD: Tensor
    """Of each code, the sum of the vectors that chose it."""
    counts_V: Tensor
    vectors: list[Tensor] = field(default_factory=list)
    """The vectors themselves, a tensor for each micro-batch, where k-means or restarts need them."""


class CosineQuantizer(Float32Buffers):
    """Replaces each vector by the code at the smallest angle; the codes move towards the vectors that they got.

    They move between optimizer steps, never in one, so that a result does not depend on how a global batch is shared
    out over workers and micro-batches. In the first step of all there are no codes yet, and vectors pass unchanged.
    """

    codebook_VD: Tensor
    usage_V: Tensor
    batches_seen: Tensor

    def __init__(self, config: QuantizerConfig | None = None) -> None:
        super().__init__()
        self.config = config or QuantizerConfig()
        self.register_buffer("codebook_VD", torch.zeros(self.config.num_codes, self.config.code_dim))
        self.register_buffer("usage_V", torch.zeros(self.config.num_codes))
        self.register_buffer("batches_seen", torch.zeros((), dtype=torch.int64))
        self._statistics: _StepStatistics | None = None
        self._pool: list[Tensor] = []
        self._fitted = False

    def forward(self, vectors_ND: Tensor, is_pad_N: Tensor | None = None) -> Quantized:
        """Quantises in fp32 whatever the input's type. In training mode the vectors count in the next `end_step`."""
        with torch.autocast(vectors_ND.device.type, enabled=False):
            unit_ND = F.normalize(vectors_ND.float(), dim=-1)
            is_real_N = torch.ones_like(unit_ND[:, 0], dtype=torch.bool) if is_pad_N is None else ~is_pad_N
            # Whoever ends the step may not look at the loss: one such vector would spoil the codebook for good.
            is_sound_N = is_real_N & unit_ND.isfinite().all(dim=-1)
            if self.batches_fitted == 0:
                labels_N, code_ND = torch.full_like(is_sound_N, -1, dtype=torch.int64), unit_ND.detach()
                counts_V = torch.zeros_like(self.usage_V)
            else:
                labels_N = self._nearest(unit_ND.detach())
                code_ND = self.codebook_VD[labels_N]
                counts_V = torch.zeros_like(self.usage_V).index_add_(0, labels_N, is_sound_N.float())
            if self.training:
                self._collect(unit_ND.detach(), is_sound_N, labels_N, counts_V)
            distance_N = (unit_ND - code_ND).square().mean(dim=-1)
            commitment = torch.where(is_real_N, distance_N, 0.0).sum()
            straight_ND = unit_ND + (code_ND - unit_ND).detach()
        return Quantized(straight_ND, labels_N.masked_fill(~is_sound_N, -1), commitment, counts_V)

    @torch.no_grad()
    def end_step(self, moved: bool) -> None:
        """Fits or moves the codebook by all vectors since the last call, those of all workers; all must call it.

        moved: whether the optimizer moved the weights, alike on all workers; of a step that was left out nothing stays.
        """
        statistics, self._statistics = self._statistics, None
        if statistics is None or not moved:
            return
        if self.batches_fitted < self.config.init_batches:
            self._fit(statistics)
        else:
            self._update(statistics)

    @property
    def is_fitted(self) -> bool:
        """Whether k-means is done; until then its vectors are state that no `state_dict` holds."""
        return self.batches_fitted == self.config.init_batches

    @torch.no_grad()
    def labels(self, vectors_ND: Tensor) -> Tensor:
        """Returns the nearest code of each vector and changes nothing."""
        with torch.autocast(vectors_ND.device.type, enabled=False):
            return self._nearest(F.normalize(vectors_ND.float(), dim=-1))

    def _nearest(self, unit_ND: Tensor) -> Tensor:
        return _nearest_codes(unit_ND, self.codebook_VD)

    @torch.no_grad()
    def _collect(self, unit_ND: Tensor, is_sound_N: Tensor, labels_N: Tensor, counts_V: Tensor) -> None:
        if self._statistics is None:
            self._statistics = _StepStatistics(torch.zeros_like(self.codebook_VD), torch.zeros_like(self.usage_V))
        is_fitted = self.is_fitted
        if not is_fitted or self.config.restart_below > 0:
            self._statistics.vectors.append(unit_ND[is_sound_N])
        if is_fitted:
            self._statistics.sums_VD.index_add_(0, labels_N, torch.where(is_sound_N.unsqueeze(1), unit_ND, 0.0))
            self._statistics.counts_V.add_(counts_V)

    def _update(self, statistics: _StepStatistics) -> None:
        decay = self.config.ema_decay
        sums_VD = _sum_over_workers(statistics.sums_VD)
        counts_V = _sum_over_workers(statistics.counts_V)
        self.usage_V.mul_(decay).add_(counts_V, alpha=1.0 - decay)
        moved_VD = F.normalize(self.codebook_VD * decay + F.normalize(sums_VD, dim=-1) * (1.0 - decay), dim=-1)
        self.codebook_VD.copy_(torch.where((counts_V > 0).unsqueeze(1), moved_VD, self.codebook_VD))
        self.batches_seen += 1
        if self.config.restart_below > 0:
            self._restart_dead(_gather_from_workers(statistics.vectors))

    def _fit(self, statistics: _StepStatistics) -> None:
        vectors_ND = _gather_from_workers(statistics.vectors)
        if len(vectors_ND) == 0:
            return
        self._pool.append(vectors_ND)
        pool_ND = torch.cat(self._pool)
        generator = torch.Generator().manual_seed(self.config.seed)
        codes_VD = cosine_kmeans(pool_ND, self.config.num_codes, self.config.kmeans_iterations, generator)
        self.codebook_VD.copy_(_from_first_worker(codes_VD))
        counts_V = torch.bincount(self._nearest(pool_ND), minlength=self.config.num_codes)
        self.usage_V.copy_(_from_first_worker(counts_V / len(self._pool)))
        self.batches_seen += 1

    @property
    def batches_fitted(self) -> int:
        """Global batches that k-means was run on, `init_batches` in the end."""
        # Asking the buffer makes the host wait for the device, so the answer is kept once it is the last one.
        if not self._fitted:
            seen = int(self.batches_seen)
            if seen < self.config.init_batches:
                return seen
            self._fitted = True
            self._pool.clear()
        return self.config.init_batches

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._fitted = False
        self._statistics = None
        self._pool.clear()

    def _restart_dead(self, candidates_ND: Tensor) -> None:
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
        label_N = _nearest_codes(unit_ND, centre_VD)
        sum_VD = torch.zeros_like(centre_VD).index_add_(0, label_N, unit_ND)
        got_V = torch.bincount(label_N, minlength=num_codes) > 0
        centre_VD = torch.where(got_V.unsqueeze(1), F.normalize(sum_VD, dim=-1), centre_VD)
    return centre_VD


def _nearest_codes(unit_ND: Tensor, code_VD: Tensor) -> Tensor:
    # In parts, because the scores of some global batches of long clips would take gigabytes.
    return torch.cat([(part_ND @ code_VD.t()).argmax(dim=-1) for part_ND in unit_ND.split(NEAREST_ROWS)])


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


def _gather_from_workers(micro_batches: list[Tensor]) -> Tensor:
    """Returns the rows of all workers, the same everywhere: by micro-batch, and in each by rank.

    That is the order of the clips in the global batch, however many workers and micro-batches share it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return torch.cat(micro_batches)
    return torch.cat([_gather_rows(rows_ND) for rows_ND in micro_batches])


def _gather_rows(rows_ND: Tensor) -> Tensor:
    count = torch.tensor([len(rows_ND)], device=rows_ND.device)
    counts = [torch.zeros_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    longest = max(int(one) for one in counts)
    padded_ND = F.pad(rows_ND, (0, 0, 0, longest - len(rows_ND)))
    parts = [torch.zeros_like(padded_ND) for _ in counts]
    dist.all_gather(parts, padded_ND)
    return torch.cat([part[: int(one)] for part, one in zip(parts, counts, strict=True)])
