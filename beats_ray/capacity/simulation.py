"""A discrete-event simulation of one data-parallel run on nodes that are taken away, slow down and wait for storage.

    outcome = simulate(SimulateConfig(), Scenario(join_minutes=15.0), checkpoint_seconds=60.0, seed=0)
    outcome.goodput       # training that counts, in shares of all wanted nodes at full speed all the time

Events lie in a heap by their time; between two of them nothing changes, so that training, waiting and what goes lost
are added up in between. The rules are those of this package's training (docs/training.md):

- losing a node stops all of them, and training goes on from the last committed checkpoint after a recovery;
- a run of a fixed size waits until it has all its nodes; an elastic one goes on with those that are there, and every
  `join_minutes` begins again, from the last checkpoint, with those that have joined;
- a checkpoint stops training for a moment, is then written beside training, and counts from its commit on;
- a step waits for the slowest node; storage that is throttled gives so many clips and no more.

Time is in seconds, training in seconds of all wanted nodes at full speed.
"""

import heapq
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from beats_ray.capacity.settings import SimulateConfig

MIB_PER_GIB = 1024
DAY_SECONDS = 24 * 3600.0
LOSSES = ("waiting", "recovering", "checkpoints", "fewer nodes", "stragglers", "storage")


@dataclass(frozen=True)
class Scenario:
    """How a run meets the loss of a node."""

    join_minutes: float | None = None
    """How often an elastic run takes in nodes that have joined; None is a run of a fixed size."""
    spare_nodes: int = 0
    """Nodes beyond the wanted ones, which wait until one is lost."""

    @property
    def name(self) -> str:
        if self.join_minutes is not None:
            return f"elastic, joined every {self.join_minutes:g} min"
        return f"fixed size, {self.spare_nodes} spare nodes" if self.spare_nodes else "fixed size"


@dataclass(frozen=True)
class Outcome:
    """Where the time of a run went, in shares of all wanted nodes all the time; they and `goodput` add up to 1."""

    goodput: float
    redone: float
    """Training that a fault or a change of size threw away."""
    lost: dict[str, float]
    """By cause, of LOSSES."""
    paid: float
    """Node hours that were there and cost, of those of all wanted nodes."""
    interruptions: int

    @property
    def useful_of_paid(self) -> float:
        """Training that counts for what was paid."""
        return self.goodput / self.paid


def simulate(config: SimulateConfig, scenario: Scenario, *, checkpoint_seconds: float, seed: int) -> Outcome:
    """One run of `config.hours`, all nodes there at its start; `checkpoint_seconds` of training between two saves."""
    return _Simulation(config, scenario, checkpoint_seconds, seed).run()


@dataclass
class _State:
    """The run, between two events."""

    phase: str = "waiting"
    attempt: int = 0
    """Counts the beginnings; an event of an earlier one is void."""
    active: set[int] = field(default_factory=set)
    """Nodes that train."""
    present: set[int] = field(default_factory=set)
    """Nodes that are there."""
    slow: set[int] = field(default_factory=set)
    throttled: bool = False
    done: float = 0.0
    """Training done, as of the weights in memory."""
    committed: float = 0.0
    """Training that the last committed checkpoint holds."""


class _Simulation:
    """Handlers take what their event carries, and push what follows from it."""

    def __init__(self, config: SimulateConfig, scenario: Scenario, checkpoint_seconds: float, seed: int) -> None:
        self._config = config
        self._scenario = scenario
        self._interval = checkpoint_seconds
        self._random = random.Random(seed)
        self._queue: list[tuple[float, int, Callable[..., None], tuple[int | float, ...]]] = []
        self._order = itertools.count()  # of events at the same time
        self._numbers = itertools.count()
        self._now = 0.0
        self._state = _State()
        self._lost = dict.fromkeys(LOSSES, 0.0)
        self._redone = 0.0
        self._paid = 0.0
        self._interruptions = 0
        self._failure_rate = -math.log1p(-config.hourly_preemption) / 3600.0  # of one node, per second
        self._write_seconds = (
            config.checkpoint_gib * MIB_PER_GIB / (config.workers * config.measured.upload_mib_per_s)
        )  # every worker writes its own part

    def run(self) -> Outcome:
        end = self._config.hours * 3600.0
        for _ in range(self._config.nodes + self._scenario.spare_nodes):
            self._add_node()
        self._begin(0.0)
        if self._config.throttles_per_day:
            self._after(self._draw(DAY_SECONDS / self._config.throttles_per_day), self._throttle)
        if self._scenario.join_minutes is not None:
            self._after(self._scenario.join_minutes * 60.0, self._look_for_nodes)
        while self._queue and self._queue[0][0] < end:
            time, _, handler, arguments = heapq.heappop(self._queue)
            self._advance(time)
            handler(*arguments)
        self._advance(end)
        lost = {cause: seconds / end for cause, seconds in self._lost.items()}
        return Outcome(self._state.done / end, self._redone / end, lost, self._paid / end, self._interruptions)

    # --- time passes --------------------------------------------------------------------------------------------------

    def _advance(self, time: float) -> None:
        """Adds up the time since the last event, in which nothing changed."""
        seconds, state = time - self._now, self._state
        self._now = time
        wanted = self._config.nodes
        self._paid += seconds * len(state.present) / wanted
        if state.phase != "training":
            self._lost[state.phase] += seconds
            return
        share = len(state.active) / wanted
        speed = self._config.straggler_speed if state.active & state.slow else 1.0
        readable = self._config.storage_headroom * (self._config.throttled if state.throttled else 1.0)
        rate = min(share * speed, readable)
        state.done += seconds * rate
        self._lost["fewer nodes"] += seconds * (1.0 - share)
        self._lost["stragglers"] += seconds * share * (1.0 - speed)
        self._lost["storage"] += seconds * (share * speed - rate)

    def _after(self, seconds: float, handler: Callable[..., None], *arguments: int | float) -> None:
        heapq.heappush(self._queue, (self._now + seconds, next(self._order), handler, arguments))

    def _draw(self, mean_seconds: float) -> float:
        return self._random.expovariate(1.0 / mean_seconds) if mean_seconds else 0.0

    # --- nodes --------------------------------------------------------------------------------------------------------

    def _add_node(self) -> None:
        node = next(self._numbers)
        self._state.present.add(node)
        if self._failure_rate:
            self._after(self._draw(1.0 / self._failure_rate), self._take_away, node)
        if self._config.straggles_per_node_day:
            self._after(self._draw(DAY_SECONDS / self._config.straggles_per_node_day), self._slow_down, node)

    def _take_away(self, node: int) -> None:
        state = self._state
        state.present.discard(node)
        state.slow.discard(node)
        self._after(self._draw(self._config.replacement_minutes * 60.0), self._replace)
        if node not in state.active:
            return
        if self._random.random() < self._config.noticed:
            state.committed = state.done
        self._interrupt()
        self._begin(self._config.measured.recovery_seconds)

    def _replace(self) -> None:
        self._add_node()
        if self._state.phase == "waiting":
            self._begin(self._config.measured.recovery_seconds)

    def _look_for_nodes(self) -> None:
        assert self._scenario.join_minutes is not None
        self._after(self._scenario.join_minutes * 60.0, self._look_for_nodes)
        more = min(len(self._state.present), self._config.nodes) > len(self._state.active)
        if self._state.phase == "training" and more:
            self._interrupt()
            self._begin(self._config.measured.resize_seconds)

    def _slow_down(self, node: int) -> None:
        if node not in self._state.present:
            return
        self._state.slow.add(node)
        self._after(self._draw(self._config.straggler_minutes * 60.0), self._speed_up, node)

    def _speed_up(self, node: int) -> None:
        self._state.slow.discard(node)
        if node in self._state.present:
            self._after(self._draw(DAY_SECONDS / self._config.straggles_per_node_day), self._slow_down, node)

    def _throttle(self) -> None:
        self._state.throttled = True
        self._after(self._draw(self._config.throttle_minutes * 60.0), self._stop_throttling)

    def _stop_throttling(self) -> None:
        self._state.throttled = False
        self._after(self._draw(DAY_SECONDS / self._config.throttles_per_day), self._throttle)

    # --- attempts and checkpoints -------------------------------------------------------------------------------------

    def _interrupt(self) -> None:
        state = self._state
        self._interruptions += state.phase != "recovering"
        self._redone += state.done - state.committed
        state.done = state.committed

    def _begin(self, seconds: float) -> None:
        """A new attempt, with the nodes that are there; where they do not suffice it waits for more."""
        state = self._state
        state.attempt += 1
        fewest = self._config.nodes if self._scenario.join_minutes is None else 1
        enough = len(state.present) >= fewest
        state.active = set(itertools.islice(state.present, self._config.nodes)) if enough else set()
        state.phase = "recovering" if enough else "waiting"
        if enough:
            self._after(seconds, self._train, state.attempt)

    def _train(self, attempt: int) -> None:
        if attempt == self._state.attempt:
            self._state.phase = "training"
            self._after(self._interval, self._stop_to_save, attempt)

    def _stop_to_save(self, attempt: int) -> None:
        if attempt == self._state.attempt:
            self._state.phase = "checkpoints"
            self._after(self._config.measured.checkpoint_pause_seconds, self._write, attempt)

    def _write(self, attempt: int) -> None:
        """Training goes on; the next save waits for this one to be written."""
        if attempt != self._state.attempt:
            return
        self._state.phase = "training"
        self._after(self._write_seconds, self._commit, attempt, self._state.done)
        self._after(max(self._interval, self._write_seconds), self._stop_to_save, attempt)

    def _commit(self, attempt: int, done: float) -> None:
        if attempt == self._state.attempt:
            self._state.committed = max(self._state.committed, done)
