"""The report's handover: the settings that made the run, and how its models are loaded."""

from beats_ray.reporting.layout import Code, Section, as_yaml, best_trial, stage_title, stages_of
from beats_ray.reporting.reading import as_dict
from beats_ray.reporting.run_folder import Run, Stage


def settings(run: Run) -> Section:
    """The resolved settings of the run and of each stage."""
    section = Section("Settings")
    if run.config:
        section.code.append(Code("The run's resolved config", as_yaml(run.config), folded=True))
    for index, stages in sorted(run.iterations.items()):
        for stage in stages.values():
            own = stage.state.get("config")
            if isinstance(own, dict) and own and own != run.config:
                section.code.append(Code(stage_title(run, index, stage), as_yaml(own), folded=True))
    if not section.code:
        section.absent = "No config was found."
    return section


def loading(run: Run) -> Section:
    """How to use the newest models."""
    section = Section("Use the models")
    encoders = [stage.place.uri for _, stage in stages_of(run, "pretrain", complete=True)]
    classifiers = [stage for _, stage in stages_of(run, "sweep", complete=True) if best_trial(stage)]
    classifiers += [stage for _, stage in stages_of(run, "finetune", complete=True)]
    tuned = {stage.name: stage for stage in classifiers}  # of each task the newest
    if encoders:
        section.code.append(
            Code(
                "The newest encoder, in Python",
                "import beats_ray\n\n"
                f'encoder = beats_ray.load("{encoders[-1]}/model")\n'
                "# wave: (clips, samples) at 16 kHz, in [-1, 1]; padding_mask: its shape, True where a clip has ended\n"
                "features, is_pad = encoder.extract_features(wave, padding_mask)  # (clips, patches, width)",
            )
        )
    for stage in tuned.values():
        section.code += _classifier(stage)
    if not section.code:
        section.absent = "No model has been published yet."
    return section


def _classifier(stage: Stage) -> list[Code]:
    """How the model of a sweep or a fine-tuning is used, and how a sweep's best trial is run again."""
    of_task, model = f" of {stage.task}" if stage.task else "", f"{stage.place.uri}/model"
    again = as_dict(stage.result.get("reproduce")).get("command")
    return [
        Code(
            f"The classifier{of_task}, in Python",
            "import beats_ray\n\n"
            f'classifier = beats_ray.load("{model}")\n'
            "probabilities, _ = classifier.extract_features(wave, padding_mask)  # (clips, classes)\n"
            "print([classifier.class_names[index] for index in probabilities.argmax(1)])",
        ),
        Code(f"The classifier{of_task}, on the command line", f"beats-ray predict {model} FILE..."),
        *([Code(f"The best trial{of_task} again", str(again))] if again else []),
    ]
