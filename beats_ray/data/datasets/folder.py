"""A folder for each class: `dog/a.wav`, `dog/b/c.wav`, `rain/d.flac`; or these below `train`, `validation` and `test`.

The folders at the top are splits where all of their names are among SPLITS; the classes are then one level below.
"""

from beats_ray.config import LayoutSettings, UserError
from beats_ray.data.source import Quarantined, SourceClip, SourceListing, clip_ids, require_audio
from beats_ray.data.storage import Place

SPLITS = (
    dict.fromkeys(("train", "training"), "train")
    | dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
    | dict.fromkeys(("test", "testing", "eval"), "test")
)
"""Names of folders, in any case, to the split that they are."""


def read_folder(source: Place, _layout: LayoutSettings) -> SourceListing:
    """Every audio file with its class folder as its label, labels in alphabetical order; others are quarantined."""
    sizes = require_audio(source)
    tops = {name.split("/")[0] for name in sizes if "/" in name}
    depth = 1 if tops and all(top.lower() in SPLITS for top in tops) else 0
    class_of = {name: name.split("/")[depth] for name in sizes if name.count("/") > depth}
    if not class_of:
        raise UserError(
            f"source={source.uri}: no class folders with audio files; make one for each class, or use kind=unlabelled"
        )
    names = tuple(sorted(set(class_of.values())))
    label_id = {name: place for place, name in enumerate(names)}
    ids = clip_ids(sizes)
    clips = [
        SourceClip(
            path=name,
            clip_id=ids[name],
            bytes=sizes[name],
            labels=(label_id[label],),
            split=SPLITS[name.split("/")[0].lower()] if depth else "",
        )
        for name, label in class_of.items()
    ]
    quarantined = [
        Quarantined(name, "unlabelled", "lies in no class folder", size)
        for name, size in sizes.items()
        if name not in class_of
    ]
    return SourceListing(names, False, clips, quarantined)
