"""The stages of a BEATs run as a graph: what each one is, what it reads, and the key that follows from both.

    stages = build_stages(config, manifest)
    stages[-1].key        # changes with any setting or input that the result depends on, however far up

    iteration-0/{pretrain,baselines,probe}               the untrained encoder and what does without one
    iteration-1/{tokenizer,pretrain,probe,sweep}         labels of a random projection, computed on the fly
    iteration-K/{tokenizer,labels,pretrain,probe,sweep}  labels of a tokenizer distilled from iteration K-1, or given
    iteration-K/PROTOCOL-TASK                            instead of `sweep`, where `tasks` names data sets of their own

A stage's inputs are other stages, by their keys, and the data set and given models, by their content. So a key is known
before anything has run. Paths, the cluster and loggers are no part of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from beats_ray.config import (
    ConfigError,
    CrossValidateConfig,
    DistillConfig,
    EvaluateConfig,
    FinetuneConfig,
    IterateConfig,
    Job,
    PretrainConfig,
    Protocol,
    SweepConfig,
    TaskSettings,
    TokenizeConfig,
    UserError,
    fingerprint,
    section_fields,
)
from beats_ray.data.manifest import NO_FOLD, DatasetManifest, read_manifest
from beats_ray.data.storage import Place, open_place
from beats_ray.identity import manifest_key, model_key, run_identity
from beats_ray.inference import TOKENIZER_KINDS, check_published


@dataclass(frozen=True)
class Stage:
    """One stage of a run."""

    iteration: int
    name: str
    title: str
    """What the run shows when it comes to it."""
    folder: Place
    manifest: DatasetManifest
    """Of the data set that it reads: the run's, or its task's."""
    settings: Mapping[str, Any]
    """The part of its identity that is not input."""
    data: str = ""
    """Key of the data set; empty where the stage reads none."""
    models: Mapping[str, "Stage | str"] = field(default_factory=dict)
    """Stages it starts from, or the key of a given model, by what they are to it."""
    job: Job | None = None
    """What does its work, where that is a command of its own."""
    published: Mapping[str, Any] | None = None
    """Description of the model that it will publish."""
    source: Mapping[str, Any] | None = None
    """Description of the model that its job starts from."""
    task: str = ""
    """The name in `tasks` of what it judges an encoder by."""

    @cached_property
    def inputs(self) -> dict[str, str]:
        """The key of everything that it reads."""
        keys = {name: model.reference if isinstance(model, Stage) else model for name, model in self.models.items()}
        return ({"data": self.data} if self.data else {}) | keys

    @property
    def identity(self) -> dict[str, Any]:
        return {**self.settings, "inputs": self.inputs}

    @cached_property
    def key(self) -> str:
        return fingerprint(self.identity)

    @property
    def label(self) -> str:
        return f"iteration {self.iteration} {self.name}"

    @property
    def reference(self) -> str:
        """How other stages name it among their inputs."""
        return f"iteration-{self.iteration}/{self.name} {self.key}"

    @property
    def model(self) -> str:
        """Where its published model is."""
        return (self.folder / "model").uri


def build_stages(config: IterateConfig, manifest: DatasetManifest) -> list[Stage]:
    """All stages in the order in which they run. UserError where a given model cannot be read."""
    return _Graph(config, manifest).stages


class _Graph:
    """Adds stage after stage; each method returns the one that it added."""

    def __init__(self, config: IterateConfig, manifest: DatasetManifest) -> None:
        self._config = config
        self._manifest = manifest
        self._run = open_place(config.output)
        self.stages: list[Stage] = []
        self._tasks = {name: _read_task(name, task) for name, task in config.tasks.items()}
        labelled = bool(manifest.label_names)
        probed = labelled and _has_probe(manifest)
        untrained = self._untrained()
        if probed:
            self._add(
                0,
                "baselines",
                "baselines without an encoder",
                settings={},
                data=manifest_key(manifest, reads_labels=True),
            )
            self._judge(0, "probe", untrained, config, manifest)
        for name, task in config.tasks.items():
            if task.protocol == "probe":
                self._task(0, name, untrained)
        teacher: Stage | None = None
        heard_labels = False  # a teacher was fitted to labels of the set's own folds: none of them can judge any more
        for iteration in range(1, config.iterations + 1):
            tokenizer = self._tokenizer(iteration, teacher)
            labels = self._labels(iteration, tokenizer) if self._has_labels(iteration) else None
            encoder = self._pretrain(iteration, tokenizer, labels)
            if probed and not heard_labels:
                self._judge(iteration, "probe", encoder, config, manifest)
            tuned = [self._task(iteration, name, encoder) for name in config.tasks]
            if labelled and not config.tasks:
                tuned = [self._judge(iteration, "sweep", encoder, config, manifest)]
            tuned = [stage for stage in tuned if stage.published is not None]
            wants_tuned = iteration < config.iterations and config.teacher_of(iteration + 1) == "finetuned"
            if wants_tuned and not tuned:
                without = "no task is a sweep or a fine-tuning, which have"
                if not config.tasks:
                    without = f"{config.data.path} has no labels to fine-tune"
                raise ConfigError(
                    f"teacher={list(config.teacher)}: {without} a teacher on; use pretrained, or give a labelled data "
                    "set to fine-tune on in tasks"
                )
            teacher = tuned[0] if wants_tuned else encoder
            if wants_tuned:
                heard_labels = heard_labels or tuned[0].manifest.shards == manifest.shards
                self._check_judges(tuned[0])

    def _add(self, iteration: int, name: str, title: str, **fields: Any) -> Stage:
        job = fields.get("job")
        fields = {"manifest": self._manifest} | fields
        if job is not None:
            fields |= {"settings": run_identity(job), "data": manifest_key(fields["manifest"], job.reads_labels)}
        stage = Stage(iteration, name, title, self._folder(iteration, name), **fields)
        self.stages.append(stage)
        return stage

    def _folder(self, iteration: int, name: str) -> Place:
        return self._run / f"iteration-{iteration}" / name

    def _common(self, iteration: int, name: str) -> dict[str, Any]:
        return {"output": self._folder(iteration, name).uri, "ray": self._config.ray, "data": self._config.data}

    def _has_labels(self, iteration: int) -> bool:
        start = self._config.start
        return iteration > 1 or bool(start.encoder or start.tokenizer)

    def _untrained(self) -> Stage:
        pretrain = self._config.pretrain
        settings = {"encoder": pretrain.encoder.model_dump(mode="json"), "seed": pretrain.train.seed}
        return self._add(
            0, "pretrain", "untrained encoder", settings=settings, published=describe_encoder(self._config)
        )

    def _tokenizer(self, iteration: int, teacher: Stage | None) -> Stage:
        from beats_ray.models import RandomProjectionConfig

        start = self._config.start
        if iteration == 1 and start.tokenizer:
            given = check_published(open_place(start.tokenizer), "start.tokenizer", TOKENIZER_KINDS)
            models = {"tokenizer": model_key(start.tokenizer)}
            title = f"tokenizer, given: {start.tokenizer}"
            return self._add(1, "tokenizer", title, settings={}, models=models, published=given)
        if iteration == 1 and start.encoder:
            given = check_published(open_place(start.encoder), "start.encoder", ("encoder", "classifier"))
            title = f"tokenizer, distilled from {start.encoder}"
            return self._distilled(1, title, start.encoder, model_key(start.encoder), given)
        if teacher is None:
            chosen = RandomProjectionConfig(**self._config.random_projection.model_dump())
            description = {"kind": TOKENIZER_KINDS[0], "config": {"tokenizer": chosen.model_dump()}}
            settings = self._config.random_projection.model_dump(mode="json")
            return self._add(1, "tokenizer", "random-projection tokenizer", settings=settings, published=description)
        is_tuned = teacher.published is not None and teacher.published["kind"] == "classifier"
        what = "fine-tuned model" if is_tuned else "pre-trained encoder"
        title = f"tokenizer, distilled from iteration {iteration - 1}'s {what}"
        return self._distilled(iteration, title, teacher.model, teacher, teacher.published)

    def _distilled(
        self, iteration: int, title: str, teacher: str, key: Stage | str, source: Mapping[str, Any] | None
    ) -> Stage:
        from beats_ray.models.config import EncoderConfig
        from beats_ray.train.distill import resolve_learning_rate, tokenizer_config

        assert source is not None, title
        fields = section_fields(self._config.distill)
        job = DistillConfig(**self._common(iteration, "tokenizer"), teacher=teacher, **fields)
        chosen = tokenizer_config(job, EncoderConfig.model_validate(source["config"]["encoder"]))
        description = {"kind": TOKENIZER_KINDS[1], "config": {"tokenizer": chosen.model_dump()}}
        return self._add(
            iteration,
            "tokenizer",
            title,
            job=resolve_learning_rate(job, source["kind"]),
            models={"teacher": key},
            published=description,
            source=source,
        )

    def _labels(self, iteration: int, tokenizer: Stage) -> Stage:
        job = TokenizeConfig(
            **self._common(iteration, "labels"), tokenizer=tokenizer.model, **section_fields(self._config.inference)
        )
        models = {"tokenizer": tokenizer}
        return self._add(
            iteration, "labels", "labels of every clip", job=job, models=models, source=tokenizer.published
        )

    def _pretrain(self, iteration: int, tokenizer: Stage, labels: Stage | None) -> Stage:
        initial = self._config.start.initial if iteration == 1 else ""
        job = PretrainConfig(
            **self._common(iteration, "pretrain"),
            tokenizer=tokenizer.model,
            labels=labels.folder.uri if labels else "",
            initial=initial,
            **section_fields(self._config.pretrain),
        )
        models: dict[str, Stage | str] = {"tokenizer": tokenizer}
        if labels:
            models["labels"] = labels
        if initial:
            check_published(open_place(initial), "start.initial", ("encoder",))
            models["initial"] = model_key(initial)
        return self._add(
            iteration,
            "pretrain",
            f"masked pre-training, from {initial}" if initial else "masked pre-training",
            job=job,
            models=models,
            published=describe_encoder(self._config),
            source=tokenizer.published,
        )

    def _task(self, iteration: int, task: str, encoder: Stage) -> Stage:
        settings = self._config.tasks[task]
        return self._judge(iteration, settings.protocol, encoder, settings, self._tasks[task], task)

    def _judge(
        self,
        iteration: int,
        protocol: Protocol,
        encoder: Stage,
        settings: IterateConfig | TaskSettings,
        manifest: DatasetManifest,
        task: str = "",
    ) -> Stage:
        """Judges an encoder by the run's own data set, or by that of a task."""
        name = f"{protocol}-{task}" if task else protocol
        common = self._common(iteration, name) | {"data": settings.data}
        job: Job
        if protocol == "sweep":
            job = SweepConfig(**common, encoder=encoder.model, finetune=settings.finetune, sweep=settings.sweep)
        elif protocol == "finetune":
            job = FinetuneConfig(**common, encoder=encoder.model, **section_fields(settings.finetune))
        elif protocol == "cross-validate":
            assert isinstance(settings, TaskSettings), name
            job = CrossValidateConfig(
                **common,
                encoder=encoder.model,
                finetune=settings.finetune,
                cross_validation=settings.cross_validation,
            )
        else:
            inference = section_fields(self._config.inference)
            job = EvaluateConfig(**common, model=encoder.model, probe=settings.probe, **inference)
        title = _PROTOCOLS[protocol]
        return self._add(
            iteration,
            name,
            f"{task}: {title}" if task else title,
            job=job,
            task=task,
            manifest=manifest,
            models={"model" if protocol == "probe" else "encoder": encoder},
            published=self._classifier(manifest) if protocol in ("sweep", "finetune") else None,
            source=encoder.published,
        )

    def _check_judges(self, teacher: Stage) -> None:
        """ConfigError for a task that judges by folds a fine-tuned teacher was trained on."""
        for name, task in self._config.tasks.items():
            if task.protocol in ("probe", "cross-validate") and self._tasks[name].shards == teacher.manifest.shards:
                raise ConfigError(
                    f"tasks.{name}.protocol={task.protocol}: takes each fold in turn for a test, and the teacher that "
                    f"tasks.{teacher.task} fine-tunes has heard the labels of most of them; leave tasks.{name} out, or "
                    "use teacher=pretrained"
                )

    def _classifier(self, manifest: DatasetManifest) -> dict[str, Any]:
        head = {"num_classes": len(manifest.label_names), "multi_label": manifest.multi_label}
        return {"kind": "classifier", "config": {**describe_encoder(self._config)["config"], "classifier": head}}


_PROTOCOLS: dict[Protocol, str] = {
    "sweep": "fine-tuning sweep",
    "finetune": "fine-tuning",
    "cross-validate": "fine-tuning over folds",
    "probe": "frozen linear probe over all folds",
}


def _has_probe(manifest: DatasetManifest) -> bool:
    """Whether folds can judge a frozen encoder: they need one label a clip, and two folds at least."""
    return not manifest.multi_label and sum(int(fold) != NO_FOLD for fold in manifest.clips_by_fold) > 1


def _read_task(name: str, task: TaskSettings) -> DatasetManifest:
    try:
        manifest = read_manifest(open_place(task.data.path))
    except UserError as error:
        raise ConfigError(f"tasks.{name}.data.path: {error}") from error
    if not manifest.label_names:
        raise ConfigError(
            f"tasks.{name}.data.path={task.data.path}: has no labels to judge by; give a labelled data set"
        )
    if task.protocol in ("cross-validate", "probe") and not _has_probe(manifest):
        what = "several labels a clip" if manifest.multi_label else "fewer than two folds"
        raise ConfigError(
            f"tasks.{name}.protocol={task.protocol}: takes one label a clip and two folds or more, and "
            f"{task.data.path} has {what}; use sweep or finetune"
        )
    return manifest


def describe_encoder(config: IterateConfig) -> dict[str, Any]:
    """What `config.json` of the run's encoders will say."""
    settings = config.pretrain.encoder
    return {
        "kind": "encoder",
        "config": {"encoder": settings.resolve().model_dump(), "positions": settings.positions},
    }


def fine_tuning_of(stage: Stage) -> tuple[FinetuneConfig, int] | None:
    """The fine-tuning run of a sweep, before anything is searched, or of the first fold; and how many a stage does."""
    from beats_ray.cross_validate import plan_runs
    from beats_ray.tune.trial import trial_config

    if isinstance(stage.job, FinetuneConfig):
        return stage.job, 1
    if isinstance(stage.job, SweepConfig):
        return trial_config(stage.job, "check", {}), stage.job.sweep.num_trials * stage.job.sweep.repeats
    if isinstance(stage.job, CrossValidateConfig):
        runs = plan_runs(stage.job, stage.manifest)
        return runs[0].config, len(runs)
    return None
