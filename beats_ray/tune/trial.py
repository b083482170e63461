"""What one trial is: the fine-tuning runs of one drawn setting on one encoder, and what it tells Ray Tune.

    TRIALS/ID/                       the run, where there is one
    TRIALS/ID/repeat-K/              the runs, where `sweep.repeats` asks for several
    TRIALS/ID/failure.json           why it failed, where it did

Repeats run one after the other. A trial is compared by the validations of its first run, and then by the mean over the
runs that are done; a run that is not done is in no mean, or trials would fall back whenever one begins.

Every run is a stage of its own: in a sweep that was killed, what is done is not done again, and the run that was going
on continues from its last checkpoint.
"""

import math
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from beats_ray.config import ConfigError, FinetuneConfig, SweepConfig, replace, section_fields
from beats_ray.data.manifest import NO_FOLD, DatasetManifest
from beats_ray.data.storage import Place, open_place
from beats_ray.identity import stage_identity
from beats_ray.stage import run_stage
from beats_ray.train.checks import check_folds
from beats_ray.train.held_out import find_parts
from beats_ray.train.jobs import Run, fit_in_trial
from beats_ray.tune.placement import TrialNeeds
from beats_ray.tune.population import KEPT_CHECKPOINTS, follow, pointer, read_pointer

ENCODER, SETTING = "encoder", "setting"
"""Keys of a trial's config beside the drawn settings: which encoder it starts from, and the number of the setting."""
JUDGED_FILE = "judged.json"


@dataclass(frozen=True)
class Trials:
    """What all trials of a sweep have in common; small enough to send to each of them."""

    config: SweepConfig
    manifest: DatasetManifest
    cache: Any
    """ClipCache with the decoded clips; None where they are streamed."""
    needs: TrialNeeds
    attempt: str = ""
    """Name of this attempt at the sweep: each start of the command is one."""
    side_by_side: int = 1
    """How many run at one time at most."""

    @property
    def compares(self) -> bool:
        """Whether trials write which clips they were right about: for encoders that are compared clip by clip."""
        return len(self.config.compared) > 1 and not self.manifest.multi_label and not self.needs.uses_ray_train


def drawn_settings(parameters: dict[str, Any]) -> dict[str, Any]:
    """A trial's config without what is no fine-tuning setting."""
    return {name: value for name, value in parameters.items() if name not in (ENCODER, SETTING)}


def trial_place(config: SweepConfig, trial_id: str) -> Place:
    """Where a trial writes."""
    return open_place(config.output) / "trials" / trial_id


def run_place(config: SweepConfig, trial_id: str, repeat: int = 0) -> Place:
    """Where one of its runs writes."""
    place = trial_place(config, trial_id)
    return place / f"repeat-{repeat}" if config.sweep.repeats > 1 else place


def run_places(config: SweepConfig, trial_id: str) -> list[Place]:
    """Where its runs write, those too that have not begun."""
    return [run_place(config, trial_id, repeat) for repeat in range(config.sweep.repeats)]


def trial_config(
    config: SweepConfig,
    trial_id: str,
    parameters: dict[str, Any],
    manifest: DatasetManifest | None = None,
    repeat: int = 0,
) -> FinetuneConfig:
    """One of the fine-tuning runs that a trial is, by default its first. manifest: for repeats over folds."""
    changes = drawn_settings(parameters)
    if repeat and config.sweep.repeat_over == "seeds":
        changes["train.seed"] = replace(config.finetune, changes).train.seed + repeat
    elif repeat:
        assert manifest is not None
        changes |= fold_cycle(config, manifest)[repeat]
    if config.sweep.scheduler == "pbt":  # members are exchanged at validations
        changes["train.checkpoint_every_steps"] = config.finetune.validate_every_steps
        changes["train.keep_checkpoints"] = max(KEPT_CHECKPOINTS, config.finetune.train.keep_checkpoints)
    settings = replace(config.finetune, changes)
    encoder = config.compared[parameters.get(ENCODER, next(iter(config.compared)))]
    return FinetuneConfig(
        output=run_place(config, trial_id, repeat).uri,
        data=config.data,
        encoder=encoder,
        ray=config.ray,
        **section_fields(settings),
    )


def fold_cycle(config: SweepConfig, manifest: DatasetManifest) -> list[dict[str, int]]:
    """The folds that test and validate in each repeat, from the sweep's own on. ConfigError where there are too few."""
    parts = find_parts(trial_config(config, "check", {}), manifest)
    known = sorted(int(fold) for fold in manifest.clips_by_fold if int(fold) != NO_FOLD)
    known = [fold for fold in known if not config.data.folds or fold in config.data.folds]
    repeats = config.sweep.repeats
    if parts.test is None or len(parts.test.folds) != 1 or len(known) < max(3, repeats):
        raise ConfigError(
            f"sweep.repeat_over=folds, repeats={repeats}: needs a test fold and at least {max(3, repeats)} folds; "
            f"{config.data.path} has {known}; use repeat_over=seeds, or fewer repeats"
        )
    first = known.index(parts.test.folds[0])
    cycle = known[first:] + known[:first]
    return [
        {"folds.test_fold": cycle[index], "folds.validation_fold": cycle[(index + 1) % len(cycle)]}
        for index in range(repeats)
    ]


def check_trials(config: SweepConfig, manifest: DatasetManifest) -> None:
    """ConfigError where the data set lacks a fold or split that trials or their repeats need."""
    check_folds(trial_config(config, "check", {}), manifest)
    if config.sweep.repeats > 1 and config.sweep.repeat_over == "folds":
        fold_cycle(config, manifest)


def validations_of(config: FinetuneConfig) -> int:
    """Validations of a run that goes to its end."""
    return -(-config.train.steps // config.validate_every_steps)


@dataclass(frozen=True)
class Reports:
    """Turns a run's reports into its trial's: one count of steps and validations over all runs, and means."""

    config: FinetuneConfig
    """Of the run."""
    choose_by: str
    repeats: int
    repeat: int = 0
    done: tuple[dict[str, float], ...] = ()
    """The last metrics of the runs before."""

    def of(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """The trial's report for the run's metrics of a validation after `step`."""
        steps, validations = self.config.train.steps, validations_of(self.config)
        report = {
            **metrics,
            "step": self.repeat * steps + step,
            "validations": self.repeat * validations + -(-step // self.config.validate_every_steps),
        }
        if self.repeats == 1:
            return report
        done = [*self.done, *([metrics] if step == steps else [])]
        for name in [name for name in metrics if name.startswith(("validation/", "test/"))] if done else ():
            report[name] = sum(one.get(name, math.nan) for one in done) / len(done)
        if self.done and step < steps:  # of a run in progress only the means count
            known = self.done[0]
            report |= {
                name: sum(one[name] for one in self.done) / len(self.done) for name in known if name.startswith("test/")
            }
        report["repeats_done"] = len(done)
        return report | {f"repeat/{index}": one[self.choose_by] for index, one in enumerate(done)}


def run_trial(parameters: dict[str, Any], trials: Trials) -> None:
    """One trial, in its Tune actor."""
    from ray import tune

    from beats_ray.tune.failure import known_failure, record_failure

    trial_id = tune.get_context().get_trial_id()
    place = trial_place(trials.config, trial_id)
    known_failure(place, trials.attempt)
    try:
        _run_repeats(parameters, trials, trial_id)
    except Exception as error:
        record_failure(place, error, trials.attempt)
        raise


def _run_repeats(parameters: dict[str, Any], trials: Trials, trial_id: str) -> None:
    from ray import tune

    from beats_ray.train.leftovers import wait_until_released
    from beats_ray.train.metrics import read_metrics

    config, done = trials.config, list[dict[str, float]]()
    for repeat in range(config.sweep.repeats):
        settings = trial_config(config, trial_id, parameters, trials.manifest, repeat)
        identity = stage_identity(settings, {})  # the sweep's own has the keys
        place = open_place(settings.output)
        run = Run("finetune", settings, trials.manifest, place, identity, trials.cache, trials.side_by_side)
        reports = Reports(settings, run.choose_by, config.sweep.repeats, repeat, tuple(done))
        if config.sweep.scheduler == "pbt":  # whose settings change in mid-run, as those of a stage must not
            if (checkpoint := tune.get_checkpoint()) is not None:
                wait_until_released(run.output)
                follow(read_pointer(checkpoint), run.output)
            _train(run, trials, reports)
        else:
            run_stage(run.output, identity, partial(_train, run, trials, reports))
        last = {name: value for name, value in read_metrics(run.output)[-1].items() if isinstance(value, int | float)}
        _judge(run, trials)
        tune.report(reports.of(settings.train.steps, last))  # only now: Tune may end this process at any time after it
        done.append(last)


def _train(run: Run, trials: Trials, reports: Reports) -> None:
    """The run, in this process or on Ray Train; each validation but the last is reported."""
    from ray import tune

    def report(step: int, metrics: dict[str, float]) -> None:
        if step == run.train.steps:
            return
        is_exchanged = trials.config.sweep.scheduler == "pbt"
        with pointer(run.output, step) if is_exchanged else nullcontext() as checkpoint:
            tune.report(reports.of(step, metrics), checkpoint=checkpoint)

    if not trials.needs.uses_ray_train:
        from beats_ray.train.worker import train_trial

        train_trial(run, report, gpu_share=trials.needs.worker.get("GPU", 1.0))
        return
    from ray.util.queue import Empty, Queue

    from beats_ray.tune.train_report import ReportToTrial

    queue = Queue(maxsize=1, actor_options={"num_cpus": 0})

    def pass_on() -> None:
        with suppress(Empty):
            report(*queue.get_nowait())

    fit_in_trial(run, [ReportToTrial(queue, reports)], pass_on)


def _judge(run: Run, trials: Trials) -> None:
    """Writes which held-out clips the published model is right about, for encoders that are compared clip by clip."""
    if not trials.compares or (run.output / JUDGED_FILE).exists():
        return
    import torch

    from beats_ray.cross_validate import predict_batches
    from beats_ray.inference import load_published

    device = torch.device("cuda" if run.train.use_gpu else "cpu")
    model = load_published(run.output / "model").to(device)
    judged: dict[str, dict[str, bool]] = {}
    parts: tuple[Literal["validation", "test"], ...] = ("validation", "test")
    for part in parts:
        clips = run.held_out(part)
        if clips is None:
            continue
        batches = run.cache.eval_batches(part=clips, micro_batch_size=run.train.micro_batch_size)
        found = predict_batches(model, (batch.to(device) for batch in batches), run.manifest, NO_FOLD)
        right = found.probability_NC.argmax(1) == found.label_N
        judged[part] = dict(zip(found.clip_ids, right.tolist(), strict=True))
    (run.output / JUDGED_FILE).write_json(judged)
