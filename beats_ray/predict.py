"""`beats-ray predict MODEL FILE...`: what is heard in audio files of any sample rate, channel count and length.

Runs in this process, without a cluster. Long files are heard in windows of ten seconds; a class's probability is the
mean over them.
"""

import json

import numpy as np
import torch

from beats_ray.config import UserError
from beats_ray.console import Console
from beats_ray.data.decode import BadAudio, decode_clip
from beats_ray.data.plan import SAMPLE_RATE_HZ
from beats_ray.data.storage import Place, open_place
from beats_ray.inference import load_checked
from beats_ray.models import AudioClassifier
from beats_ray.windows import window_spans

WINDOW_SECONDS = 10.0  # the length that the paper's models are trained at
BATCH_WINDOWS = 16


def run_predict(model: str, files: list[str], top_k: int = 3, as_json: bool = False) -> None:
    """Prints the `top_k` most probable classes of each file: a table, or one JSON object a line.

    UserError for a model that is no classifier, and for a file that is missing or holds no readable audio.
    """
    module = load_checked(open_place(model), "model", ("classifier",))
    assert isinstance(module, AudioClassifier)
    console = Console()
    for file in files:
        wave_S = read_audio(open_place(file))
        probability_C = predict_wave(module, wave_S)
        best = probability_C.topk(min(top_k, len(probability_C)))
        names = module.class_names or [str(index) for index in range(len(probability_C))]
        found = [
            (names[index], value) for index, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        if as_json:
            labels = [{"label": name, "probability": round(value, 6)} for name, value in found]
            print(json.dumps({"file": file, "seconds": round(len(wave_S) / SAMPLE_RATE_HZ, 3), "labels": labels}))
        else:
            console.table(file, ["label", "probability"], found)


def read_audio(place: Place) -> np.ndarray:
    """The file as 16 kHz mono int16 samples. UserError where it is missing, unreadable or empty."""
    try:
        return decode_clip(place.read_bytes(), place.name)
    except FileNotFoundError:
        raise UserError(f"file={place.uri}: does not exist; check the path") from None
    except (BadAudio, IsADirectoryError) as error:
        raise UserError(f"file={place.uri}: {error}; give a whole WAV, FLAC, Ogg or MP3 file") from None


def predict_wave(model: AudioClassifier, wave_S: np.ndarray) -> torch.Tensor:
    """Class probabilities of one recording of any length: the mean over its windows."""
    pieces = split_windows(wave_S)
    probabilities = []
    with torch.inference_mode():
        for start in range(0, len(pieces), BATCH_WINDOWS):
            batch = pieces[start : start + BATCH_WINDOWS]
            wave_BS = torch.zeros(len(batch), max(len(piece) for piece in batch), dtype=torch.int16)
            for row, piece in zip(wave_BS, batch, strict=True):
                row[: len(piece)] = torch.from_numpy(piece)
            num_samples_B = torch.tensor([len(piece) for piece in batch])
            probabilities.append(model.probabilities(model(*model.encoder.normalised_fbank(wave_BS, num_samples_B))))
    return torch.cat(probabilities).mean(0)


def split_windows(wave_S: np.ndarray) -> list[np.ndarray]:
    """Consecutive windows that hold every sample once; a very short rest stays with the last one."""
    window = round(WINDOW_SECONDS * SAMPLE_RATE_HZ)
    return [wave_S[start:end] for start, end in window_spans(len(wave_S), window, window)]
