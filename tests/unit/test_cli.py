"""The command line: exit status, one clear line for a mistake, fast start, no secrets; and what the console shows."""

import io
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import click
import pytest
from rich.console import Console as RichConsole

from beats_ray import cli, console
from beats_ray.cli import cli as group
from beats_ray.config import UserError

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
SECRET = "s3cr3t-value-of-a-key"


def beats_ray(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "beats_ray", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False
    )


MISTAKES: list[tuple[list[str], str]] = [
    ([], "no command given; choose one of demo, prepare, pretrain"),
    (["pretrian"], "unknown command 'pretrian'; did you mean pretrain?"),
    (["xyzzy"], "unknown command 'xyzzy'; commands: demo, prepare"),
    (["--frob"], "--frob"),
    (["pretrain", "output=o", "train.sleps=3"], "unknown config key; did you mean train.steps?"),
    (["pretrain", "output=o", "train.steps=many"], "train.steps='many': input should be a valid integer"),
    (
        ["pretrain", "jobs/pretrain-base.yaml", "train.num_workers=3"],
        "train.global_batch_size=560 is not divisible",
    ),
    (["pretrain", "missing.yaml"], "config file missing.yaml: No such file or directory"),
    (["pretrain", "a.yaml", "b.yaml"], "takes one config file"),
    (["pretrain", "output=o"], "data.path: missing"),
    (["pretrain", "output=o", "data.path=/nowhere"], "/nowhere: not a prepared data set"),
    (["tokenize", "output=o", "data.path=ftp://x"], "ftp://x: unknown scheme"),
    (["prepare", "esc50"], "prepare takes KIND SRC DST"),
    (["prepare", "esc5", "/nowhere", "o"], "kind='esc5'"),
    (["prepare", "esc50", "/nowhere", "o"], "source=/nowhere: does not exist"),
    (["demo", "--data", "/nowhere"], "--data=/nowhere: does not exist"),
    (["demo", "--budget", "soon"], "--budget"),
    (["demo", "clips"], "a data folder is --data DIR"),
    (["predict", "/nowhere"], "FILE"),
    (["predict", "/nowhere", "a.wav"], "model=/nowhere: does not exist"),
    (["embed", "/nowhere"], "embed takes MODEL SRC DST"),
    (["embed", "/nowhere", "/nowhere", "o"], "/nowhere: not a prepared data set"),
    (["embed", "m", "d", "o", "pooling=max"], "pooling='max'"),
    (["import", "/nowhere.pt", "o"], "source=/nowhere.pt: does not exist"),
    (["import", "README.md", "o"], "README.md"),
    (["import", "README.md", "tests"], "target=tests: exists already"),
    (["import", "README.md"], "DST"),
    (["export", "/nowhere", "o.wav"], "its ending '.wav' names no format; use one of .pt, .onnx, .pt2"),
    (["export", "/nowhere", "README.md.pt"], "source=/nowhere: does not exist"),
    (["export", "tests", "o.pt"], "no published model there (no config.json)"),
    (["report", "/nowhere"], "run=/nowhere: does not exist"),
    (["report", ".", "--format", "pdf"], "'pdf' is not one of 'html', 'md', 'json'"),
    (["report", "tests"], "not a run (no run.json, no iteration-K folder, no stage and no evaluation)"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("beats-ray: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not list(ROOT.glob("o*"))


@pytest.mark.parametrize(
    ("arguments", "message"), MISTAKES[1:12:5], ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_the_real_command_answers_a_mistake_at_once(arguments: list[str], message: str) -> None:
    started = time.monotonic()
    done = beats_ray(*arguments)
    seconds = time.monotonic() - started
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert seconds < 10  # about one second on an idle machine


def test_nothing_heavy_is_imported_for_the_command_line() -> None:
    code = "import sys, beats_ray.cli; print([m for m in ('ray', 'torch', 'deepspeed', 'pyarrow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", [[], *([name] for name in group.commands)], ids=str)
def test_every_command_has_help(name: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*name, "--help"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Usage: beats-ray")
    assert err == ""


def test_help_of_a_command_lists_its_settings() -> None:
    text = beats_ray("pretrain", "--help").stdout
    assert "masking.ratio [0.75]  Fraction of a clip's patches hidden from the encoder. Paper: 0.75" in text
    assert "AdamW's decay rates. Paper (E): 0.9, 0.98\n" in text
    assert "train.global_batch_size [560]" in text
    assert "data.path" in text


def test_show_config_prints_complete_settings_without_secrets() -> None:
    keys = {name: f"{SECRET}-{name}" for name in cli.SECRET_VARIABLES}
    done = beats_ray("pretrain", "jobs/pretrain-base.yaml", "--show-config", **keys)
    assert done.returncode == 0
    assert "zero_stage: 2" in done.stdout
    assert SECRET not in done.stdout + done.stderr


def test_a_failure_is_a_traceback_and_status_1_without_secrets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(*_arguments: object) -> list[str]:
        raise RuntimeError(f"the store said no to {SECRET}")

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setattr(cli, "_load", lambda _entry: fail)
    assert cli.main(["report", str(tmp_path)]) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "the store said no to <AWS_SECRET_ACCESS_KEY>" in shown
    assert SECRET not in shown


class WrappedError(Exception):
    """As Ray wraps what a task or a worker raised."""

    def __init__(self, cause: Exception | None = None, failures: dict[int, Exception] | None = None) -> None:
        super().__init__("a long story")
        self.cause = cause
        self.worker_failures = failures


@pytest.mark.parametrize(
    "error",
    [
        UserError("x=1: bad"),
        WrappedError(cause=UserError("x=1: bad")),
        WrappedError(failures={0: UserError("x=1: bad")}),
    ],
)
def test_a_mistake_found_by_a_worker_is_one_line_and_status_2(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(*_arguments: object) -> list[str]:
        raise error

    monkeypatch.setattr(cli, "_load", lambda _entry: fail)
    assert cli.main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "beats-ray: error: x=1: bad\n"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_unwind_and_give_their_status(number: int, status: int) -> None:
    code = f"""
import os, pathlib, time
from beats_ray import cli
def job(*arguments):
    try:
        os.kill(os.getpid(), {int(number)})
        time.sleep(30)
    finally:
        print("unwound", flush=True)
cli._load = lambda entry: job
import sys; sys.argv = ["beats-ray", "report", "."]
cli.run()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=25, check=False
    )
    assert done.returncode == status
    assert done.stdout == "unwound\n"
    assert "Traceback" not in done.stderr


def test_a_job_gets_its_settings_and_its_results_are_printed_last(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    seen = {}

    def run_job(settings: object, shown: console.Console) -> list[tuple[str, str]]:
        seen["settings"] = settings
        shown.note("working")
        return [("model", "s3://bucket/model")]

    class Cluster:
        def __init__(self, settings: object) -> None: ...
        def __enter__(self) -> None:
            seen["opened"] = True

        def __exit__(self, *_: object) -> None:
            seen["closed"] = True

    monkeypatch.setattr(cli, "_load", lambda entry: Cluster if entry == "launch:ray_cluster" else run_job)
    monkeypatch.setattr(cli, "_check_place", lambda _settings, _need: None)
    assert cli.main(["finetune", str(ROOT / "jobs/finetune-esc50.yaml"), "train.seed=7"]) == 0
    assert seen["settings"].train.seed == 7
    assert seen["closed"]
    assert capsys.readouterr().out.splitlines()[-1] == "model  s3://bucket/model"


def test_every_command_but_the_demo_has_an_entry_script() -> None:
    local = {"demo", "import", "export", "check-cluster"}  # these run on the machine at hand, without a cluster
    commands = set(group.commands) - local
    scripts = {path: re.search(r'run\(\["([a-z-]+)"', path.read_text()) for path in (ROOT / "jobs").glob("*.py")}
    assert {match.group(1) for match in scripts.values() if match} == commands
    assert not {path.stem for path in scripts} & sys.stdlib_module_names  # the script's folder comes first on sys.path


def test_pins_cover_every_dependency_and_name_no_registry() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {re.split(r"[\[<>=~]", requirement)[0].lower() for requirement in wanted}
    text = (ROOT / "constraints.txt").read_text()
    pins = {line.split("==")[0] for line in text.splitlines() if re.match(r"[a-z]", line)}
    assert names <= pins
    assert "torch==2.11.0\n" in text
    assert "torchaudio==2.11.0\n" in text
    assert "://" not in text


# --- console ----------------------------------------------------------------------------------------------------------


def recording(terminal: bool) -> tuple[console.Console, io.StringIO]:
    stream = io.StringIO()
    return console.Console(RichConsole(file=stream, force_terminal=terminal, width=100, highlight=False)), stream


def test_progress_in_a_log_is_a_plain_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    shown, stream = recording(terminal=False)
    shown.stage("pretrain")
    for step in range(101):
        shown.progress(step * 16, 1600, loss=5.25)
        clock[0] += 0.5
    lines = stream.getvalue().splitlines()
    assert lines[0].strip() == "[    0 s] pretrain"
    assert 5 <= len(lines) - 1 <= 7
    assert lines[1].split("  ")[-4:] == ["320/1,600 clips", "32.0 clips/s", "40 s left", "loss 5.250"]
    assert "1,600/1,600 clips" in lines[-1]
    assert "\x1b" not in stream.getvalue()


def test_a_resumed_job_counts_its_speed_from_where_it_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    shown, stream = recording(terminal=False)
    shown.progress(1000, 1100)
    clock[0] += 20
    shown.progress(1050, 1100)
    assert "2.5 clips/s  20 s left" in stream.getvalue()


def test_progress_on_a_terminal_renews_one_line() -> None:
    shown, stream = recording(terminal=True)
    for done in range(0, 110, 10):
        shown.progress(done, 100)
    shown.close()
    text = stream.getvalue()
    assert text.count("\n") - text.count("\x1b[1A") == 1  # lines begun, less those gone back to
    assert "100/100 clips" in click.unstyle(text).splitlines()[-1]


def test_text_in_brackets_and_long_paths_are_shown_as_they_are() -> None:
    shown, stream = recording(terminal=False)
    path = "s3://bucket/" + "deep/" * 40
    shown.note("[bold] data.folds=[1]")
    shown.written([("model", path)])
    shown.table("Leaderboard", ["iteration", "probe"], [["[1]", 0.79731], ["none", None]])
    text = stream.getvalue()
    assert "[bold] data.folds=[1]" in text
    assert path in text
    assert "0.797" in text
    assert "[1]" in text
