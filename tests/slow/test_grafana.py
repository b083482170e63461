"""A real Prometheus scrapes real runs: every query of cluster/grafana and every rule gets a series; promtool agrees.

Debian's package `prometheus` has both programs: `apt-get install --no-install-recommends prometheus`.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.dashboards import GRAFANA, NEEDS_GPU, ROOT, metrics_in, panel_queries, rules
from support.hparams import hparam_rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not (shutil.which("prometheus") and shutil.which("promtool")),
        reason="prometheus and promtool (Debian's package prometheus) are not on PATH",
    ),
]

WAIT_SECONDS = 60
"""How long a series may take to Prometheus after the run that exports it has begun."""
SMALL = [
    "data.clip_seconds=1", "data.read_tasks=1", "train.warmup_steps=2", "train.global_batch_size=8",
    "train.micro_batch_size=4", "train.cpus_per_worker=1", "train.epsilon=1e-8", "train.log_every_steps=1",
]  # fmt: skip


def test_promtool_accepts_rules_and_configuration_and_every_alert_fires_where_it_should() -> None:
    alerts = yaml.safe_load((ROOT / "tests" / "support" / "alerts_test.yml").read_text())
    firing = {
        case["alertname"] for test in alerts["tests"] for case in test["alert_rule_test"] if case["exp_alerts"]
    }  # fmt: skip
    assert firing == {rule["alert"] for rule in rules() if "alert" in rule}
    for words in (
        ["check", "rules", str(GRAFANA / "alerts.yml")],
        ["check", "config", str(GRAFANA / "prometheus.yml")],
        ["test", "rules", str(ROOT / "tests" / "support" / "alerts_test.yml")],
    ):
        done = subprocess.run(["promtool", *words], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_query_of_the_dashboards_and_every_rule_gets_a_series_from_real_runs(tmp_path: Path) -> None:
    # The runs are in a process of their own: whether Ray collects metrics is settled when a process first starts it.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "OMP_NUM_THREADS": "1",
        "RAY_enable_metrics_collection": "1",  # which a private cluster of ours does not do by itself
        "RAY_metrics_report_interval_ms": "2000",
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_usage_stats_enabled": "0",
    }
    with tempfile.TemporaryDirectory(prefix="br-", dir="/tmp", ignore_cleanup_errors=True) as ray_folder:
        log = tmp_path / "runs.log"
        with log.open("wb") as out:
            runs = subprocess.Popen(
                [sys.executable, __file__, str(tmp_path), ray_folder],
                cwd=ROOT, env=environment, stdout=out, stderr=out, stdin=subprocess.PIPE,
            )  # fmt: skip
        try:
            with prometheus(tmp_path, ray_folder) as server:
                missing = wait_for_series(server, runs, log)
                assert not missing, f"{missing}\n{log.read_text(errors='replace')[-3000:]}"
                misspelt = server.values("max(ray_beats_ray_trian_loss)")
                assert not misspelt, "a query that nobody serves would pass too"
            board = json.loads((tmp_path / "run" / "sweep" / "leaderboard.json").read_text())
            trials = {row["trial_id"]: row for row in board["trials"]}
            rows = hparam_rows(tmp_path / "run")
            assert rows.keys() == {*trials, f"{tmp_path.name}/run/pretrain"}, "as many as there are runs"
            for name, row in trials.items():
                hyperparameters, metrics, _ = rows[name]
                for setting, value in row["config"].items():
                    assert hyperparameters[setting].number_value == pytest.approx(value)
                assert metrics["validation/accuracy"][1] == pytest.approx(row["validation_accuracy"])
        finally:
            assert runs.stdin is not None
            runs.stdin.close()  # which it waits for
            with contextlib.suppress(subprocess.TimeoutExpired):
                runs.wait(60)
            runs.kill()
            runs.wait()


class Server:
    """A Prometheus that runs for the time of the test."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._began = time.time()

    def values(self, query: str) -> list[float]:
        """The newest number of each series that the query has had since the server was started."""
        found = self._get("query_range", query=query, start=self._began, end=time.time(), step=3)
        numbers = [[float(text) for _, text in series["values"] if text != "NaN"] for series in found["result"]]
        return [series[-1] for series in numbers if series]

    def rules(self) -> list[dict[str, Any]]:
        """The rules as the server evaluates them."""
        found: list[dict[str, Any]] = [rule for group in self._get("rules")["groups"] for rule in group["rules"]]
        return found

    def _get(self, path: str, **parameters: Any) -> Any:
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/api/v1/{path}?{query}", timeout=30) as response:
            return json.load(response)["data"]

    def is_ready(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self._port}/-/ready", timeout=5):
            return True
        return False


@contextlib.contextmanager
def prometheus(folder: Path, ray_folder: str) -> Iterator[Server]:
    """With the repository's configuration, but for Ray's folder and a shorter interval."""
    config = yaml.safe_load((GRAFANA / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "2s", "evaluation_interval": "2s"}
    config["rule_files"] = [str(GRAFANA / name) for name in config["rule_files"]]
    (discovery,) = config["scrape_configs"][0]["file_sd_configs"]
    discovery["files"] = [file.replace("/tmp/ray", ray_folder) for file in discovery["files"]]
    discovery["refresh_interval"] = "2s"
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with (folder / "prometheus.log").open("wb") as out:
        process = subprocess.Popen(
            [
                "prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb",
                f"--web.listen-address=127.0.0.1:{port}",
            ], stdout=out, stderr=out,
        )  # fmt: skip
    try:
        server = Server(port)
        deadline = time.monotonic() + 30
        while not server.is_ready():
            assert time.monotonic() < deadline, (folder / "prometheus.log").read_text()[-2000:]
            time.sleep(0.2)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def wait_for_series(server: Server, runs: "subprocess.Popen[bytes]", log: Path) -> list[str]:
    """The queries that have no series although the runs are through; empty as soon as each has one."""
    wanted = {query: panel for panel, query in panel_queries() if not metrics_in(query) & NEEDS_GPU}
    recorded = [rule for rule in rules() if "record" in rule]
    wanted |= {rule["record"]: f"rule {rule['record']}" for rule in recorded}
    wanted |= {rule["expr"]: f"expression of rule {rule['record']}" for rule in recorded}
    through: float | None = None
    began = time.monotonic()
    while wanted:
        for query in list(wanted):
            if server.values(query):
                print(f"{time.monotonic() - began:6.1f} s  {wanted.pop(query)}", flush=True)
        if through is None and b"RUNS ARE THROUGH" in log.read_bytes():
            through = time.monotonic()
        if runs.poll() is not None or (through is not None and time.monotonic() > through + WAIT_SECONDS):
            break
        time.sleep(2)
    unhealthy = [f"rule {rule['name']}: {rule['lastError']}" for rule in server.rules() if rule["health"] == "err"]
    return [f"{panel}: {query}" for query, panel in wanted.items()] + unhealthy


# --- the runs, in a process of their own ------------------------------------------------------------------------------


def run_everything(folder: Path, ray_folder: str) -> None:
    """A data set with a broken file, streamed pre-training on two workers, and a sweep, on one local cluster."""
    import ray

    from beats_ray.config import PrepareConfig, PretrainConfig, SweepConfig, load_config
    from beats_ray.console import Console
    from beats_ray.data.prepare import prepare
    from beats_ray.data.sample import make_sample_set
    from beats_ray.models import BeatsEncoder, RandomProjectionTokenizer, encoder_config, save_model
    from beats_ray.train.jobs import run_pretrain
    from beats_ray.tune.sweep import run_sweep

    make_sample_set(folder / "clips", num_clips=50, clip_seconds=1.0)
    next(iter((folder / "clips" / "audio").glob("*.wav"))).write_bytes(b"RIFF no audio")
    save_model(RandomProjectionTokenizer(), folder / "tokenizer")
    tiny = {"num_layers": 1, "width": 32, "num_heads": 2, "ffn_width": 64}
    save_model(BeatsEncoder(encoder_config("tiny", **tiny)), folder / "encoder")
    ray.init(
        address="local", num_cpus=6, object_store_memory=300 * 2**20, include_dashboard=True, dashboard_port=0,
        log_to_driver=False, _temp_dir=ray_folder,
    )  # fmt: skip
    console = Console()
    source, data = str(folder / "clips"), str(folder / "data")
    prepare(
        PrepareConfig(kind="esc50", source=source, output=data, data={"max_bad_clip_fraction": 0.1}), console.progress
    )
    pretraining = [
        f"data.path={data}", f"output={folder}/run/pretrain", f"tokenizer={folder}/tokenizer", "encoder.preset=tiny",
        f"encoder.overrides={json.dumps(tiny)}", "predictor.num_layers=1", "train.steps=60", "train.num_workers=2",
        "train.checkpoint_every_steps=30",
    ]  # fmt: skip
    run_pretrain(load_config(PretrainConfig, None, [*SMALL, *pretraining]), console)
    trials = [name.replace("train.", "finetune.train.", 1) for name in SMALL]
    sweep = [
        f"data.path={data}", f"output={folder}/run/sweep", f"encoder={folder}/encoder", "finetune.train.steps=30",
        "finetune.validate_every_steps=5", "sweep.num_trials=3",
    ]  # fmt: skip
    run_sweep(load_config(SweepConfig, None, [*trials, *sweep]), console)


if __name__ == "__main__":
    run_everything(Path(sys.argv[1]), sys.argv[2])
    print("RUNS ARE THROUGH", flush=True)
    sys.stdin.read()
    import ray

    ray.shutdown()
