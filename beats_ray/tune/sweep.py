"""A sweep: Ray Tune looks for the fine-tuning settings that do best on the validation part of the data set.

    run_sweep(config, console)

    OUTPUT/leaderboard.json          every trial, the best first; while the sweep runs, too (`leaderboard.py`)
    OUTPUT/model                     the model of the best trial that ran to its end
    OUTPUT/reproduce.yaml            fine-tunes it again: beats-ray finetune OUTPUT/reproduce.yaml
    OUTPUT/trials/ID/                each trial's runs (`trial.py`)
    OUTPUT/tune/                     Ray Tune's own state, from which the same command goes on
    OUTPUT/budget.json               what it has taken so far

Decoded clips are read once for all trials. What each trial is, who proposes it, who stops it and where it runs is in
`trial.py`, `search.py`, `schedulers.py` and `placement.py`. The test part is looked at once by each finished run and
chooses nothing.
"""

import logging
import os
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from beats_ray.config import ConfigError, FinetuneSettings, SweepConfig, SweepSettings, UserError
from beats_ray.console import Console
from beats_ray.data.manifest import DatasetManifest, read_manifest
from beats_ray.data.storage import Place, StorageError, open_place
from beats_ray.identity import content_keys, stage_identity
from beats_ray.inference import check_published
from beats_ray.stage import check_output, is_complete, reopen, run_stage
from beats_ray.telemetry import run_name
from beats_ray.train.jobs import Written, load_cache
from beats_ray.tune.leaderboard import LEADERBOARD_FILE, objectives_of
from beats_ray.tune.placement import TrialNeeds, cluster_trials, trial_needs
from beats_ray.tune.space import check_space
from beats_ray.tune.trial import Trials, check_trials, run_place, run_places, run_trial, trial_config, validations_of
from beats_ray.tune.warm_start import read_known

NAME = "trials"
STATE_SECONDS, REMOTE_STATE_SECONDS = "2", "10"
"""Between two saves of Tune's state: trials begun since then would be forgotten with a driver that is killed."""
METRICS = ("validation/loss", "validation/accuracy")
"""What each trial reports of its validation part; of several labels a clip, `validation/mean_average_precision` too."""


def run_sweep(config: SweepConfig, console: Console, keys: Mapping[str, str] | None = None) -> Written:
    """Runs (or resumes) the sweep; writes `output/leaderboard.json` and the best model to `output/model`.

    keys: of the inputs, as part of the sweep's identity; by their content where not given.
    """
    output = open_place(config.output)
    manifest = read_manifest(open_place(config.data.path))
    if not is_complete(output):
        check_inputs(config, manifest)
        check_search(config.finetune, config.sweep)
        _count_trials(config, _needs(config, manifest))
    identity = stage_identity(config, content_keys(config) if keys is None else keys)
    if _has_more_budget(config, manifest, output):
        check_output(output, identity)
        reopen(output)
    run_stage(output, identity, lambda: _sweep(config, manifest, output, console))
    show_best((output / LEADERBOARD_FILE).read_json(), console)
    return [("best model", (output / "model").uri), ("leaderboard", (output / LEADERBOARD_FILE).uri)]


# --- checks -----------------------------------------------------------------------------------------------------------


def check_sweep(finetune: FinetuneSettings, sweep: SweepSettings) -> None:
    """ConfigError for a space that does not fit the settings, and for trials that the cluster can never run."""
    check_search(finetune, sweep)
    cluster_trials(_cached_needs(finetune, sweep), 1)


def check_search(finetune: FinetuneSettings, sweep: SweepSettings) -> None:
    """ConfigError for settings that no cluster could run a sweep with."""
    if not finetune.folds.has_validation:
        raise ConfigError(
            "finetune.folds keeps no validation part, which trials are compared on; name validation_fold, "
            "validation_split or a validation_fraction above 0"
        )
    _cached_needs(finetune, sweep)
    check_space(sweep, finetune)
    if sweep.scheduler != "pbt":
        return
    validations = -(-finetune.train.steps // finetune.validate_every_steps)
    if validations <= sweep.grace_validations:
        raise ConfigError(
            f"sweep.grace_validations={sweep.grace_validations}: members would never exchange weights in their "
            f"{validations} validations; use less, or a lower finetune.validate_every_steps"
        )


def check_inputs(config: SweepConfig, manifest: DatasetManifest) -> None:
    """UserError for encoders, folds, metrics, an earlier sweep or a budget that the sweep could not end with."""
    from beats_ray.train.flops import step_flops_per_clip
    from beats_ray.tune.budget import check_budget

    published = {
        name: check_published(open_place(path), "encoder" if config.encoder else f"encoders.{name}", ("encoder",))
        for name, path in config.compared.items()
    }
    _check_alike(config, published)
    if len(published) > 1 and config.sweep.scheduler == "pbt":
        raise ConfigError(
            "encoders: sweep.scheduler=pbt changes settings as it goes, so that encoders would not be compared on the "
            "same ones; use another scheduler, or a sweep for each encoder"
        )
    check_trials(config, manifest)
    known = [*METRICS, *(["validation/mean_average_precision"] if manifest.multi_label else [])]
    for metric in config.sweep.objectives:
        if metric not in known:
            raise ConfigError(f"sweep.objectives.{metric}: no trial reports it; use {', '.join(known)}")
    read_known(config.sweep, next(iter(objectives_of(config, manifest))))
    first = trial_config(config, "check", {})
    description = next(iter(published.values()))
    flops = step_flops_per_clip("finetune", first, description, len(manifest.label_names))
    clips = first.train.steps * first.train.global_batch_size * config.sweep.repeats
    check_budget(config.sweep, _cached_needs(config.finetune, config.sweep), float(flops * clips))


def _check_alike(config: SweepConfig, published: Mapping[str, Mapping[str, Any]]) -> None:
    """Encoders of another size or kind would not be compared on the same settings: a layer decay means another one."""
    first_name, *names = published
    for name in names:
        ours, first = (published[one]["config"]["encoder"] for one in (name, first_name))
        for key in ("num_layers", "width", "num_heads", "ffn_width", "patch_size"):
            if ours.get(key) != first.get(key):
                raise ConfigError(
                    f"encoders.{name}={config.encoders[name]}: has {key}={ours.get(key)}, {first_name} has "
                    f"{first.get(key)}; compare encoders of one architecture, and sweep others on their own"
                )


def _needs(config: SweepConfig, manifest: DatasetManifest) -> TrialNeeds:
    """Of each trial, by whether the cluster's object store can hold the decoded clips."""
    from beats_ray.data.cache import is_cached

    is_streamed = not is_cached(manifest, config.data)
    return trial_needs(config.sweep, config.finetune.train, config.data, is_streamed)


def _count_trials(config: SweepConfig, needs: TrialNeeds) -> int:
    return cluster_trials(needs, config.sweep.max_concurrent_trials)


def _cached_needs(finetune: FinetuneSettings, sweep: SweepSettings) -> TrialNeeds:
    return trial_needs(sweep, finetune.train, SweepConfig(output="-").data, is_streamed=False)


# --- the sweep --------------------------------------------------------------------------------------------------------


def _sweep(config: SweepConfig, manifest: DatasetManifest, output: Place, console: Console) -> None:
    from beats_ray.data.stream import start_bookkeepers
    from beats_ray.tune.budget import Budget, BudgetUsedUp
    from beats_ray.tune.live import LiveBoard

    needs = _needs(config, manifest)
    most = _count_trials(config, needs)
    cache = load_cache(config.data, manifest) if needs.reading_cpus == 0 else None
    if cache is None:  # reading has them start otherwise
        start_bookkeepers()
    trials = Trials(config, manifest, cache, needs, attempt=uuid.uuid4().hex, side_by_side=most)
    budget = Budget(config.sweep, needs, output)
    board = LiveBoard(config, manifest, budget)
    found = None
    try:
        found = _tune(trials, output, budget, board, most).trials
    except BudgetUsedUp:
        pass  # the board says of which trials
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C, or what the command line makes of SIGTERM
        _end_well(board, console)
        raise
    finally:
        budget.write()
    _publish(config, output, board.write("complete", found))


def _has_more_budget(config: SweepConfig, manifest: DatasetManifest, output: Place) -> bool:
    """Whether the sweep ended with its budget, and may take more now."""
    from beats_ray.tune.budget import Budget

    if not is_complete(output) or (output / LEADERBOARD_FILE).read_json()["budget"]["used_up"] is None:
        return False
    return Budget(config.sweep, _needs(config, manifest), output).used_up is None


def _tune(trials: Trials, output: Place, budget: Any, board: Any, most: int) -> Any:
    """Ray Tune's run of all trials, gone on with where there is one."""
    from ray import tune
    from ray.tune.search import BasicVariantGenerator

    from beats_ray.tune.gauges import sweep_callbacks
    from beats_ray.tune.live import ReleaseWorkers, read_histories
    from beats_ray.tune.schedulers import build_scheduler, replay
    from beats_ray.tune.search import SettingsSearch, num_settings
    from beats_ray.tune.space import tune_domains

    config, sweep = trials.config, trials.config.sweep
    objectives = objectives_of(config, trials.manifest)
    metric, mode = next(iter(objectives.items()))
    encoders = tuple(config.compared)
    total = validations_of(trial_config(config, "check", {})) * sweep.repeats
    settings: dict[str, Any] = {}
    search: Any
    if sweep.scheduler == "pbt":  # Ray's takes no searcher: the first members are drawn, and then they change
        settings = tune_domains(sweep.space)
        search = BasicVariantGenerator(
            points_to_evaluate=[dict(point) for point in sweep.start], max_concurrent=most, random_state=sweep.seed
        )
    else:
        search = SettingsSearch(sweep, objectives, total, encoders, read_known(sweep, metric))
    scheduler = build_scheduler(sweep, total, encoders)
    scheduler.set_search_properties(metric, mode)
    replay(scheduler, sweep, read_histories(output))
    folder = output / "tune"
    for name in ("ray.tune.tune", "ray.tune.execution.tune_controller"):  # of failures the board tells, in one line
        logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C is ours, on a cluster that was joined too
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = REMOTE_STATE_SECONDS if folder.is_remote else STATE_SECONDS
    return tune.run(
        tune.with_resources(tune.with_parameters(run_trial, trials=trials), trials.needs.of_tune),
        name=NAME,
        config=settings,
        metric=None,  # searcher and scheduler have it
        num_samples=num_settings(sweep) * len(encoders),
        search_alg=search,
        scheduler=scheduler,
        stop=budget,
        callbacks=[board, ReleaseWorkers(config), *sweep_callbacks(run_name(output.uri), metric, total, mode)],
        max_concurrent_trials=None if sweep.scheduler == "pbt" else most,
        storage_path=folder.path,
        storage_filesystem=folder.keyless_filesystem,
        trial_name_creator=lambda trial: str(trial.trial_id),
        trial_dirname_creator=lambda trial: str(trial.trial_id),
        max_failures=config.finetune.train.max_failures,  # of nodes that are lost: see `failure.py`
        reuse_actors=not trials.needs.uses_ray_train,  # whose run does not end when its trial is stopped
        raise_on_failed_trial=False,
        verbose=0,
        resume_config=_resume_config(folder),
    )


def _resume_config(folder: Place) -> Any:
    """How Tune goes on where it has state of this sweep: trials that ended stay, the others run. Else None."""
    from ray.tune import ResumeConfig

    if not any(name.startswith("experiment_state") for name in (folder / NAME).sizes()):
        return None
    kind: Any = ResumeConfig.ResumeType
    return ResumeConfig(finished=kind.SKIP, unfinished=kind.RESUME, errored=kind.RESTART)


def _publish(config: SweepConfig, output: Place, board: Mapping[str, Any]) -> None:
    """Copies the best model, and drops the checkpoints that nothing will go on from.

    UserError where the budget was used up before any trial ran to its end, RuntimeError where all failed.
    """
    best, rows, used_up = board["best"], board["trials"], board["budget"]["used_up"]
    if best is None and used_up and (not rows or any(row["stopped_by"] == "budget" for row in rows)):
        raise UserError(
            f"{used_up}={getattr(config.sweep, used_up.removeprefix('sweep.')):g}: used up before any trial of "
            f"{output.uri} ran to its end; raise it, and the same command goes on"
        )
    if best is None:
        failures = [f"{row['failure']['kind']}: {row['failure']['reason']}" for row in rows if row["failure"]]
        why = sorted(set(failures)) or ["all were stopped"]
        raise RuntimeError(f"no trial of {output.uri} ran to the end: {'; '.join(why)}")
    (run_place(config, best["trial_id"]) / "model").copy_to(output / "model")
    for row in rows:
        if row["trial_id"] != best["trial_id"] and row["stopped_by"] != "budget":
            for place in run_places(config, row["trial_id"]):
                (place / "checkpoints").delete()


def _end_well(board: Any, console: Console) -> None:
    """Has the trials that run make a checkpoint, and says what was best so far."""
    board.checkpoint_running()
    console.note("interrupted; the same command goes on")
    with suppress(StorageError):
        show_best(board.write("interrupted"), console)


def show_best(board: Mapping[str, Any], console: Console) -> None:
    """Says what is best, how encoders compare, and how to repeat it."""
    rows: Sequence[Mapping[str, Any]] = board["trials"]
    name = board["metric"].removeprefix("validation/")
    shown, best = name.replace("_", " "), board["best"]
    stopped, failed = (sum(test(row) for row in rows) for test in (_was_stopped, _has_failed))
    ends = f"{stopped} stopped early" + (f", {failed} failed" if failed else "")
    if best is None:
        console.note(f"{len(rows)} trials ({ends}), none has run to its end")
        return
    test_value = best[f"test_{name}"]
    tested = float("nan") if test_value is None else test_value
    console.note(
        f"best of {len(rows)} trials ({ends}): validation {shown} {best[f'validation_{name}']:.3f}, "
        f"test {shown} {tested:.3f}"
    )
    for row in [row for row in rows if row.get("failure")]:
        console.note(f"trial {row['trial_id']} failed ({row['failure']['kind']}): {row['failure']['reason']}")
    for comparison in board.get("comparisons", []):
        console.note(comparison["says"])
    if board.get("reproduce"):
        console.note(f"again: {board['reproduce']['command']}")


def _was_stopped(row: Mapping[str, Any]) -> bool:
    return bool(row["stopped_early"])


def _has_failed(row: Mapping[str, Any]) -> bool:
    return bool(row["status"] == "failed")
