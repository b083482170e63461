"""Whatever bytes it gets, the decoder returns a wave or raises BadAudio, soon, without a word and within its memory.

BEATS_RAY_FUZZ_SECONDS=600 BEATS_RAY_FUZZ_SEED=1 python -m pytest -m slow tests/slow/test_fuzz_decoder.py -s

Mutants of good files are decoded in processes of their own, so that a crash or a hang is a failure of one mutant. The
bytes of a failure are stored, and its seed and number printed: `mutate` makes it again from these.
"""

import faulthandler
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from beats_ray.data import decode, decode_ffmpeg
from tests.unit.data.broken_files import FOLDER, UNREADABLE, write_broken_files

pytestmark = pytest.mark.slow

SECONDS = float(os.environ.get("BEATS_RAY_FUZZ_SECONDS", "120"))
SEED = int(os.environ.get("BEATS_RAY_FUZZ_SEED", time.time_ns() % 10**9))
WORKERS = 2
LONGEST_SECONDS = 10.0  # for one file
MEMORY_BYTES = 4 << 30  # address space of a worker
FAILURES = Path(tempfile.gettempdir()) / "beats-ray-fuzz-failures"
ROOT = Path(__file__).parents[2]
LARGEST_SEED_BYTES = 200_000
FIELDS = (0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFF8, 0xFFFFFFFE, 0xFFFFFFFF)


def test_no_mutant_of_an_audio_file_breaks_the_decoder(tmp_path: Path) -> None:
    (tmp_path / "seeds").mkdir()
    write_broken_files(tmp_path / "seeds")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    workers = []
    for index in range(WORKERS):
        arguments = [sys.executable, __file__, str(tmp_path), str(index), str(SEED), str(SECONDS)]
        with (tmp_path / f"{index}.err").open("wb") as errors:
            workers.append(subprocess.Popen(arguments, env=environment, stdin=subprocess.DEVNULL, stderr=errors))
    faults = _watch(workers, tmp_path)
    count = sum(_last_number(tmp_path, index) // WORKERS for index in range(WORKERS))
    print(f"{count} mutants in {SECONDS:g} s with seed {SEED}")
    if faults:
        pytest.fail("\n".join(faults))
    assert count > 20 * SECONDS


def _watch(workers: list[subprocess.Popen[bytes]], folder: Path) -> list[str]:
    """Waits for all workers and kills those that are stuck; returns what was wrong."""
    faults, running = [], dict(enumerate(workers))
    while running:
        time.sleep(0.2)
        for index, worker in list(running.items()):
            mark = folder / f"{index}.number"  # written before each mutant
            status = worker.poll()
            is_stuck = status is None and mark.exists() and time.time() - mark.stat().st_mtime > LONGEST_SECONDS
            if is_stuck:
                worker.kill()
                worker.wait()
            if is_stuck or status:
                what = f"took more than {LONGEST_SECONDS:g} s" if is_stuck else f"ended with {status}"
                faults.append(_report(folder, index, what))
            if is_stuck or status is not None:
                del running[index]
    return faults


def _last_number(folder: Path, index: int) -> int:
    path = folder / f"{index}.number"
    return int(path.read_text() or 0) if path.exists() else 0


def _report(folder: Path, index: int, what: str) -> str:
    number = _last_number(folder, index)
    name, data = mutate(read_seeds(folder / "seeds"), SEED, number)
    FAILURES.mkdir(exist_ok=True)
    path = FAILURES / f"{SEED}-{number}.bin"
    path.write_bytes(data)
    words = (folder / f"{index}.err").read_text(errors="replace").strip()[-2000:]
    return f"seed {SEED}, mutant {number} of {name!r}, stored in {path}: {what}\n{words}"


def read_seeds(folder: Path) -> dict[str, bytes]:
    """The corpus's files, small ones, each content once."""
    paths = sorted(path for path in folder.iterdir() if path.name not in (FOLDER, UNREADABLE))
    contents = {path.read_bytes(): path.name for path in reversed(paths)}
    return {name: data for data, name in sorted(contents.items(), key=lambda item: item[1]) if len(data) > 1}


def mutate(seeds: dict[str, bytes], seed: int, number: int) -> tuple[str, bytes]:
    """The mutant of this number, and which file it comes from."""
    rng = random.Random(f"{seed}-{number}")
    small = [name for name, data in seeds.items() if len(data) <= LARGEST_SEED_BYTES]
    name = rng.choice(small)
    data = bytearray(seeds[name])
    for _ in range(rng.choice((1, 1, 2, 3, 8, 30))):
        place = rng.randrange(min(len(data), rng.choice((16, 64, 512, 1 << 30))) or 1)
        size = rng.choice((1, 2, 3, 4, 8, 100, 5000))
        kind = rng.randrange(8)
        if kind == 0 and data:
            data[place % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[place : place + size] = rng.randbytes(size)
        elif kind == 2:
            data[place:place] = rng.randbytes(size) if rng.randrange(2) else bytes(size)
        elif kind == 3:
            del data[place : place + size]
        elif kind == 4:
            data[place:place] = data[place : place + size]
        elif kind in (5, 6):
            width = rng.choice((1, 2, 4, 4, 8))
            value = rng.choice((*FIELDS, len(data), rng.getrandbits(32))) % 256**width
            data[place : place + width] = value.to_bytes(width, rng.choice(("little", "big")))
        else:
            data[place:] = seeds[rng.choice(small)][rng.choice((0, place)) :] if rng.randrange(3) == 0 else b""
    return name, bytes(data)


def work(folder: Path, index: int, seed: int, seconds: float) -> None:
    """Decodes mutants until the time is over; ends with an error at the first one that is not handled as it must be."""
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    decode_ffmpeg._torchcodec = lambda: None  # type: ignore[assignment]
    os.environ["PATH"] = ""
    seeds, end, number = read_seeds(folder / "seeds"), time.monotonic() + seconds, index
    while time.monotonic() < end:
        _, data = mutate(seeds, seed, number)
        (folder / f"{index}.number").write_text(str(number))
        try:
            wave = decode.decode_clip(data, "mutant")
            assert wave.dtype == "int16"
            assert wave.size >= decode.MIN_SAMPLES
        except decode.BadAudio:
            pass
        if os.fstat(2).st_size:
            sys.exit("it printed what stands above")
        number += WORKERS


def test_ten_hours_are_decoded_in_little_more_memory_than_they_fill(tmp_path: Path) -> None:
    code = (
        "import resource, sys, numpy, soundfile\n"
        "from beats_ray.data.decode import decode_clip\n"
        "with soundfile.SoundFile(sys.argv[1], 'w', 8000, 1, format='FLAC', subtype='PCM_16') as sound:\n"
        "    for _ in range(600):\n"
        "        sound.write(numpy.zeros(60 * 8000, 'int16'))\n"
        "print(decode_clip(open(sys.argv[1], 'rb').read(), 'x', timeout_seconds=300).size)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "silence.flac")]
    answer = subprocess.run(arguments, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split()
    assert int(answer[0]) == 10 * 3600 * 16_000
    assert int(answer[1]) < 1.7e6  # KiB; the wave itself is 1.1e6


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
