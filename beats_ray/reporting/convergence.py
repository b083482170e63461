"""The table of `beats-ray convergence`: what each encoder is worth, as means and standard errors over seeds.

An encoder's gain is taken against the untrained encoder of its own seed, seed by seed, so that what a seed does to both
drops out.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
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
}
"""Column of the table: metric."""
Figures = dict[str, float]


def read_seed(arm: Place) -> dict[int, Figures]:
    """Of one run of `iterate` and its probes: the figures of each iteration that was judged; empty before the first."""
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
        training = stages["pretrain"]
        for name, metric in TRAINING_FIGURES.items():
            tail = tail_mean(training.series(metric))
            if tail is not None:
                figures[name] = tail
        found[index] = figures
    return found


def summary_rows(
    baselines: Mapping[str, Any], seeds: Mapping[int, Mapping[str, Mapping[int, Figures]]]
) -> list[dict[str, Any]]:
    """Rows of the table: baselines, the untrained encoder, each iteration, and iteration 1 with compact positions.

    seeds: by seed and positions, what `read_seed` found. Each figure is {"mean", "standard_error", "seeds", "text"}.
    """
    rows = []
    for key, name in BASELINES.items():
        result = dict(baselines.get(key) or {})
        accuracy = number(result.get("accuracy"))
        if accuracy is not None:
            folds = {f"fold {fold}": spread([value]) for fold, value in result.get("fold_accuracies", {}).items()}
            rows.append({"name": name, "probe": spread([accuracy]), "gain": spread([]), "training": folds})
    for positions in ("true", "compact"):
        runs = [arms[positions] for arms in seeds.values() if arms.get(positions)]
        for index in sorted({index for run in runs for index in run}):
            if positions == "compact" and index == 0:
                continue  # an untrained encoder has the same weights, and sees all patches
            rows.append(_row(_name(index, positions), index, runs))
    return rows


def summary_markdown(rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""
    columns = ["encoder", "seeds", "probe", "above untrained", "unheard fold 1", *TRAINING_FIGURES]
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1)]
    for row in rows:
        training = [row["training"].get(name, spread([]))["text"] for name in ("fold 1", *TRAINING_FIGURES)]
        lines.append([row["name"], str(row["probe"]["seeds"]), row["probe"]["text"], row["gain"]["text"], *training])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


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


def _row(name: str, index: int, runs: Sequence[Mapping[int, Figures]]) -> dict[str, Any]:
    judged = [run for run in runs if index in run]
    gains = [run[index]["probe"] - run[0]["probe"] for run in judged if 0 in run] if index else []
    names = {figure for run in judged for figure in run[index]} - {"probe"}
    return {
        "name": name,
        "probe": spread([run[index]["probe"] for run in judged]),
        "gain": spread(gains, signed=True),
        "training": {
            figure: spread([run[index][figure] for run in judged if figure in run[index]]) for figure in sorted(names)
        },
    }


def _name(index: int, positions: str) -> str:
    name = f"iteration {index}" if index else "untrained"
    return name if positions == "true" else f"{name}, {positions} positions"
