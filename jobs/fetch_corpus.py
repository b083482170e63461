"""A real unlabelled corpus for pre-training from Debian's free packages: music, effects and speech.

    python jobs/fetch_corpus.py runs/corpus --clips path/to/ESC-10 --hours 12
    beats-ray pretrain jobs/pretrain-base.yaml data.path=runs/corpus/dataset ...

    OUTPUT/packages/       the packages, as apt downloads them; nothing is installed
    OUTPUT/unpacked/       their audio files, package by package
    OUTPUT/copyright/      their licences and authors
    OUTPUT/source/         what was chosen: links to files of unpacked/ and of the labelled set
    OUTPUT/dataset/        prepared: clips of 5 s, unlabelled

Needs apt with any Debian or Ubuntu source that holds the packages, dpkg, and 4 GB of disk. Every step that was done is
not done again. Exit status 2 for what the caller can put right.
"""

import argparse
import csv
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import soundfile

from beats_ray.cli import main as run_beats_ray
from beats_ray.data.source import is_audio
from beats_ray.errors import UserError

PACKAGES = (
    "wesnoth-1.16-music", "wesnoth-1.16-data", "warzone2100-music", "nexuiz-music", "ufoai-music", "naev-data",
    "widelands-data", "supertux-data", "hedgewars-data",  # music and effects
    "megaglest-data", "sonic-pi-samples",  # animals, weather, machines, ambience
    "fillets-ng-data", "asterisk-core-sounds-en-wav", "asterisk-core-sounds-fr-wav",  # speech
)  # fmt: skip
"""Debian 12's. Others, or those of another release: `--packages`."""
ARCHIVES = (".pk3", ".zip", ".love")  # zip archives in which games keep their sounds
SECONDS_PER_HOUR = 3600.0
LONGEST_CLIP_SECONDS = 5.0


def main(arguments: list[str] | None = None) -> int:
    """Fetches, chooses and prepares; returns the exit status."""
    options = _parse(arguments)
    output = Path(options.output)
    try:
        for package in options.packages:
            fetch_package(package, output)
        lengths = measure(output / "unpacked")
        chosen = choose(lengths, options.hours, options.seed)
        report(lengths, chosen, options.hours)
        files = {output / "source" / name: output / "unpacked" / name for name in chosen}
        if options.clips:
            clips = labelled_clips(Path(options.clips), options.folds)
            for copy in range(options.clip_copies):
                for path, name in clips.items():
                    files[output / "source" / f"clips-{copy}" / name] = path
        link_all(files, output / "source")
    except UserError as error:
        print(f"fetch_corpus: error: {error}", file=sys.stderr)
        return 2
    limit = f"data.max_clip_seconds={LONGEST_CLIP_SECONDS:g}"
    command = ["prepare", "unlabelled", str(output / "source"), str(output / "dataset"), limit, *options.settings]
    return run_beats_ray(command)


def fetch_package(name: str, output: Path) -> None:
    """Downloads a package and unpacks its audio files and its copyright file. UserError where apt cannot."""
    folder = output / "unpacked" / name
    if folder.exists():
        return
    downloads = output / "packages"
    downloads.mkdir(parents=True, exist_ok=True)
    if not list(downloads.glob(f"{name}_*.deb")):
        print(f"download {name}", flush=True)
        _execute(["apt-get", "download", name], downloads, f"--packages: {name}: apt cannot download it")
    scratch = output / f"unpacking-{name}"
    shutil.rmtree(scratch, ignore_errors=True)
    (package,) = downloads.glob(f"{name}_*.deb")
    _execute(
        ["dpkg-deb", "-x", str(package.absolute()), str(scratch.absolute())], output, f"{package}: cannot be unpacked"
    )
    keep_audio(scratch)
    licence = scratch / "usr" / "share" / "doc" / name / "copyright"
    if licence.exists():
        (output / "copyright").mkdir(exist_ok=True)
        shutil.move(licence, output / "copyright" / name)
    folder.parent.mkdir(exist_ok=True)
    scratch.rename(folder)  # last: a folder is whole or not there


def keep_audio(folder: Path) -> None:
    """Unpacks the archives below a folder and removes every file that is neither audio nor a copyright file."""
    files = sorted(path for path in folder.rglob("*") if path.is_symlink() or path.is_file())
    for path in files:
        if path.is_symlink():
            path.unlink()
        elif path.suffix.lower() in ARCHIVES:
            with zipfile.ZipFile(path) as archive:
                for member in filter(is_audio, archive.namelist()):
                    archive.extract(member, path.with_name(f"{path.name}.d"))  # which keeps names inside the folder
            path.unlink()
        elif not is_audio(path.name) and path.name != "copyright":
            path.unlink()


def measure(folder: Path) -> dict[str, float]:
    """Seconds of each file below the folder, by its path there; 0 for what only `prepare` may be able to read."""
    lengths = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and is_audio(path.name)):
        try:
            lengths[path.relative_to(folder).as_posix()] = soundfile.info(path).duration
        except soundfile.LibsndfileError:
            lengths[path.relative_to(folder).as_posix()] = 0.0
    return lengths


def choose(lengths: Mapping[str, float], hours: float | None, seed: int) -> list[str]:
    """Files in an order that the seed draws, as many as fit in so many hours; all of them without a limit.

    A file's place does not depend on which others there are, so a larger cap holds all that a smaller one holds, and
    a package more leaves the rest in its order.
    """

    def place(name: str) -> bytes:
        return hashlib.sha256(f"{seed}:{name}".encode()).digest()

    chosen, seconds = [], 0.0
    for name in sorted(lengths, key=place):
        seconds += lengths[name]
        if hours is not None and seconds > hours * SECONDS_PER_HOUR:
            break
        chosen.append(name)
    return chosen


def report(lengths: Mapping[str, float], chosen: Iterable[str], hours: float | None) -> None:
    """Prints hours by package. UserError where there is less than was asked for."""
    by_package: dict[str, list[float]] = {}
    for name in chosen:
        by_package.setdefault(name.split("/")[0], []).append(lengths[name])
    for package, seconds in sorted(by_package.items()):
        print(f"{package:<30} {len(seconds):>5} files {sum(seconds) / SECONDS_PER_HOUR:>6.2f} h")
    there = sum(lengths.values()) / SECONDS_PER_HOUR
    taken = sum(map(sum, by_package.values())) / SECONDS_PER_HOUR
    print(f"{'chosen':<30} {sum(map(len, by_package.values())):>5} files {taken:>6.2f} h of {there:.2f} h", flush=True)
    if hours is not None and there < hours:
        raise UserError(f"--hours={hours:g}: the packages hold {there:.2f} h; lower --hours or add --packages")


def labelled_clips(folder: Path, folds: Iterable[int]) -> dict[Path, str]:
    """The clips of those folds of a set in ESC-50's layout, and their names. UserError where one is missing."""
    table, wanted = folder / "meta" / "esc50.csv", set(folds)
    if not table.exists():
        raise UserError(f"--clips={folder}: has no meta/esc50.csv; give a folder in ESC-50's layout")
    with table.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if int(row["fold"]) in wanted]
    if not rows:
        raise UserError(f"--folds={sorted(wanted)}: {table} has no clip of these folds; choose others")
    found = {}
    for row in rows:  # a subset may keep the table's names under another format
        path = folder / "audio" / row["filename"]
        path = path if path.exists() else next(path.parent.glob(f"{path.stem}.*"), path)
        if not path.exists():
            raise UserError(f"--clips={folder}: {path} is named by {table.name} and missing; complete the set")
        found[path] = path.name
    return found


def link_all(files: Mapping[Path, Path], source: Path) -> None:
    """Makes `source` hold exactly these files (target: file): hard links, or copies from another file system."""
    shutil.rmtree(source, ignore_errors=True)
    for target, path in files.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, target)
        except OSError:
            shutil.copyfile(path, target)


def _execute(command: list[str], folder: Path, problem: str) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(f"{command[0]}: not found; this script needs apt and dpkg, of Debian or Ubuntu") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("E:")] or done.stderr.splitlines()[-1:]
        reason = " ".join(lines) or f"status {done.returncode}"
        raise UserError(f"{problem} ({reason}); run `apt-get update`, or choose others with --packages")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", metavar="OUTPUT", help="folder of the corpus, local")
    parser.add_argument("settings", metavar="section.field=value", nargs="*", help="of `beats-ray prepare`")
    parser.add_argument("--packages", nargs="+", default=PACKAGES, metavar="NAME", help="Debian packages")
    parser.add_argument("--hours", type=float, help="most hours of the packages' sound; without it, all")
    parser.add_argument("--seed", type=int, default=0, help="draws the files under the cap of --hours")
    parser.add_argument("--clips", metavar="DIR", help="set in ESC-50's layout whose clips are added without labels")
    parser.add_argument("--clip-copies", type=int, default=1, help="how often each of them stands in the corpus [1]")
    parser.add_argument("--folds", nargs="+", type=int, default=[2, 3, 4, 5], help="folds of it [2 3 4 5]")
    return parser.parse_intermixed_args(arguments)  # settings may stand behind options


if __name__ == "__main__":
    sys.exit(main())
