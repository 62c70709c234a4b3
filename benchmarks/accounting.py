"""Where the seconds of an interrupted run went, from when its parts began and ended.

Every second from the start of the first process to the end of the last is counted once. Nothing
here runs or measures anything.
"""

import bisect
import itertools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

# Kinds of spans that count wherever they are, even within a step; the first one that fits counts.
INNER = ('save', 'restore', 'compilation')
PARTS = ('steps', 'steps again', 'start-up', 'compilation', 'restore', 'save', 'stopping')


class Span(NamedTuple):
    """What a process did from `begin` to `end`, in seconds since the epoch."""

    kind: str  # 'step', or one of INNER
    begin: float
    end: float
    step: int = 0  # the step that was finished at `end`; an evaluation is part of its step


class Life(NamedTuple):
    """A process, or several that ran as one, from its start to its end."""

    began: float
    ended: float
    spans: Sequence[Span]
    hit: float = math.inf  # when it was interrupted

    @property
    def steps(self) -> list[Span]:
        """Returns its steps, in order."""
        return [span for span in self.spans if span.kind == 'step']


class Account(NamedTuple):
    """What a run cost."""

    seconds: dict[str, float]  # of each of PARTS
    hits: int
    most_lost: int  # the most steps that one interruption cost
    first_step: float  # median seconds from a start to the first new step; nan without one

    @property
    def total(self) -> float:
        """Returns the seconds of the whole run."""
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """Returns the share of time that went into steps which count."""
        return self.seconds['steps'] / self.total


def account(lives: Sequence[Life]) -> Account:
    """Counts the seconds of a run, which is its lives in order.

    A step counts if the run later continued after it, and again is one that had to be repeated.
    The first step of a life waits for data and tracing: more than a usual step is start-up.
    """
    usual = median([s.end - s.begin for life in lives for s in life.steps[1:]], 0.0)
    seconds, lost, kept = dict.fromkeys(PARTS, 0.0), [0], math.inf
    ends = [life.began for life in lives[1:]] + [lives[-1].ended]
    for life, end in reversed(list(zip(lives, ends, strict=True))):
        steps = life.steps
        if steps and kept < math.inf:
            lost.append(max(0, steps[-1].step - int(kept)))
        for part, length in parts(life, end, kept, usual):
            seconds[part] += length
        if steps:
            kept = steps[0].step - 1
    waits = [life.steps[0].end - life.began for life in lives if life.steps]
    hits = sum(life.hit < math.inf for life in lives)
    return Account(seconds, hits, max(lost), median(waits, math.nan))


def parts(life: Life, end: float, kept: float, usual: float) -> list[tuple[str, float]]:
    """Returns (part, seconds) of each piece of a life, up to the start of the next one at `end`.

    kept: the last step that counts. usual: the seconds of a usual step.
    """
    steps = life.steps
    if steps:
        steps[0] = steps[0]._replace(begin=max(life.began, steps[0].end - usual))
    inner = [[span for span in life.spans if span.kind == kind] for kind in INNER]
    times = {life.began, end, life.hit, *(t for s in (*life.spans, *steps[:1]) for t in s[1:3])}
    cuts = sorted(time for time in times if life.began <= time <= end)
    finished = [span.end for span in steps]

    def part(time: float) -> str:
        for kind, spans in zip(INNER, inner, strict=True):
            if any(span.begin <= time < span.end for span in spans):
                return kind
        after = bisect.bisect_right(finished, time)  # steps that were finished before
        if after < len(steps) and steps[after].begin <= time:
            return 'steps' if steps[after].step <= kept else 'steps again'
        if not steps or time < steps[0].begin:
            return 'start-up' if time < life.hit else 'stopping'
        return 'stopping' if time >= life.hit or life.hit == math.inf else 'steps again'

    return [(part((a + b) / 2), b - a) for a, b in itertools.pairwise(cuts)]


def median(values: Sequence[float], otherwise: float) -> float:
    """Returns the median, or another value if there are none."""
    return statistics.median(values) if values else otherwise
