"""Readers of raw data: labels and splits follow names and tables, and every audio file is accounted for just once."""

import io
import json
import os
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import soundfile

from beats_ray.config import LayoutSettings, PrepareConfig, UserError
from beats_ray.data.archives import read_member
from beats_ray.data.datasets import webdataset
from beats_ray.data.datasets.audioset import read_audioset
from beats_ray.data.datasets.csv_table import read_csv_table
from beats_ray.data.datasets.folder import read_folder
from beats_ray.data.datasets.parquet import read_parquet
from beats_ray.data.datasets.speech_commands import COMMANDS, read_speech_commands
from beats_ray.data.datasets.unlabelled import read_unlabelled
from beats_ray.data.datasets.webdataset import read_webdataset
from beats_ray.data.decode import decode_clip
from beats_ray.data.prepare import READERS, check_source
from beats_ray.data.shard_writer import ShardPlan, write_shard
from beats_ray.data.source import (
    MAX_LABELS,
    LabelledClip,
    Quarantined,
    Reader,
    SourceClip,
    SourceListing,
    account_for_others,
    add_labelled,
    clip_ids,
    is_audio,
    list_audio,
    source_root,
    undecodable_files,
)
from beats_ray.data.storage import Place, open_place, read_table, write_table

pytestmark = pytest.mark.unit

DATA = b"12345"


def _tree(folder: Place | Path, *names: str, **texts: str) -> Place:
    """A folder with these audio files and, by name with `__` for a dot, texts."""
    place = folder if isinstance(folder, Place) else open_place(str(folder))
    for name in names:
        (place / name).write_bytes(DATA)
    for name, text in texts.items():
        (place / name.replace("__", ".")).write_bytes(text.encode())
    return place


def _list(reader: Reader, source: Place, **layout: object) -> SourceListing:
    """What the reader finds; its books are closed, each file in one account, ids unique, labels in the vocabulary."""
    listing = reader(source, LayoutSettings.model_validate(layout))
    items: list[SourceClip | Quarantined] = [*listing.clips, *listing.quarantined, *listing.skipped]
    accounts = Counter(item.path for item in items)
    assert not [path for path, times in accounts.items() if times > 1]
    if source.is_dir():
        start = len(source.path) + 1
        files = {place.path[start:] for place in source.list(recursive=True) if is_audio(place.name)}
        hidden = {name for name in files if any(part.startswith(".") for part in name.split("/"))}
        assert files - hidden <= set(accounts)
        assert not hidden & set(accounts)
    assert len({clip.clip_id for clip in listing.clips}) == len(listing.clips)
    assert all(0 <= label < len(listing.label_names) for clip in listing.clips for label in clip.labels)
    return listing


def _labels(listing: SourceListing) -> dict[str, list[str]]:
    return {clip.clip_id: [listing.label_names[label] for label in clip.labels] for clip in listing.clips}


def _reasons(listing: SourceListing) -> dict[str, str]:
    return {item.path: item.reason for item in (*listing.quarantined, *listing.skipped)}


def _splits(listing: SourceListing) -> dict[str, str]:
    return {clip.path: clip.split for clip in listing.clips}


def _wav(seed: int) -> tuple[bytes, np.ndarray]:
    wave = np.random.default_rng(seed).integers(-9999, 9999, 1600, dtype=np.int16)
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, 16_000, format="WAV", subtype="PCM_16")
    return buffer.getvalue(), wave


def test_every_kind_of_the_configuration_has_a_reader() -> None:
    assert set(READERS) == set(PrepareConfig.model_fields["kind"].annotation.__args__)  # type: ignore[union-attr]


# AudioSet

HEADER = (
    "# Segments csv created Sun Mar  5 10:54:31 2017\n"
    "# num_ytids=3, num_segs=3, num_unique_labels=3, num_positive_labels=4\n"
    "# YTID, start_seconds, end_seconds, positive_labels\n"
)
CLASSES = (
    'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/m/05zppz,"Male speech, man speaking"\n2,/t/dd00088,"Gargling"\n'
)
BALANCED = HEADER + (
    '--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"\n'
    '--ZhevVpy1s, 50.000, 60.000, "/m/05zppz"\n'
    '_xylo-Phone, 0.000, 10.000, "/m/09x0r"\n'
)
UNBALANCED = HEADER + '---1_cCGK4M, 0.000, 10.000, "/m/05zppz,/m/05zppz"\nYabcdefghij, 12.500, 22.500, "/m/09x0r"\n'
EVAL = HEADER + '-0RWZT-miFs, 420.000, 430.000, "/t/dd00088,/m/09x0r"\n'
TABLES = {
    "class_labels_indices__csv": CLASSES,
    "balanced_train_segments__csv": BALANCED,
    "unbalanced_train_segments__csv": UNBALANCED,
    "eval_segments__csv": EVAL,
}
NAMES = (
    "bal/--PJHxphWEs_30.000_40.000.flac",
    "bal/Y--ZhevVpy1s.wav",
    "bal/_xylo-Phone.m4a",
    "unbal/00/---1_cCGK4M_0_10000.wav",
    "unbal/01/YYabcdefghij_12500_22500.wav",
    "eval/Y-0RWZT-miFs_420.ogg",
)


def test_audioset_follows_the_published_tables_whatever_the_files_are_called(root: str) -> None:
    listing = _list(read_audioset, _tree(open_place(root), *NAMES, "x/not-a-video.wav", "x/aaaaaaaaaaa.wav", **TABLES))
    assert listing.label_names == ("Speech", "Male speech, man speaking", "Gargling")
    assert listing.multi_label
    assert {clip.clip_id: (clip.path, clip.labels, clip.split) for clip in listing.clips} == {
        "--PJHxphWEs_30.000": (NAMES[0], (0, 2), "balanced_train"),
        "--ZhevVpy1s_50.000": (NAMES[1], (1,), "balanced_train"),
        "_xylo-Phone_0.000": (NAMES[2], (0,), "balanced_train"),
        "---1_cCGK4M_0.000": (NAMES[3], (1,), "unbalanced_train"),
        "Yabcdefghij_12.500": (NAMES[4], (0,), "unbalanced_train"),
        "-0RWZT-miFs_420.000": (NAMES[5], (0, 2), "eval"),
    }
    assert _reasons(listing) == {"x/not-a-video.wav": "not-in-tables", "x/aaaaaaaaaaa.wav": "not-in-tables"}
    assert (listing.missing, listing.quarantined) == ([], [])


@pytest.mark.parametrize(
    "name",
    [
        "{}.wav",
        "Y{}.wav",
        "{}_30.flac",
        "{}_30.000.wav",
        "{}_30.000_40.000.wav",
        "{}_30000_40000.wav",
        "{}_30_40.wav",
        "{}-30-40.wav",
        "Y{}_000030.mp3",
        "clip_7_{}_30.wav",
        "{}_audio.wav",
        "{}_30.000_40.000_16k.wav",
    ],
)
def test_audioset_names_of_all_customs_are_understood(tmp_path: Path, name: str) -> None:
    listing = _list(read_audioset, _tree(tmp_path, name.format("--PJHxphWEs"), **TABLES))
    assert [clip.clip_id for clip in listing.clips] == ["--PJHxphWEs_30.000"]
    assert len(listing.missing) == 5


def test_audioset_subsets_leave_the_others_out(tmp_path: Path) -> None:
    source = _tree(tmp_path, *NAMES, **TABLES)
    listing = _list(read_audioset, source, subsets=["eval", "balanced_train"])
    assert Counter(clip.split for clip in listing.clips) == {"balanced_train": 3, "eval": 1}
    assert _reasons(listing) == {NAMES[3]: "not-in-tables", NAMES[4]: "not-in-tables"}
    assert listing.num_files == 4


def test_audioset_tables_may_lie_elsewhere_and_some_may_be_absent(root: str, tmp_path: Path) -> None:
    tables = _tree(tmp_path / "tables", **{name: TABLES[name] for name in list(TABLES)[:2]})
    listing = _list(read_audioset, _tree(open_place(root), *NAMES), table=tables.uri)
    assert {clip.split for clip in listing.clips} == {"balanced_train"}
    assert len(listing.skipped) == 3


def test_audioset_takes_the_first_of_two_files_and_only_the_segment_that_a_name_means(tmp_path: Path) -> None:
    several = HEADER + "".join(f'--PJHxphWEs, {start}.000, {start + 10}.000, "/m/09x0r"\n' for start in (30, 90))
    names = ("b/--PJHxphWEs_90.wav", "a/--PJHxphWEs_90000.wav", "--PJHxphWEs-60.wav", "--PJHxphWEs.wav")
    source = _tree(tmp_path, *names, class_labels_indices__csv=CLASSES, eval_segments__csv=several)
    listing = _list(read_audioset, source)
    assert [(clip.path, clip.clip_id) for clip in listing.clips] == [(names[1], "--PJHxphWEs_90.000")]
    assert _reasons(listing) == {names[0]: "duplicate-segment", names[2]: "not-in-tables", names[3]: "ambiguous"}
    assert [(item.path, item.reason) for item in listing.missing] == [("--PJHxphWEs_30.000", "missing-clip")]


@pytest.mark.parametrize(
    ("change", "layout", "message"),
    [
        ({"eval_segments__csv": HEADER + 'ab, 0.000, 10.000, "/m/09x0r"\n'}, {}, "eval_segments.csv: line 4: is not"),
        ({"eval_segments__csv": HEADER + "\n-0RWZT-miFs, 1.0, x, /m/09x0r\n"}, {}, "eval_segments.csv: line 5: is not"),
        (
            {"eval_segments__csv": EVAL + '-0RWZT-miFs, 1.000, 2.000, "/m/09x0r,/m/x"\n'},
            {},
            "eval_segments.csv: line 5: '/m/x' is not in class_labels_indices.csv",
        ),
        ({"class_labels_indices__csv": CLASSES + '4,/m/x,"X"\n'}, {}, "its 4 indices are not 0 to 3"),
        ({"class_labels_indices__csv": CLASSES + '2,/m/x,"X"\n'}, {}, "line 5: index=2 is no number, or there before"),
        ({"class_labels_indices__csv": "index,mid\n"}, {}, "column 'display_name' is missing"),
        ({}, {"subsets": ["train"]}, "layout.subsets=train: no subset of AudioSet; choose of balanced_train, unbal"),
        ({}, {"table": "/nowhere"}, "/nowhere/class_labels_indices.csv: does not exist"),
    ],
)
def test_audioset_tables_that_are_not_as_published_are_named_with_their_line(
    tmp_path: Path, change: dict[str, str], layout: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        _list(read_audioset, _tree(tmp_path, *NAMES, **TABLES | change), **layout)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_audioset_without_tables_or_without_any_recording_is_refused(tmp_path: Path) -> None:
    some = _tree(tmp_path / "a", *NAMES, class_labels_indices__csv=CLASSES)
    with pytest.raises(UserError, match=r"holds none of the segment tables"):
        _list(read_audioset, some)
    with pytest.raises(UserError, match=r"layout.subsets=eval: .* has no eval_segments.csv"):
        _list(read_audioset, some, subsets=["eval"])
    with pytest.raises(UserError, match=r"none of 1 audio files is named by the id of a segment"):
        _list(read_audioset, _tree(tmp_path / "b", "x.wav", **TABLES))


# Speech Commands


def _speech_commands(folder: Place | Path) -> Place:
    words = (
        "yes/a_nohash_0.wav",
        "yes/b_nohash_0.wav",
        "go/a_nohash_0.wav",
        "cat/a_nohash_0.wav",
        "zero/b_nohash_1.wav",
    )
    return _tree(
        folder,
        *words,
        "_background_noise_/pink_noise.wav",
        validation_list__txt="yes/b_nohash_0.wav\n",
        testing_list__txt="cat/a_nohash_0.wav\ngo/a_nohash_0.wav\n",
    )


def test_speech_commands_words_and_official_splits(root: str) -> None:
    listing = _list(read_speech_commands, _speech_commands(open_place(root)))
    assert listing.label_names == ("cat", "go", "yes", "zero")
    assert _labels(listing)["yes/a_nohash_0"] == ["yes"]
    assert _splits(listing) == {
        "yes/a_nohash_0.wav": "train",
        "yes/b_nohash_0.wav": "validation",
        "go/a_nohash_0.wav": "test",
        "cat/a_nohash_0.wav": "test",
        "zero/b_nohash_1.wav": "train",
    }
    assert _reasons(listing) == {"_background_noise_/pink_noise.wav": "not-a-word"}
    assert not listing.multi_label


def test_speech_commands_with_twelve_classes(tmp_path: Path) -> None:
    listing = _list(read_speech_commands, _speech_commands(tmp_path), classes=12)
    assert listing.label_names == (*COMMANDS, "_unknown_", "_silence_")
    assert len(listing.label_names) == 12
    assert _labels(listing) == {
        "yes/a_nohash_0": ["yes"],
        "yes/b_nohash_0": ["yes"],
        "go/a_nohash_0": ["go"],
        "cat/a_nohash_0": ["_unknown_"],
        "zero/b_nohash_1": ["_unknown_"],
        "_background_noise_/pink_noise": ["_silence_"],
    }
    assert _splits(listing)["_background_noise_/pink_noise.wav"] == "train"
    assert _splits(listing)["cat/a_nohash_0.wav"] == "test"
    assert listing.skipped == []


def test_speech_commands_lists_hold_for_copies_in_another_format_and_missing_ones_are_named(tmp_path: Path) -> None:
    source = _tree(
        tmp_path,
        "yes/a.flac",
        "no/b.flac",
        "c.flac",
        validation_list__txt="yes/a.wav\n",
        testing_list__txt="no/x.wav\n",
    )
    listing = _list(read_speech_commands, source)
    assert _splits(listing) == {"yes/a.flac": "validation", "no/b.flac": "train"}
    assert _reasons(listing) == {"no/x.wav": "missing-file", "c.flac": "unlabelled"}


def test_speech_commands_without_lists_or_words_is_refused(tmp_path: Path) -> None:
    lists = {"validation_list__txt": "", "testing_list__txt": ""}
    with pytest.raises(UserError, match=r"no validation_list.txt"):
        _list(read_speech_commands, _tree(tmp_path / "a", "yes/a.wav"))
    with pytest.raises(UserError, match="no word folders"):
        _list(read_speech_commands, _tree(tmp_path / "b", "a.wav", "_background_noise_/b.wav", **lists))


# Folders


def test_folders_are_classes_in_alphabetical_order(root: str) -> None:
    names = ("zebra/1.wav", "dog/a/b/2.flac", "dog/3.ogg", "Ärger – 音/4.mp3", "top.wav", ".cache/5.wav", "dog/.6.wav")
    listing = _list(read_folder, _tree(open_place(root), *names, readme__txt="x"))
    assert listing.label_names == ("dog", "zebra", "Ärger – 音")
    assert _labels(listing) == {
        "zebra/1": ["zebra"],
        "dog/a/b/2": ["dog"],
        "dog/3": ["dog"],
        "Ärger – 音/4": ["Ärger – 音"],
    }
    assert _reasons(listing) == {"top.wav": "unlabelled"}
    assert {clip.split for clip in listing.clips} == {""}


def test_folders_called_as_splits_are_splits(tmp_path: Path) -> None:
    tops = {"Train": "train", "training": "train", "dev": "validation", "valid": "validation", "val": "validation"} | {
        "validation": "validation",
        "test": "test",
        "testing": "test",
        "eval": "test",
    }
    source = _tree(tmp_path, *(f"{top}/dog/x/1.wav" for top in tops), "train/cat/2.wav", "test/3.wav")
    listing = _list(read_folder, source)
    assert listing.label_names == ("cat", "dog")
    assert _splits(listing) == {f"{top}/dog/x/1.wav": split for top, split in tops.items()} | {
        "train/cat/2.wav": "train"
    }
    assert _reasons(listing) == {"test/3.wav": "unlabelled"}
    mixed = _list(read_folder, _tree(tmp_path / "mixed", "train/1.wav", "boat/2.wav"))
    assert mixed.label_names == ("boat", "train")
    assert {clip.split for clip in mixed.clips} == {""}


def test_a_folder_without_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no class folders with audio files"):
        _list(read_folder, _tree(tmp_path / "a", "1.wav"))
    for reader in (read_folder, read_unlabelled):
        with pytest.raises(UserError, match="holds no audio files"):
            _list(reader, _tree(tmp_path / "b", "dog/1.txt"))
        with pytest.raises(UserError, match="does not exist"):
            _list(reader, open_place(str(tmp_path / "c")))


def test_unlabelled_takes_every_audio_file(root: str) -> None:
    listing = _list(read_unlabelled, _tree(open_place(root), "a.wav", "b/c.FLAC", "b/c.mp3", "d/é.opus", "n.txt"))
    assert {clip.path: clip.clip_id for clip in listing.clips} == {
        "a.wav": "a",
        "b/c.FLAC": "b/c.FLAC",
        "b/c.mp3": "b/c.mp3",
        "d/é.opus": "d/é",
    }
    assert listing.label_names == ()


def test_clip_ids_are_unique_whatever_the_names() -> None:
    names = ["a.wav", "a.flac", "a.wav.flac", "b.wav", "b", "c.d/e.wav", "c.d/e", "f.wav.wav", "f.wav"]
    ids = clip_ids(names)
    assert len(set(ids.values())) == len(names)
    assert clip_ids(["x/a.wav", "x/b.wav"]) == {"x/a.wav": "x/a", "x/b.wav": "x/b"}


# Tables


def test_a_table_gives_labels_splits_and_folds(root: str) -> None:
    source = open_place(root)
    _tree(source, "a.wav", "deep/ü.flac", "c.sph", "not named.wav")
    table = "fold,path,labels,split,more\n1,./a.wav,dog,train,x\n0,deep/ü.flac, cat ,,x\n,c.sph,dog,test,x\n"
    _tree(source, metadata__csv=table)
    _tree(source, other__TSV=table.replace(",", "\t"))
    listings = [
        _list(read_csv_table, source),
        _list(read_csv_table, source / "metadata.csv"),
        _list(read_csv_table, source / "other.TSV"),
        _list(read_csv_table, source, table=(source / "other.TSV").uri),
    ]
    for listing in listings:
        assert listing.label_names == ("cat", "dog")
        assert not listing.multi_label
        assert {clip.path: (clip.clip_id, clip.labels, clip.fold, clip.split) for clip in listing.clips} == {
            "a.wav": ("a", (1,), 1, "train"),
            "deep/ü.flac": ("deep/ü", (0,), 0, ""),
            "c.sph": ("c", (1,), -1, "test"),
        }
        assert _reasons(listing) == {"not named.wav": "not-in-table"}
        assert all(read_member(source_root(source / "metadata.csv"), clip.path) == DATA for clip in listing.clips)


def test_a_table_with_several_labels_in_a_row_is_multi_label(tmp_path: Path) -> None:
    source = _tree(tmp_path, "a.wav", "b.wav", "c.wav", metadata__csv="path,labels\na.wav,x; y;x\nb.wav,\nc.wav,y\n")
    listing = _list(read_csv_table, source)
    assert listing.multi_label
    assert _labels(listing) == {"a": ["x", "y"], "b": [], "c": ["y"]}
    other = _list(read_csv_table, source, label_separator="|")
    assert not other.multi_label
    assert _labels(other) == {"a": ["x; y;x"], "c": ["y"]}
    assert _reasons(other) == {"b.wav": "unlabelled"}
    whole = _list(read_csv_table, source, label_separator="")
    assert _labels(whole) == _labels(other)


def test_rows_of_a_table_that_do_not_fit_are_quarantined_with_the_reason(tmp_path: Path) -> None:
    rows = ["a.wav,x,1", "b.wav,x,1", "b.wav,y,1", "c.wav,x,128", "d.wav,x,one", "no.wav,z,1", "../out.wav,x,1"]
    _tree(tmp_path, "out.wav")
    source = _tree(
        tmp_path / "s", "a.wav", "b.wav", "c.wav", "d.wav", metadata__csv="path,labels,fold\n" + "\n".join(rows)
    )
    listing = _list(read_csv_table, source)
    assert _reasons(listing) == {
        "b.wav": "duplicate-row",
        "c.wav": "bad-fold",
        "d.wav": "bad-fold",
        "no.wav": "missing-file",
        "../out.wav": "missing-file",
    }
    assert listing.label_names == ("x",)


def test_a_table_without_labels_is_for_pretraining(tmp_path: Path) -> None:
    for text in ("path\na.wav\n", "path,labels\na.wav,\n"):
        listing = _list(read_csv_table, _tree(tmp_path, "a.wav", metadata__csv=text))
        assert (listing.label_names, len(listing.clips)) == ((), 1)


def test_a_relative_table_is_looked_for_in_the_source_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _tree(tmp_path / "s", "a.wav", mine__csv="path,labels\na.wav,x\n")
    _tree(tmp_path, mine__csv="path,labels\na.wav,y\n", other__csv="path,labels\na.wav,z\n")
    monkeypatch.chdir(tmp_path)
    assert _list(read_csv_table, source, table="mine.csv").label_names == ("x",)
    assert _list(read_csv_table, source, table="other.csv").label_names == ("z",)


def test_files_that_no_reader_looks_at_are_accounted_for(tmp_path: Path) -> None:
    source = _tree(tmp_path, "a/one.wav", "a/two.wav", "a/notes.txt", ".hidden.wav", "a/._one.wav")
    (tmp_path / "a/gone.wav").symlink_to(tmp_path / "nowhere.wav")
    (tmp_path / "a/gone.txt").symlink_to(tmp_path / "nowhere.txt")
    listing = _list(read_unlabelled, source)
    account_for_others(source, listing)
    assert sorted(clip.path for clip in listing.clips) == ["a/one.wav", "a/two.wav"]
    assert [(item.path, item.reason) for item in listing.skipped] == [("a/notes.txt", "other-file")]
    assert [(item.path, item.reason) for item in listing.quarantined] == [("a/gone.wav", "dangling-link")]


@pytest.mark.parametrize("below", ["", "/sub"])
def test_an_output_among_the_recordings_is_refused(below: str, tmp_path: Path) -> None:
    source = _tree(tmp_path / "raw", "a/one.wav")
    with pytest.raises(UserError, match=r"raw.*: lies in source=.*raw, among the recordings; give another output"):
        check_source(PrepareConfig(kind="unlabelled", source=source.uri, output=f"{source.uri}{below}"))
    check_source(PrepareConfig(kind="unlabelled", source=source.uri, output=f"{source.uri}-prepared"))


def test_a_missing_table_is_one_clear_line(tmp_path: Path) -> None:
    source = _tree(tmp_path, "a.wav", empty__csv="path\n", bad__csv="name\n")
    for given, layout, message in (
        (source, {}, "no metadata.csv"),
        (source / "a.wav", {}, "is no .csv or .tsv file"),
        (source / "x.csv", {}, "does not exist"),
        (source, {"table": "/nowhere.csv"}, "layout.table=/nowhere.csv: there is no /nowhere.csv; check"),
        (source / "empty.csv", {}, "names no recordings"),
        (source / "bad.csv", {}, "column 'path' is missing; found: name"),
    ):
        with pytest.raises(UserError, match=message):
            _list(read_csv_table, given, **layout)


def test_labels_keep_their_numbers_and_names_their_order() -> None:
    def added(*labels: tuple[int | str, ...]) -> SourceListing:
        listing = SourceListing()
        clips: list[LabelledClip] = [(SourceClip(f"{i}.wav", f"{i}", 1), mine) for i, mine in enumerate(labels)]
        add_labelled(listing, clips, "labels=x")
        return listing

    numbers = added((3,), (0,), (-1,), ())
    assert numbers.label_names == ("0", "1", "2", "3")
    assert [clip.labels for clip in numbers.clips] == [(3,), (0,)]
    assert [bad.reason for bad in numbers.quarantined] == ["unlabelled", "unlabelled"]
    text = added(("b", "a"), ("a", "a"), (10,), ())
    assert text.label_names == ("10", "a", "b")
    assert [clip.labels for clip in text.clips] == [(1, 2), (1,), (0,), ()]
    assert text.multi_label
    assert not added(("a", "a")).multi_label
    assert added((), ()).label_names == ()
    assert len(added((), ()).clips) == 2
    for many in ([(MAX_LABELS,)], [(str(i),) for i in range(MAX_LABELS + 1)], [(10**30,)]):
        with pytest.raises(UserError, match=r"labels=x: gives \d+ labels, at most 32768 fit"):
            added(*many)
    assert added((MAX_LABELS - 1,)).clips[0].labels == (MAX_LABELS - 1,)


# Parquet


def test_rows_of_parquet_files_become_clips(root: str) -> None:
    source = open_place(root)
    data, waves = zip(*map(_wav, range(7)), strict=True)
    audio = [{"bytes": item, "path": "x"} for item in data]
    write_table(source / "d/b.parquet", pa.table({"audio": audio[:5], "label": [2, 0, 1, 1, 0]}), row_group_rows=4)
    write_table(source / "a.parquet", pa.table({"audio": audio[5:], "label": [0, -1]}))
    listing = _list(read_parquet, source)
    assert listing.label_names == ("0", "1", "2")
    assert _labels(listing) == {
        "d/b/000000": ["2"],
        "d/b/000001": ["0"],
        "d/b/000002": ["1"],
        "d/b/000003": ["1"],
        "d/b/000004": ["0"],
        "a/000000": ["0"],
    }
    assert [bad.reason for bad in listing.quarantined] == ["unlabelled"]
    by_id = {clip.clip_id: clip for clip in listing.clips}
    for clip_id, wave in zip(["d/b/000000", "d/b/000003", "d/b/000004"], (waves[0], waves[3], waves[4]), strict=True):
        np.testing.assert_array_equal(decode_clip(read_member(source, by_id[clip_id].path), clip_id), wave)
    sizes = [clip.bytes for clip in listing.clips if clip.path.startswith("d/b.parquet!/0/")]
    assert len(data[0]) <= min(sizes) <= max(sizes) < 1.6 * len(data[0])
    single = _list(read_parquet, source / "d/b.parquet")
    assert read_member(source_root(source / "d/b.parquet"), single.clips[0].path) == data[0]


def test_columns_of_parquet_files_are_used_where_they_are(tmp_path: Path) -> None:
    source = open_place(str(tmp_path))
    columns = {
        "sound": [b"1", b"2", b"3", b"4"],
        "tags": [["b", "a"], ["a"], [], ["a"]],
        "id": [7, 8, None, 7],
        "fold": [1, None, 3, 999],
        "split": ["train", None, "test", "train"],
    }
    write_table(source / "x.parquet", pa.table(columns))
    listing = _list(read_parquet, source, audio_column="sound", label_column="tags")
    assert listing.multi_label
    assert _labels(listing) == {"7": ["a", "b"], "8": ["a"], "x/000002": []}
    assert [(clip.fold, clip.split) for clip in listing.clips] == [(1, "train"), (-1, ""), (3, "test")]
    assert [bad.reason for bad in listing.quarantined] == ["bad-fold"]
    columns["clip_id"], columns["fold"] = ["p", "q", "p", "r"], [1, 1, 1, 1]
    write_table(source / "x.parquet", pa.table(columns))
    listing = _list(read_parquet, source, audio_column="sound")
    assert [clip.clip_id for clip in listing.clips] == ["p", "q", "r"]
    assert [bad.reason for bad in listing.quarantined] == ["duplicate-id"]
    assert listing.label_names == ()


def test_listing_parquet_never_reads_the_audio(tmp_path: Path) -> None:
    place = open_place(str(tmp_path)) / "x.parquet"
    write_table(place, pa.table({"label": ["a", "b"], "audio": [b"A" * 100, b"B" * 100]}))
    whole = _list(read_parquet, place)
    import pyarrow.parquet as pq

    chunk = pq.read_metadata(place.path).row_group(0).column(1)
    data = bytearray(place.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    place.write_bytes(bytes(data))
    assert _list(read_parquet, place) == whole
    assert whole.label_names == ("a", "b")


def test_parquet_files_that_do_not_fit_are_one_clear_line(tmp_path: Path) -> None:
    source = open_place(str(tmp_path))
    for name, columns in {
        "none": {"sound": [b"1"]},
        "text": {"audio": ["1"]},
        "struct": {"audio": [{"path": "x"}]},
        "float": {"audio": [b"1"], "label": [0.5]},
        "empty": {"audio": pa.array([], pa.binary())},
    }.items():
        write_table(source / name / "x.parquet", pa.table(columns))
    (source / "broken/x.parquet").write_bytes((source / "none/x.parquet").read_bytes()[:-20])
    _tree(source / "bare", "a.wav")
    for name, message in {
        "none": r"layout.audio_column=audio: .*none/x.parquet has no such column; found: sound",
        "text": r"layout.audio_column=audio: holds string in .*, not files' bytes",
        "struct": r"layout.audio_column=audio: holds struct<path: string> in",
        "float": r"layout.label_column=label: holds double in .*, neither whole numbers nor text",
        "empty": r"its Parquet files have no rows",
        "broken": r"x.parquet: damaged, or no Parquet file \(.*\); fetch it again",
        "bare": r"holds no .parquet files",
        "bare/a.wav": r"is no .parquet file",
        "nowhere": r"does not exist",
    }.items():
        with pytest.raises(UserError, match=message):
            _list(read_parquet, source / name)


# WebDataset


def _tar(*members: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def test_samples_of_tars_become_clips(root: str) -> None:
    source = open_place(root)
    data, waves = zip(*map(_wav, range(4)), strict=True)
    long = "sehr/" + "lang-ö" * 30
    first = _tar(
        ("./000.wav", data[0]), ("./000.cls", b"2\n"), ("001.cls", b"0"), ("001.wav", data[1]), ("001.txt", b"x")
    )
    second = _tar(
        ("000.flac.txt", b"no"),
        (f"{long}.WAV", data[2]),
        (f"{long}.cls", b"1"),
        ("000.cls", b"0"),
        ("000.wav", data[3]),
    )
    (source / "train/a.tar").write_bytes(first)
    (source / "b.tar").write_bytes(second)
    listing = _list(read_webdataset, source)
    assert listing.label_names == ("0", "1", "2")
    assert _labels(listing) == {"train/a/000": ["2"], "train/a/001": ["0"], f"b/{long}": ["1"], "b/000": ["0"]}
    assert _reasons(listing) == {}
    by_id = {clip.clip_id: clip for clip in listing.clips}
    for clip_id, wave in zip(["train/a/000", "train/a/001", f"b/{long}", "b/000"], waves, strict=True):
        np.testing.assert_array_equal(decode_clip(read_member(source, by_id[clip_id].path), clip_id), wave)
        assert by_id[clip_id].bytes == len(data[0])
    single = _list(read_webdataset, source / "train/a.tar")
    assert read_member(source_root(source / "train/a.tar"), single.clips[0].path) == data[0]


@pytest.mark.parametrize(
    ("column", "content", "labels"),
    [
        ("label", {"json": b'{"label": "dog"}'}, ["dog"]),
        ("label", {"json": b'{"label": ["dog", "cat"]}'}, ["cat", "dog"]),
        ("label", {"json": b'{"text": "dog"}'}, []),
        ("label", {"txt": b"a caption"}, []),
        ("label", {"label": b"dog\n", "cls": b"3"}, ["dog"]),
        ("label", {"cls": b"1", "json": b"no json"}, ["1"]),
        ("json", {"json": b'{"label": 1}', "cls": b"0"}, ["1"]),
        ("json", {"json": b'"dog"'}, ["dog"]),
        ("txt", {"txt": "Hündin\n".encode(), "cls": b"3"}, ["Hündin"]),
        ("txt", {"TXT": b"dog"}, ["dog"]),
        ("cls", {"txt": b"dog"}, []),
        ("seg.txt", {"seg.txt": b"dog", "txt": b"cat"}, ["dog"]),
    ],
)
def test_a_sample_has_the_label_of_the_member_that_is_asked_for(
    tmp_path: Path, column: str, content: dict[str, bytes], labels: list[str]
) -> None:
    source = open_place(str(tmp_path))
    (source / "a.tar").write_bytes(_tar(*((f"x.{name}", data) for name, data in content.items()), ("x.wav", DATA)))
    assert _labels(_list(read_webdataset, source, label_column=column)) == {"a/x": labels}


def test_samples_that_do_not_fit_are_quarantined_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = {"a": b"two", "b": b"", "c": b"\xff"}
    members = [(f"{name}.{kind}", data) for name, data in bad.items() for kind, data in (("wav", DATA), ("cls", data))]
    more = [("d.json", b'{"label": 0.5}'), ("d.wav", DATA), ("e.json", b"[" * 100_000), ("e.wav", DATA)]
    rest = [
        ("f.cls", b"1"),
        ("g.left.wav", DATA),
        ("g.right.wav", DATA),
        ("g.cls", b"1"),
        ("h.wav", DATA * 2),
        ("h.cls", b"1"),
    ]
    source = open_place(str(tmp_path))
    (source / "x.tar").write_bytes(_tar(*members, *more, *rest))
    monkeypatch.setattr(webdataset, "MAX_MEMBER_BYTES", len(DATA))
    listing = _list(read_webdataset, source)
    assert {path.split("!/")[1].split("/")[-1]: reason for path, reason in _reasons(listing).items()} == {
        "a.wav": "bad-label",
        "b.wav": "bad-label",
        "c.wav": "bad-label",
        "d.wav": "bad-label",
        "e.wav": "bad-label",
        "f": "missing-file",
        "g.right.wav": "second-audio",
        "h.wav": "too-large",
    }
    assert _labels(listing) == {"x/g": ["1"]}
    assert [item.reason for item in listing.skipped] == ["second-audio"]


def test_a_damaged_tar_is_refused_rather_than_read_in_part(tmp_path: Path) -> None:
    good = _tar(*((f"{index}.wav", bytes(3000)) for index in range(5)))
    place = open_place(str(tmp_path)) / "x.tar"
    place.write_bytes(good[: 5 * (512 + 3072)])  # an end without the usual zeros is no damage
    assert len(_list(read_webdataset, place).clips) == 5
    header = 2 * (512 + 3072)
    import gzip

    for data in (
        good[: header + 100],
        good[: header + 1000],
        good[:header] + b"rubbish" + good[header + 7 :],
        good[:header] + bytes(100) + b"x" + good[header + 101 :],
        b"no tar" * 500,
        b"",
        gzip.compress(good),
    ):
        place.write_bytes(data)
        with pytest.raises(UserError, match=r"x.tar: damaged, or no plain tar file \(.*\); fetch or make it again"):
            _list(read_webdataset, place)


def test_tars_without_audio_are_refused(tmp_path: Path) -> None:
    source = open_place(str(tmp_path))
    (source / "x.tar").write_bytes(_tar(("a.txt", b"1")))
    with pytest.raises(UserError, match="its tar files hold no audio"):
        _list(read_webdataset, source)
    with pytest.raises(UserError, match=r"holds no .tar files"):
        _list(read_webdataset, _tree(source / "empty", "a.wav"))


def test_listing_a_tar_reads_a_fraction_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0

    class Counting(io.FileIO):
        def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
            nonlocal read
            count = super().readinto(buffer)
            read += count
            return count

    class Files:
        def get_file_info(self, asked: object) -> object:
            return pa.fs.LocalFileSystem().get_file_info(asked)

        def open_input_file(self, path: str) -> Counting:
            return Counting(path)

    place = open_place(str(tmp_path)) / "x.tar"
    place.write_bytes(
        _tar(*((f"{i}.{kind}", data) for i in range(20) for kind, data in (("wav", bytes(10**6)), ("cls", b"1"))))
    )
    monkeypatch.setattr(Place, "filesystem", property(lambda _: Files()))
    assert len(_list(read_webdataset, place).clips) == 20
    assert read < 0.1 * 20 * 10**6


# Zip


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("kind", ["audioset", "speech_commands", "folder", "unlabelled", "csv"])
def test_a_zip_holds_what_its_folder_holds(root: str, tmp_path: Path, kind: str, method: int) -> None:
    folder = open_place(str(tmp_path / "folder"))
    wav, wave = _wav(1)
    if kind == "audioset":
        _tree(folder, *NAMES, **TABLES)
    elif kind == "speech_commands":
        _speech_commands(folder)
    else:
        _tree(folder, "dög/1.wav", "cat/2.flac", "x.wav", metadata__csv="path,labels\ndög/1.wav,dog\nno.wav,dog\n")
    files = [path for path in Path(folder.path).rglob("*") if path.is_file()]
    with zipfile.ZipFile(tmp_path / "set.zip", "w", method) as archive:
        for path in files:
            if is_audio(path.name):
                path.write_bytes(wav)
            archive.write(path, f"top/{path.relative_to(folder.path).as_posix()}")
    source = open_place(root) / "set.zip"
    source.write_bytes((tmp_path / "set.zip").read_bytes())
    plain, zipped = (_list(READERS[kind], place) for place in (folder, source))
    assert plain.num_files > 0
    assert (zipped.label_names, zipped.multi_label, zipped.missing) == (
        plain.label_names,
        plain.multi_label,
        plain.missing,
    )
    for mine, other in (
        (zipped.clips, plain.clips),
        (zipped.quarantined, plain.quarantined),
        (zipped.skipped, plain.skipped),
    ):
        moved = [vars(item) | {"path": f"set.zip!/top/{item.path}"} for item in other]
        assert [vars(item) for item in mine] == moved
    for clip in zipped.clips:
        np.testing.assert_array_equal(decode_clip(read_member(source_root(source), clip.path), clip.path), wave)


def test_a_task_writes_what_can_be_read_of_a_zip_and_quarantines_the_rest(tmp_path: Path) -> None:
    wav, _ = _wav(1)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("a/1.wav", "a/2.wav", "a/3.wav"):
            archive.writestr(name, wav)
    source = open_place(str(tmp_path)) / "set.zip"
    source.write_bytes(buffer.getvalue())
    listing = _list(READERS["unlabelled"], source)
    damaged = bytearray(buffer.getvalue())
    damaged[damaged.find(b"a/2.wav") + 100] ^= 1
    source.write_bytes(bytes(damaged))
    gone = SourceClip("set.zip!/a/4.wav", "4", 1)
    plan = ShardPlan(
        source=source_root(source),
        target=open_place(str(tmp_path / "out.parquet")),
        index=open_place(str(tmp_path / "index.parquet")),
        groups=((*listing.clips, gone),),
        row_group_clips=8,
        max_clip_seconds=30.0,
    )
    result = write_shard(plan)
    assert {bad.path: bad.reason for bad in result.quarantined} == {
        "set.zip!/a/2.wav": "damaged",
        "set.zip!/a/4.wav": "missing-file",
    }
    assert read_table(plan.target, ["clip_id"])["clip_id"].to_pylist() == ["1", "3"]


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_a_zip_of_archives_is_refused(tmp_path: Path, kind: str) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.tar", _tar())
    with pytest.raises(UserError, match=r"x.zip: is no \.(parquet|tar) file; give one, or a folder of them"):
        _list(READERS[kind], open_place(str(tmp_path / "x.zip")))


def test_labels_of_json_members_keep_their_type(tmp_path: Path) -> None:
    source = open_place(str(tmp_path))
    labels = [json.dumps({"label": label}).encode() for label in (1, None, [0])]
    members = [pair for i, label in enumerate(labels) for pair in ((f"{i}.wav", DATA), (f"{i}.json", label))]
    (source / "a.tar").write_bytes(_tar(*members))
    listing = _list(read_webdataset, source)
    assert _labels(listing) == {"a/0": ["1"], "a/2": ["0"]}
    assert [bad.reason for bad in listing.quarantined] == ["unlabelled"]


def test_a_name_that_is_not_utf8_costs_that_file_only(tmp_path: Path) -> None:
    for name in (b"good.wav", b"caf\xe9.wav", b"notes\xff.txt", b".hidden\xff.wav"):
        (tmp_path / os.fsdecode(name)).write_bytes(b"x" * 5)
    place = open_place(str(tmp_path))
    assert list_audio(place) == {"good.wav": 5}
    assert [vars(item) for item in undecodable_files(place)] == [
        {"path": "caf\\xe9.wav", "reason": "bad-name", "detail": "not UTF-8", "bytes": 5}
    ]
