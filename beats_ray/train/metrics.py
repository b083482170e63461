"""Metrics of a run: exact means over all workers, and where they are written.

A metric is a pair (sum, count). Sums are kept on the device and reduced over the workers only on logging steps. What is
no mean over clips, average precision, is computed from the scores of all clips, which the workers gather.
"""

import json
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from beats_ray.data.storage import Place, with_retries
from beats_ray.models import codebook_usage
from beats_ray.scoring import mean_average_precision
from beats_ray.train.codebook_health import count_collapsed_steps, is_collapsed
from beats_ray.train.context import WorkerContext
from beats_ray.train.loggers import Logger, TensorBoardLogger

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankedScores:
    """What a classifier says of some clips, to be ranked among all others: B clips, C classes."""

    scores_BC: Tensor
    targets_BC: Tensor
    """1 where the clip has the label."""


MetricSums = dict[str, tuple[Tensor, Tensor] | Tensor | RankedScores]
"""Name -> (sum, count), both scalars on the training device; or, for `.../code_counts`, how often each code came up; or
scores, of which the metric is the mean average precision over all clips."""

CODE_COUNTS = "/code_counts"
GOES_ON = ("seconds", "cost/cpu_seconds", "cost/gpu_seconds")
"""Metrics that a process counts from zero and a run counts over all its attempts."""


class MetricMeans:
    """Sums up and gives count-weighted means over all workers; of code counts, used fraction and perplexity.

    Of scores, the mean average precision; they are held in host memory, and whole on every worker for a moment: 4 C + C
    bytes for a clip of C classes.
    """

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}
        self._scores: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}

    def add(self, sums: MetricSums) -> None:
        for name, value in sums.items():
            if isinstance(value, RankedScores):
                scores_BC, targets_BC = value.scores_BC.detach().float(), value.targets_BC.detach() > 0.5
                self._scores.setdefault(name, []).append((scores_BC.cpu().numpy(), targets_BC.cpu().numpy()))
                continue
            total = (
                torch.stack([part.detach().double() for part in value]) if isinstance(value, tuple) else value.double()
            )
            self._totals[name] = self._totals[name] + total if name in self._totals else total

    def reduce(self, context: WorkerContext) -> dict[str, float]:
        """Means over everything added since the last call, the same on every worker; all must call it."""
        shapes: dict[str, int] = {}
        scored: set[str] = set()
        for held, names_of_scores in context.gather(
            ({name: total.numel() for name, total in self._totals.items()}, list(self._scores))
        ):
            scored.update(names_of_scores)
            shapes |= held  # a worker without any batch of its own still takes part in the sums
        names = sorted(shapes)
        if not names:
            return {}
        for name, size in shapes.items():
            if name not in self._totals:
                self._totals[name] = torch.zeros(size, dtype=torch.double, device=context.device)
        sizes = [shapes[name] for name in names]
        flat = context.all_reduce(torch.cat([self._totals[name] for name in names])).cpu()
        self._totals.clear()
        means: dict[str, float] = {}
        for name, part in zip(names, flat.split(sizes), strict=True):
            if name.endswith(CODE_COUNTS):
                prefix = name.removesuffix(CODE_COUNTS)
                used, perplexity = codebook_usage(part)
                means |= {f"{prefix}/used_code_fraction": used, f"{prefix}/perplexity": perplexity}
                means[f"{prefix}/collapsed"] = float(is_collapsed(perplexity, len(part), float(part.sum())))
            elif part[1] > 0:
                means[name] = float(part[0] / part[1])
        return means | {name: self._reduce_scores(name, context) for name in sorted(scored)}

    def _reduce_scores(self, name: str, context: WorkerContext) -> float:
        gathered = [part for parts in context.gather(self._scores.pop(name, [])) for part in parts]
        scores_NC, truth_NC = (np.concatenate([part[index] for part in gathered]) for index in (0, 1))
        return mean_average_precision(truth_NC, scores_NC)


def code_counts(labels_BN: Tensor, num_codes: int) -> Tensor:
    """How often each code stands in `labels_BN` (-1 at padding)."""
    code_X = labels_BN.flatten().long() + 1
    counts_V = torch.zeros(num_codes + 1, dtype=torch.int64, device=code_X.device)
    return counts_V.scatter_add_(0, code_X, torch.ones_like(code_X))[1:]  # a bincount waits for the device


class MetricsLog:
    """Rank 0's record of a run: `metrics.jsonl`, a small `progress.json` for whoever watches, and the loggers.

    `progress.json` is replaced at every report, in the background; `metrics.jsonl` is written by `flush` (at
    checkpoints and at the end), since object storage cannot append. Time and cost go on over resumptions.
    """

    def __init__(
        self, output: Place, resumed_step: int, loggers: Sequence[Logger] | None = None, retry_seconds: float = 0.0
    ) -> None:
        """`loggers`: TensorBoard alone unless given. retry_seconds: how long earlier reports are asked for."""
        self._output = output
        earlier = with_retries(partial(read_metrics, output), retry_seconds)
        self._records = [record for record in earlier if record["step"] <= resumed_step]
        self._before = {name: self.newest.get(name, 0.0) for name in GOES_ON}
        self._loggers = [TensorBoardLogger(output / "tensorboard", resumed_step)] if loggers is None else list(loggers)
        self._publisher: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes the loggers of a run that failed; `close` ends the log of one that is complete."""
        if kind is None:
            return
        for logger in self._loggers:
            try:
                logger.close(complete=False)
            except Exception as error:  # noqa: BLE001  # what ended the run is what must be heard of
                _log.warning("%s did not close: %s", type(logger).__name__, error)

    @property
    def newest(self) -> dict[str, Any]:
        """The last report; empty where there is none."""
        return dict(self._records[-1]) if self._records else {}

    def write(self, record: dict[str, Any]) -> None:
        """Adds one report; `record["step"]` is its place on the x axis."""
        record = record | {name: self._before[name] + record[name] for name in GOES_ON if name in record}
        record = record | count_collapsed_steps(record, self._records[-1] if self._records else None)
        self._records.append(record)
        for logger in self._loggers:
            logger.write(record)
        if self._publisher is None or not self._publisher.is_alive():  # the newest wins; none is waited for
            self._publisher = threading.Thread(
                target=(self._output / "progress.json").write_json, args=(dict(record),), daemon=True
            )
            self._publisher.start()

    def flush(self) -> None:
        """Writes everything so far to storage."""
        self._write_records()
        for logger in self._loggers:
            logger.flush()

    def close(self) -> None:
        self._write_records()
        for logger in self._loggers:
            logger.close()

    def _write_records(self) -> None:
        if self._publisher is not None:
            self._publisher.join()
        lines = "".join(json.dumps(record) + "\n" for record in self._records)
        (self._output / "metrics.jsonl").write_bytes(lines.encode())


def read_metrics(output: Place) -> list[dict[str, Any]]:
    """The reports of a run, oldest first; empty where it has none yet."""
    try:
        text = (output / "metrics.jsonl").read_bytes().decode()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines() if line]
