"""Rules for every test: it says how long it takes, and it never reaches the developer's own cloud account."""

import os
import signal
from collections.abc import Iterator

import pytest

KINDS = ("unit", "ray", "slow", "gpu")

os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # at Ray's 15 its workers starve beside another test
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
for _name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "GOOGLE_APPLICATION_CREDENTIALS"):
    os.environ[_name] = os.devnull

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a background job of a shell; children would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test without a marker would run nowhere: it is an error. `pytest -n` keeps together what shares a fixture."""
    unmarked = [item.nodeid for item in items if not any(item.get_closest_marker(kind) for kind in KINDS)]
    if unmarked:
        raise pytest.UsageError(f"tests without a marker ({', '.join(KINDS)}): {', '.join(unmarked[:5])}")
    for item in items:
        shares_cluster = "shared" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("cluster" if shares_cluster else str(item.path)))


@pytest.fixture(scope="session")
def process_group() -> Iterator[None]:
    """A process group of one for what trains in this process. DeepSpeed keeps the first one: no test may end it."""
    import torch.distributed as dist

    from beats_ray.train.context import single_process_context

    single_process_context(lambda _step, _metrics: None)
    yield
    dist.destroy_process_group()
