"""`beats-ray import` and `beats-ray export`: published models between our folders and other formats.

    beats-ray import BEATs_iter3.pt models/iter3             # released or ESPnet file -> folder
    beats-ray export models/mine mine.pt                     # folder -> what every BEATs tool reads
    beats-ray export models/mine mine.onnx                   # from waveform to result; also mine.pt2 (torch.export)

The ending of the target names the format. Both sides may be on object storage. Runs in this process.
"""

import tempfile
from pathlib import Path

from beats_ray.config import UserError
from beats_ray.console import Console
from beats_ray.data.storage import existing_place, open_place
from beats_ray.inference import load_checked, load_published
from beats_ray.models import describe_model, save_model
from beats_ray.models.export import EXPORTED_SUFFIXES, export_model
from beats_ray.models.released import save_released

Written = list[tuple[str, str]]


def run_import(source: str, target: str, console: Console) -> Written:
    """Writes any model that `beats_ray.load` reads as a model folder. UserError for one that it does not read."""
    place, folder = existing_place("source", source), open_place(target)
    if folder.exists() and (not folder.is_dir() or folder.list()):
        raise UserError(f"target={target}: exists already; choose another path or remove it")
    module = load_published(place)
    description = describe_model(module)
    console.note(f"{description['kind']}, {sum(one.numel() for one in module.parameters()):,} parameters")
    with tempfile.TemporaryDirectory(prefix="beats-ray-import-") as scratch:
        save_model(module, Path(scratch) / "model", {"imported_from": place.name})
        folder.upload(Path(scratch) / "model")
    return [("model", folder.uri)]


def run_export(source: str, target: str, console: Console) -> Written:
    """Writes a published model in the format that the target's ending names. UserError where that cannot be."""
    file = open_place(target)
    suffix = Path(file.name).suffix
    if suffix not in (".pt", *EXPORTED_SUFFIXES):
        endings = ", ".join((".pt", *EXPORTED_SUFFIXES))
        raise UserError(f"target={target}: its ending {suffix or '(none)'!r} names no format; use one of {endings}")
    if file.exists():
        raise UserError(f"target={target}: exists already; choose another path or remove it")
    module = load_checked(existing_place("source", source), "source")
    with tempfile.TemporaryDirectory(prefix="beats-ray-export-") as scratch:
        local = Path(scratch) / file.name
        try:
            if suffix == ".pt":
                save_released(module, local)
            else:
                console.note(f"tracing a {describe_model(module)['kind']}")
                export_model(module, local)
        except (ValueError, ImportError) as error:
            raise UserError(f"source={source}: {error}") from None
        file.write_bytes(local.read_bytes())
    return [("exported", file.uri)]
