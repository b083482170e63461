"""`beats-ray tokenize`: the patch labels of every clip, computed once and written beside the data set's shards.

    OUTPUT/shards/<name of the data shard>.parquet    clip_id: string, labels: list<int16>; same rows, same row groups
    OUTPUT/labels.json                                written last: what the labels belong to, and codebook usage

A run that was stopped goes on with the shards that are missing; a complete OUTPUT is left as it is.
"""

import math
from typing import Any

import numpy as np
import pyarrow as pa

from beats_ray.config import TokenizeConfig, UserError
from beats_ray.console import Console
from beats_ray.data.manifest import DatasetManifest, read_manifest, shards_fingerprint
from beats_ray.data.storage import Place, open_place, read_table
from beats_ray.inference import (
    TOKENIZER_KINDS,
    check_pool,
    check_published,
    map_shards,
    missing_shards,
    model_sha256,
    row_group_spans,
    write_shard,
)
from beats_ray.train.codebook_health import REMEDIES, is_collapsed

RESULT_FILE = "labels.json"
SOURCE_FILE = "source.json"  # written first: what an unfinished OUTPUT belongs to


def run_tokenize(config: TokenizeConfig, console: Console) -> list[tuple[str, str]]:
    """Computes all labels and returns what was written and where; at once where OUTPUT is complete.

    UserError where OUTPUT holds labels of another data set or tokenizer, or the cluster has no room for the actors.
    """
    dataset, output, tokenizer = open_place(config.data.path), open_place(config.output), open_place(config.tokenizer)
    manifest = read_manifest(dataset)
    settings = check_published(tokenizer, "tokenizer", TOKENIZER_KINDS)["config"]["tokenizer"]
    if settings.get("num_codebooks", 1) > 1:
        raise UserError(
            f"tokenizer={tokenizer.uri}: gives {settings['num_codebooks']} labels for each patch, and a labels stage "
            "holds one; pre-train without `labels`, which computes them on the fly"
        )
    num_codes = int(settings.get("num_codes") or settings["quantizer"]["num_codes"])
    if not (output / RESULT_FILE).exists():
        check_pool(row_group_spans(manifest, shards=missing_shards(manifest, output)), config)
    source = {"fingerprint": shards_fingerprint(manifest), "tokenizer_sha256": model_sha256(tokenizer)}
    _claim(output, source)
    written = [("labels", output.uri)]
    if (output / RESULT_FILE).exists():
        return written
    counts = _label_shards(config, manifest, output, num_codes, console)
    result = {
        **source,
        "data": dataset.uri,
        "tokenizer": tokenizer.uri,
        "num_codes": num_codes,
        "clips": manifest.clips,
        "patches": int(counts.sum()),
        **code_usage(counts),
        "code_counts": counts.tolist(),
    }
    (output / RESULT_FILE).write_json(result)
    console.note(f"{result['used_code_fraction']:.1%} of {num_codes} codes used, perplexity {result['perplexity']:.1f}")
    if is_collapsed(result["perplexity"], num_codes, result["patches"]):
        console.note(f"warning: the tokenizer has collapsed: train it anew; {REMEDIES['tokenizer']}")
    return written


def code_usage(counts: np.ndarray) -> dict[str, float]:
    """Part of the codes that occur at all, and the perplexity of their distribution (1: a single code)."""
    total = counts.sum()
    probability = counts[counts > 0] / total if total else np.ones(1)
    perplexity = math.exp(-float((probability * np.log(probability)).sum()))
    return {"used_code_fraction": float((counts > 0).mean()), "perplexity": perplexity}


def _claim(output: Place, source: dict[str, str]) -> None:
    """Marks OUTPUT as belonging to this data set and tokenizer, or refuses it."""
    for name in (RESULT_FILE, SOURCE_FILE):
        try:
            found = (output / name).read_json()
        except FileNotFoundError:
            continue
        for key, what in (("fingerprint", "data set"), ("tokenizer_sha256", "tokenizer")):
            if found.get(key) != source[key]:
                raise UserError(
                    f"output={output.uri}: holds labels of another {what}; choose another output or remove it"
                )
        return
    (output / SOURCE_FILE).write_json(source)


def _label_shards(
    config: TokenizeConfig, manifest: DatasetManifest, output: Place, num_codes: int, console: Console
) -> np.ndarray:
    """Writes every missing label shard as soon as it is whole; returns how often each code occurs in all of them."""
    counts = np.zeros(num_codes, np.int64)
    missing = missing_shards(manifest, output)
    for index in set(range(len(manifest.shards))) - set(missing):
        counts += _count(read_table(output / "shards" / manifest.shards[index].file, ["labels"])["labels"], num_codes)
    for index, rows in map_shards(
        open_place(config.data.path),
        manifest,
        PatchLabels,
        missing,
        console=console,
        model=open_place(config.tokenizer),
        batch_clips=config.batch_clips,
        num_workers=config.num_workers,
        use_gpu=config.use_gpu,
        retry_seconds=config.data.retry_seconds,
    ):
        labels = rows.select(["clip_id", "patch_labels"]).rename_columns(["clip_id", "labels"])
        write_shard(output, manifest.shards[index], labels)
        counts += _count(labels["labels"], num_codes)
    return counts


def _count(labels: pa.ChunkedArray, num_codes: int) -> np.ndarray:
    values = labels.combine_chunks().flatten() if labels.num_chunks else pa.array([], pa.int16())
    return np.bincount(values.to_numpy(), minlength=num_codes)


class PatchLabels:
    """A `ClipWorker`: the tokenizer's labels of each clip's patches, without padding."""

    def __init__(self, model: Any) -> None:
        self._tokenizer = model

    def __call__(self, wave_BS: Any, num_samples_B: Any) -> dict[str, Any]:
        from beats_ray.models import compute_fbank, num_patches

        labels_BN = self._tokenizer.label_fbank(*compute_fbank(wave_BS, num_samples_B))
        labels = labels_BN.cpu().numpy().astype(np.int16)
        return {
            "patch_labels": [
                row[:count] for row, count in zip(labels, num_patches(num_samples_B).tolist(), strict=True)
            ]
        }
