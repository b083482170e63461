"""The corpus script: what is kept of a package, what is chosen under a cap, and how mistakes are named."""

import csv
import importlib.util
import shutil
import subprocess
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile

from beats_ray.errors import UserError

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fetch_corpus", ROOT / "jobs" / "fetch_corpus.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_sound(path: Path, seconds: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.zeros(round(seconds * 8_000)), 8_000)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A real package, built by dpkg-deb and downloaded already, with loose sounds and some in a game's archive."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not installed: packages can neither be built nor unpacked here")
    tree, output = tmp_path / "tree", tmp_path / "corpus"
    write_sound(tree / "usr/share/game/horn.wav", 1.0)
    write_sound(tmp_path / "inside.flac", 2.0)
    with zipfile.ZipFile(tree / "usr/share/game/base.pk3", "w") as archive:
        archive.write(tmp_path / "inside.flac", "music/theme.flac")
        archive.writestr("../escape.wav", "not here")
        archive.writestr("textures/wall.png", "no sound")
    (tree / "usr/share/game/again.wav").symlink_to("horn.wav")
    licence = tree / "usr/share/doc/game-data/copyright"
    licence.parent.mkdir(parents=True)
    licence.write_text("free")
    control = tree / "DEBIAN" / "control"
    control.parent.mkdir()
    fields = {"Package": "game-data", "Version": "1", "Architecture": "all", "Description": "sounds"}
    fields["Maintainer"] = "Nobody <nobody@example.org>"
    control.write_text("".join(f"{name}: {value}\n" for name, value in fields.items()))
    (output / "packages").mkdir(parents=True)
    command = ["dpkg-deb", "--build", "--root-owner-group", str(tree), str(output / "packages" / "game-data_1_all.deb")]
    subprocess.run(command, check=True, capture_output=True)
    return output


def test_of_a_package_the_sounds_and_the_licence_are_kept_each_once(script: ModuleType, package: Path) -> None:
    script.fetch_package("game-data", package)
    lengths = script.measure(package / "unpacked")
    sounds = {Path(name).name: seconds for name, seconds in lengths.items() if seconds}
    assert sounds == {"horn.wav": 1.0, "theme.flac": 2.0}
    files = [path for path in package.rglob("*") if path.is_file() or path.is_symlink()]
    assert not [path for path in files if path.suffix in (".png", ".pk3") or path.is_symlink()]
    assert all((package / "unpacked" / "game-data") in path.parents for path in files if path.name == "escape.wav")
    assert (package / "copyright" / "game-data").read_text() == "free"
    assert not (package / "unpacking-game-data").exists()


def test_a_larger_cap_keeps_what_a_smaller_one_chose_and_another_seed_chooses_others(script: ModuleType) -> None:
    lengths = {f"package/{index:03}.ogg": 60.0 for index in range(200)}
    small, large = script.choose(lengths, 1.0, 0), script.choose(lengths, 2.0, 0)
    assert len(small) == 60
    assert large[: len(small)] == small
    assert set(script.choose(lengths, 1.0, 1)) != set(small)
    assert set(script.choose(lengths, None, 0)) == set(lengths)
    assert script.choose({**lengths, "other/a.ogg": 0.0}, None, 0) != sorted(lengths), "drawn, not in order of names"


def labelled_set(folder: Path) -> Path:
    (folder / "meta").mkdir(parents=True)
    with (folder / "meta" / "esc50.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["filename", "fold", "target", "category"])
        for fold in (1, 2, 3):
            writer.writerow([f"{fold}-100-A-0.wav", fold, 0, "dog"])
            write_sound(folder / "audio" / f"{fold}-100-A-0.ogg", 1.0)  # another format than the table says
    return folder


def test_clips_of_the_chosen_folds_come_without_their_labels_as_often_as_asked(
    script: ModuleType, tmp_path: Path
) -> None:
    clips = script.labelled_clips(labelled_set(tmp_path / "esc"), [2, 3])
    assert sorted(clips.values()) == ["2-100-A-0.ogg", "3-100-A-0.ogg"], "the test fold's sound stays out"
    with pytest.raises(UserError, match=r"--folds=\[7\]"):
        script.labelled_clips(tmp_path / "esc", [7])
    with pytest.raises(UserError, match=r"no meta/esc50\.csv"):
        script.labelled_clips(tmp_path, [2])


def test_a_mistake_ends_with_status_two_and_one_line(
    script: ModuleType, package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([str(package), "--packages", "game-data", "--hours", "5", "ray.address=local"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--hours=5: the packages hold 0.00 h" in error
    assert not (package / "dataset").exists()
