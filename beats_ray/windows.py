"""Long clips heard piece by piece: where the windows lie, and the mean of what a model says about them.

Windows of `window` samples start every `hop` samples. They cover the whole clip; a rest that is too short to be heard
alone stays with the last window. A clip of at most one window is heard whole, as it would be without windows.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from beats_ray.data.plan import SAMPLE_RATE_HZ

if TYPE_CHECKING:
    import torch

SHORTEST_REST_SECONDS = 1.0  # a shorter rest is heard together with the window before it


def window_spans(num_samples: int, window: int, hop: int) -> list[tuple[int, int]]:
    """(start, end) of each window of a clip, in samples; every sample lies in at least one.

    The last window reaches to the end of the clip: it may be shorter, or longer by less than the shortest rest.
    """
    rest = min(round(SHORTEST_REST_SECONDS * SAMPLE_RATE_HZ), window)
    starts = [0]
    while starts[-1] + window + rest <= num_samples:
        starts.append(starts[-1] + hop)
    ends = [start + window for start in starts[:-1]] + [num_samples]
    return list(zip(starts, ends, strict=True))


class ByWindows:
    """A `ClipWorker`: another worker's columns as means over each clip's windows, weighted by their lengths.

    Weighted, because that is what a mean over the patches of the whole clip would do. Padding is in no window.
    """

    def __init__(self, model: Any, worker: Callable[[Any], Any], window_samples: int, hop_samples: int) -> None:
        self._worker = worker(model)
        self._window_samples = window_samples
        self._hop_samples = hop_samples

    def __call__(self, wave_BS: "torch.Tensor", num_samples_B: "torch.Tensor") -> dict[str, Any]:
        import torch

        spans = [
            (row, start, end)
            for row, num_samples in enumerate(num_samples_B.tolist())
            for start, end in window_spans(num_samples, self._window_samples, self._hop_samples)
        ]
        parts: list[dict[str, np.ndarray]] = []
        for first in range(0, len(spans), len(wave_BS)):  # no more windows at once than clips: memory stays as it is
            chunk = spans[first : first + len(wave_BS)]
            lengths = [end - start for _, start, end in chunk]
            windows = wave_BS.new_zeros(len(chunk), max(lengths))
            for window, (row, start, end) in zip(windows, chunk, strict=True):
                window[: end - start] = wave_BS[row, start:end]
            parts.append(self._worker(windows, torch.tensor(lengths, device=wave_BS.device)))
        row_W = np.array([row for row, _, _ in spans])
        length_W = np.array([end - start for _, start, end in spans], dtype=np.float64)
        weight_W = length_W / np.bincount(row_W, length_W)[row_W]
        return {
            name: _weighted_sum(np.concatenate([part[name] for part in parts]), weight_W, row_W) for name in parts[0]
        }


def _weighted_sum(value_WK: np.ndarray, weight_W: np.ndarray, row_W: np.ndarray) -> np.ndarray:
    total_BK = np.zeros((row_W[-1] + 1, value_WK.shape[1]))
    np.add.at(total_BK, row_W, value_WK * weight_W[:, None])
    return total_BK.astype(value_WK.dtype)
