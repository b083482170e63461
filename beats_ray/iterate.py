"""The BEATs loop (paper section 3): tokenizer, labels, pre-training, sweep, again; resumable and addressed by content.

    beats-ray iterate CONFIG.yaml --plan       what would run, and why: see `iterate_plan.py`
    beats-ray iterate CONFIG.yaml

Every stage (`stages.py`) has its own folder and is done once. Started again, a run goes on with the first stage that is
not complete, and a training stage in its newest checkpoint. With a changed setting or data set those stages run again
that depend on it; what they had made before is kept aside (`aside.py`), and serves again when the setting does.
"""

import datetime as dt
from typing import Any

from beats_ray import __version__
from beats_ray.aside import make_ready
from beats_ray.config import (
    CrossValidateConfig,
    DistillConfig,
    EvaluateConfig,
    FinetuneConfig,
    IterateConfig,
    PretrainConfig,
    SweepConfig,
    TokenizeConfig,
    fingerprint,
)
from beats_ray.console import Console
from beats_ray.data.storage import Place, open_place
from beats_ray.downstream import show_results, write_results
from beats_ray.identity import run_identity
from beats_ray.iterate_plan import inspect
from beats_ray.stage import differences, is_complete, run_stage
from beats_ray.stages import Stage
from beats_ray.train.jobs import Written

RUN_FILE = "run.json"


def run_iterate(config: IterateConfig, console: Console) -> Written:
    """Runs (or goes on with) all iterations; writes the models, the leaderboard and the report below `output`."""
    from beats_ray.report import write_report

    found = inspect(config)
    for mistake in found.mistakes:
        raise mistake
    check_plan(config, is_labelled=bool(found.stages[0].manifest.label_names))
    run = open_place(config.output)
    record_run(run, config)
    for stage in found.stages:
        make_ready(stage.folder, stage.key)
        if not is_complete(stage.folder):
            console.stage(f"iteration {stage.iteration}: {stage.title}" if stage.iteration else stage.title)
            _run(stage, config, console)
        if stage.task:
            write_results(run, found.stages)
    show_results(found.stages, console)
    return [("encoder", (run / f"iteration-{config.iterations}" / "pretrain" / "model").uri), *write_report(run.uri)]


def check_plan(config: IterateConfig, is_labelled: bool) -> None:
    """ConfigError where a stage asks for more than the cluster has, or a sweep's settings could not run.

    is_labelled: whether the data set has labels; without them, and without tasks, nothing is swept.
    """
    from beats_ray.inference import check_actors
    from beats_ray.launch import check_fits
    from beats_ray.tune.sweep import check_sweep

    check_actors(config.inference.num_workers, config.inference.use_gpu, "inference.")
    check_fits(config.pretrain.train, config.data)
    if config.iterations > 1 or config.start.encoder:
        check_fits(config.distill.train, config.data)
    if is_labelled and not config.tasks:
        check_sweep(config.finetune, config.sweep)
    for task in config.tasks.values():
        if task.protocol == "sweep":
            check_sweep(task.finetune, task.sweep)
        elif task.protocol != "probe":
            check_fits(task.finetune.train, task.data)


def record_run(run: Place, config: IterateConfig) -> None:
    """Writes `run.json`: the settings as they are now, when the run began, and what was changed since."""
    identity = run_identity(config)
    now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    try:
        found = (run / RUN_FILE).read_json()
    except FileNotFoundError:
        found = {}
    changes = list(found.get("changes", []))
    if found and found.get("fingerprint") != fingerprint(identity):
        old = found.get("config", {})
        changes.append({"time": now, "settings": [list(one) for one in differences(old, identity)]})
    record = {
        "name": run.name,
        "started": found.get("started", now),
        "version": __version__,
        "fingerprint": fingerprint(identity),
        "data": config.data.path,
        "config": identity,
        "changes": changes,
    }
    if record != found:
        (run / RUN_FILE).write_json(record)


def _run(stage: Stage, config: IterateConfig, console: Console) -> None:
    from beats_ray.cross_validate import run_cross_validate
    from beats_ray.evaluate import run_evaluate
    from beats_ray.tokenize import run_tokenize
    from beats_ray.train.jobs import run_distill, run_finetune, run_pretrain
    from beats_ray.tune.sweep import run_sweep

    job = stage.job
    if isinstance(job, DistillConfig):
        run_distill(job, console, stage.inputs)
    elif isinstance(job, PretrainConfig):
        run_pretrain(job, console, stage.inputs)
    elif isinstance(job, SweepConfig):
        run_sweep(job, console, stage.inputs)
    elif isinstance(job, FinetuneConfig):
        run_finetune(job, console, stage.inputs)
    elif isinstance(job, CrossValidateConfig):
        run_stage(stage.folder, stage.identity, lambda: run_cross_validate(job, console))
    elif isinstance(job, TokenizeConfig):
        run_stage(stage.folder, stage.identity, lambda: run_tokenize(job, console))
    elif isinstance(job, EvaluateConfig):
        run_stage(stage.folder, stage.identity, lambda: run_evaluate(job, console))
    elif stage.name == "baselines":
        run_stage(stage.folder, stage.identity, lambda: _baselines(stage, config))
    else:
        run_stage(stage.folder, stage.identity, lambda: _publish(stage, config))


def _baselines(stage: Stage, config: IterateConfig) -> None:
    from beats_ray.baselines import run_baselines

    result = run_baselines(open_place(config.data.path), config.inference.num_workers)
    (stage.folder / "baselines.json").write_json(result)


def _publish(stage: Stage, config: IterateConfig) -> None:
    """A model that is made on the spot."""
    from beats_ray.inference import publish

    publish(_build(stage, config), stage.folder / "model")


def _build(stage: Stage, config: IterateConfig) -> Any:
    import torch

    from beats_ray.inference import load_published
    from beats_ray.models import BeatsEncoder
    from beats_ray.train.pretrain import build_random_projection

    if stage.name == "pretrain":
        torch.manual_seed(config.pretrain.train.seed)
        settings = config.pretrain.encoder
        return BeatsEncoder(settings.resolve(), settings.positions)
    if config.start.tokenizer:
        return load_published(open_place(config.start.tokenizer))
    return build_random_projection(config.random_projection)
