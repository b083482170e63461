"""Where trials run, and how many at one time, so that a sweep never waits for itself.

Two kinds of trials:
- one worker, clips in the object store: the training loop runs in Tune's own actor, whose reservation is all it needs;
- several workers, or clips that are streamed: Tune's actor holds next to nothing and starts a Ray Train run, which asks
  for its workers as one placement group.

Neither can deadlock. A placement group is given as a whole or not at all, so no trial ever holds one worker and waits
for another. What remains is a trial that holds its workers and waits for its stream's tasks; for these room is counted:
`concurrent_trials` packs whole trials, workers with their streams, onto the nodes, and no more are started than fit.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from beats_ray.config import ConfigError, StreamSettings, SweepSettings, TrainSettings
from beats_ray.launch import has_silent_autoscaler
from beats_ray.train.jobs import STARTER_CPUS

Resources = Mapping[str, float]
UNBOUNDED_NODES = 1000
"""Of a group for which the autoscaler has no limit."""
ROUNDING = 1e-6  # fractions of a CPU or a GPU that add up to a whole one


@dataclass(frozen=True)
class TrialNeeds:
    """What one trial holds while it runs."""

    uses_ray_train: bool
    worker: dict[str, float]
    """Resources of each worker."""
    num_workers: int
    reading_cpus: float
    """Of the tasks of its streams, anywhere in the cluster; 0 where clips are in the object store."""

    @property
    def of_tune(self) -> dict[str, float]:
        """What Tune reserves for the trial's actor."""
        return {"CPU": STARTER_CPUS} if self.uses_ray_train else self.worker

    @property
    def gpus(self) -> float:
        return self.num_workers * self.worker.get("GPU", 0.0)

    @property
    def cpus(self) -> float:
        return self.num_workers * self.worker.get("CPU", 0.0) + self.reading_cpus


def trial_needs(sweep: SweepSettings, train: TrainSettings, data: StreamSettings, is_streamed: bool) -> TrialNeeds:
    """What a trial of these settings needs. ConfigError for workers that cannot share a GPU, or change in number."""
    if train.min_workers != train.max_workers:
        raise ConfigError(
            f"finetune.train.num_workers={list(train.worker_range)}: a trial keeps its workers, or times could not be "
            "compared; give one number"
        )
    if sweep.gpus_per_worker < 1 and not train.use_gpu:
        raise ConfigError(
            f"sweep.gpus_per_worker={sweep.gpus_per_worker:g}: trials run on the CPU; set finetune.train.use_gpu=true, "
            "or leave it out"
        )
    if sweep.gpus_per_worker < 1 and (train.max_workers > 1 or is_streamed):
        raise ConfigError(
            f"sweep.gpus_per_worker={sweep.gpus_per_worker:g}: workers of one run would meet on one GPU, which NCCL "
            "refuses, and runs that stream are of that kind; use 1, or finetune.train.num_workers=1 with cached clips"
        )
    worker = {"CPU": train.cpus_per_worker} | ({"GPU": sweep.gpus_per_worker} if train.use_gpu else {})
    reading_cpus = 0.0
    if is_streamed:
        from beats_ray.data.stream import required_cpus

        reading_cpus = required_cpus(data, data.streams + 1)  # held-out clips are read beside the training's
    return TrialNeeds(
        uses_ray_train=train.max_workers > 1 or is_streamed,
        worker=worker,
        num_workers=train.max_workers,
        reading_cpus=reading_cpus,
    )


def concurrent_trials(needs: TrialNeeds, nodes: Sequence[Resources], most: int | None) -> int:
    """Trials that run at one time: as many as fit on the nodes, and at most `most`. ConfigError where none does."""
    count = _pack(needs, nodes, most or 10**6)
    if count == 0:
        total = {name: sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")}
        streams = f" and {needs.reading_cpus:g} CPUs for its streams" if needs.reading_cpus else ""
        each = " and ".join(f"{amount:g} {name}" for name, amount in needs.worker.items())
        raise ConfigError(
            f"a trial needs {needs.num_workers} x ({each}){streams} (finetune.train.num_workers, cpus_per_worker, "
            f"use_gpu); the cluster has {total['CPU']:g} CPU and {total['GPU']:g} GPU on {len(nodes)} nodes; lower "
            "them, or use a larger cluster"
        )
    return count


def cluster_trials(needs: TrialNeeds, most: int | None) -> int:
    """`concurrent_trials` on the nodes that the cluster has or may start.

    Where its autoscaler does not say what it may start, that is left to it: `most` trials ask for their workers, and
    those wait for which there are no nodes. Without a `most` it is what fits now, or one.
    """
    nodes = node_resources()
    if has_silent_autoscaler():
        return most or max(1, _pack(needs, nodes, 10**6))
    return concurrent_trials(needs, nodes, most)


def _pack(needs: TrialNeeds, nodes: Sequence[Resources], most: int) -> int:
    """Whole trials, worker by worker, onto the first node with room; what streams read with may be anywhere."""
    free = [dict(node) for node in nodes]
    count = 0
    while count < most:
        for _ in range(needs.num_workers):
            node = next((node for node in free if _fits(needs.worker, node)), None)
            if node is None:
                return count
            for name, amount in needs.worker.items():
                node[name] -= amount
        left = needs.reading_cpus + (STARTER_CPUS if needs.uses_ray_train else 0.0)
        for node in free:
            taken = min(left, max(0.0, node.get("CPU", 0.0)))
            node["CPU"] = node.get("CPU", 0.0) - taken
            left -= taken
        if left > ROUNDING:
            return count
        count += 1
    return count


def _fits(worker: Resources, node: Resources) -> bool:
    return all(node.get(name, 0.0) >= amount - ROUNDING for name, amount in worker.items())


def node_resources() -> list[dict[str, Any]]:
    """What each living node of the cluster has, then each that its autoscaler may still start."""
    import ray
    from ray._private.state import state  # where `launch.most_resources` looks too

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    started = Counter(_size(node) for node in nodes)
    config = state.get_cluster_config()
    for group in config.node_group_configs if config else ():
        resources = {name: float(amount) for name, amount in group.resources.items()}
        most = UNBOUNDED_NODES if group.max_count == -1 else group.max_count
        of_group = min(most, started[_size(resources)])
        started[_size(resources)] -= of_group
        nodes += [dict(resources) for _ in range(most - of_group)]
    return nodes


def _size(node: Resources) -> tuple[float, float]:
    """What a living node's group is told by: not every autoscaler has Ray say of which it is."""
    return node.get("CPU", 0.0), node.get("GPU", 0.0)
