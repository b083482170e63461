"""What is exported beside a run's reports: when it reaches Ray, under which name, and what a sweep tells."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from beats_ray import telemetry
from beats_ray.data.flac import encode_flac
from beats_ray.telemetry import EXPORTED, ExportedMetric, run_name
from beats_ray.train.loggers import PrometheusLogger

pytestmark = pytest.mark.unit

Values = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> Values:
    """What Ray would have got, by name and labels, as if this process had joined a cluster."""
    import ray
    from ray.util import metrics

    values: Values = {}

    class Recorder:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            self._name, self._tag_keys = name, tag_keys

        def _key(self, tags: dict[str, str]) -> Any:
            assert tuple(tags) == self._tag_keys
            return self._name, frozenset(tags.items())

        def set(self, value: float, tags: dict[str, str]) -> None:
            values[self._key(tags)] = value

        def inc(self, value: float, tags: dict[str, str]) -> None:
            assert value > 0, "Ray raises"
            values[self._key(tags)] = values.get(self._key(tags), 0.0) + value

    monkeypatch.setattr(metrics, "Gauge", Recorder)
    monkeypatch.setattr(metrics, "Counter", Recorder)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_worker_id=lambda: id(values)))
    return values


def by_label(values: Values, name: str) -> dict[str, float]:
    """The values of a metric by their last label."""
    return {dict(labels).get("state") or next(iter(dict(labels).values()), ""): value
            for (found, labels), value in values.items() if found == name}  # fmt: skip


def test_names_are_those_that_ray_serves() -> None:
    assert telemetry.DECODED_CLIPS.scraped_name == "ray_beats_ray_data_decoded_clips_total"
    assert telemetry.RUN_ACTIVE.scraped_name == "ray_beats_ray_run_active"
    assert len({metric.scraped_name for metric in EXPORTED}) == len(EXPORTED)
    defined = {value for value in vars(telemetry).values() if isinstance(value, ExportedMetric)}
    assert defined == set(EXPORTED)


def test_runs_of_different_iterations_and_places_have_different_names() -> None:
    assert run_name("s3://bucket/runs/first/iteration-1/pretrain") == "first/iteration-1/pretrain"
    assert run_name("/data/runs/second/iteration-1/pretrain/") == "second/iteration-1/pretrain"
    assert run_name("s3://bucket/run") == "bucket/run"
    assert run_name("s3://bucket/trials/first/sweep/trials/ab12/repeat-1") == "trials/first/sweep/trials/ab12/repeat-1"


def test_outside_a_cluster_nothing_happens_and_ray_is_not_imported() -> None:
    code = (
        "import sys; from beats_ray.telemetry import *; DECODED_CLIPS.add(3); RUN_ACTIVE.set(1, run='a'); "
        "assert 'ray' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_to_count_is_no_count(exported: Values) -> None:
    telemetry.DECODED_CLIPS.add(0)  # Ray would raise
    assert exported == {}


def test_a_process_that_joins_another_cluster_makes_its_metrics_anew(
    exported: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    telemetry.RUN_ACTIVE.set(1, run="a")
    first = telemetry.RUN_ACTIVE._opened()
    assert telemetry.RUN_ACTIVE._opened() is first
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_worker_id=lambda: "another"))
    assert telemetry.RUN_ACTIVE._opened() is not first


def test_a_run_is_active_until_its_logger_is_closed(exported: Values) -> None:
    logger = PrometheusLogger("a")
    assert by_label(exported, "beats_ray_run_active") == {"a": 1}
    logger.close(complete=False)
    assert by_label(exported, "beats_ray_run_active") == {"a": 0}


def test_every_way_of_decoding_counts_clips_and_their_seconds(exported: Values) -> None:
    from beats_ray.data.clips import ExampleSpec, decode_clips, decode_whole_clips, example_decoder

    samples = [16_000, 8_000]
    rows = pa.table(
        {
            "clip_id": ["a", "b"],
            "audio": pa.array([encode_flac(np.arange(count, dtype=np.int16)) for count in samples], pa.binary()),
            "num_samples": pa.array(samples, pa.int32()),
            "labels": pa.array([[0], [1]], pa.list_(pa.int16())),
            "position": [0, 1],
            "read_seconds": pa.array([0.0, 0.0], pa.float32()),
        }
    )
    for number, decode in enumerate(
        (decode_clips, decode_whole_clips, example_decoder(ExampleSpec(8_000, 2, 2, 0))), 1
    ):
        decode(rows)
        assert by_label(exported, "beats_ray_data_decoded_clips") == {"": 2 * number}
        assert by_label(exported, "beats_ray_data_decoded_audio_seconds") == {"": 1.5 * number}


def test_prepare_exports_how_far_it_is_and_what_it_put_aside(exported: Values) -> None:
    from beats_ray.data.prepare import _Progress
    from beats_ray.data.storage import open_place

    told: list[tuple[int, int]] = []
    listing: Any = SimpleNamespace(num_files=10, quarantined=["unreadable"])
    progress = _Progress(open_place("s3://bucket/data/set"), listing, lambda *files: told.append(files))
    progress.add()
    done: Any = SimpleNamespace(num_files=3, quarantined=["silent", "short"])
    progress.add(done, done)
    assert told == [(1, 10), (7, 10)]
    for name, files in (("source", 10), ("done", 7), ("quarantined", 5)):
        assert by_label(exported, f"beats_ray_prepare_{name}_files") == {"bucket/data/set": files}


# --- a sweep ----------------------------------------------------------------------------------------------------------


def trial(status: str, validations: int = 0, best: float | None = None) -> Any:
    analysis = {} if best is None else {"validation/accuracy": {"max": best, "min": best / 2}}
    return SimpleNamespace(
        status=status, metric_analysis=analysis, run_metadata=SimpleNamespace(last_result={"validations": validations})
    )


def test_a_sweep_exports_trials_by_state_and_its_best_value(exported: Values) -> None:
    from beats_ray.tune.gauges import STATES, SweepGauges

    gauges = SweepGauges("first/sweep", "validation/accuracy", validations=100)
    gauges.on_step_end(1, [trial("PENDING"), trial("RUNNING", 10)])
    assert by_label(exported, "beats_ray_sweep_best") == {}, "no trial has reported yet"
    ended = [trial("TERMINATED", 100, 0.5), trial("TERMINATED", 40, 0.7), trial("ERROR", 10), trial("PAUSED", 10, 0.1)]
    gauges.on_experiment_end(ended)
    shown = by_label(exported, "beats_ray_sweep_trials")
    assert shown == dict.fromkeys(STATES, 0) | {"complete": 1, "stopped": 1, "failed": 1, "paused": 1}
    ((_, labels),) = [key for key in exported if key[0] == "beats_ray_sweep_best"]
    assert dict(labels) == {"run": "first/sweep", "metric": "validation/accuracy"}
    assert list(by_label(exported, "beats_ray_sweep_best").values()) == [0.7]
    SweepGauges("first/sweep", "validation/accuracy", validations=100, mode="min").on_experiment_end(ended)
    assert list(by_label(exported, "beats_ray_sweep_best").values()) == [0.05]


def test_tune_writes_its_tables_and_no_tensorboard_files_of_its_own() -> None:
    from ray.tune.logger import CSVLoggerCallback, JsonLoggerCallback, TBXLoggerCallback
    from ray.tune.utils.callback import _create_default_callbacks

    from beats_ray.tune.gauges import NoTuneTensorBoard, SweepGauges, sweep_callbacks

    made = _create_default_callbacks(sweep_callbacks("s", "validation/accuracy", 10))
    assert {type(callback) for callback in made} >= {SweepGauges, JsonLoggerCallback, CSVLoggerCallback}
    assert [type(callback) for callback in made if isinstance(callback, TBXLoggerCallback)] == [NoTuneTensorBoard]
    for method in ("log_trial_start", "log_trial_result", "log_trial_end"):
        assert method in vars(NoTuneTensorBoard), "what is inherited writes files"
