"""Members of zip, tar and Parquet files read as they were, on both kinds of storage; damage is named."""

import io
import tarfile
import tracemalloc
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from beats_ray.config import LayoutSettings, UserError
from beats_ray.data import archives
from beats_ray.data.archives import open_zip, read_member
from beats_ray.data.datasets.esc50 import read_esc50
from beats_ray.data.decode import BadAudio
from beats_ray.data.source import SourceListing, in_zip_too, list_audio, source_root
from beats_ray.data.storage import Place, open_place, write_table

pytestmark = pytest.mark.unit

CONTENT = {
    "top/audio/a.wav": bytes(range(256)) * 300,
    "top/audio/größe – 音.flac": b"x" * 5000,
    "top/audio/empty.ogg": b"",
    "top/meta/table.csv": b"a,b\n1,2\n",
}


def _zip(content: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def _put(folder: Place | Path, name: str, data: bytes) -> Place:
    place = (folder if isinstance(folder, Place) else open_place(str(folder))) / name
    place.write_bytes(data)
    return place


def _reason(source: Place, path: str) -> str:
    with pytest.raises(BadAudio) as caught:
        read_member(source, path)
    return caught.value.reason


@pytest.fixture(autouse=True)
def _empty_caches() -> Iterator[None]:
    yield
    archives._zip_directory.cache_clear()
    archives._row_group.cache_clear()


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_members_of_a_zip_are_read_as_they_were(root: str, method: int) -> None:
    source = open_place(root)
    _put(source, "deep/set.zip", _zip(CONTENT, method))
    for name, data in CONTENT.items():
        assert read_member(source, f"deep/set.zip!/{name}") == data
    for missing in ("deep/set.zip!/top/audio/b.wav", "deep/no.zip!/a.wav", "deep!/a.wav"):
        with pytest.raises(FileNotFoundError):
            read_member(source, missing)


def test_a_long_extra_field_in_front_of_a_member_is_passed_over(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        info = zipfile.ZipInfo("a.wav")
        info.extra = b"\xfe\xca" + (9000).to_bytes(2, "little") + bytes(9000)
        archive.writestr(info, b"content")
    place = _put(tmp_path, "x.zip", b"#!/bin/sh\n" + buffer.getvalue())  # and with something in front of the archive
    assert read_member(place.parent, "x.zip!/a.wav") == b"content"


def test_plain_paths_are_plain_files_whatever_they_are_called(root: str) -> None:
    source = open_place(root)
    for name in ("a.wav", "wow!/a.wav", "set.zip", "é/b.wav"):
        _put(source, name, name.encode())
        assert read_member(source, name) == name.encode()


def test_a_zip_looks_like_the_folder_that_it_holds(root: str, tmp_path: Path) -> None:
    for name, data in CONTENT.items():
        _put(tmp_path / "folder", name, data)
    folder = open_place(str(tmp_path / "folder/top"))
    rubbish = {".DS_Store": b"", "__MACOSX/top/audio/._a.wav": b"x"}
    for content in (CONTENT, CONTENT | rubbish, {name.removeprefix("top/"): data for name, data in CONTENT.items()}):
        view = open_zip(_put(open_place(root), "set.zip", _zip(content)))
        assert list_audio(view) == list_audio(folder)
        assert list_audio(view / "audio") == list_audio(folder / "audio")
        shown = [place.name for place in view.list() if not place.name.startswith(".")]
        assert shown == [place.name for place in folder.list()] == ["audio", "meta"]
        files = {place.uri[len(view.uri) :] for place in view.list(recursive=True) if not place.is_dir()}
        assert files - {"/.DS_Store"} == {name.removeprefix("top") for name in CONTENT}
        for name in ("audio", "audio/a.wav", "nothing", "meta/table.csv"):
            mine, other = view / name, folder / name
            assert (mine.exists(), mine.is_dir(), mine.size_bytes() * (not other.is_dir())) == (
                other.exists(),
                other.is_dir(),
                other.size_bytes() * (not other.is_dir()),
            )
        assert (view / "meta/table.csv").read_bytes() == CONTENT["top/meta/table.csv"]
        with pytest.raises(FileNotFoundError):
            (view / "nothing").read_bytes()


def _esc50(prefix: str) -> dict[str, bytes]:
    table = "filename,fold,target,category\n1-1-A-0.wav,1,0,dog\n2-2-A-1.wav,2,1,rain\n2-3-A-1.wav,2,1,rain\n"
    names = ("1-1-A-0.wav", "2-2-A-1.wav", "9-9-A-9.wav")
    return {f"{prefix}meta/esc50.csv": table.encode()} | {f"{prefix}audio/{name}": b"data" for name in names}


@pytest.mark.parametrize("prefix", ["", "ESC-50-master/"])
def test_a_reader_lists_a_zip_as_it_lists_the_folder(root: str, tmp_path: Path, prefix: str) -> None:
    for name, data in _esc50("").items():
        _put(tmp_path / "folder", name, data)
    source = _put(open_place(root), "esc.zip", _zip(_esc50(prefix), zipfile.ZIP_DEFLATED))
    reader = in_zip_too(read_esc50)
    plain = reader(open_place(str(tmp_path / "folder")), LayoutSettings())
    zipped = reader(source, LayoutSettings())
    assert len(plain.clips) == len(plain.quarantined) == 2
    assert plain.label_names == zipped.label_names == ("dog", "rain")
    for mine, other in ((zipped.clips, plain.clips), (zipped.quarantined, plain.quarantined)):
        assert [vars(item) for item in mine] == [
            vars(item) | {"path": f"esc.zip!/{prefix}{item.path}"} for item in other
        ]
    for clip in zipped.clips:
        assert read_member(source_root(source), clip.path) == b"data"


def test_the_root_is_the_folder_that_a_file_lies_in(root: str) -> None:
    file = _put(open_place(root), "deep/set.zip", _zip(CONTENT))
    assert source_root(file) == file.parent
    assert source_root(file.parent) == file.parent
    assert source_root(file.parent / "nothing") == file.parent / "nothing"


def _patch_headers(data: bytes, local: int, central: int, change: int) -> bytes:
    """XORs a byte in every local header and in every entry of the directory."""
    patched = bytearray(data)
    for signature, offset in ((b"PK\3\4", local), (b"PK\1\2", central)):
        at = patched.find(signature)
        while at >= 0:
            patched[at + offset] ^= change
            at = patched.find(signature, at + 4)
    return bytes(patched)


def test_names_in_utf8_are_understood_with_and_without_the_mark(tmp_path: Path) -> None:
    data = _zip({"größe/音.wav": b"1"})
    place = _put(tmp_path, "x.zip", _patch_headers(data, 7, 9, 0x08))
    assert list(archives.zip_members(place)) == ["größe/音.wav"]
    assert read_member(place.parent, "x.zip!/größe/音.wav") == b"1"
    cp437 = bytearray(_zip({"aeb.wav": b"2"}).replace(b"aeb", b"a\x82b"))  # é in code page 437, no UTF-8
    place = _put(tmp_path, "y.zip", bytes(cp437))
    assert read_member(place.parent, "y.zip!/aéb.wav") == b"2"


def test_members_that_cannot_be_read_are_quarantined_while_listing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = _esc50("")
    source = _put(tmp_path, "good.zip", _zip(content, zipfile.ZIP_DEFLATED))
    reader = in_zip_too(read_esc50)
    name = "good.zip!/audio/1-1-A-0.wav"

    def listed() -> dict[str, str]:
        archives._zip_directory.cache_clear()
        return {bad.path: bad.reason for bad in reader(source, LayoutSettings()).quarantined}

    usual = {"good.zip!/audio/2-3-A-1.wav": "missing-file", "good.zip!/audio/9-9-A-9.wav": "unlabelled"}
    assert listed() == usual
    members = archives.zip_members(source)
    with monkeypatch.context() as patch:
        patch.setattr(archives, "MAX_MEMBER_BYTES", 3)
        assert _reason(source.parent, name) == "too-large"
        with pytest.raises(UserError, match=r"good.zip: meta/esc50.csv has \d+ bytes, at most 3 are read"):
            listed()
    directory = archives._zip_directory
    for field, value, reason in (("flag_bits", 1, "encrypted"), ("compress_type", 9, "bad-compression")):
        setattr(members["audio/1-1-A-0.wav"], field, value)
        with monkeypatch.context() as patch:
            patch.setattr(archives, "_zip_directory", lambda *_: members)
            listing = reader(source, LayoutSettings())
            assert {bad.path: bad.reason for bad in listing.quarantined} == usual | {name: reason}
            assert [clip.clip_id for clip in listing.clips] == ["2-2-A-1"]
            assert _reason(source.parent, name) == reason
        setattr(members["audio/1-1-A-0.wav"], field, 0)
    assert directory is archives._zip_directory


def test_a_zip_with_a_password_is_recognised(tmp_path: Path) -> None:
    place = _put(tmp_path, "x.zip", _patch_headers(_zip({"a.wav": b"1234"}), 6, 8, 0x01))
    assert _reason(place.parent, "x.zip!/a.wav") == "encrypted"


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_any_damaged_byte_of_a_member_is_found(tmp_path: Path, method: int) -> None:
    name, data = "a.wav", bytes(range(256)) * 4
    good = _zip({name: data}, method)
    start = len(good) - len(good[good.find(b"PK\1\2") :])
    for at in range(30 + len(name), start, 7):
        place = _put(tmp_path, "x.zip", good[:at] + bytes([good[at] ^ 0x55]) + good[at + 1 :])
        archives._zip_directory.cache_clear()
        try:
            assert read_member(place.parent, "x.zip!/a.wav") == data  # a byte that means nothing to the decoder
        except BadAudio as error:
            assert error.reason == "damaged"  # noqa: PT017
        else:
            assert method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


def test_a_member_that_unpacks_to_more_than_it_says_is_damaged(tmp_path: Path) -> None:
    data = bytearray(_zip({"a.wav": bytes(50_000_000)}, zipfile.ZIP_DEFLATED))
    at = data.find(b"PK\1\2")
    data[at + 24 : at + 28] = (1000).to_bytes(4, "little")
    place = _put(tmp_path, "bomb.zip", bytes(data))
    tracemalloc.start()
    try:
        assert _reason(place.parent, "bomb.zip!/a.wav") == "damaged"
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_a_directory_that_points_nowhere_is_damage(tmp_path: Path) -> None:
    good = _zip({"a.wav": b"1234"})
    at = good.find(b"PK\1\2") + 42
    for offset in (3, 200):
        place = _put(tmp_path, "x.zip", good[:at] + offset.to_bytes(4, "little") + good[at + 4 :])
        archives._zip_directory.cache_clear()
        assert _reason(place.parent, "x.zip!/a.wav") == "damaged"


@pytest.mark.parametrize("data", [b"", b"no zip at all" * 100, _zip(CONTENT)[:-30]])
def test_what_is_no_zip_is_one_clear_line(tmp_path: Path, data: bytes) -> None:
    place = _put(tmp_path, "x.zip", data)
    with pytest.raises(UserError, match=r"x.zip: cannot be read as a zip archive \(.*\); fetch or make it again"):
        in_zip_too(read_esc50)(place, LayoutSettings())


def test_a_replaced_archive_is_read_anew(root: str) -> None:
    source = open_place(root)
    for version in (b"first", b"second one"):
        _put(source, "x.zip", _zip({"a.wav": version, "b" * len(version): b""}))
        assert read_member(source, "x.zip!/a.wav") == version
        write_table(source / "x.parquet", pa.table({"audio": [version] * len(version)}))
        assert read_member(source, "x.parquet!/0/1/audio") == version


def test_a_member_of_a_tar_is_the_range_that_its_path_says(root: str) -> None:
    source, buffer = open_place(root), io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("a.wav", "tief/ö.wav"):
            info = tarfile.TarInfo(name)
            info.size = len(CONTENT["top/audio/a.wav"])
            archive.addfile(info, io.BytesIO(CONTENT["top/audio/a.wav"]))
    _put(source, "x.tar", buffer.getvalue())
    for member in tarfile.open(fileobj=io.BytesIO(buffer.getvalue())):  # noqa: SIM115
        path = f"x.tar!/{member.offset_data}/{member.size}/{member.name}"
        assert read_member(source, path) == CONTENT["top/audio/a.wav"]
    _put(source, "x.tar", buffer.getvalue()[:2000])
    assert _reason(source, "x.tar!/512/76800/a.wav") == "damaged"
    assert _reason(source, "x.tar!/77824/76800/tief/ö.wav") == "damaged"
    with pytest.raises(FileNotFoundError):
        read_member(source, "y.tar!/0/1/a.wav")


def _table(as_struct: bool, rows: int = 10) -> pa.Table:
    files = [f"file {row}".encode() for row in range(rows)]
    audio = [{"bytes": data, "path": "p"} for data in files] if as_struct else files
    return pa.table({"other": [b"o" * 1000] * rows, "my audio": audio})


@pytest.mark.parametrize("as_struct", [False, True])
def test_a_cell_of_a_parquet_file_is_read_by_group_and_row(root: str, as_struct: bool) -> None:
    source = open_place(root)
    write_table(source / "d/x.parquet", _table(as_struct), row_group_rows=4)
    for row in range(10):
        assert read_member(source, f"d/x.parquet!/{row // 4}/{row % 4}/my audio") == f"file {row}".encode()
    for nowhere in (
        "d/x.parquet!/2/2/my audio",
        "d/x.parquet!/3/0/my audio",
        "d/x.parquet!/0/0/no",
        "d/y.parquet!/0/0/a",
    ):
        with pytest.raises(FileNotFoundError):
            read_member(source, nowhere)


def test_an_empty_cell_and_a_broken_page_are_named(tmp_path: Path) -> None:
    place = open_place(str(tmp_path)) / "x.parquet"
    write_table(place, pa.table({"audio": [b"1", None]}))
    assert _reason(place.parent, "x.parquet!/0/1/audio") == "empty-file"
    data = bytearray(place.read_bytes())
    data[4:20] = b"\xff" * 16
    _put(place.parent, "y.parquet", bytes(data))
    _put(place.parent, "z.parquet", place.read_bytes()[:-9])
    assert _reason(place.parent, "y.parquet!/0/0/audio") == "damaged"
    assert _reason(place.parent, "z.parquet!/0/0/audio") == "damaged"


def test_a_row_group_is_read_once_for_many_threads_and_only_its_audio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[tuple[int, list[str]]] = []

    class Counting(pq.ParquetFile):
        def read_row_group(self, i: int, columns: list[str]) -> pa.Table:
            reads.append((i, columns))
            return super().read_row_group(i, columns)

    place = open_place(str(tmp_path)) / "x.parquet"
    write_table(place, _table(as_struct=True), row_group_rows=5)
    monkeypatch.setattr(archives.pq, "ParquetFile", Counting)
    with ThreadPoolExecutor(8) as threads:
        paths = [f"x.parquet!/{row // 5}/{row % 5}/my audio" for row in range(10)]
        assert len(list(threads.map(lambda path: read_member(place.parent, path), paths * 5))) == 50
    assert sorted(reads) == [(0, ["my audio.bytes"]), (1, ["my audio.bytes"])]


def test_listing_a_zip_of_a_missing_source_is_the_readers_own_message(tmp_path: Path) -> None:
    def reader(source: Place, _layout: LayoutSettings) -> SourceListing:
        raise UserError(f"own {source.name}")

    (tmp_path / "dir.zip").mkdir()
    for name in ("no.zip", "dir.zip"):
        with pytest.raises(UserError, match=f"own {name}"):
            in_zip_too(reader)(open_place(str(tmp_path / name)), LayoutSettings())
