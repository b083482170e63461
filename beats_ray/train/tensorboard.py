"""TensorBoard files of a run: its scalars, and its settings for the HParams tab.

    logger = TensorBoardLogger(output / "tensorboard", 0, "first/pretrain", flat_settings(config))

One session of TensorBoard's HParams plugin is one run, or one trial of a sweep: `tensorboard --logdir SWEEP` lists the
trials with the settings in which they differ and their newest metrics. No description of the whole experiment is
written: the plugin would show what the first run describes and nothing else, whereas it finds settings and metrics of
all runs itself.
"""

import tempfile
from pathlib import Path
from typing import Any

from beats_ray.data.storage import Place


class TensorBoardLogger:
    """TensorBoard files, collected in a local folder and uploaded to `place` by `flush`: storage cannot append.

    run_name: the row of the HParams tab, which has little room: of a trial it shows what stands behind `trials/`.
    hyperparameters: plain values by dotted name; None leaves that cell empty.
    """

    def __init__(
        self, place: Place, resumed_step: int, run_name: str = "", hyperparameters: dict[str, Any] | None = None
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter  # tensorboardX's flush leaves out what its queue still holds

        self._place = place
        self._folder = tempfile.TemporaryDirectory(prefix="beats-ray-tensorboard-")
        # Reports that an attempt wrote beyond the checkpoint that this one starts from are hidden.
        self._writer: Any = SummaryWriter(
            self._folder.name, filename_suffix=f".step{resumed_step}", purge_step=resumed_step + 1
        )
        self._has_session = bool(hyperparameters)
        if hyperparameters:
            self._begin_session(run_name, hyperparameters)

    def write(self, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if "/" in name:
                self._writer.add_scalar(name, value, record["step"])

    def flush(self) -> None:
        self._writer.flush()
        self._place.upload(Path(self._folder.name))

    def close(self, complete: bool = True) -> None:
        try:
            if complete and self._has_session:
                self._end_session()
            self.flush()  # a trial that the scheduler ends has made no checkpoint, and is looked at all the same
        finally:
            self._writer.close()
            self._folder.cleanup()

    def _begin_session(self, run_name: str, hyperparameters: dict[str, Any]) -> None:
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb

        given = {name: value for name, value in hyperparameters.items() if value is not None}
        self._writer.file_writer.add_summary(hparams_pb(given, trial_id=run_name.rpartition("trials/")[2]))

    def _end_session(self) -> None:
        """Only a complete run's: the plugin believes the first end that it reads, and a failed run may go on."""
        from torch.utils.tensorboard.summary import hparams

        _, _, end = hparams({}, {})
        self._writer.file_writer.add_summary(end)
