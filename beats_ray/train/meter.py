"""What a training process measures of itself between two reports: means, rates, waiting, model FLOPs."""

import time

import torch

from beats_ray.config import TrainSettings
from beats_ray.data.batches import MicroBatch
from beats_ray.train.context import WorkerContext
from beats_ray.train.engine import Engine
from beats_ray.train.flops import peak_flops
from beats_ray.train.metrics import MetricMeans, MetricSums
from beats_ray.train.optimizer import learning_rate


class Meter:
    """Rates and sums between two reports; every worker has one and reports alike."""

    def __init__(
        self, settings: TrainSettings, context: WorkerContext, first_step: int, flops_per_clip: int = 0
    ) -> None:
        self._settings = settings
        self._context = context
        self._means = MetricMeans()
        self._last_step = first_step
        self._started = self._last_time = time.perf_counter()
        self._wait_seconds = 0.0
        self._flops_per_clip = flops_per_clip

    def fetched(self, batch: MicroBatch) -> None:
        """Counts what a batch cost before it was here."""
        self._wait_seconds += batch.wait_seconds
        if batch.decode_seconds:  # of clips that were streamed
            device, clips = self._context.device, float(len(batch.clip_ids))
            for name, seconds in (("read", batch.read_seconds), ("decode", batch.decode_seconds)):
                pair = [torch.full((), value, dtype=torch.double, device=device) for value in (seconds, clips)]
                self._means.add({f"data/{name}_seconds_per_clip": (pair[0], pair[1])})

    def add(self, sums: MetricSums) -> None:
        self._means.add(sums)

    def report(self, step: int, engine: Engine) -> dict[str, float]:
        """The metrics of all steps since the last report, after `step` steps; the host waits for the device here."""
        now = time.perf_counter()
        seconds = now - self._last_time
        wait = torch.tensor(self._wait_seconds / seconds, device=self._context.device)
        self._means.add({"data/wait_fraction": (wait, torch.ones_like(wait))})
        metrics = {
            "step": step,
            "seconds": now - self._started,
            "clips": step * self._settings.global_batch_size,
            **self._means.reduce(self._context),
            "train/learning_rate": learning_rate(step - 1, self._settings),
            "train/grad_norm": engine.grad_norm(),
            "perf/clips_per_s": (step - self._last_step) * self._settings.global_batch_size / seconds,
            **self._cost(now - self._started),
        }
        metrics |= self._device_metrics(metrics["perf/clips_per_s"])
        self._last_step, self._last_time, self._wait_seconds = step, now, 0.0
        return metrics

    def _cost(self, seconds: float) -> dict[str, float]:
        """What the workers have reserved of the cluster while they trained."""
        worker_seconds = self._context.world_size * seconds
        return {
            "cost/cpu_seconds": worker_seconds * self._settings.cpus_per_worker,
            "cost/gpu_seconds": worker_seconds * self._settings.use_gpu * self._context.gpu_share,
        }

    def _device_metrics(self, clips_per_s: float) -> dict[str, float]:
        """Model FLOPs over the device's peak, without what is computed twice, and the memory held at most."""
        found = {}
        tera = clips_per_s / self._context.world_size * self._flops_per_clip / 1e12
        if self._flops_per_clip:
            found["perf/model_tflops_per_s"] = tera
        if self._context.device.type == "cuda":
            found["perf/gpu_memory_gib"] = torch.cuda.max_memory_allocated(self._context.device) / 2**30
            peak = peak_flops(torch.cuda.get_device_name(self._context.device), self._settings.precision)
            if peak and self._flops_per_clip:
                found["perf/mfu"] = tera * 1e12 / peak
        return found
