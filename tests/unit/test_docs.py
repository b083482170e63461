"""What the README and docs show runs: Python examples as they stand, and every command of the command line exists."""

import inspect
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from beats_ray.bench.cases import ABOUT, BENCHES
from beats_ray.cli import cli
from beats_ray.config import BenchConfig, load_config
from beats_ray.models import (
    AudioClassifier,
    BeatsEncoder,
    ClassifierConfig,
    QuantizerConfig,
    SelfDistilledTokenizer,
    TokenizerConfig,
    encoder_config,
    save_released,
)

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TINY = encoder_config("tiny", num_layers=1)


@pytest.fixture
def released_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files under the names that the examples load."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = [f"/m/{index:05}" for index in range(5)]
    tokenizer = SelfDistilledTokenizer(TokenizerConfig(encoder=TINY, quantizer=QuantizerConfig(num_codes=8)))
    tokenizer.train()(torch.randn(2, 64, 128))
    tokenizer.quantizer.end_step(moved=True)
    save_released(BeatsEncoder(TINY), "BEATs_iter3.pt")
    save_released(
        AudioClassifier(BeatsEncoder(TINY), ClassifierConfig(num_classes=5), names),
        "BEATs_iter3_finetuned_on_AS2M_cpt1.pt",
    )
    save_released(tokenizer, "Tokenizer_iter3.pt")


def python_blocks() -> list[tuple[str, str]]:
    return [
        (f"{page.name}-{number}", block)
        for page in PAGES
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    ]


@pytest.mark.parametrize("code", [code for _, code in python_blocks()], ids=[name for name, _ in python_blocks()])
def test_a_python_example_runs(code: str, released_files: None, capsys: pytest.CaptureFixture[str]) -> None:
    wave = 0.1 * torch.randn(2, 16_000)
    found: dict[str, object] = {"wave": wave, "padding_mask": torch.zeros_like(wave, dtype=torch.bool)}
    exec(compile(code, "example", "exec"), found)  # noqa: S102  it is our own text
    features, is_pad = found["features"], found["is_pad"]
    assert isinstance(features, torch.Tensor)
    assert isinstance(is_pad, torch.Tensor)
    assert features.shape == (*is_pad.shape, TINY.width)
    if "classifier" in code:
        assert re.search(r"\['/m/\d+', '/m/\d+', '/m/\d+'\]", capsys.readouterr().out)


def test_the_readme_has_an_example() -> None:
    assert any(name.startswith("README") for name, _ in python_blocks())


def test_every_command_in_the_pages_exists() -> None:
    seen = set()
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        inline = [" ".join(one.split()) for one in re.findall(r"`(beats-ray\s[a-z][^`]+)`", text)]
        jobs = [f"beats-ray bench {rest}" for rest in re.findall(r"python jobs/bench\.py (.*)$", text, re.MULTILINE)]
        for line in re.findall(r"^\s*(?:\$ )?(beats-ray .*)$", text, re.MULTILINE) + inline + jobs:
            words = shlex.split(line, comments=True)
            seen.add(words[1])
            assert words[1] in cli.commands, f"{page.name}: {line}"
            for option in [word for word in words[2:] if word.startswith("--")]:
                names = [name for one in cli.commands[words[1]].params for name in one.opts]
                assert option in [*names, "--help"], f"{page.name}: {line}"
            if words[1] == "bench" and len(words) > 2 and not words[2].startswith("-"):
                assert words[2] in ABOUT, f"{page.name}: {line}"
            if words[1] == "bench" and len(words) > 2 and words[2] in BENCHES:
                config = load_config(BenchConfig, None, [word for word in words[3:] if "=" in word], name=words[2])
                assert set(config.cases) <= {case.name for case in BENCHES[words[2]]}, f"{page.name}: {line}"
    assert {"prepare", "iterate", "predict", "embed", "import", "export", "bench"} <= seen


def test_ray_job_stop_waits_for_the_last_checkpoint_of_a_run_that_is_submitted_as_shown() -> None:
    from ray.dashboard.modules.job import job_manager, job_supervisor

    from beats_ray.train.jobs import NOTICE_SECONDS

    variable = "RAY_JOB_STOP_WAIT_TIME_S"
    assert variable in inspect.getsource(job_supervisor.JobSupervisor.run)  # of the Ray that is installed
    for page in (ROOT / "docs" / "training.md", ROOT / "jobs" / "README.md"):
        shown = re.findall(r"^ *(ray job submit .*--runtime-env-json .*)$", page.read_text(), re.MULTILINE)
        assert shown, page
        for line in shown:
            words = shlex.split(line)
            given = json.loads(words[words.index("--runtime-env-json") + 1])
            seen = job_manager.JobManager._get_supervisor_runtime_env(None, given, "job")  # of who waits
            assert int(seen["env_vars"][variable]) > NOTICE_SECONDS + 10  # it closes the cluster afterwards
