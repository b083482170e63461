"""beats_ray: pre-train BEATs audio encoders and fine-tune them on a Ray cluster.

model = beats_ray.load("BEATs_iter3.pt")        # a released file, an ESPnet one, or a folder of ours
features, is_pad = model.extract_features(wave, padding_mask)
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.nn import Module

__version__ = "0.1.0"


def load(path: "str | os.PathLike[str]") -> "Module":
    """Returns the encoder, classifier or tokenizer at `path`, in eval mode, on the CPU.

    path: a model folder of ours, a released `.pt` file, or an ESPnet checkpoint; local, s3:// or gs://. Remote
    ones are kept in a cache on this machine.
    Raises ValueError naming what is wrong: nothing there, a damaged file, one with code in it, an unknown layout.
    """
    if "://" in str(path):
        from beats_ray.config import UserError
        from beats_ray.data.storage import open_place
        from beats_ray.inference import load_published

        try:
            return load_published(open_place(str(path)))
        except UserError as error:
            raise ValueError(str(error)) from error
    from beats_ray.models import load_model

    return load_model(path)
