"""`beats-ray cross-validate`: k-fold fine-tuning, the protocol of ESC-50 and of five-fold emotion sets.

Every fold is the test fold of one fine-tuning run, for every seed and every encoder, so every clip is judged once for
each seed by a model that never saw its fold. Nothing is ever chosen by a test fold.

    OUTPUT/cross_validation.json, runs.csv          accuracies with their spreads, paired comparisons, every run
    OUTPUT/ENCODER/seed-S/evaluation.json, ...      the files of `judgement.py` over the clips of all folds
    OUTPUT/ENCODER/seed-S/fold-K/                   an ordinary fine-tuning run, with the same files for its test fold

The clips are decoded once for all runs. A run of one worker is a Ray task that trains and judges in one process: it
reserves all it needs at once, so runs wait for room and never for each other. A command that was interrupted goes on,
and one with further seeds or encoders adds to what is there.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from beats_ray.config import ConfigError, CrossValidateConfig, FinetuneConfig, UserError, replace, section_fields
from beats_ray.console import Console
from beats_ray.data.manifest import NO_FOLD, DatasetManifest, read_manifest
from beats_ray.data.storage import Place, open_place, read_table
from beats_ray.fold_statistics import compare, summarise
from beats_ray.identity import data_key, model_key, stage_identity
from beats_ray.judgement import RESULT_FILE, Predictions, judge, write_csv, write_judgement
from beats_ray.stage import run_stage
from beats_ray.train.checks import find_mistakes, read_inputs
from beats_ray.train.jobs import Run, Written, fit_run, load_cache

SUMMARY_FILE = "cross_validation.json"


@dataclass(frozen=True)
class FoldRun:
    """One fine-tuning run of a cross-validation."""

    encoder: str
    """Its name in the comparison."""
    seed: int
    fold: int
    config: FinetuneConfig

    @property
    def place(self) -> Place:
        return open_place(self.config.output)

    @property
    def keys(self) -> dict[str, str]:
        """Those of what the run is made from."""
        return _keys_of(self.config.data.path, self.config.encoder)

    @property
    def learning_rate(self) -> float:
        return self.config.train.learning_rate

    @property
    def name(self) -> str:
        return f"{self.encoder}, seed {self.seed}, fold {self.fold}"

    def as_run(self, manifest: DatasetManifest, cache: Any) -> Run:
        """What a training process gets."""
        identity = stage_identity(self.config, self.keys)
        return Run("finetune", self.config, manifest, self.place, identity, cache)


def run_cross_validate(config: CrossValidateConfig, console: Console) -> Written:
    """Runs (or goes on with) every fold, and writes what they say together.

    UserError, before anything runs, for settings, encoders, folds or a cluster that it could not end with.
    """
    manifest = read_manifest(open_place(config.data.path))
    runs = plan_runs(config, manifest)
    check_runs(runs, manifest)
    _finish(runs, config, manifest, console)
    chosen = choose_runs(runs)
    output = open_place(config.output)
    summary = _summarise(config, runs, chosen, output, manifest)
    (output / SUMMARY_FILE).write_json(summary)
    write_csv(output / "runs.csv", _run_rows(summary["runs"]))
    _show(summary, console)
    return [("cross-validation", (output / SUMMARY_FILE).uri), ("runs", (output / "runs.csv").uri)]


# --- which runs -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _keys_of(data: str, encoder: str) -> dict[str, str]:
    """Read once for all runs of an encoder: its file is read whole for this."""
    return {"data": data_key(data, reads_labels=True), "encoder": model_key(encoder)}


def plan_runs(config: CrossValidateConfig, manifest: DatasetManifest) -> list[FoldRun]:
    """Every run, seed by seed and fold by fold, the encoders side by side. ConfigError for folds that are not there.

    With selection=inner the validation fold is the one that follows the test fold, in a cycle.
    """
    settings = config.cross_validation
    known = sorted(int(fold) for fold in manifest.clips_by_fold if int(fold) != NO_FOLD)
    known = [fold for fold in known if not config.data.folds or fold in config.data.folds]
    needed = 2 if settings.selection == "none" else 3
    if len(known) < needed:
        raise ConfigError(
            f"cross_validation.selection={settings.selection}: needs at least {needed} folds, {config.data.path} has "
            f"{known}; give a data set with folds, or widen data.folds"
        )
    for fold in settings.folds:
        if fold not in known:
            raise ConfigError(f"cross_validation.folds: {fold} is not among the folds {known}; choose of them")
    runs = []
    for seed in settings.seeds:
        for fold in settings.folds or known:
            inner = known[(known.index(fold) + 1) % len(known)] if settings.selection == "inner" else NO_FOLD
            for name, encoder in config.compared.items():
                for rate in settings.learning_rates or (config.finetune.train.learning_rate,):
                    changes = {
                        "folds.test_fold": fold,
                        "folds.validation_fold": inner,
                        "train.seed": seed,
                        "train.learning_rate": rate,
                    }
                    folder = f"{config.output}/{name}/seed-{seed}/fold-{fold}"
                    folder += f"/learning-rate-{rate:g}" if settings.learning_rates else ""
                    fields = section_fields(replace(config.finetune, changes))
                    run = FinetuneConfig(output=folder, data=config.data, encoder=encoder, ray=config.ray, **fields)
                    runs.append(FoldRun(name, seed, fold, run))
    return runs


def check_runs(runs: list[FoldRun], manifest: DatasetManifest) -> None:
    """UserError for the first run that could not be done, before any is."""
    from beats_ray.launch import check_fits

    if manifest.multi_label:
        raise UserError(
            f"data.path={runs[0].config.data.path}: a clip has several labels; k-fold accuracies need one: use "
            "`beats-ray finetune` and `beats-ray evaluate`"
        )
    inputs = {run.encoder: run for run in reversed(runs)}
    read = {name: read_inputs("finetune", run.config) for name, run in inputs.items()}
    for run in runs:
        for mistake in read[run.encoder].mistakes + find_mistakes("finetune", run.config, read[run.encoder], run.keys):
            raise mistake
    check_fits(runs[0].config.train, runs[0].config.data)


def choose_runs(runs: Iterable[FoldRun]) -> list[FoldRun]:
    """For each encoder, seed and fold the run of the best validation accuracy; the first of several that are alike."""
    best: dict[tuple[str, int, int], tuple[float, FoldRun]] = {}
    for run in runs:
        key, score = (run.encoder, run.seed, run.fold), validation_accuracy(run.place) or 0.0
        if key not in best or score > best[key][0]:
            best[key] = (score, run)
    return [run for _, run in best.values()]


def validation_accuracy(place: Place) -> float | None:
    """The last that a fine-tuning run reported; None where it kept no validation fold apart."""
    lines = (place / "metrics.jsonl").read_bytes().decode().splitlines()
    found = [json.loads(line).get("validation/accuracy") for line in lines if line.strip()]
    return next((float(value) for value in reversed(found) if value is not None), None)


# --- running them -----------------------------------------------------------------------------------------------------


def _finish(runs: list[FoldRun], config: CrossValidateConfig, manifest: DatasetManifest, console: Console) -> None:
    """Does what is not done yet."""
    waiting = [run for run in runs if not (run.place / RESULT_FILE).exists()]
    if not waiting:
        return
    cache = load_cache(config.data, manifest)
    if config.finetune.train.num_workers == 1:
        finished = _run_beside(waiting, manifest, cache, config.cross_validation.max_concurrent_runs)
    else:
        finished = _run_in_turn(waiting, manifest, cache, console)
    console.stage(f"fine-tuning: {len(waiting)} of {len(runs)} runs to do")
    done = len(runs) - len(waiting)
    for run in finished:
        done += 1
        console.note(f"{run.name}: accuracy {(run.place / RESULT_FILE).read_json()['accuracy']:.3f}")
        console.progress(done, len(runs), unit="runs")


def _run_beside(
    waiting: list[FoldRun], manifest: DatasetManifest, cache: Any, most_at_once: int | None
) -> Iterator[FoldRun]:
    """Yields runs as they end; as many go on beside each other as the cluster has room for."""
    import ray

    train = waiting[0].config.train
    task = ray.remote(train_and_judge).options(
        num_cpus=train.cpus_per_worker, num_gpus=1 if train.use_gpu else 0, max_retries=train.max_failures
    )
    left, running = list(reversed(waiting)), dict[Any, FoldRun]()
    while left or running:
        while left and len(running) < (most_at_once or len(waiting)):
            run = left.pop()
            running[task.remote(run.as_run(manifest, cache))] = run
        ended, _ = ray.wait(list(running), num_returns=1)
        ray.get(ended)  # raises what the run failed with
        yield running.pop(ended[0])


def _run_in_turn(waiting: list[FoldRun], manifest: DatasetManifest, cache: Any, console: Console) -> Iterator[FoldRun]:
    """Yields runs of several workers, one after the other, each an ordinary Ray Train run."""
    import ray

    for fold_run in waiting:
        run = fold_run.as_run(manifest, cache)
        fit_run(run, console)
        ray.get(ray.remote(judge_run).options(num_cpus=1, num_gpus=1 if run.train.use_gpu else 0).remote(run))
        yield fold_run


def train_and_judge(run: Run) -> None:
    """A whole run in this process: an ordinary fine-tuning stage, and the judgement of its test fold."""
    from beats_ray.train.context import single_process_context
    from beats_ray.train.worker import train

    def work() -> None:
        train(run, single_process_context(lambda _step, _metrics: None, run.train.use_gpu))

    run_stage(run.output, run.identity, work)
    judge_run(run)


def judge_run(run: Run) -> None:
    """Writes the judgement of the published model on the test fold's cached clips; of a longer clip its middle."""
    import torch

    from beats_ray.inference import load_published
    from beats_ray.train.provenance import describe_data

    fold = run.config.folds.test_fold
    device = torch.device("cuda" if run.train.use_gpu else "cpu")
    model = load_published(run.output / "model").to(device)
    batches = run.cache.eval_batches(part=run.held_out("test"), micro_batch_size=run.train.micro_batch_size)
    predictions = predict_batches(model, (batch.to(device) for batch in batches), run.manifest, fold)
    result = {
        "kind": "classifier",
        "model": (run.output / "model").uri,
        "data": run.config.data.path,
        "folds": [fold],
        "trained_on": describe_data(run.config, run.manifest)["training"],
        **judge(predictions),
    }
    write_judgement(run.output, predictions, result)


def predict_batches(model: Any, batches: Iterable[Any], manifest: DatasetManifest, fold: int) -> Predictions:
    """A classifier's probabilities of the clips of labelled micro-batches, which are on its device."""
    import torch

    from beats_ray.evaluate import probabilities_of

    clip_ids: list[str] = []
    labels: list[list[int]] = []
    logits = []
    with torch.inference_mode():
        for batch in batches:
            fbank_BTF, num_frames_B = model.encoder.normalised_fbank(batch.audio_BS, batch.num_samples_B)
            logits.append(model(fbank_BTF, num_frames_B).double().cpu().numpy())
            clip_ids += batch.clip_ids
            labels += [np.flatnonzero(row).tolist() for row in batch.targets_BC.cpu().numpy()]
    probability_NC = probabilities_of(np.concatenate(logits), model.config.multi_label)
    folds = np.full(len(clip_ids), fold)
    return Predictions(clip_ids, folds, labels, probability_NC, manifest.label_names, manifest.multi_label)


# --- what they say together -------------------------------------------------------------------------------------------


def _summarise(
    config: CrossValidateConfig, runs: list[FoldRun], chosen: list[FoldRun], output: Place, manifest: DatasetManifest
) -> dict[str, Any]:
    names, seeds = list(config.compared), config.cross_validation.seeds
    right: dict[str, np.ndarray] = {}
    fold_N = np.zeros(0)
    for name in names:
        pooled = [_pool([run for run in chosen if (run.encoder, run.seed) == (name, seed)], manifest) for seed in seeds]
        for seed, found in zip(seeds, pooled, strict=True):
            _write_pooled(output / name / f"seed-{seed}", found, config, config.compared[name])
        right[name] = np.array([found.probability_NC.argmax(1) == found.label_N for found in pooled])
        fold_N = pooled[0].folds
    comparisons = [
        {"encoder": name, "reference": names[0], **compare(right[name], right[names[0]], fold_N)} for name in names[1:]
    ]
    return {
        "data": config.data.path,
        "selection": config.cross_validation.selection,
        "seeds": list(seeds),
        "folds": sorted({run.fold for run in runs}),
        "encoders": {name: {"path": config.compared[name], **summarise(right[name], fold_N)} for name in names},
        "comparisons": comparisons,
        "runs": [_describe(run, run in chosen) for run in runs],
    }


def _pool(runs: list[FoldRun], manifest: DatasetManifest) -> Predictions:
    """The predictions of runs with different test folds, fold by fold; clips without a label are not among them."""
    rows = [row for run in runs for row in read_table(run.place / "predictions.parquet").to_pylist()]
    place_of = {name: place for place, name in enumerate(manifest.label_names)}
    return Predictions(
        [row["clip_id"] for row in rows],
        np.array([row["fold"] for row in rows]),
        [[place_of[label] for label in row["labels"]] for row in rows],
        np.array([row["probabilities"] for row in rows]),
        manifest.label_names,
        manifest.multi_label,
    )


def _write_pooled(folder: Place, found: Predictions, config: CrossValidateConfig, encoder: str) -> None:
    result = {"kind": "cross-validation", "model": encoder, "data": config.data.path, **judge(found)}
    write_judgement(folder, found, result)


def _describe(run: FoldRun, is_chosen: bool) -> dict[str, Any]:
    result = (run.place / RESULT_FILE).read_json()
    return {
        "encoder": run.encoder,
        "seed": run.seed,
        "fold": run.fold,
        "learning_rate": run.learning_rate,
        "chosen": is_chosen,
        "accuracy": result["accuracy"],
        "clips": result["clips"],
        "validation_accuracy": validation_accuracy(run.place),
        "model": result["model"],
    }


def _run_rows(runs: list[dict[str, Any]]) -> list[list[object]]:
    return [list(runs[0]), *(list(run.values()) for run in runs)]


def _show(summary: dict[str, Any], console: Console) -> None:
    from beats_ray.reporting.layout import spread

    by_encoder: dict[str, Callable[[dict[str, Any]], str]] = {
        "accuracy, all clips": lambda one: spread(one["accuracy"], one["standard_error"]),
        "seeds": lambda one: spread(one["accuracy"], one["seed_standard_error"]),
        "folds, mean and deviation": lambda one: spread(one["fold_mean"], one["fold_standard_deviation"]),
    }
    compared = {one["encoder"]: one for one in summary["comparisons"]}
    rows = []
    for name, one in summary["encoders"].items():
        against = compared.get(name)
        low, high = against["interval"] if against else (0.0, 0.0)
        paired = f"{against['difference']:+.3f} [{low:+.3f}, {high:+.3f}]" if against else "-"
        rows.append([name, *(cell(one) for cell in by_encoder.values()), paired])
    first = next(iter(summary["encoders"]))
    console.table("Cross-validation", ["encoder", *by_encoder, f"against {first}, 95 %"], rows)
