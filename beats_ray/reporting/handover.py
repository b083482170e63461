"""The report's handover: the settings that made the run, and how its models are loaded."""

from beats_ray.reporting.layout import Code, Section, as_yaml, best_trial, stage_title, stages_of
from beats_ray.reporting.reading import as_dict
from beats_ray.reporting.run_folder import Run


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
    tuned = [stage.place.uri for _, stage in stages_of(run, "sweep", complete=True) if best_trial(stage)]
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
    if tuned:
        section.code += [
            Code(
                "The best classifier, in Python",
                "import beats_ray\n\n"
                f'classifier = beats_ray.load("{tuned[-1]}/model")\n'
                "probabilities, _ = classifier.extract_features(wave, padding_mask)  # (clips, classes)\n"
                "print([classifier.class_names[index] for index in probabilities.argmax(1)])",
            ),
            Code("The best classifier, on the command line", f"beats-ray predict {tuned[-1]}/model FILE..."),
        ]
        again = [as_dict(stage.result.get("reproduce")).get("command") for _, stage in stages_of(run, "sweep", True)]
        section.code += [Code("The best trial again", str(command)) for command in again[-1:] if command]
    if not section.code:
        section.absent = "No model has been published yet."
    return section
