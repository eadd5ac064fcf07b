"""Mode online: finds layers that a better placement is worth loading weights for, and has them migrated.

An iteration ranks what is worthwhile by predicted gain per byte and migrates the best ``layer_updates_per_iter``
layers. The next one begins when nothing migrates any more; meanwhile other layers are evaluated, a few at a time on a
worker thread, so that it is known by then what comes next. After a migration of it failed a layer waits, longer each
time.

A search costs more than everything else here, so one is made only where it may bring something new: of a layer that
has another placement than at the last search, or other traffic. One that found something keeps it until it is that
layer's turn, and is searched again then if traffic has changed.

Pure but for ``Effects``; time comes in as an argument.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import grpc

from expertmesh.balancer.actual import Actual, Phase
from expertmesh.balancer.applying import Applying
from expertmesh.balancer.effects import Effects
from expertmesh.balancer.evaluation import EVALUATION_TIMEOUT_S, Answer, Job, LayerQuestion
from expertmesh.balancer.events import EventLog
from expertmesh.balancer.migration import Outcome
from expertmesh.balancer.migrations import Migrations
from expertmesh.balancer.noise import Dispersion, has_drifted
from expertmesh.balancer.policy import Floats, LayerStatistics, Layout, Proposal, StatisticsSource
from expertmesh.balancer.refusal import RefusedError
from expertmesh.balancer.source_quotas import quotas_of
from expertmesh.balancer.state import ModeSwitch
from expertmesh.mesh.config import BalancerConfig

log = logging.getLogger(__name__)

ENOUGH_SHARE = 0.25
"""Of the half-life: tokens that a layer's statistics need before anything is done about it."""
FRESH_SHARE = 0.1
"""Of the half-life: tokens between two looks at a layer, which need not come to a search."""
SEARCH_SHARE = 0.25
"""The same between two searches, but for the one before a layer migrates; twice as many after each that found
nothing, up to ``REST_SHARE``."""
REST_SHARE = 1.0
"""Of the half-life: tokens after which a layer is evaluated again though its loads are as they were: which experts are
chosen together may have changed, and more tokens show smaller gains."""
LAYERS_PER_JOB = 4
MAX_BACK_OFF_S = 600.0


@dataclass(kw_only=True)
class _Layer:
    """What is known about one layer."""

    dispersion: Dispersion = field(default_factory=Dispersion)
    evaluated: float | None = None  # tokens seen at the last evaluation
    looked: float = 0.0  # and at the last look, which need not have come to that
    counts: LayerStatistics | None = None  # of the last evaluation, loads only
    fruitless: int = 0  # searches in a row
    proposal: Proposal | None = None
    made_for: tuple[int, int] = (0, 0)  # view number, placement version
    failures: int = 0  # in a row
    wait_until_s: float = 0.0


class Online:
    """``mode``: static, offline (static after a placement file) or online."""

    def __init__(
        self,
        config: BalancerConfig,
        actual: Actual,
        migrations: Migrations,
        applying: Applying,
        *,
        statistics: StatisticsSource,
        effects: Effects,
        events: EventLog,
    ) -> None:
        self._config = config
        self._actual = actual
        self._migrations = migrations
        self._applying = applying
        self._statistics = statistics
        self._effects = effects
        self._events = events
        self._layers: dict[int, _Layer] = {}
        self._chosen: deque[int] = deque()
        self._job: Job | None = None
        self._job_s = 0.0
        self._job_is_late = False
        self._num_jobs = 0
        self.mode: str = config.mode
        self.layer_updates_per_iter = config.layer_updates_per_iter
        self._resume(actual.mode_switch)
        applying.layers_at_a_time = max(1, self.layer_updates_per_iter)

    def _resume(self, switch: ModeSwitch | None) -> None:
        """An administrator's switch outlives a restart, unless the configuration was changed since."""
        if switch is None or switch.configured != self._config.mode:
            self._actual.mode_switch = None
            return
        self.mode, self.layer_updates_per_iter = switch.mode, switch.layer_updates_per_iter
        log.info("mode %s, as it was switched to before the restart", self.mode)

    def set_mode(self, mode: str, layer_updates_per_iter: int | None) -> str:
        """Switch, for good: also a balancer that starts again goes on in this mode. What migrates already goes on.

        Returns the mode before.

        Raises:
            RefusedError: no such mode, or online without layers to update.
        """
        layers = self.layer_updates_per_iter if layer_updates_per_iter is None else layer_updates_per_iter
        if mode not in ("static", "online"):
            text = f"mode {mode!r} cannot be switched to: give static or online"
            raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, text)
        if mode == "online" and layers == 0:
            text = "layer_updates_per_iter is 0, with which mode online changes nothing: give 1 or more"
            raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, text)
        previous, self.mode, self.layer_updates_per_iter = self.mode, mode, layers
        self._applying.layers_at_a_time = max(1, layers)
        self._actual.mode_switch = ModeSwitch(mode=mode, layer_updates_per_iter=layers, configured=self._config.mode)
        self._effects.save(self._actual.durable())
        if mode != "online":
            self._chosen.clear()
        self._events.add("mode_changed", "balancer", f"{previous} → {mode}, {layers} layers at a time")
        return previous

    def tick(self, now: float) -> str | None:
        """Take the next action that is due. Returns what was done, None when nothing was."""
        self._learn(now)
        late = self._watch(now)
        if late is not None:
            return late
        if self._actual.phase is not Phase.SERVING or self._applying.is_busy:
            self._chosen.clear()
            return None
        if self._chosen:
            return self._start(self._chosen.popleft(), now)
        is_on = self.mode == "online" and self.layer_updates_per_iter > 0
        if not is_on or self._job is not None:
            return None
        busy = {migration.layer for migration in self._migrations}
        idle = [layer for layer in self._actual.model.moe_layers if layer not in busy]
        due = (layer for layer in idle if self._is_due(layer, now))
        best = self._best(idle, now)
        return (
            self._evaluate(due, now)
            or self._evaluate((layer for layer in best if self._is_stale(layer)), now)
            or (self._choose(best) if best and not busy else None)
        )

    def answered(self, answer: Answer, now: float) -> None:
        """The worker has finished a job."""
        job, self._job = self._job, None
        assert job is not None
        assert job.number == answer.job.number
        for asked in job.layers:
            state, proposal = self._layers[asked.layer], answer.proposals.get(asked.layer)
            if proposal is None:
                self._hold_back(asked.layer, now)
                refusal = answer.refusals.get(asked.layer, "no reason given")
                self._events.add("solver_failed", f"layer {asked.layer}", refusal, logging.ERROR)
            elif not self._job_is_late:
                state.proposal, state.made_for = proposal, (job.view_number, asked.version)
                state.fruitless = 0 if proposal.worthwhile else state.fruitless + 1

    # What became of earlier decisions.

    def _learn(self, now: float) -> None:
        while self._migrations.ended:
            ended = self._migrations.ended.popleft()
            state = self._state(ended.layer)
            state.proposal = None
            if ended.outcome is Outcome.COMMITTED:
                state.failures = 0
            elif ended.outcome is Outcome.ABORTED:
                self._hold_back(ended.layer, now)

    def _hold_back(self, layer: int, now: float) -> None:
        state = self._state(layer)
        state.wait_until_s = now + min(self._config.migration_timeout_s * 2.0**state.failures, MAX_BACK_OFF_S)
        state.failures += 1

    def _watch(self, now: float) -> str | None:
        """The worker cannot be interrupted: until it answers, nothing else is evaluated, and then it is too late."""
        if self._job is None or self._job_is_late or now - self._job_s <= EVALUATION_TIMEOUT_S:
            return None
        self._job_is_late = True
        layers = ", ".join(str(asked.layer) for asked in self._job.layers)
        text = f"no placement for layer {layers} within {EVALUATION_TIMEOUT_S:g} s; its answer will be ignored"
        self._events.add("solver_late", "balancer", text, logging.WARNING)
        return "gave a solve up"

    # Evaluation.

    def _state(self, layer: int) -> _Layer:
        state = self._layers.get(layer)
        if state is None:
            state = self._layers[layer] = _Layer()
        return state

    def _is_due(self, layer: int, now: float) -> bool:
        state, seen = self._state(layer), self._statistics.tokens_seen(layer)
        if now < state.wait_until_s or self._worthwhile(layer, now) is not None:
            return False
        if state.evaluated is None:
            return seen >= ENOUGH_SHARE * self._config.stats_half_life_tokens
        return self._is_stale(layer)

    def _is_stale(self, layer: int) -> bool:
        """Fresh tokens were counted since the layer was looked at."""
        fresh = self._statistics.tokens_seen(layer) - self._state(layer).looked
        return fresh >= max(FRESH_SHARE * self._config.stats_half_life_tokens, 1.0)

    def _evaluate(self, layers: Iterable[int], now: float) -> str | None:
        """Look at them in turn until some are found that are worth a search."""
        questions = itertools.islice(filter(None, map(self._look, layers)), LAYERS_PER_JOB)
        asked = tuple(questions)
        if not asked:
            return None
        self._num_jobs += 1
        self._job = Job(
            number=self._num_jobs,
            view_number=self._actual.view.number,
            layout=Layout.of(self._actual.view),
            max_loads=self._config.max_slots_per_update,
            layers=asked,
        )
        self._job_s, self._job_is_late = now, False
        self._effects.evaluate(self._job)
        return f"asked for placements of {len(asked)} layers"

    def _look(self, layer: int) -> LayerQuestion | None:
        """What to ask about a layer; None where the answer would be that of the last time."""
        question, state, seen = self.question(layer), self._state(layer), self._statistics.tokens_seen(layer)
        assert question is not None, "tokens were seen"
        state.looked = seen
        state.dispersion.observe(question.statistics, seen)
        if not self._may_differ(question, state, seen):
            return None
        state.evaluated, state.proposal = seen, None
        state.counts = replace(question.statistics, coactivation_EE=None)
        return question

    def _may_differ(self, question: LayerQuestion, state: _Layer, seen: float) -> bool:
        """Whether a search may find something else than the last one."""
        if state.evaluated is None or state.counts is None:
            return True
        fresh, half_life = seen - state.evaluated, self._config.stats_half_life_tokens
        if fresh >= REST_SHARE * half_life:
            return True
        waits = state.proposal is not None and state.proposal.worthwhile
        if not waits and fresh < SEARCH_SHARE * half_life * 2.0**state.fruitless:
            return False
        if state.proposal is None or state.made_for != (self._actual.view.number, question.version):
            return True
        return has_drifted(state.counts, question.statistics, fresh, state.dispersion.value)

    def question(self, layer: int) -> LayerQuestion | None:
        """What the policy is asked about a layer; None while nothing was counted or no view places it."""
        statistics, placement = self._statistics.layer_statistics(layer), self._actual.layer_placement(layer)
        if statistics is None or placement is None:
            return None
        return LayerQuestion(
            layer=layer,
            version=placement.version,
            slots=tuple(placement.slots),
            statistics=replace(statistics, dispersion=self._state(layer).dispersion.value),
            quotas=quotas_of(placement),
        )

    def known_loads(self) -> dict[int, Floats]:
        """Layer → load_E of the layers that enough tokens were counted for, in mode online: what a view's placement
        may start from. In the other modes placements do not depend on traffic."""
        if self.mode != "online":
            return {}
        enough = ENOUGH_SHARE * self._config.stats_half_life_tokens
        known = {
            layer: self._statistics.layer_load(layer)
            for layer in self._actual.model.moe_layers
            if self._statistics.tokens_seen(layer) >= enough
        }
        return {layer: load_E for layer, load_E in known.items() if load_E is not None}

    # Choice.

    def _best(self, layers: Iterable[int], now: float) -> list[int]:
        """The layers whose change saves most for the bytes that it takes; all experts of a model are equally large, and
        a change of quotas takes next to nothing."""
        worth = [
            (-proposal.gain / max(proposal.num_loads, 0.5), layer)
            for layer in layers
            if (proposal := self._worthwhile(layer, now)) is not None
        ]
        return [layer for _, layer in sorted(worth)[: self.layer_updates_per_iter]]

    def _choose(self, best: Sequence[int]) -> str:
        self._chosen.extend(best)
        return f"chose layers {', '.join(map(str, best))}"

    def _worthwhile(self, layer: int, now: float) -> Proposal | None:
        state = self._state(layer)
        proposal = state.proposal
        if proposal is None or not proposal.worthwhile or now < state.wait_until_s:
            return None
        placement = self._actual.layer_placement(layer)
        if placement is None:
            return None
        return proposal if state.made_for == (self._actual.view.number, placement.version) else None

    def _start(self, layer: int, now: float) -> str | None:
        proposal = self._worthwhile(layer, now)
        if proposal is None:
            return f"passed layer {layer} over"
        self._state(layer).proposal = None
        self._migrations.start(layer, proposal.slots, proposal.quotas, _why(proposal), now)
        return f"planned layer {layer}"


def _why(proposal: Proposal) -> str:
    before, after = proposal.before, proposal.after
    parts = [f"balancedness {before.balancedness:.3f} → {after.balancedness:.3f}"]
    if before.fanout_ranks is not None and after.fanout_ranks is not None:
        parts.append(f"ranks a token {before.fanout_ranks:.2f} → {after.fanout_ranks:.2f}")
    parts.append(f"gain {proposal.gain:.3f} over noise {proposal.noise:.3f}")
    return ", ".join(parts)
