"""Which encoder is better: the same settings tried on each, and the best of each, compared in pairs.

Settings that all encoders finished are compared clip by clip where trials have said which clips they were right about,
with the interval of `fold_statistics.compare`: over clips, and over runs (settings, repeats) as over seeds there. Else
(several labels a clip, streamed clips) the interval is over settings alone, and says nothing of other clips. The test
part is looked at where there is one, which chose neither settings nor weights.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from beats_ray.fold_statistics import CONFIDENCE, compare, error_of_mean

Judged = Mapping[str, Mapping[str, bool]]
"""Of each part, whether a model was right about each clip."""
Row = Mapping[str, Any]


def is_finished(row: Row) -> bool:
    """Whether the trial of a leaderboard's row ran to its end."""
    return row.get("status") == "complete" and not row["stopped_early"]


def compare_encoders(
    rows: Sequence[Row], encoders: Sequence[str], metric: str, judged: Mapping[str, Sequence[Judged]]
) -> list[dict[str, Any]]:
    """Each encoder against the first one, on the same settings and by its best trial.

    rows: of the leaderboard, the best first. judged: by trial id, what each of its runs wrote; may lack any.
    """
    finished = [row for row in rows if is_finished(row)]
    by_encoder = {name: {row["setting"]: row for row in finished if row["encoder"] == name} for name in encoders}
    found = []
    reference = by_encoder[encoders[0]]
    for name in encoders[1:]:
        shared = [setting for setting in by_encoder[name] if setting in reference]
        pairs = [(by_encoder[name][setting], reference[setting]) for setting in shared]
        best = [next((row for row in finished if row["encoder"] == one), None) for one in (name, encoders[0])]
        for of, chosen in (("same settings", pairs), ("best trials", [tuple(best)] if all(best) else [])):
            comparison = _compare(chosen, metric, judged)
            found.append({"encoder": name, "reference": encoders[0], "of": of, "pairs": len(chosen), **comparison})
    return [one | {"says": say(one)} for one in found]


def _compare(pairs: Sequence[Any], metric: str, judged: Mapping[str, Sequence[Judged]]) -> dict[str, Any]:
    nothing = {"difference": None, "standard_error": None, "interval": None, "over": "nothing", "is_noise": None}
    name = metric.split("/", 1)[1]
    part = (
        "test" if pairs and all(row.get(f"test_{name}") is not None for pair in pairs for row in pair) else "validation"
    )
    if not pairs:
        return nothing | {"part": part}
    by_clip = [[_right(judged.get(row["trial_id"], ()), part) for row in pair] for pair in pairs]
    if all(runs for pair in by_clip for runs in pair):
        clips = sorted(set.intersection(*(set(run) for pair in by_clip for runs in pair for run in runs)))
        right_SN, reference_SN = (
            np.array([[run[clip] for clip in clips] for pair in by_clip for run in pair[side]]) for side in (0, 1)
        )
        result = compare(right_SN, reference_SN, np.zeros(len(clips)))
        over = "clips" if result["over"] == "clips" else "clips and runs"
        kept = {key: result[key] for key in ("difference", "standard_error", "interval")}
        return {**kept, "over": over, "part": part, "is_noise": _is_noise(result["interval"])}
    differences = np.array([ours[f"{part}_{name}"] - theirs[f"{part}_{name}"] for ours, theirs in pairs])
    mean, error = float(differences.mean()), error_of_mean(differences)
    if error is None:  # one pair says nothing of its own error
        return nothing | {"difference": mean, "part": part}
    from scipy.stats import t as student

    half = float(student.ppf(0.5 + CONFIDENCE / 2, len(differences) - 1)) * error
    interval = [mean - half, mean + half]
    return {
        "difference": mean,
        "standard_error": error,
        "interval": interval,
        "over": "settings",
        "part": part,
        "is_noise": _is_noise(interval),
    }


def _right(runs: Sequence[Judged], part: str) -> list[Mapping[str, bool]]:
    """Of each run of a trial its clips; those of repeats over folds have none in common and are put together."""
    found = [run[part] for run in runs if part in run]
    if len(found) > 1 and not set.intersection(*(set(run) for run in found)):
        return [{clip: right for run in found for clip, right in run.items()}]
    return found


def _is_noise(interval: Sequence[float]) -> bool:
    low, high = interval
    return bool(low <= 0 <= high) or not math.isfinite(low + high)


def say(comparison: Mapping[str, Any]) -> str:
    """The comparison in a sentence."""
    name, reference, of = comparison["encoder"], comparison["reference"], comparison["of"]
    if comparison["difference"] is None:
        return f"{of}: no pair of finished trials of {name} and {reference}"
    figure = f"{of}: {name} {comparison['difference']:+.3f} against {reference} on {comparison['part']}"
    if comparison["interval"] is None:
        return f"{figure}; one pair, whose error is not known"
    low, high = comparison["interval"]
    verdict = "no more than noise" if comparison["is_noise"] else "more than noise"
    if comparison["over"] == "clips":
        verdict += ", of clips alone: what another seed changes is not known from one run of each"
    return f"{figure} [{low:+.3f}, {high:+.3f}] over {comparison['over']}: {verdict}"
