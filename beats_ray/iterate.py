"""The BEATs loop as a resumable sequence of stages (paper section 3): tokenizer, labels, pre-training, sweep, again.

    RUN/iteration-0/{pretrain,probe}                           the untrained encoder: the baseline row
    RUN/iteration-1/{tokenizer,pretrain,probe,sweep}           labels of a random projection, computed on the fly
    RUN/iteration-K/{tokenizer,labels,pretrain,probe,sweep}    labels of a tokenizer distilled from encoder K-1

Every stage has its own folder and is done once; a run started again goes on with the first stage that is not complete,
and a training stage in its newest checkpoint.
"""

import datetime as dt
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from beats_ray import __version__
from beats_ray.config import (
    DistillConfig,
    EvaluateConfig,
    FinetuneConfig,
    IterateConfig,
    PretrainConfig,
    SweepConfig,
    TokenizeConfig,
    UserError,
    fingerprint,
)
from beats_ray.console import Console
from beats_ray.data.manifest import read_manifest
from beats_ray.data.storage import Place, open_place
from beats_ray.stage import first_difference, is_complete, run_stage
from beats_ray.train.checks import check_folds, run_identity
from beats_ray.train.jobs import Written


def run_iterate(config: IterateConfig, console: Console) -> Written:
    """Runs (or goes on with) all iterations; writes the models, the leaderboard and the report below `output`."""
    from beats_ray.report import write_report

    run = open_place(config.output)
    manifest = read_manifest(open_place(config.data.path))
    check_plan(config)
    if manifest.label_names:
        check_folds(FinetuneConfig(output=config.output, data=config.data, **_fields(config.finetune)), manifest)
    open_run(run, config)
    _Iterations(config, run, console, labelled=bool(manifest.label_names)).go()
    return [("encoder", (run / f"iteration-{config.iterations}" / "pretrain" / "model").uri), *write_report(run.uri)]


def check_plan(config: IterateConfig) -> None:
    """Everything about all stages that can be known before the first: ConfigError for what could not run."""
    from beats_ray.launch import check_fits
    from beats_ray.tune.sweep import check_sweep

    check_fits(config.pretrain.train, config.data)
    if config.iterations > 1:
        check_fits(config.distill.train, config.data)
    check_sweep(config.finetune, config.sweep)


def open_run(run: Place, config: IterateConfig) -> None:
    """Writes `run.json`, or checks that the folder holds a run of the same config. UserError where it does not."""
    identity = run_identity(config)
    try:
        found = (run / "run.json").read_json()
    except FileNotFoundError:
        started = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        (run / "run.json").write_json(
            {
                "name": run.name,
                "started": started,
                "version": __version__,
                "fingerprint": fingerprint(identity),
                "data": config.data.path,
                "config": identity,
            }
        )
        return
    if found.get("fingerprint") != fingerprint(identity):
        raise UserError(
            f"{run.uri} belongs to a run of another config: {first_difference(found.get('config'), identity)}; "
            "choose another output or remove it"
        )


class _Iterations:
    """The stages of one run, in their order."""

    def __init__(self, config: IterateConfig, run: Place, console: Console, labelled: bool) -> None:
        self._config = config
        self._run = run
        self._console = console
        self._labelled = labelled

    def go(self) -> None:
        self._publish(0, "pretrain", "untrained encoder", self._untrained_encoder)
        if self._labelled:
            self._baselines()
            self._probe(0)
        for iteration in range(1, self._config.iterations + 1):
            self._tokenizer(iteration)
            if iteration > 1:
                self._labels(iteration)
            self._pretrain(iteration)
            if self._labelled:
                self._probe(iteration)
                self._sweep(iteration)

    def _place(self, iteration: int, stage: str) -> Place:
        return self._run / f"iteration-{iteration}" / stage

    def _model(self, iteration: int, stage: str) -> str:
        return (self._place(iteration, stage) / "model").uri

    def _begin(self, iteration: int, stage: str, what: str) -> bool:
        """Announces a stage; False when it has been done already."""
        if is_complete(self._place(iteration, stage)):
            return False
        self._console.stage(f"iteration {iteration}: {what}" if iteration else what)
        return True

    def _publish(self, iteration: int, stage: str, what: str, build: Callable[[], Any]) -> None:
        """A stage whose model is built on the spot."""
        from beats_ray.models import save_model

        place = self._place(iteration, stage)

        def work() -> None:
            with tempfile.TemporaryDirectory(prefix="beats-ray-publish-") as scratch:
                save_model(build(), Path(scratch) / "model")
                (place / "model").upload(Path(scratch) / "model")

        if self._begin(iteration, stage, what):
            run_stage(place, run_identity(self._config), work)

    def _untrained_encoder(self) -> Any:
        import torch

        from beats_ray.models import BeatsEncoder

        torch.manual_seed(self._config.pretrain.train.seed)
        settings = self._config.pretrain.encoder
        return BeatsEncoder(settings.resolve(), settings.positions)

    def _random_projection(self) -> Any:
        from beats_ray.models import RandomProjectionConfig, RandomProjectionTokenizer

        return RandomProjectionTokenizer(RandomProjectionConfig(**self._config.random_projection.model_dump()))

    def _baselines(self) -> None:
        from beats_ray.baselines import run_baselines

        if not (self._run / "baselines.json").exists():
            self._console.stage("baselines without an encoder")
            workers = self._config.inference.num_workers
            (self._run / "baselines.json").write_json(run_baselines(open_place(self._config.data.path), workers))

    def _tokenizer(self, iteration: int) -> None:
        from beats_ray.train.jobs import run_distill

        if iteration == 1:
            self._publish(1, "tokenizer", "random-projection tokenizer", self._random_projection)
        elif self._begin(iteration, "tokenizer", "tokenizer, distilled from the last encoder"):
            config = DistillConfig(
                output=self._place(iteration, "tokenizer").uri,
                ray=self._config.ray,
                data=self._config.data,
                teacher=self._model(iteration - 1, "pretrain"),
                **_fields(self._config.distill),
            )
            run_distill(config, self._console)

    def _labels(self, iteration: int) -> None:
        from beats_ray.tokenize import run_tokenize

        place = self._place(iteration, "labels")
        config = TokenizeConfig(
            output=place.uri,
            ray=self._config.ray,
            data=self._config.data,
            tokenizer=self._model(iteration, "tokenizer"),
            **_fields(self._config.inference),
        )
        if self._begin(iteration, "labels", "labels of every clip"):
            run_stage(place, run_identity(config), lambda: _ignore(run_tokenize(config, self._console)))

    def _pretrain(self, iteration: int) -> None:
        from beats_ray.train.jobs import run_pretrain

        if self._begin(iteration, "pretrain", "masked pre-training"):
            config = PretrainConfig(
                output=self._place(iteration, "pretrain").uri,
                ray=self._config.ray,
                data=self._config.data,
                tokenizer=self._model(iteration, "tokenizer"),
                labels=self._place(iteration, "labels").uri if iteration > 1 else "",
                **_fields(self._config.pretrain),
            )
            run_pretrain(config, self._console)

    def _probe(self, iteration: int) -> None:
        from beats_ray.evaluate import run_evaluate

        place = self._place(iteration, "probe")
        config = EvaluateConfig(
            output=place.uri,
            ray=self._config.ray,
            data=self._config.data,
            model=self._model(iteration, "pretrain"),
            probe=self._config.probe,
            **_fields(self._config.inference),
        )
        if self._begin(iteration, "probe", "frozen linear probe over all folds"):
            run_stage(place, run_identity(config), lambda: _ignore(run_evaluate(config, self._console)))

    def _sweep(self, iteration: int) -> None:
        from beats_ray.tune.sweep import run_sweep

        if self._begin(iteration, "sweep", "fine-tuning sweep"):
            config = SweepConfig(
                output=self._place(iteration, "sweep").uri,
                ray=self._config.ray,
                data=self._config.data,
                encoder=self._model(iteration, "pretrain"),
                finetune=self._config.finetune,
                sweep=self._config.sweep,
            )
            run_sweep(config, self._console)


def _fields(settings: Any) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in type(settings).model_fields}


def _ignore(_written: Written) -> None:
    return None
