"""What is left of a Ray Train run whose starter has ended: workers that go later, a placement group that stays.

Tune ends a trial's process at once. Ray Train's controller ends with it and the workers with the controller, but later:
one may write one more checkpoint meanwhile. Their placement group belongs to nobody, and Ray's own cleaner asks
the dashboard who is alive, so that without one the CPUs and GPUs would be held until the cluster ends.

    wait_until_released(run_output)              # before the run begins again
    if is_released(run_output): ...              # whoever has stopped the trial asks now and then
"""

import time
from typing import Any

from beats_ray.data.storage import Place

ATTEMPTS_FILE = "attempts.json"
"""How often a run has begun, and by rank what each worker of its newest attempt is to Ray; see `Holder`."""
RELEASE_SECONDS = 60.0
POLL_SECONDS = 0.2

Holder = dict[str, str]
"""{actor, placement_group}: hexadecimal ids; empty of a process that is no worker of Ray Train."""


def current_holder() -> Holder:
    """Of this process, a worker of Ray Train."""
    import ray
    from ray.util import get_current_placement_group

    group = get_current_placement_group()
    actor = ray.get_runtime_context().get_actor_id()
    return {"actor": actor or "", "placement_group": "" if group is None else group.id.hex()}


def is_released(output: Place) -> bool:
    """Whether nothing is left of the run's newest attempt; gives its placement group back once its controller is gone.

    While the controller is there this does nothing: it would take the loss of its workers for a fault, and ask for new
    ones.
    """
    from ray._private.state import actors  # Ray's public list of actors needs its dashboard

    try:
        holders = [holder for holder in (output / ATTEMPTS_FILE).read_json().get("workers", []) if holder]
    except FileNotFoundError:
        return True
    workers = [found for holder in holders if (found := actors(holder["actor"]))]  # none of another cluster's
    owners = [worker["OwnerAddress"] for worker in workers]
    if any(actor["Address"] in owners and _is_alive(actor) for actor in (actors() if owners else {}).values()):
        return False
    for group in {holder["placement_group"] for holder in holders if workers} - {""}:
        _remove(group)
    return not any(_is_alive(actors(worker["ActorID"])) for worker in workers)


def wait_until_released(output: Place) -> None:
    """Returns when nothing is left of the run's newest attempt. TimeoutError where something stays."""
    deadline = time.monotonic() + RELEASE_SECONDS
    while not is_released(output):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{output.uri}: workers of an earlier attempt have not ended in {RELEASE_SECONDS:g} s")
        time.sleep(POLL_SECONDS)


def _is_alive(actor: dict[str, Any]) -> bool:
    return bool(actor) and actor["State"] != "DEAD"


def _remove(placement_group: str) -> None:
    """Ray forgives one that has been removed before."""
    from ray import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(placement_group)))
