"""A sweep: Ray Tune looks for the fine-tuning settings that do best on the validation part of the data set.

Every trial runs the training loop in its Tune actor, so a trial's reservation is all it needs and a sweep cannot
deadlock. Decoded clips are read once for all trials. ASHA stops trials that fall behind; the best of those that
ran to the end is published to `output/model`. The test part is looked at once by each finished trial and chooses
nothing.
"""

import json
from collections.abc import Mapping
from typing import Any

from beats_ray.config import (
    ConfigError,
    FinetuneConfig,
    FinetuneSettings,
    SweepConfig,
    SweepSettings,
    TrainSettings,
    replace,
    section_fields,
)
from beats_ray.console import Console
from beats_ray.data.manifest import DatasetManifest, read_manifest
from beats_ray.data.storage import Place, open_place
from beats_ray.identity import content_keys, stage_identity
from beats_ray.inference import check_published
from beats_ray.stage import is_complete, run_stage
from beats_ray.telemetry import run_name
from beats_ray.train.checks import check_folds
from beats_ray.train.held_out import clips_in, find_parts
from beats_ray.train.jobs import Run, Written, load_cache
from beats_ray.tune.space import check_space, tune_domains


def run_sweep(config: SweepConfig, console: Console, keys: Mapping[str, str] | None = None) -> Written:
    """Runs (or resumes) the sweep; writes `output/leaderboard.json` and the best model to `output/model`.

    keys: of the inputs, as part of the sweep's identity; by their content where not given.
    """
    output = open_place(config.output)
    manifest = read_manifest(open_place(config.data.path))
    if not is_complete(output):
        check_published(open_place(config.encoder), "encoder", ("encoder",))
        check_sweep(config.finetune, config.sweep)
        check_folds(trial_config(config, "check", {}), manifest)
    identity = stage_identity(config, content_keys(config) if keys is None else keys)
    run_stage(output, identity, lambda: _sweep(config, manifest, output))
    board = (output / "leaderboard.json").read_json()
    best, stopped = board["best"], sum(row["stopped_early"] for row in board["trials"])
    validation, test = (best[f"{part}_{manifest.main_metric}"] for part in ("validation", "test"))
    shown, tested = manifest.main_metric.replace("_", " "), float("nan") if test is None else test
    console.note(
        f"best of {len(board['trials'])} trials ({stopped} stopped early): validation {shown} {validation:.3f}, "
        f"test {shown} {tested:.3f}"
    )
    return [("best model", (output / "model").uri), ("leaderboard", (output / "leaderboard.json").uri)]


def check_sweep(finetune: FinetuneSettings, sweep: SweepSettings) -> None:
    """ConfigError for a space that does not fit the settings, and for trials that the cluster can never run."""
    import ray

    check_search(finetune, sweep)
    total = ray.cluster_resources()
    for name, needed in _trial_resources(finetune.train).items():
        if needed > total.get(name, 0.0):
            raise ConfigError(
                f"a trial needs {needed:g} {name} (finetune.train.cpus_per_worker, use_gpu); the cluster has "
                f"{total.get(name, 0.0):g}; lower it or use a larger cluster"
            )


def check_search(finetune: FinetuneSettings, sweep: SweepSettings) -> None:
    """ConfigError for settings that no cluster could run a sweep with."""
    if finetune.train.num_workers != 1:
        raise ConfigError(
            f"finetune.train.num_workers={finetune.train.num_workers}: a trial has one worker; use 1 and raise "
            "sweep.max_concurrent_trials"
        )
    if not finetune.folds.has_validation:
        raise ConfigError(
            "finetune.folds keeps no validation part, which trials are compared on; name validation_fold, "
            "validation_split or a validation_fraction above 0"
        )
    check_space(sweep.space, finetune)


def trial_config(config: SweepConfig, trial_id: str, parameters: dict[str, Any]) -> FinetuneConfig:
    """The fine-tuning run that one trial is."""
    settings = replace(config.finetune, parameters)
    return FinetuneConfig(
        output=f"{config.output}/trials/{trial_id}",
        data=config.data,
        encoder=config.encoder,
        ray=config.ray,
        **section_fields(settings),
    )


def _sweep(config: SweepConfig, manifest: DatasetManifest, output: Place) -> None:
    from ray import tune

    cache = load_cache(config.data, manifest)
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, config=config, manifest=manifest, cache=cache),
        _trial_resources(config.finetune.train),
    )
    folder = output / "tune"
    path = f"{folder.path}/trials"
    if tune.Tuner.can_restore(path, storage_filesystem=folder.keyless_filesystem):
        tuner = tune.Tuner.restore(
            path, trainable, storage_filesystem=folder.keyless_filesystem, resume_unfinished=True, restart_errored=True
        )
    else:
        tuner = _new_tuner(config, manifest, trainable, folder)
    results = tuner.fit()
    board = leaderboard(config, manifest, results)
    (output / "leaderboard.json").write_json(board)
    if board["best"] is None:
        errors = sorted({str(error).strip().splitlines()[-1] for error in results.errors})
        raise RuntimeError(f"no trial of {output.uri} ran to the end: {'; '.join(errors) or 'all were stopped'}")
    (output / "trials" / board["best"]["trial_id"] / "model").copy_to(output / "model")
    for row in board["trials"]:  # the models of the others are of no further use
        if row["trial_id"] != board["best"]["trial_id"]:
            (output / "trials" / row["trial_id"] / "checkpoints").delete()


def _new_tuner(config: SweepConfig, manifest: DatasetManifest, trainable: Any, folder: Place) -> Any:
    import optuna
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    from beats_ray.tune.gauges import sweep_callbacks

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    settings, steps = config.sweep, config.finetune.train.steps
    validations = max(1, -(-steps // config.finetune.validate_every_steps))
    search = OptunaSearch(seed=settings.seed) if settings.search == "optuna" else None
    return tune.Tuner(
        trainable,
        param_space=tune_domains(settings.space),
        tune_config=tune.TuneConfig(
            metric=f"validation/{manifest.main_metric}",
            mode="max",
            num_samples=settings.num_trials,
            max_concurrent_trials=settings.max_concurrent_trials,
            search_alg=search,
            scheduler=ASHAScheduler(
                time_attr="validations",
                max_t=validations,
                grace_period=min(settings.grace_validations, validations),
                reduction_factor=settings.reduction_factor,
            ),
            reuse_actors=True,
            trial_name_creator=lambda trial: str(trial.trial_id),
            trial_dirname_creator=lambda trial: str(trial.trial_id),
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=folder.path,
            storage_filesystem=folder.keyless_filesystem,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=0),
            callbacks=sweep_callbacks(run_name(config.output), f"validation/{manifest.main_metric}", steps),
        ),
    )


def _trial_resources(train: TrainSettings) -> dict[str, float]:
    return {"CPU": train.cpus_per_worker} | ({"GPU": 1.0} if train.use_gpu else {})


def run_trial(parameters: dict[str, Any], config: SweepConfig, manifest: DatasetManifest, cache: Any) -> None:
    """One trial, in its Tune actor."""
    from ray import tune

    from beats_ray.train.worker import train_trial

    trial_id = tune.get_context().get_trial_id()
    settings = trial_config(config, trial_id, parameters)
    identity = stage_identity(settings, {})  # the sweep's own has the keys
    train_trial(Run("finetune", settings, manifest, open_place(settings.output), identity, cache), tune.report)


def leaderboard(config: SweepConfig, manifest: DatasetManifest, results: Any) -> dict[str, Any]:
    """All trials, the best on the validation part first; `best` is the first of those that ran to the end.

    A row has `validation_NAME` and `test_NAME` of the data set's main metric; `metric` is `validation/NAME`, and
    `test_clips` how many clips the test part has.
    """
    name = manifest.main_metric
    metric = f"validation/{name}"
    rows = []
    for result in results:
        metrics = result.metrics or {}
        frame = result.metrics_dataframe
        steps = int(metrics.get("step", 0))
        rows.append(
            {
                "trial_id": str(metrics.get("trial_id") or result.path.rsplit("/", 1)[-1]),
                "config": result.config,
                f"validation_{name}": metrics.get(metric),
                f"test_{name}": metrics.get(f"test/{name}"),
                "steps": steps,
                "stopped_early": result.error is None and steps < config.finetune.train.steps,
                "status": "failed" if result.error else "complete",
                "history": []
                if frame is None
                else frame[[column for column in ("step", metric, "train/loss") if column in frame]].to_dict("records"),
            }
        )
    # Trials that do equally well come in the order of their settings: their names are drawn anew in each run.
    rows.sort(key=lambda row: (-(row[f"validation_{name}"] or 0.0), json.dumps(row["config"], sort_keys=True)))
    finished = [row for row in rows if row["status"] == "complete" and not row["stopped_early"]]
    parts = find_parts(trial_config(config, "check", {}), manifest)
    tested = clips_in(manifest, parts.test) if parts.test else 0
    best = finished[0] if finished else None
    return {"metric": metric, "trials": rows, "best": best, "test_clips": tested}
