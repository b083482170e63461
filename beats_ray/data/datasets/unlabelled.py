"""Any tree of audio files, without labels: for pre-training."""

from beats_ray.config import LayoutSettings
from beats_ray.data.source import SourceClip, SourceListing, clip_ids, require_audio
from beats_ray.data.storage import Place


def read_unlabelled(source: Place, _layout: LayoutSettings) -> SourceListing:
    """Every audio file below the source; a clip's id is its path without the extension, where that is unique."""
    sizes = require_audio(source)
    ids = clip_ids(sizes)
    return SourceListing(clips=[SourceClip(path=name, clip_id=ids[name], bytes=size) for name, size in sizes.items()])
