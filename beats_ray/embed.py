"""`beats-ray embed MODEL SRC DST`: the embeddings of a whole prepared data set, as Parquet.

    DST/embeddings.json            model, width, pooling, layer, clips
    DST/shards/<as in SRC>.parquet clip_id, labels, fold, num_samples, embedding

`embedding` is a list of D values, the mean over the clip's patches; with pooling=none a list of N x D values, patch by
patch, time-major (8 patches along frequency for every 160 ms): `np.reshape(row, (-1, D))`. Padding is never part of it.
Shards are written as soon as they are whole, and a run started again computes the missing ones.
"""

from typing import Any

import numpy as np

from beats_ray.config import ConfigError, EmbedConfig, UserError
from beats_ray.console import Console
from beats_ray.data.manifest import read_manifest, shards_fingerprint
from beats_ray.data.storage import Place, open_place
from beats_ray.inference import (
    check_pool,
    check_published,
    map_shards,
    missing_shards,
    model_sha256,
    row_group_spans,
    write_shard,
)
from beats_ray.stage import first_difference

RESULT_FILE = "embeddings.json"
SOURCE_FILE = "source.json"  # written first: what an unfinished DST belongs to


def run_embed(config: EmbedConfig, console: Console) -> list[tuple[str, str]]:
    """Computes all embeddings and returns what was written and where; at once where DST is complete.

    UserError for a model without an encoder, a layer that it does not have, a DST of other settings, and a cluster
    without room for the actors.
    """
    dataset, output, model = open_place(config.data.path), open_place(config.output), open_place(config.model)
    manifest = read_manifest(dataset)
    encoder = check_published(model, "model", ("encoder", "classifier"))["config"]["encoder"]
    if (config.layer or 0) > encoder["num_layers"]:
        raise ConfigError(f"layer={config.layer}: the encoder has {encoder['num_layers']} layers; choose at most that")
    if not (output / RESULT_FILE).exists():
        check_pool(row_group_spans(manifest, shards=missing_shards(manifest, output)), config)
    source = {
        "data": shards_fingerprint(manifest),
        "model": model_sha256(model),
        "pooling": config.pooling,
        "layer": config.layer,
        "dtype": config.dtype,
    }
    _claim(output, source)
    if not (output / RESULT_FILE).exists():
        for index, rows in map_shards(
            dataset,
            manifest,
            Embeddings,
            missing_shards(manifest, output),
            console=console,
            model=model,
            worker_options={"pooling": config.pooling, "layer": config.layer, "dtype": config.dtype},
            batch_clips=config.batch_clips,
            num_workers=config.num_workers,
            use_gpu=config.use_gpu,
            retry_seconds=config.data.retry_seconds,
        ):
            columns = rows.select(["clip_id", "clip_labels", "fold", "num_samples", "embedding"])
            write_shard(output, manifest.shards[index], columns.rename_columns([*_COLUMNS]))
        result = source | {"data": dataset.uri, "model": model.uri, "width": encoder["width"], "clips": manifest.clips}
        (output / RESULT_FILE).write_json(result)
    return [("embeddings", output.uri)]


_COLUMNS = ("clip_id", "labels", "fold", "num_samples", "embedding")


def _claim(output: Place, source: dict[str, Any]) -> None:
    """Marks DST as belonging to this data set, model and settings, or refuses it."""
    try:
        found = (output / SOURCE_FILE).read_json()
    except FileNotFoundError:
        (output / SOURCE_FILE).write_json(source)
        return
    if found != source:
        raise UserError(
            f"output={output.uri}: holds other embeddings ({first_difference(found, source)}); choose another output "
            "or remove it"
        )


class Embeddings:
    """A `ClipWorker`: features of each clip's real patches, or their mean."""

    def __init__(self, model: Any, pooling: str, layer: int | None, dtype: str) -> None:
        from beats_ray.models import AudioClassifier

        self._encoder = model.encoder if isinstance(model, AudioClassifier) else model
        self._pooling = pooling
        self._layer = layer
        self._dtype = np.dtype(dtype)

    def __call__(self, wave_BS: Any, num_samples_B: Any) -> dict[str, Any]:
        from beats_ray.clip_table import mean_over_patches

        output = self._encoder.features_from_waveform(wave_BS, num_samples_B, layer=self._layer)
        lengths = {"num_samples": num_samples_B.cpu().numpy().astype(np.int32)}
        if self._pooling == "mean":
            pooled = mean_over_patches(output.features_BND, output.is_pad_BN)
            return lengths | {"embedding": list(pooled.cpu().numpy().astype(self._dtype))}
        features = output.features_BND.float().cpu().numpy().astype(self._dtype)
        is_real = ~output.is_pad_BN.cpu().numpy()
        return lengths | {"embedding": [row[real].ravel() for row, real in zip(features, is_real, strict=True)]}
