"""Reading ESC-50's layout: labels follow the targets, whatever does not fit is quarantined, and says why."""

from pathlib import Path

import pytest

from beats_ray.config import LayoutSettings, UserError
from beats_ray.data.datasets.esc50 import check_layout, read_esc50
from beats_ray.data.source import SourceListing
from beats_ray.data.storage import open_place

pytestmark = pytest.mark.unit

HEADER = "filename,fold,target,category,take\n"
ROWS = [
    "1-100-A-10.wav,1,10,rain,A",
    "2-101-A-0.ogg,2,0,dog,A",
    "3-102-B-41.flac,3,41,saw,B",
    "3-103-B-41.wav,3,41,saw,B",
    "1-104-A-0.wav,1,0,dog,A",
]


def _folder(path: Path, rows: list[str], header: str = HEADER, without: tuple[str, ...] = ()) -> Path:
    (path / "audio").mkdir(parents=True)
    (path / "meta").mkdir()
    for row in rows:
        name = row.split(",")[0]
        if name not in without and name:
            (path / "audio" / name).write_bytes(b"12345")
    (path / "meta/esc50.csv").write_text(header + "\n".join(rows) + "\n")
    return path


def _read(path: Path) -> SourceListing:
    return read_esc50(open_place(str(path)), LayoutSettings())


def _reasons(listing: SourceListing) -> dict[str, str]:
    return {bad.path.removeprefix("audio/"): bad.reason for bad in listing.quarantined}


def test_labels_are_places_in_the_target_order(tmp_path: Path) -> None:
    listing = _read(_folder(tmp_path, ROWS))
    assert listing.label_names == ("dog", "rain", "saw")
    assert {clip.clip_id: (clip.labels, clip.fold) for clip in listing.clips} == {
        "1-100-A-10": ((1,), 1),
        "2-101-A-0": ((0,), 2),
        "3-102-B-41": ((2,), 3),
        "3-103-B-41": ((2,), 3),
        "1-104-A-0": ((0,), 1),
    }
    assert listing.quarantined == []
    assert listing.num_files == 5
    assert {clip.bytes for clip in listing.clips} == {5}


def test_the_same_on_an_object_store(root: str, tmp_path: Path) -> None:
    _folder(tmp_path / "local", ROWS)
    place = open_place(root) / "esc"
    place.upload(tmp_path / "local")
    assert read_esc50(place, LayoutSettings()) == _read(tmp_path / "local")


def test_files_that_do_not_fit_are_quarantined_with_the_reason(tmp_path: Path) -> None:
    rows = [
        *ROWS,
        "1-200-A-0.wav,2,0,dog,A",
        "1-201-A-0.wav,1,10,rain,A",
        "1-202-A-0.wav,1,0,rain,A",
        "1-203-A-0.wav,0,0,dog,A",
        "1-204-A-0.wav,one,0,dog,A",
        "1-205-A-0.wav,128,0,dog,A",
        "1-206-A-0.wav,1,-1,dog,A",
        "1-207-A-0.wav,1,x,dog,A",
        "1-208-A-0.wav,1,0,,A",
        "1-209-A-0.wav,1,0,dog,A",
        "1-104-A-0.wav,1,0,dog,A",
        "2-101-A-0.flac,2,0,dog,A",
        "1-210-A-7.wav,1,7,dog,A",
        "../../secret.wav,1,0,dog,A",
    ]
    _folder(tmp_path / "esc", rows, without=("1-209-A-0.wav", "../../secret.wav"))
    for name in ("9-999-A-9.wav", "deep.wav", ".hidden.wav", "notes.txt"):
        (tmp_path / "esc/audio" / name).write_bytes(b"")
    listing = _read(tmp_path / "esc")
    assert _reasons(listing) == {
        "1-200-A-0.wav": "mislabelled",
        "1-201-A-0.wav": "mislabelled",
        "1-202-A-0.wav": "mislabelled",
        "1-203-A-0.wav": "bad-fold",
        "1-204-A-0.wav": "bad-fold",
        "1-205-A-0.wav": "bad-fold",
        "1-206-A-0.wav": "bad-target",
        "1-207-A-0.wav": "bad-target",
        "1-208-A-0.wav": "bad-category",
        "1-209-A-0.wav": "missing-file",
        "1-104-A-0.wav": "duplicate-row",
        "2-101-A-0.flac": "duplicate-id",
        "1-210-A-7.wav": "mislabelled",
        "../../secret.wav": "missing-file",
        "9-999-A-9.wav": "unlabelled",
        "deep.wav": "unlabelled",
    }
    assert listing.label_names == ("dog", "rain", "saw")
    assert len(listing.clips) == 4
    details = {bad.path: bad.detail for bad in listing.quarantined}
    assert details["audio/1-200-A-0.wav"] == "line 7: fold=2, but the file's name says 1"


def test_names_of_other_kinds_need_not_carry_fold_and_target(tmp_path: Path) -> None:
    listing = _read(_folder(tmp_path, ["my dog.wav,1,0,dog,A", "2-b.wav,1,0,dog,A"]))
    assert listing.quarantined == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 1: column 'filename' is missing; found: nothing"),
        ("filename,target,category\n", "line 1: column 'fold' is missing; found: filename, target, category"),
        (HEADER + "a.wav,1,0\n", "line 2: no value for column 'category'"),
        (HEADER + "a.wav,1,0,dog,A\nb.wav,1,0,dog,A,B\n", "line 3: a value after the last column 'take'"),
        (HEADER + ",1,0,dog,A\n", "line 2: column 'filename' is empty"),
        (HEADER + '"a.wav,1,0,dog,A\n', "unexpected end of data"),
        (HEADER + "gr\udcfcn.wav,1,0,dog,A\n", "line 2: not UTF-8 text"),
    ],
)
def test_a_malformed_table_is_named_with_line_and_column(tmp_path: Path, content: str, message: str) -> None:
    _folder(tmp_path, ROWS)
    (tmp_path / "meta/esc50.csv").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError) as caught:
        _read(tmp_path)
    assert message in str(caught.value)
    assert "esc50.csv: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_none_of_this_layout_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "bare/audio").mkdir(parents=True)
    (tmp_path / "silent/audio").mkdir(parents=True)
    (tmp_path / "silent/meta").mkdir()
    (tmp_path / "silent/meta/esc50.csv").write_text(HEADER)
    for name, message in {
        "nowhere": "does not exist",
        "empty": "the folder is empty",
        "file": "is a file",
        "bare": "no meta/esc50.csv",
        "silent": "audio/ holds no files",
    }.items():
        with pytest.raises(UserError, match=f"source={tmp_path / name}: {message}"):
            check_layout(open_place(str(tmp_path / name)))


def test_a_table_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    _folder(tmp_path, ROWS)
    table = tmp_path / "meta/esc50.csv"
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())
    assert len(_read(tmp_path).clips) == 5
