"""What is expected of the work in hand, from how fast it went of late."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from worker.engine.chat.arrivals import Arrival
from worker.engine.chat.forecast import Answer, Forecast, Pace, Work, answer_span, forecast
from worker.engine.chat.scheduler import Scheduler, TokenSequence
from worker.protocol.messages import Generate

FORECAST_EVERY_S = 0.1


class Outlook:
    """Pace, and the last forecast. Engine thread only."""

    def __init__(self, max_running: int):
        """max_running: sequences in a pass of one model."""
        self._max_running = max_running
        self._pace = Pace()
        self._forecast = Forecast()
        self._until = 0.0

    def after_pass(self, seconds: float, prompt_tokens: int, rows: int, context: int) -> None:
        self._pace = self._pace.after_pass(seconds, prompt_tokens, rows, context)

    def after_answer(self, answer: Answer) -> None:
        self._pace = self._pace.after_answer(answer)

    def span(self, begin_s: float, prompt_tokens: int, allowed: int) -> tuple[float, float] | None:
        """Seconds from now until a request's answer ends, (from, to), as `answer_span` has them.
        begin_s: until it begins."""
        span = answer_span(self._pace, prompt_tokens, allowed)
        return None if span is None else (begin_s + span[0], begin_s + span[1])

    def expected(
        self, schedulers: Sequence[Scheduler], arrivals: Iterable[Arrival], models: int, now: float
    ) -> Forecast:
        """Of all models together: as exact as the places of the fullest one allow. Not made anew
        more often than every FORECAST_EVERY_S.

        models: that have work.
        """
        if now >= self._until:
            self._until = now + FORECAST_EVERY_S
            running: list[Work] = []
            waiting = [_new_work(one) for one in arrivals]
            for scheduler in schedulers:
                for index, sequence in enumerate(scheduler):
                    group = running if index < scheduler.running else waiting
                    group.append(_work(sequence))
            places = self._max_running * max(1, models)
            self._forecast = forecast(running, waiting, places, self._pace)
        return self._forecast


def _work(sequence: TokenSequence) -> Work:
    done = len(sequence.ids) - sequence.prompt_tokens
    left = 0 if done else sequence.prompt_tokens - sequence.computed
    return Work(prompt_tokens=left, done=done, allowed=sequence.limit, context=len(sequence.ids))


def _new_work(arrival: Arrival) -> Work:
    message = arrival.message
    allowed = message.sampling.max_tokens if isinstance(message, Generate) else 1
    return Work(prompt_tokens=0, done=0, allowed=allowed)
