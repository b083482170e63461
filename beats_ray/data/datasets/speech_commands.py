"""Speech Commands as published: a folder for each word, `validation_list.txt`, `testing_list.txt`.

The lists make the official splits: a recording in neither is for training. `layout.classes` says what is told apart:
35, every word that is there (the first version has 30), or 12, the ten commands, `_unknown_` for all other words and
`_silence_`, which is what `_background_noise_` holds: long recordings, for training only, that `prepare` cuts.
"""

from pathlib import PurePosixPath

from beats_ray.config import LayoutSettings, UserError
from beats_ray.data.source import Quarantined, SourceClip, SourceListing, clip_ids, read_text, require_audio
from beats_ray.data.storage import Place

COMMANDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
UNKNOWN = "_unknown_"
SILENCE = "_silence_"
NOISE_FOLDER = "_background_noise_"
LISTS = {"validation": "validation_list.txt", "test": "testing_list.txt"}


def read_speech_commands(source: Place, layout: LayoutSettings) -> SourceListing:
    """Every recording of a word with its label and official split; their format may differ from the lists'."""
    sizes = require_audio(source)
    split_of = {_stem(name): split for split, file in LISTS.items() for name in _read_list(source, file)}
    words = sorted({name.split("/")[0] for name in sizes if "/" in name and not name.startswith("_")})
    if not words:
        raise UserError(
            f"source={source.uri}: no word folders with audio files; give the folder that holds `yes`, `no`, ..."
        )
    names = (*COMMANDS, UNKNOWN, SILENCE) if layout.classes == 12 else tuple(words)
    label_id = {name: place for place, name in enumerate(names)}
    ids = clip_ids(sizes)
    listing = SourceListing(names)
    for name, size in sizes.items():
        folder = name.split("/")[0]
        if "/" not in name:
            listing.quarantined.append(Quarantined(name, "unlabelled", "lies in no word's folder", size))
        elif folder == NOISE_FOLDER and layout.classes == 12:
            listing.clips.append(SourceClip(name, ids[name], size, (label_id[SILENCE],), split="train"))
        elif folder.startswith("_"):
            listing.skipped.append(Quarantined(name, "not-a-word", f"{folder} is no word", size))
        else:
            label = label_id[folder] if folder in label_id else label_id[UNKNOWN]
            split = split_of.get(_stem(name), "train")
            listing.clips.append(SourceClip(name, ids[name], size, (label,), split=split))
    present = {_stem(name) for name in sizes}
    listing.quarantined += [
        Quarantined(f"{stem}.wav", "missing-file", f"{LISTS[split]} names it, the source does not hold it")
        for stem, split in split_of.items()
        if stem not in present
    ]
    return listing


def _read_list(source: Place, file: str) -> list[str]:
    if not (source / file).exists():
        raise UserError(f"source={source.uri}: no {file}; give the folder of Speech Commands as published")
    return read_text(source / file).splitlines()


def _stem(name: str) -> str:
    return name.removesuffix(PurePosixPath(name).suffix)
