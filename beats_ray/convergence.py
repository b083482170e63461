"""`beats-ray convergence`: over several seeds, does pre-training help, and do true positions?

    OUTPUT/baselines/                                classical methods on the judged set, without an encoder
    OUTPUT/seed-S/true/iteration-K/...               `iterate` on `data.path`; iteration 0 is the untrained encoder
    OUTPUT/seed-S/compact/iteration-1/...            its first iteration with the visible patches packed
    OUTPUT/seed-S/{true,compact}/judged-K/           the frozen probe of encoder K over the judged set's folds
    OUTPUT/seed-S/{true,compact}/finetuned-K/        with `finetuned`, encoder K fine-tuned: `cross-validate`
    OUTPUT/convergence.json, convergence.md          means and standard errors over the seeds
    OUTPUT/curves/*.svg                              loss beside its baseline, and label perplexity

Made to run for hours in pieces: what is complete is never done again, a run that was stopped goes on in the middle of
its training, the table is written anew after each seed, and seeds and fine-tuning may be added to an OUTPUT later. Each
judgement has the key of what it judges: of another encoder or data set it is made anew, and the old one is kept aside.
"""

from collections.abc import Callable, Iterator
from typing import Any

from beats_ray.aside import make_ready
from beats_ray.config import (
    ConvergenceConfig,
    CrossValidateConfig,
    DistillSettings,
    EvaluateConfig,
    IterateConfig,
    PretrainSettings,
    StreamSettings,
    TrainSettings,
    UserError,
    fingerprint,
    replace,
    section_fields,
    validate,
)
from beats_ray.console import Console
from beats_ray.data.manifest import DatasetManifest, read_manifest
from beats_ray.data.storage import Place, open_place
from beats_ray.identity import content_keys, data_key, stage_identity
from beats_ray.reporting.convergence import read_seed, summary_markdown, summary_rows
from beats_ray.stage import run_stage
from beats_ray.train.jobs import Written

TOKENIZER_SHARE = 0.25
"""Steps of a tokenizer's training for each of a pre-training."""
WARMUP_SHARE, CHECKPOINTS = 0.1, 8
BASELINES_FILE = "baselines.json"


def run_convergence(config: ConvergenceConfig, console: Console) -> Written:
    """Runs what is missing of every seed and writes the table and the curves; returns what was written and where.

    UserError, before anything is trained, for a judged set or fine-tuning settings that it could not end with.
    """
    from beats_ray.iterate import run_iterate

    check_judging(config, read_manifest(open_place(config.judged)))
    _measure_baselines(config, console)
    written: Written = []
    for seed in config.seeds:
        for positions, iterations in _arms(config):
            console.stage(f"seed {seed}, {positions} positions")
            arm = _arm(config, seed, positions)
            run_iterate(arm_config(config, seed, positions, iterations, arm), console)
            for iteration in range(iterations + 1):
                _probe(arm, iteration, config, console)
        written = write_summary(config, console)
        if config.finetuned:
            for positions, iteration in _finetuned_encoders(config):
                console.stage(f"seed {seed}, {positions} positions: fine-tuning of iteration {iteration}'s encoder")
                _finetune(finetuning_config(config, seed, positions, iteration), console)
            written = write_summary(config, console)
    return written


def check_judging(config: ConvergenceConfig, judged: DatasetManifest) -> None:
    """UserError where the judged set has no single labels, or its folds or the cluster do not allow fine-tuning."""
    from beats_ray.cross_validate import plan_runs
    from beats_ray.launch import check_fits
    from beats_ray.train.checks import Inputs, settings_mistakes

    if not judged.label_names:
        raise UserError(f"judged={config.judged}: has no labels to judge by; give a labelled data set")
    if judged.multi_label:
        raise UserError(f"judged={config.judged}: a clip has several labels; the probe and accuracies need one")
    if config.finetuned:
        for run in plan_runs(finetuning_config(config, config.seeds[0], "true", 0), judged):
            for mistake in settings_mistakes("finetune", run.config, Inputs(None, judged, [])):
                raise mistake
        check_fits(config.finetune.train, config.data)


def arm_config(config: ConvergenceConfig, seed: int, positions: str, iterations: int, arm: Place) -> IterateConfig:
    """The `iterate` of one seed and one kind of positions, by the budget of `minutes` where one is set."""
    fields: dict[str, Any] = {name: getattr(config, name) for name in IterateConfig.model_fields}
    if config.tasks:  # which have their own
        del fields["finetune"], fields["sweep"]
    pretrain, distill = config.pretrain, config.distill
    encoder = pretrain.encoder.model_copy(update={"positions": positions})
    steps = None
    if config.minutes is not None:
        steps = config.minutes * 60.0 * config.clips_per_s / pretrain.train.global_batch_size
    teachers = config.teacher if len(config.teacher) == 1 else config.teacher[: iterations - 1]
    fields |= {
        "output": arm.uri,
        "iterations": iterations,
        "teacher": teachers or ("pretrained",),  # a single iteration has none to choose
        "random_projection": config.random_projection.model_copy(update={"seed": seed}),
        "pretrain": _replaced(pretrain, train=_train(pretrain.train, seed, steps), encoder=encoder),
        "distill": _replaced(
            distill, train=_train(distill.train, seed, steps if steps is None else steps * TOKENIZER_SHARE)
        ),
    }
    return IterateConfig(**fields)


def finetuning_config(config: ConvergenceConfig, seed: int, positions: str, iteration: int) -> CrossValidateConfig:
    """The fine-tuning of one encoder on the judged set, with the seed that the encoder was trained with."""
    arm = _arm(config, seed, positions)
    return CrossValidateConfig(
        output=(arm / f"finetuned-{iteration}").uri,
        ray=config.ray,
        data=replace(config.data, {"path": config.judged, "folds": (), "splits": (), "sampling": "uniform"}),
        encoder=_model(arm, iteration).uri,
        finetune=config.finetune,
        cross_validation=replace(config.cross_validation, {"seeds": (seed,)}),
    )


def write_summary(config: ConvergenceConfig, console: Console) -> Written:
    """Writes convergence.json, convergence.md and the curves of all seeds so far, and shows the table."""
    from beats_ray.report import write_curves

    output = open_place(config.output)
    seeds = {}
    for seed in config.seeds:
        arms = {positions: read_seed(_arm(config, seed, positions)) for positions, _ in _arms(config)}
        if any(arms.values()):
            seeds[seed] = arms
    rows = summary_rows((output / "baselines" / BASELINES_FILE).read_json(), seeds)
    (output / "convergence.json").write_json({"seeds": sorted(seeds), "rows": rows})
    (output / "convergence.md").write_bytes(summary_markdown(rows).encode())
    shown = {"probe": "probe", "gain": "above untrained"}
    if config.finetuned:
        shown |= {"finetuned": "fine-tuned", "finetuned_gain": "above untrained, fine-tuned"}
    console.table(
        f"Encoders over {len(seeds)} seeds", ["encoder", *shown.values()],
        [[row["name"], *(row[name]["text"] for name in shown)] for row in rows],
    )  # fmt: skip
    written = [("table", (output / "convergence.md").uri)]
    for positions, _ in _arms(config):
        runs = [_arm(config, seed, positions).uri for seed in seeds if seeds[seed][positions]]
        if runs:
            written += write_curves(runs, (output / "curves" / positions).uri)
    return written


def _arms(config: ConvergenceConfig) -> list[tuple[str, int]]:
    """Kinds of positions, and how many iterations each is run for."""
    return [("true", config.iterations)] + ([("compact", 1)] if config.compact else [])


def _finetuned_encoders(config: ConvergenceConfig) -> Iterator[tuple[str, int]]:
    """(positions, iteration); an untrained encoder hears all patches, so that its positions are no difference."""
    for positions, iterations in _arms(config):
        for iteration in range(iterations + 1):
            if positions == "true" or iteration:
                yield positions, iteration


def _arm(config: ConvergenceConfig, seed: int, positions: str) -> Place:
    return open_place(config.output) / f"seed-{seed}" / positions


def _model(arm: Place, iteration: int) -> Place:
    return arm / f"iteration-{iteration}" / "pretrain" / "model"


def _train(settings: TrainSettings, seed: int, steps: float | None) -> TrainSettings:
    changes: dict[str, Any] = {"seed": seed}
    if steps is not None:
        count = max(1, round(steps))
        changes |= {
            "steps": count,
            "warmup_steps": round(count * WARMUP_SHARE),
            "checkpoint_every_steps": max(1, count // CHECKPOINTS),
        }
    return settings.model_copy(update=changes)


def _replaced(settings: PretrainSettings | DistillSettings, **sections: Any) -> Any:
    """The same settings with whole sections replaced, and checked again."""
    return validate(type(settings), settings.model_dump() | {k: v.model_dump() for k, v in sections.items()})


# --- judgements -------------------------------------------------------------------------------------------------------


def _measure_baselines(config: ConvergenceConfig, console: Console) -> None:
    from beats_ray.baselines import run_baselines

    place = open_place(config.output) / "baselines"

    def work() -> None:
        console.stage("baselines without an encoder")
        found = run_baselines(open_place(config.judged), config.inference.num_workers)
        (place / BASELINES_FILE).write_json(found)

    _judge(place, {"inputs": {"data": data_key(config.judged, reads_labels=True)}}, work)


def _probe(arm: Place, iteration: int, config: ConvergenceConfig, console: Console) -> None:
    from beats_ray.evaluate import run_evaluate

    settings = EvaluateConfig(
        output=(arm / f"judged-{iteration}").uri,
        ray=config.ray,
        data=StreamSettings(path=config.judged),
        model=_model(arm, iteration).uri,
        probe=config.probe,
        **section_fields(config.inference),
    )
    place = open_place(settings.output)
    _judge(place, stage_identity(settings, content_keys(settings)), lambda: run_evaluate(settings, console))


def _finetune(settings: CrossValidateConfig, console: Console) -> None:
    from beats_ray.cross_validate import run_cross_validate

    place = open_place(settings.output)
    _judge(place, stage_identity(settings, content_keys(settings)), lambda: run_cross_validate(settings, console))


def _judge(place: Place, identity: dict[str, Any], work: Callable[[], object]) -> None:
    """Does `work` once for each identity; what another one had left in the folder is kept beside it."""
    make_ready(place, fingerprint(identity))
    run_stage(place, identity, work)
