"""Settings of `beats-ray plan` and `beats-ray simulate`, and the one place of the measured figures they reckon with.

Three kinds of numbers are kept apart: what was *measured* (`MeasuredSettings`, each with its source), what the user
*knows* of a cluster and its prices (`ClusterSettings`), and what is *assumed* of a spot market (`SimulateConfig`).
Prices have no defaults: they are given for an hour of a node, with the day on which they were read.
"""

import datetime as dt
from typing import Annotated, Self

from pydantic import Field, model_validator

from beats_ray.config import (
    Fraction,
    IterateConfig,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)
from beats_ray.settings import NonNegativeFloat

Price = NonNegativeFloat | None


class MeasuredSettings(Section):
    """Measured on two virtual cores (H1 of docs/performance.md); put in what your own cluster shows."""

    decode_ms_per_second: PositiveFloat = 0.17
    """CPU, ms, that the data plane takes for a second of sound on its nodes: reading, decoding, ordering. 1.0 to 1.1 ms
    for a clip of 5 s in all, less the coordinator's 0.16 to 0.21 (docs/performance.md, The data plane)."""
    coordinator_ms_per_block: PositiveFloat = 20.0
    """CPU, ms, of Ray Data's coordinator for one block, whatever its size: one process serves all workers of a run
    (docs/performance.md, The data plane)."""
    start_seconds: NonNegativeFloat = 45.0
    """From the start of a stage to its first step, with its nodes there: 35 to 55 (docs/performance.md, The demo's
    stages)."""
    recovery_seconds: NonNegativeFloat = 51.0
    """From the loss of a worker to training again on nodes that are there: 46 to 71 (docs/training.md, What was
    measured), nearly all of it imports on two cores."""
    resize_seconds: NonNegativeFloat = 29.0
    """The same where an elastic run takes nodes in that have joined (docs/training.md, What was measured)."""
    checkpoint_pause_seconds: NonNegativeFloat = 1.6
    """That training stands still for a resume checkpoint: 1.6 from a request to the commit, in a group of two
    processes, so rather too much (docs/training.md, Faults)."""
    upload_mib_per_s: PositiveFloat = 108.0
    """That one worker writes to object storage: 113 MB/s on one thread, against a server on loopback."""


class PlannedDataSettings(Section):
    """A data set that is not prepared yet."""

    hours: PositiveFloat | None = None
    """Hours of sound; where it is set, `data.path` is not read."""
    clip_seconds: PositiveFloat = 10.0
    """Mean length of a clip."""
    num_classes: NonNegativeInt = 0
    """Labels in the vocabulary; without any there are neither probes nor sweeps."""
    multi_label: bool = True
    """Whether a clip has several labels; if so it is not probed."""
    bytes_per_second: PositiveFloat = 32_000.0
    """Bytes of a second of sound in the shards: 16-bit samples at 16 kHz, the most that FLAC makes of them."""


class ClusterSettings(Section):
    """The cluster that is asked about, its prices included."""

    tflops_per_worker: PositiveFloat = 100.0
    """TFLOP/s that one worker sustains: its GPU's peak times the MFU that a run reports (`perf/mfu`)."""
    workers_per_node: PositiveInt = 8
    """GPUs of a worker node."""
    worker_node_cores: PositiveInt = 64
    """CPU cores of a worker node; what its workers leave decodes clips."""
    data_node_cores: PositiveInt = 32
    """CPU cores of a data node: one that decodes and does not train."""
    max_worker_nodes: PositiveInt | None = None
    """Worker nodes that the cluster may have; none means as many as the stages ask for."""
    max_data_nodes: NonNegativeInt | None = None
    """Data nodes that the cluster may have; none means as many as it takes."""
    storage_mib_per_s: PositiveFloat | None = None
    """MiB/s that object storage gives all nodes together; none means enough."""
    hourly_preemption: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Chance that a worker node is taken away within an hour (spot)."""
    replacement_minutes: NonNegativeFloat = 5.0
    """Until another node stands in for one that was taken away; an assumption."""
    worker_node_price: Price = None
    """Of an hour of one worker node."""
    data_node_price: Price = None
    """Of an hour of one data node."""
    head_node_price: Price = None
    """Of an hour of the head node, which is paid as long as anything runs."""
    currency: str = "USD"
    """What the prices are in."""
    prices_as_of: dt.date | None = None
    """The day on which the prices were read, as in 2026-11-24."""

    @model_validator(mode="after")
    def _dated(self) -> Self:
        prices = {
            "worker_node_price": self.worker_node_price,
            "data_node_price": self.data_node_price,
            "head_node_price": self.head_node_price,
        }
        given = {name: price for name, price in prices.items() if price is not None}
        if given and self.prices_as_of is None:
            name, price = next(iter(given.items()))
            raise ValueError(
                f"{name}={price:g} has no day, and prices change; set cluster.prices_as_of, as in "
                "cluster.prices_as_of=2026-11-24"
            )
        if given and self.worker_node_price is None:
            raise ValueError("worker_node_price: missing beside the other prices; set it, 0 for nodes of your own")
        return self


class PlanConfig(IterateConfig):
    """A run of all iterations, and the cluster that it is planned for."""

    cluster: ClusterSettings = ClusterSettings()
    planned_data: PlannedDataSettings = PlannedDataSettings()
    measured: MeasuredSettings = MeasuredSettings()


class SimulateConfig(Section):
    """One data-parallel run on a spot cluster. What has no source in its description is an assumption."""

    workers: PositiveInt = 1000
    """GPUs that the run wants."""
    workers_per_node: PositiveInt = 8
    """GPUs of a node; nodes come and go as a whole."""
    tflops_per_worker: PositiveFloat = 100.0
    """TFLOP/s that one GPU sustains."""
    gflop_per_clip: PositiveFloat = 147.0
    """Model FLOPs of a clip, 1e9: the base encoder's pre-training (docs/training.md, FLOPs and MFU)."""
    clip_seconds: PositiveFloat = 10.0
    """Length of a clip."""
    micro_batch_size: PositiveInt = 35
    """Clips of one forward pass of a worker, by which blocks are cut."""
    workers_per_stream: PositiveInt | None = None
    """GPUs that one stream serves (`data.streams`); all where None."""
    bytes_per_second: PositiveFloat = 32_000.0
    """Bytes of a second of sound in the shards; 16-bit samples at 16 kHz are the most."""
    checkpoint_gib: PositiveFloat = 1.26
    """A resume checkpoint: 12 bytes for each of the base encoder's parameters (docs/training.md, Pre-flight)."""
    hours: PositiveFloat = 168.0
    """Simulated time."""
    runs: PositiveInt = 5
    """Repetitions, each with a seed of its own."""
    seed: NonNegativeInt = 0
    """Seed of the first repetition."""
    hourly_preemption: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    """Chance that a node is taken away within an hour."""
    noticed: Fraction = 0.0
    """Share of the nodes taken away that say so in time for a checkpoint, so that no step is lost."""
    replacement_minutes: NonNegativeFloat = 5.0
    """Mean time until another node is there, exponential."""
    join_minutes: tuple[PositiveFloat, ...] = (1.0, 15.0)
    """How often an elastic run takes in nodes that have joined, to be compared. Ray Train looks every minute
    (docs/training.md, Faults)."""
    spare_nodes: NonNegativeInt = 8
    """Nodes beyond the wanted ones, for a run of a fixed size that has some."""
    straggles_per_node_day: NonNegativeFloat = 0.05
    """How often a node becomes slow in a day."""
    straggler_speed: Annotated[float, Field(gt=0.0, le=1.0)] = 0.7
    """Speed of a slow node, of what it should be. Every step waits for the slowest one."""
    straggler_minutes: PositiveFloat = 20.0
    """Mean length of that, exponential."""
    throttles_per_day: NonNegativeFloat = 4.0
    """How often object storage throttles in a day."""
    throttle_minutes: PositiveFloat = 10.0
    """Mean length of that, exponential."""
    throttled: Fraction = 0.25
    """Share of its bandwidth that throttled storage gives."""
    storage_headroom: PositiveFloat = 2.0
    """Bandwidth of the storage, in multiples of what the whole run reads. Checkpoints are written beside reading."""
    checkpoint_minutes: tuple[PositiveFloat, ...] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
    """Distances between two checkpoints that are compared."""
    measured: MeasuredSettings = MeasuredSettings()

    @model_validator(mode="after")
    def _whole_nodes(self) -> Self:
        if self.workers % self.workers_per_node:
            nodes = max(1, round(self.workers / self.workers_per_node))
            raise ValueError(
                f"workers={self.workers} is not divisible by workers_per_node={self.workers_per_node}; use "
                f"{nodes * self.workers_per_node}"
            )
        return self

    @property
    def nodes(self) -> int:
        """Nodes that the run wants."""
        return self.workers // self.workers_per_node
