"""Means over workers, in real processes; and every metric is explained."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from beats_ray.config import FinetuneConfig, load_config
from beats_ray.data.storage import open_place
from beats_ray.train.context import WorkerContext
from beats_ray.train.meter import Meter
from beats_ray.train.metrics import read_metrics

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[3]

REDUCE = """
import json, sys
import torch
import torch.distributed as dist
from beats_ray.train.context import WorkerContext
from beats_ray.train.metrics import MetricMeans, RankedScores

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
context = WorkerContext(rank, 2, torch.device("cpu"), lambda step, metrics: None)
means = MetricMeans()
found = []
for batches in ((0, 2), (1, 0), (0, 0), (1, 1)):  # of each rank, in each of four reports
    for _ in range(batches[rank]):
        total, count = torch.tensor(10.0 + rank), torch.tensor(2 + 2 * rank)
        means.add({"train/loss": (total, count), "labels/code_counts": torch.tensor([1, 1 - rank, 0, 0])})
    found.append(means.reduce(context))
generator = torch.Generator().manual_seed(0)
scores, targets = torch.randn(7, 3, generator=generator), torch.rand(7, 3, generator=generator) > 0.5
targets[:, 2] = False  # a class that no clip has
for cut in (3, 7):  # clips of the first worker, in batches of two
    for start in range(0, cut, 2) if rank == 0 else range(cut, 7, 2):
        stop = min(start + 2, cut if rank == 0 else 7)
        means.add({"train/mean_average_precision": RankedScores(scores[start:stop], targets[start:stop].float()),
                   "train/loss": (torch.tensor(1.0), torch.tensor(1.0))})
    found.append(means.reduce(context))
found.append([scores.tolist(), targets.tolist()])
print(json.dumps(found))
dist.destroy_process_group()
"""


def test_a_worker_without_any_batch_takes_part_in_the_means_of_all(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", REDUCE, str(rank), str(tmp_path / "store")],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=90)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0]
    first, second = (json.loads(output.splitlines()[-1]) for output in outputs)
    assert first == second, "every worker gets the same means"
    only_second, only_first, none, both, divided, lone, (scores, targets) = first
    assert only_second == {
        "train/loss": pytest.approx(22 / 8),
        "labels/used_code_fraction": 0.25,
        "labels/perplexity": pytest.approx(1.0),
        "labels/collapsed": 0.0,  # two patches are too few to tell
    }
    assert only_first["train/loss"] == pytest.approx(10 / 2)
    assert only_first["labels/used_code_fraction"] == 0.5
    assert none == {}
    assert both["train/loss"] == pytest.approx(21 / 6), "weighted by counts, not a mean of means"
    expected = average_precision_score(np.array(targets)[:, :2], np.array(scores)[:, :2], average="macro")
    for reported in (divided, lone):
        assert reported["train/mean_average_precision"] == pytest.approx(expected, abs=1e-12), "over all clips at once"


def test_every_metric_that_training_reports_stands_in_the_docs(tmp_path: Path, pretraining) -> None:
    explained = set(re.findall(r"`([a-z0-9_/]+)`", (ROOT / "docs" / "metrics.md").read_text()))
    pretraining.run(tmp_path, steps=1, warmup_steps=0)
    (reported,) = read_metrics(open_place(str(tmp_path)))
    named = {
        name
        for file in (ROOT / "beats_ray" / "train").glob("*.py")
        for name in re.findall(r'"((?:data|labels|perf|tokenizer|train|validation)/[a-z0-9_]+)"', file.read_text())
        if not name.endswith("/code_counts")
    }
    assert {"train/teacher_cosine", "train/accuracy"} <= named
    assert {*reported, *named} <= explained


def test_a_run_costs_what_its_workers_reserve_while_they_train(tmp_path: Path, pretraining) -> None:
    pretraining.run(tmp_path, steps=1, warmup_steps=0, cpus_per_worker=3)
    (reported,) = read_metrics(open_place(str(tmp_path)))
    assert reported["cost/cpu_seconds"] == pytest.approx(3 * reported["seconds"])
    assert reported["cost/gpu_seconds"] == 0


def test_of_a_gpu_that_is_shared_a_run_costs_its_share() -> None:
    settings = load_config(FinetuneConfig, None, ["train.use_gpu=true"], output="o").train
    context = WorkerContext(0, 1, torch.device("cpu"), lambda _step, _metrics: None, gpu_share=0.5)
    assert Meter(settings, context, 0)._cost(8.0)["cost/gpu_seconds"] == 4.0
