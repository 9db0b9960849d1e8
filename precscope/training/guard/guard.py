"""What the training loop calls: alarms become verdicts, verdicts become actions."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from ...batches import RandomStates
from ...errors import TrainingError
from ...events import NAME, Event, EventLog
from ..log import Row
from .actions import Episode, NormLimit, Planner
from .amending import EVERYTHING, Promotion, format_of, safer
from .config import GuardConfig
from .dense import DenseRecording
from .files import remove_old, save_failing_step, save_plan
from .judging import Verdict, by_scale, judge
from .looking import look
from .signals import Signal, Signals
from .snapshots import GoodBuffers, Snapshots, one_pass, take_again
from .storage import Lost, StorageWatch

if TYPE_CHECKING:
    from ..loop import Trainer

_ATTENTIVE = 20  # steps after an alarm during which the device is read at every step
_KEEP_EVERY = 10  # steps between copies of running statistics
_PARTS = ("signals", "planner", "buffers", "limit", "storage")
_NUMBERS = (
    "_alarms", "_last_alarm", "_last_kind", "_limit_until", "_attentive_until", "_saved", "_next_probe", "_wait",
    "_left_out", "_sound", "_spiked", "_back_for",
)  # fmt: skip
"""What of a guard goes into a checkpoint."""


class Guard:
    """One run's guard; see GuardConfig. events: what it saw and did in this process, also in OUT/events.jsonl.

    Its decisions rest on figures that are equal on all processes, so that these act alike; the main one writes.
    """

    def __init__(self, config: GuardConfig | None = None) -> None:
        self.config = config or GuardConfig()
        self.signals, self.planner = Signals(self.config), Planner(self.config)
        self.dense, self.snapshots = DenseRecording(), Snapshots(self.config.snapshot_every)
        self.buffers, self.limit = GoodBuffers(), NormLimit(self.config.skip_ratio)
        self.storage = StorageWatch(self.config)
        self._log = EventLog(None)
        self._random: RandomStates | None = None
        self._alarms, self._last_alarm, self._last_kind = 0, -(10**9), ""
        self._hits: list[int] = []  # steps that failed for a module
        self._inspect: tuple[int, int] | None = None  # after going back: steps to look at before they are taken
        self._spiked = False  # whether that is for a spike, or weights that are not finite: of no module
        self._back_for = -1  # the last step that was gone back for
        self._rollbacks: dict[int, int] = {}
        self._limit_until, self._attentive_until, self._saved = 0, 0, 0
        self._next_probe = self._wait = self.config.settle_steps
        self._left_out = 0  # steps in a row, up to the last one read, that were not taken
        self._sound = -1  # the last step that was seen to be as in fp32

    @property
    def events(self) -> list[Event]:
        """What was seen and done, in order."""
        return self._log.events

    # what the loop calls

    def begin(self, trainer: Trainer) -> None:
        """The run begins, or goes on, at trainer.first_step."""
        self._usual_sync = min(trainer.sync_every, self.config.look_every)
        if trainer.out is not None and trainer.engine.main:
            self._log = EventLog(trainer.out / NAME)
            remove_old(trainer, self._log)
        self.planner.begin(trainer)
        self._keep(trainer, trainer.first_step)

    def allows(self, finite: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """Whether the optimizer may step: bool scalar on the device. finite: whether the gradients are; norm: their
        total 2-norm. Waits for nothing."""
        if self.config.action not in ("skip", "rollback"):
            return finite
        allowed = self.limit.allows(finite, norm)  # learns what is usual in any case
        return allowed if self.config.action == "skip" or self._limit_until else finite

    def after_reading(self, trainer: Trainer, rows: list[Row]) -> None:
        """Look at the steps since the last reading, and act. Raises TrainingError where nothing helps."""
        scaled, signal = trainer.scaler is not None, None
        random = self._random if len(rows) == 1 else None
        for row in rows:
            signal = self.signals.see(row, scaled=scaled) or signal  # the weights changed least since the last one
            self._left_out = self._left_out + 1 if row.skipped else 0
        last, next_step = rows[-1], trainer.next_step
        signal = signal or self._probe(trainer, last)
        if signal is not None and not (signal.kind == "suspect" and self.planner.all_high(trainer)):
            self._alarm(trainer, signal, random)
        elif self._inspect is not None and next_step >= self._inspect[0]:
            self._look_ahead(trainer)
        elif not last.skipped:
            self._calm(trainer, last.step)
        if trainer.next_step < next_step:
            self.snapshots.forget_after(trainer.next_step)
        elif not last.skipped:
            self._keep(trainer, next_step)
        lost = self.storage.after(trainer)
        if lost is not None:
            self._swallowed(trainer, last.step, lost)
        self.dense.go_on(trainer)
        self._pay_attention(trainer)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: tensors, numbers and strings in plain containers."""
        return {
            **{name: getattr(self, name).state_dict() for name in _PARTS},
            **{name: getattr(self, name) for name in _NUMBERS},
            "hits": list(self._hits), "rollbacks": dict(self._rollbacks),
            "inspect": list(self._inspect) if self._inspect is not None else None,
            "dense": [self.dense.begin, self.dense.until], "snapshots_since": self.snapshots.since,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of state_dict."""
        for name in _PARTS:
            getattr(self, name).load_state_dict(state[name])
        for name in _NUMBERS:
            setattr(self, name, state[name])
        self._hits, self._rollbacks = list(state["hits"]), dict(state["rollbacks"])
        self._inspect = tuple(state["inspect"]) if state["inspect"] is not None else None
        (self.dense.begin, self.dense.until), self.snapshots.since = state["dense"], state["snapshots_since"]

    def _probe(self, trainer: Trainer, row: Row) -> Signal | None:
        """A look for no reason, now and then: a format may be wrong from the first step on, and nothing stands out."""
        every, done = self.config.probe_every, trainer.next_step
        if every is None or row.skipped or done < self._next_probe:
            return None
        self._next_probe, self._wait = done + min(self._wait, every), 2 * self._wait
        return Signal("suspect", row.step, row.scale, self._sound + 1, {})

    # alarms

    def _alarm(self, trainer: Trainer, signal: Signal, random: RandomStates | None) -> None:
        step = signal.step
        if step - self._last_alarm > self.config.window:
            self._alarms, self._last_kind = 0, ""
        if signal.kind != "suspect":
            self._alarms, self._last_alarm = self._alarms + 1, step
            self._attentive_until = step + _ATTENTIVE
        hopeful = self.config.acts and self._last_kind in ("", "module", "harm", "unexplained", "scale")
        if not hopeful and self._alarms & (self._alarms - 1):
            return  # known by now: told at the first, second, fourth, eighth ... alarm
        with self.buffers.put_right(trainer, stay=self.config.acts):
            verdict = judge(trainer, signal, self.config, random)
        if verdict.kind == "sound":
            self._sound = step
        if signal.kind == "suspect" and verdict.kind not in ("module", "harm"):
            return
        self._last_kind = verdict.kind
        before = trainer.next_step
        self._decide(trainer, signal, verdict, random)
        if self._inspect is None or trainer.next_step == before:
            self.dense.around(trainer, trainer.next_step, self.config.dense_steps)

    def _decide(self, trainer: Trainer, signal: Signal, verdict: Verdict, random: RandomStates | None) -> None:
        step, config = signal.step, self.config
        if verdict.kind in ("module", "everywhere") and self._saved < config.save_steps:
            self._saved += save_failing_step(trainer, step, verdict, random)
        if verdict.kind == "scale":
            self._rescale(trainer, signal, verdict)
        elif verdict.kind in ("module", "harm"):
            self._hits = [hit for hit in self._hits if hit > step - config.window] + [step]
            enough = min(config.overflow_repeats, trainer.config.nonfinite_limit)
            sure = signal.kind != "overflow" or any(e.trying for e in self.planner.episodes)
            if not config.acts:
                self._tell(trainer, signal, verdict, "warn")
            elif len(self._hits) < enough and not sure:
                self._tell(trainer, signal, verdict, "none")
            elif not self._went_back(trainer, signal, verdict):
                self._promote(trainer, signal, verdict, random)
        elif verdict.kind in ("weights", "sound") and self._went_back(trainer, signal, verdict):
            return
        elif config.acts and signal.kind == "overflow" and verdict.kind in ("unexplained", "sound"):
            self._hits = [hit for hit in self._hits if hit > step - config.window] + [step]
            if len(self._hits) < min(config.overflow_repeats, trainer.config.nonfinite_limit):
                self._tell(trainer, signal, verdict, "none")
            else:
                self._promote_all(trainer, signal, verdict)
        else:
            self._tell(trainer, signal, verdict, "warn")

    def _promote(self, trainer: Trainer, signal: Signal, verdict: Verdict, random: RandomStates | None) -> None:
        step, next_step = signal.step, trainer.next_step
        forward = verdict.found is None or not by_scale(verdict.found)
        scale = (self.signals.good_scale or signal.scale) if forward else verdict.scale
        before = [e for e in self.planner.episodes if e.trying]
        for episode in before:
            episode.trying, episode.quiet, episode.since = False, 2 * episode.quiet, next_step
        if before:
            self.planner.put(trainer, step)
            if look(trainer, step, scale=self._scale_of(trainer), random=random).clean:
                names = ", ".join(p.target for e in before for p in e.promotions)
                again = self._changed(trainer, scale)
                text = f"{verdict.text}; back to the safer format of {names}, for twice as long{again}"
                self._tell(trainer, signal, verdict, "promote", text=text, plan=save_plan(trainer, self.planner))
                return
        tried = self.planner.cure(trainer, step, verdict, scale=scale, random=random)
        if tried is None and signal.kind not in ("overflow", "scale"):  # it trains on, as well as it can
            text = f"{verdict.text}; no safer format brings the step nearer to fp32"
            self._tell(trainer, signal, verdict, "warn", text=text)
            return
        if tried is None:
            text = f"{verdict.text}; no safer format makes the step finite, not even fp32 throughout"
            self._tell(trainer, signal, verdict, "stop", text=text)
            raise TrainingError(
                f"guard: {text} (step {step}): look at the module's code and at the learning rate, or replay the "
                "failing step (precscope trace --replay)"
            )
        quiet = self.config.quiet_steps or 0
        self.planner.episodes.append(Episode(tried.promotions, next_step, quiet))
        again = self._changed(trainer, tried.scale)
        self._tell(
            trainer, signal, verdict, "promote", text=f"{verdict.text}. {tried.text}{again}",
            numbers={"error": tried.error}, plan=save_plan(trainer, self.planner),
            modules={p.target: p.compute for p in tried.promotions},
        )  # fmt: skip

    def _promote_all(self, trainer: Trainer, signal: Signal, verdict: Verdict) -> None:
        """It fails again and again, and no look at it says why: the whole model to the next safer format."""
        formats = safer(format_of(self.planner.plan(trainer).at_step(trainer.in_force), EVERYTHING))
        if not formats:
            self._tell(trainer, signal, verdict, "warn")
            return
        promotion = Promotion(EVERYTHING, formats[0], f"guard, step {signal.step}: {verdict.text}")
        self.planner.episodes.append(Episode([promotion], trainer.next_step, self.config.quiet_steps or 0))
        self.planner.put(trainer, signal.step)
        again = self._changed(trainer, self.signals.good_scale or signal.scale)
        text = f"{verdict.text}; it fails again and again. From here on the whole model in {formats[0]}{again}"
        plan = save_plan(trainer, self.planner)
        self._tell(trainer, signal, verdict, "promote", text=text, plan=plan, modules={EVERYTHING: formats[0]})

    def _changed(self, trainer: Trainer, scale: float) -> str:
        """After a promotion: what the failing steps left behind is put right, and those that were left out are taken
        again where their data are still to be had; that in words."""
        if trainer.scaler is not None and scale != trainer.scaler.get_scale():
            trainer.scaler.update(scale)  # its falls were no fault of the scale; or the one that was seen to fit
        trainer.readings.forget()
        words, self._left_out = take_again(trainer, self._left_out), 0
        self.snapshots.changed(trainer.next_step)
        self.signals.forget_history()
        self._hits.clear()
        return words

    def _rescale(self, trainer: Trainer, signal: Signal, verdict: Verdict) -> None:
        """Too high a loss scale is brought down at once, rather than by a lost step for each halving."""
        if not self.config.acts or trainer.scaler is None or not self._left_out:
            self._tell(trainer, signal, verdict, "none")
            return
        trainer.scaler.update(min(verdict.scale, trainer.scaler.get_scale()))
        again, self._left_out = take_again(trainer, self._left_out), 0
        self._tell(trainer, signal, verdict, "rescale", text=f"{verdict.text}{again}")

    def _scale_of(self, trainer: Trainer) -> float:
        return trainer.scaler.get_scale() if trainer.scaler is not None else 1.0

    def _swallowed(self, trainer: Trainer, step: int, lost: Lost) -> None:
        """Parameters that storage keeps from moving go to fp32, where a plan stores them low and one process trains."""
        text, plan, config = lost.text, "", self.config
        now = trainer.precision.plan
        low = [name for name, _ in lost.modules if now is not None and now[name].params != "fp32"]
        acts = config.acts and bool(low) and trainer.engine.world == 1
        if acts:
            reason = f"guard, step {step}: {text}"
            promotions = [Promotion(name, "", reason, params="fp32") for name in low]
            self.planner.episodes.append(Episode(promotions, trainer.next_step, 0))
            self.planner.put(trainer, step)
            self.snapshots.changed(trainer.next_step)
            plan = save_plan(trainer, self.planner)
            text += f". From here on fp32 storage for {', '.join(low[:4])}" + (" ..." if len(low) > 4 else "")
        else:
            text += "; train with updates='stochastic' or 'master', or with a larger learning rate"
        numbers = {"share": lost.share, "lr": lost.lr, "modules": dict(lost.modules)}
        self._log.write(
            Event(step, "swallowed", "promote" if acts else "warn", text, lost.modules[0][0], "", numbers, plan)
        )
        if trainer.engine.main:
            warnings.warn(f"guard, step {step}: {text}", RuntimeWarning, stacklevel=4)

    # going back

    def _went_back(self, trainer: Trainer, signal: Signal, verdict: Verdict) -> bool:
        """Go back to the last good state, where that is what to do and there is one."""
        if self.config.action != "rollback" or one_pass(trainer) or signal.numbers.get("ahead"):
            return False
        if signal.step <= self._back_for:
            return False  # that was looked at already, before it was taken
        state = self.snapshots.before(trainer, signal.first) or self.snapshots.before(trainer, signal.step)
        if state is None or self._rollbacks.get(state["step"], 0) >= self.config.max_rollbacks:
            return False
        trainer.rollback(state)
        to = state["step"]
        self._rollbacks[to], self._back_for = self._rollbacks.get(to, 0) + 1, signal.step
        self._inspect = (to if verdict.kind == "weights" else max(to, signal.first), signal.step)
        self._attentive_until, self._left_out = signal.step + _ATTENTIVE, 0
        self._spiked = verdict.kind in ("weights", "sound")
        self.signals.forget_history()
        text = f"{verdict.text}; back to step {to}, to look at step {self._inspect[0]} before it is taken"
        self._tell(trainer, signal, verdict, "rollback", text=text, numbers={"to": to})
        self.dense.around(trainer, self._inspect[0], self.config.dense_steps)
        return True

    def _look_ahead(self, trainer: Trainer) -> None:
        """Replaying: look at the step that comes next, with the weights that it is to be computed with."""
        assert self._inspect is not None
        step, end = trainer.next_step, self._inspect[1]
        self._inspect = (step + 1, end) if step < end else None
        if step >= trainer.config.steps:
            return
        scale = self._scale_of(trainer)
        signal = Signal("replay", step, scale, step, {"ahead": 1.0})
        random = RandomStates.take(cuda=True)
        verdict = judge(trainer, signal, self.config, random)
        if verdict.kind in ("module", "harm"):
            self._inspect, self._limit_until = None, 0  # what follows was to be seen in the old precision
            self._promote(trainer, signal, verdict, random)
        elif verdict.kind == "sound" and self._spiked and not self._limit_until:
            self._limit_until = end + _ATTENTIVE
            text = f"{verdict.text}: not a matter of precision; steps with too large a gradient are left out here"
            self._tell(trainer, signal, verdict, "skip", text=text)

    # calm

    def _calm(self, trainer: Trainer, step: int) -> None:
        """Nothing is wrong: try a demoted format again where it has been so for long."""
        if self._limit_until and step >= self._limit_until:
            self._limit_until = 0
        if self.config.quiet_steps is None or self._inspect is not None or trainer.next_step >= trainer.config.steps:
            return
        for episode in reversed(self.planner.episodes):
            if not episode.quiet or step - max(episode.since, self._last_alarm) < episode.quiet:
                continue
            if episode.trying:
                self.planner.episodes.remove(episode)
                self._quiet(trainer, step, episode, "restore", "held: it stays")
            else:
                self._try_again(trainer, step, episode)
            return

    def _try_again(self, trainer: Trainer, step: int, episode: Episode) -> None:
        """One step is run in the demoted format and compared with fp32 first: that costs nothing where it fails."""
        episode.trying, episode.since = True, trainer.next_step
        self.planner.put(trainer, step, tried=True)
        probe = Signal("suspect", step, self._scale_of(trainer), step, {})
        holds = judge(trainer, probe, self.config, None).kind in ("sound", "scale")
        if not holds:
            episode.trying, episode.quiet = False, 2 * episode.quiet
        self.planner.put(trainer, step)
        if holds:
            self._quiet(trainer, step, episode, "retry", "is tried again", plan=save_plan(trainer, self.planner))
        else:
            self._quiet(trainer, step, episode, "keep", f"would still fail: next try in {episode.quiet} steps")

    def _quiet(self, trainer: Trainer, step: int, episode: Episode, action: str, words: str, plan: str = "") -> None:
        names = [p.target for p in episode.promotions]
        text = f"no alarm for long: the format of {', '.join(names)} from before {words}"
        self._log.write(Event(step, "quiet", action, text, names[0], "", {"quiet_steps": episode.quiet}, plan))

    def _keep(self, trainer: Trainer, steps: int) -> None:
        """What there may be to go back to, after so many steps."""
        if steps % _KEEP_EVERY == 0 or steps == trainer.first_step:
            self.buffers.keep(trainer)
        if self.config.action == "rollback":
            self.snapshots.after(trainer, steps)

    def _pay_attention(self, trainer: Trainer) -> None:
        """Around an alarm the device is read at each step, so that a failing one can be run again as it was."""
        self._random = RandomStates.take(cuda=True)
        close = trainer.next_step < self._attentive_until or self._inspect is not None or self.storage.close(trainer)
        trainer.sync_every = 1 if close else self._usual_sync

    def _tell(
        self, trainer: Trainer, signal: Signal, verdict: Verdict, action: str, *, text: str | None = None,
        numbers: dict[str, float] | None = None, plan: str = "", modules: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        text = verdict.text if text is None else text
        about: dict[str, Any] = {**signal.numbers, "scale": signal.scale, "error": verdict.error, **(numbers or {})}
        if modules:
            about["modules"] = modules
        kind = signal.kind if verdict.kind in ("module", "sound") else verdict.kind
        if signal.kind in ("suspect", "replay") and verdict.found is not None:
            kind = verdict.found.kind
        module = verdict.module or next(iter(modules or {}), "")
        self._log.write(Event(signal.step, kind, action, text, module, verdict.op, about, plan))
        if action not in ("none", "rescale", "stop") and trainer.engine.main:
            warnings.warn(f"guard, step {signal.step}: {text}", RuntimeWarning, stacklevel=4)
