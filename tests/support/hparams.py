"""TensorBoard's HParams tab for a folder, as its plugin answers the page."""

from pathlib import Path
from typing import Any

from tensorboard import context
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups


def hparam_rows(folder: Path) -> dict[str, Any]:
    """Each row of the tab by its name: hyperparameters, newest metrics by `(run, tag)`, and the session's status."""
    multiplexer = plugin_event_multiplexer.EventMultiplexer().AddRunsFromDirectory(str(folder)).Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(folder))
    plugin = backend_context.Context(base_plugin.TBContext(data_provider=provider))
    request = api_pb2.ListSessionGroupsRequest(
        start_index=0, slice_size=100, aggregation_type=api_pb2.AGGREGATION_AVG,
        allowed_statuses=[
            api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE, api_pb2.STATUS_RUNNING,
        ],
    )  # fmt: skip
    answer = list_session_groups.Handler(context.RequestContext(), plugin, "", request).run()
    rows = {}
    for group in answer.session_groups:
        (session,) = group.sessions
        metrics = {value.name.tag: (value.training_step, value.value) for value in group.metric_values}
        rows[group.name] = (dict(group.hparams), metrics, session)
    return rows
