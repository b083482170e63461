"""The report's confusions: the matrix of each judgement, what is confused most, and how that sounds.

Audio of the worst confusions is embedded, a few seconds of a few clips, so that the page needs nothing but itself.
"""

from collections import Counter

from soundfile import SoundFileError

from beats_ray.config import UserError
from beats_ray.data.storage import open_place
from beats_ray.reporting.audio import read_excerpts
from beats_ray.reporting.charts import HeatMap, present
from beats_ray.reporting.judgements import Judgement
from beats_ray.reporting.layout import AudioClip, Grid, Row, Section
from beats_ray.reporting.reading import number
from beats_ray.reporting.run_folder import Run

MAX_TABLE = 15
"""Classes of a matrix that is shown as a table."""
MAX_MAP = 80
"""Classes of one that is drawn: squares of five pixels on a phone."""
MAX_PAIRS = 20
MAX_CLIPS = 12
"""Over the whole page."""
CLIPS_PER_JUDGEMENT = 8
CLIPS_PER_PAIR = 2

Pair = tuple[str, str]
"""True class, and the one it was taken for."""


def confusions(run: Run, with_audio: bool = True) -> Section:
    """Confusions of the newest probe and of every evaluation with one label a clip; of others their surest mistakes."""
    section = Section("Confusions")
    for one in run.judgements:
        if one.confusion:
            _add_matrix(section, one)
        chosen = _choose(one, min(CLIPS_PER_JUDGEMENT, MAX_CLIPS - len(section.clips)))
        if chosen and with_audio:
            _add_clips(section, one, chosen)
    if section.clips:
        section.notes.append(
            "The clips are the surest mistakes of the worst confusions: the loudest seconds of each, as MP3."
        )
    if not section.tables and not section.charts:
        section.absent = (
            "No confusion matrix yet: the first probe of an iteration writes one, and `beats-ray evaluate` of a "
            "classifier with output=RUN/evaluations/NAME."
        )
    return section


def _add_matrix(section: Section, one: Judgement) -> None:
    head, *labels = one.confusion[0]
    names = [row[head] for row in one.confusion]
    counts = [[_count(row[label]) for label in labels] for row in one.confusion]
    if len(labels) <= MAX_TABLE:
        rows = [
            Row(
                [f"{place} {name}", *map(str, line)],
                shades=[0.0, *(count / (sum(line) or 1) for count in line)],
            )
            for place, (name, line) in enumerate(zip(names, counts, strict=True), 1)
        ]
        columns = ["true class", *(str(place) for place in range(1, len(labels) + 1))]
        title = f"{one.name}: confusion matrix, a row for each true class, a column for what it was taken for"
        section.tables.append(Grid(columns, rows, title, text=("true class",)))
    elif len(labels) <= MAX_MAP:
        title = f"{one.name}: confusion matrix, rows are true classes; orange is taken for another"
        section.charts += present(HeatMap(title, tuple(labels), tuple(map(tuple, counts))))
    pairs = [
        (count, name, label)
        for name, line in zip(names, counts, strict=True)
        for label, count in zip(labels, line, strict=True)
        if label != name and count
    ]
    pairs.sort(key=lambda pair: -pair[0])
    if pairs:
        totals = {name: sum(line) for name, line in zip(names, counts, strict=True)}
        rows = [Row([name, label, f"{count} of {totals[name]}"]) for count, name, label in pairs[:MAX_PAIRS]]
        columns = ["class", "taken for", "clips"]
        section.tables.append(Grid(columns, rows, f"{one.name}: confused most", text=("class", "taken for")))


def _choose(one: Judgement, most: int) -> list[dict[str, str]]:
    """The mistakes to be heard: of the commonest confusions, the surest few."""
    counts: Counter[Pair] = Counter(_pair(row) for row in one.mistakes)
    chosen: list[dict[str, str]] = []
    for pair, _ in counts.most_common():
        if len(chosen) >= most:
            break
        chosen += [row for row in one.mistakes if _pair(row) == pair][:CLIPS_PER_PAIR]
    return chosen[: max(0, most)]


def _add_clips(section: Section, one: Judgement, chosen: list[dict[str, str]]) -> None:
    folds, splits = one.result.get("folds") or (), one.result.get("splits") or ()
    try:
        data = open_place(str(one.result.get("data") or ""))
        excerpts = read_excerpts(data, [row["clip_id"] for row in chosen], folds, splits)
    except (UserError, OSError, ValueError, SoundFileError) as error:  # far from its data, or these are damaged
        section.notes.append(f"{one.name}: its clips cannot be heard here: {error}")
        return
    for row in chosen:
        if row["clip_id"] in excerpts:
            true, taken = _pair(row)
            sure = number(float(row.get("probability_1") or "nan"))
            caption = f"{true} taken for {taken}" + (f" ({sure:.0%} sure)" if sure is not None else "")
            section.clips.append(AudioClip(caption, row["clip_id"], excerpts[row["clip_id"]]))


def _pair(row: dict[str, str]) -> Pair:
    return row["labels"].replace(";", ", "), row.get("predicted_1") or "?"


def _count(text: str) -> int:
    return int(number(float(text or 0)) or 0)
