"""`beats-ray convergence`: over several seeds, does pre-training help, and do true positions?

    OUTPUT/baselines.json                            classical methods on the judged set, without an encoder
    OUTPUT/seed-S/true/iteration-K/...               `iterate` on `data.path`; iteration 0 is the untrained encoder
    OUTPUT/seed-S/compact/iteration-1/...            its first iteration with the visible patches packed
    OUTPUT/seed-S/{true,compact}/judged-K/           the frozen probe of encoder K over the judged set's folds
    OUTPUT/convergence.json, convergence.md          means and standard errors over the seeds
    OUTPUT/curves/*.svg                              loss beside its baseline, and label perplexity

Made to run for hours in pieces: what is complete is never done again, a run that was stopped goes on in the middle of
its training, the table is written anew after each seed, and seeds may be added to an OUTPUT later.
"""

from typing import Any

from beats_ray.config import (
    ConvergenceConfig,
    DistillSettings,
    EvaluateConfig,
    IterateConfig,
    PretrainSettings,
    StreamSettings,
    TrainSettings,
    UserError,
    fingerprint,
    section_fields,
    validate,
)
from beats_ray.console import Console
from beats_ray.data.manifest import read_manifest
from beats_ray.data.storage import Place, open_place
from beats_ray.identity import content_keys, stage_identity
from beats_ray.reporting.convergence import read_seed, summary_markdown, summary_rows
from beats_ray.stage import STAGE_FILE, read_stage, run_stage
from beats_ray.train.jobs import Written

TOKENIZER_SHARE = 0.25
"""Steps of a tokenizer's training for each of a pre-training."""
WARMUP_SHARE, CHECKPOINTS = 0.1, 8


def run_convergence(config: ConvergenceConfig, console: Console) -> Written:
    """Runs what is missing of every seed and writes the table and the curves; returns what was written and where."""
    from beats_ray.iterate import run_iterate

    output, judged = open_place(config.output), open_place(config.judged)
    if not read_manifest(judged).label_names:
        raise UserError(f"judged={config.judged}: has no labels to judge by; give a labelled data set")
    _baselines(output, judged, config, console)
    written: Written = []
    for seed in config.seeds:
        for positions, iterations in _arms(config):
            console.stage(f"seed {seed}, {positions} positions")
            arm = output / f"seed-{seed}" / positions
            run_iterate(arm_config(config, seed, positions, iterations, arm), console)
            for iteration in range(iterations + 1):
                _judge(arm, iteration, config, console)
        written = write_summary(config, console)
    return written


def arm_config(config: ConvergenceConfig, seed: int, positions: str, iterations: int, arm: Place) -> IterateConfig:
    """The `iterate` of one seed and one kind of positions, by the budget of `minutes` where one is set."""
    fields: dict[str, Any] = {name: getattr(config, name) for name in IterateConfig.model_fields}
    pretrain, distill = config.pretrain, config.distill
    encoder = pretrain.encoder.model_copy(update={"positions": positions})
    steps = None
    if config.minutes is not None:
        steps = config.minutes * 60.0 * config.clips_per_s / pretrain.train.global_batch_size
    fields |= {
        "output": arm.uri,
        "iterations": iterations,
        "random_projection": config.random_projection.model_copy(update={"seed": seed}),
        "pretrain": _replaced(pretrain, train=_train(pretrain.train, seed, steps), encoder=encoder),
        "distill": _replaced(
            distill, train=_train(distill.train, seed, steps if steps is None else steps * TOKENIZER_SHARE)
        ),
    }
    return IterateConfig(**fields)


def write_summary(config: ConvergenceConfig, console: Console) -> Written:
    """Writes convergence.json, convergence.md and the curves of all seeds so far, and shows the table."""
    from beats_ray.report import write_curves

    output = open_place(config.output)
    seeds = {}
    for seed in config.seeds:
        folder = output / f"seed-{seed}"
        arms = {positions: read_seed(folder / positions) for positions, _ in _arms(config)}
        if any(arms.values()):
            seeds[seed] = arms
    rows = summary_rows((output / "baselines.json").read_json(), seeds)
    (output / "convergence.json").write_json({"seeds": sorted(seeds), "rows": rows})
    (output / "convergence.md").write_bytes(summary_markdown(rows).encode())
    console.table(
        f"Frozen probe over {len(seeds)} seeds", ["encoder", "probe", "above untrained"],
        [[row["name"], row["probe"]["text"], row["gain"]["text"]] for row in rows],
    )  # fmt: skip
    written = [("table", (output / "convergence.md").uri)]
    for positions, _ in _arms(config):
        runs = [(output / f"seed-{seed}" / positions).uri for seed in seeds if seeds[seed][positions]]
        if runs:
            written += write_curves(runs, (output / "curves" / positions).uri)
    return written


def _arms(config: ConvergenceConfig) -> list[tuple[str, int]]:
    """Kinds of positions, and how many iterations each is run for."""
    return [("true", config.iterations)] + ([("compact", 1)] if config.compact else [])


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


def _baselines(output: Place, judged: Place, config: ConvergenceConfig, console: Console) -> None:
    from beats_ray.baselines import run_baselines

    if not (output / "baselines.json").exists():
        console.stage("baselines without an encoder")
        (output / "baselines.json").write_json(run_baselines(judged, config.inference.num_workers))


def _judge(arm: Place, iteration: int, config: ConvergenceConfig, console: Console) -> None:
    """The probe of one encoder, once; anew for another encoder or data set, since it takes seconds."""
    from beats_ray.evaluate import run_evaluate

    model, place = arm / f"iteration-{iteration}" / "pretrain" / "model", arm / f"judged-{iteration}"
    settings = EvaluateConfig(
        output=place.uri,
        ray=config.ray,
        data=StreamSettings(path=config.judged),
        model=model.uri,
        probe=config.probe,
        **section_fields(config.inference),
    )
    identity = stage_identity(settings, content_keys(settings))
    if read_stage(place).get("fingerprint") != fingerprint(identity):
        (place / STAGE_FILE).delete()
    run_stage(place, identity, lambda: run_evaluate(settings, console))
