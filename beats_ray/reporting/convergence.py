"""The tables of `beats-ray convergence`: what each encoder is worth, as means and standard errors over seeds.

An encoder's gain is taken against the untrained encoder of its own seed, seed by seed, so that what a seed does to both
drops out; so is a loss against its clip-band baseline.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from beats_ray.data.storage import Place
from beats_ray.reporting.reading import number
from beats_ray.reporting.run_folder import read_run

BASELINES = {"random_forest_mfcc": "random forest, MFCC", "mean_log_mel": "linear, mean log-mel"}
TAIL_SHARE = 0.1
"""Figures of a training are means over its reports from the last tenth of the steps."""
TRAINING_FIGURES = {
    "loss": "train/loss",
    "clip-band loss": "train/clip_band_loss",
    "loss, no silence": "train/sounding_loss",
    "clip-band loss, no silence": "train/sounding_clip_band_loss",
    "accuracy": "train/masked_accuracy",
    "clip-band accuracy": "train/clip_band_accuracy",
    "label perplexity": "labels/perplexity",
    "used codes": "labels/used_code_fraction",
}
"""Column of the table: metric."""
DIFFERENCES = {
    "below clip-band": ("clip-band loss", "loss"),
    "below clip-band, no silence": ("clip-band loss, no silence", "loss, no silence"),
}
"""Column of the table: the figures whose difference it is."""
ACCURACIES = {
    "probe": "probe",
    "above untrained": "gain",
    "fine-tuned": "finetuned",
    "above untrained, fine-tuned": "finetuned_gain",
}
"""Column of the table: field of a row."""
UNHEARD = "fold 1"
"""Fold of the judged set that the corpus of jobs/fetch_corpus.py leaves out."""
Figures = Mapping[str, float]


@dataclass(frozen=True)
class JudgedEncoder:
    """What is known of one encoder of one seed."""

    figures: Figures
    """Of the probe `probe` and `fold K`, `finetuned` where it was, and those of its training by their columns."""
    labels: str = "-"
    """Where the labels come from that it was trained to predict."""


def read_seed(arm: Place) -> dict[int, JudgedEncoder]:
    """Of one run of `iterate` and its probes: each iteration's encoder that was judged; empty before the first."""
    if not (arm / "run.json").exists():
        return {}
    found = {}
    for index, stages in sorted(read_run(arm).iterations.items()):
        try:
            probe = (arm / f"judged-{index}" / "evaluation.json").read_json()
        except FileNotFoundError:
            continue
        figures = {"probe": float(probe["accuracy"])}
        figures |= {f"fold {fold}": float(value) for fold, value in probe["fold_accuracies"].items()}
        figures |= _finetuned(arm / f"finetuned-{index}")
        training = stages["pretrain"]
        for name, metric in TRAINING_FIGURES.items():
            tail = tail_mean(training.series(metric))
            if tail is not None:
                figures[name] = tail
        for name, (baseline, own) in DIFFERENCES.items():
            if baseline in figures and own in figures:
                figures[name] = figures[baseline] - figures[own]
        found[index] = JudgedEncoder(figures, stages["tokenizer"].teacher.removeprefix("none: ") if index else "-")
    return found


def summary_rows(
    baselines: Mapping[str, Any], seeds: Mapping[int, Mapping[str, Mapping[int, JudgedEncoder]]]
) -> list[dict[str, Any]]:
    """Rows of the tables: baselines, the untrained encoder, each iteration, and iteration 1 with compact positions.

    seeds: by seed and positions, what `read_seed` found. Each figure is {"mean", "standard_error", "seeds", "text"}.
    """
    rows = []
    for key, name in BASELINES.items():
        result = dict(baselines.get(key) or {})
        accuracy = number(result.get("accuracy"))
        if accuracy is not None:
            folds = {f"fold {fold}": spread([value]) for fold, value in result.get("fold_accuracies", {}).items()}
            row = {"name": name, "labels": "-", "training": folds}
            rows.append(row | {field: spread([]) for field in ACCURACIES.values()} | {"probe": spread([accuracy])})
    for positions in ("true", "compact"):
        runs = [(arms[positions], _untrained(arms)) for arms in seeds.values() if arms.get(positions)]
        for index in sorted({index for run, _ in runs for index in run}):
            if positions == "compact" and index == 0:
                continue  # an untrained encoder has the same weights, and sees all patches
            judged = [(run[index], untrained) for run, untrained in runs if index in run]
            rows.append({"name": _name(index, positions), **_row(judged, is_untrained=index == 0)})
    return rows


def summary_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as two Markdown tables: what the encoders are worth, and what their pre-training said."""
    training = [*TRAINING_FIGURES, *DIFFERENCES]
    judged = []
    for row in rows:
        accuracies = [row[field]["text"] for field in ACCURACIES.values()]
        judged.append([row["name"], str(row["probe"]["seeds"]), *accuracies, _text(row, UNHEARD)])
    trained = [
        [row["name"], row["labels"], *(_text(row, name) for name in training)]
        for row in rows
        if row["training"].keys() & set(training)
    ]
    tables = [_table(["encoder", "seeds", *ACCURACIES, f"unheard {UNHEARD}"], judged)]
    if trained:
        tables.append(_table(["encoder", "labels", *training], trained))
    return "\n".join(tables)


def spread(values: Sequence[float], signed: bool = False) -> dict[str, Any]:
    """Mean and standard error of the mean over seeds; no error for a single one, `-` for none."""
    if not values:
        return {"mean": None, "standard_error": None, "seeds": 0, "text": "-"}
    mean = math.fsum(values) / len(values)
    text = f"{mean:+.3f}" if signed else f"{mean:.3f}" if abs(mean) < 20 else f"{mean:.0f}"
    error = None
    if len(values) > 1:
        variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
        error = math.sqrt(variance / len(values))
        text += f" ± {error:.3f}" if abs(mean) < 20 else f" ± {error:.0f}"
    return {"mean": mean, "standard_error": error, "seeds": len(values), "text": text}


def tail_mean(points: Sequence[tuple[float, float]]) -> float | None:
    """Mean of a curve's values over the last tenth of its steps, at least its last one; None where it has none."""
    if not points:
        return None
    first = points[-1][0] * (1 - TAIL_SHARE)
    tail = [value for step, value in points if step > first]
    return math.fsum(tail) / len(tail)


def _finetuned(place: Place) -> dict[str, float]:
    """The accuracy of the fine-tuned encoder over all folds, where it has come so far."""
    try:
        (encoder,) = (place / "cross_validation.json").read_json()["encoders"].values()
    except FileNotFoundError:
        return {}
    return {"finetuned": float(encoder["accuracy"])}


def _untrained(arms: Mapping[str, Mapping[int, JudgedEncoder]]) -> Figures:
    """Of a seed's untrained encoder: the same for all positions, so that only one of them need be fine-tuned."""
    found: dict[str, float] = {}
    for positions in ("compact", "true"):
        encoder = arms.get(positions, {}).get(0)
        found |= encoder.figures if encoder else {}
    return found


def _row(judged: Sequence[tuple[JudgedEncoder, Figures]], is_untrained: bool) -> dict[str, Any]:
    """judged: an encoder of each seed beside that seed's untrained one."""

    def of(figure: str) -> dict[str, Any]:
        values = [one.figures[figure] for one, _ in judged if figure in one.figures]
        return spread(values, signed=figure in DIFFERENCES)

    def gain(figure: str) -> dict[str, Any]:
        pairs = [(one.figures.get(figure), untrained.get(figure)) for one, untrained in judged if not is_untrained]
        return spread([a - b for a, b in pairs if a is not None and b is not None], signed=True)

    names = {figure for one, _ in judged for figure in one.figures} - {"probe", "finetuned"}
    return {
        "labels": ", ".join(sorted({one.labels for one, _ in judged})),
        "probe": of("probe"),
        "gain": gain("probe"),
        "finetuned": of("finetuned"),
        "finetuned_gain": gain("finetuned"),
        "training": {name: of(name) for name in sorted(names)},
    }


def _text(row: Mapping[str, Any], figure: str) -> str:
    return str(row["training"].get(figure, spread([]))["text"])


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _name(index: int, positions: str) -> str:
    name = f"iteration {index}" if index else "untrained"
    return name if positions == "true" else f"{name}, {positions} positions"
