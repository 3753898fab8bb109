"""A machine, a text and a clock that exist only in numbers, to try the depth control on.

`simulate` is the decode loop without a model: the next round is chosen before the one in flight is read, a round is
timed only when it is followed by one of the same depth, and the first round of a depth has to build its graph. Time is
virtual and chance is seeded, so every run is the same everywhere.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from statistics import fmean

from mlx_mtp.generation.depth import DepthPolicy, FixedDepth

# Chance of a draft to be accepted, by the tokens generated so far.
Text = Callable[[int], float]


@dataclass(frozen=True)
class Machine:
    """seconds: of a round by depth, undisturbed. noise: how its rounds scatter, as a factor drawn for each."""

    name: str
    seconds: tuple[float, ...]
    noise: str = "calm"
    # (from token, to token, factor): something else runs, and every round takes so many times as long. In tokens, so
    # that it comes to the same for all depths.
    busy: tuple[tuple[int, int, float], ...] = ()
    # Rounds before which the machine slept for 10,000 seconds.
    sleeps: tuple[int, ...] = ()
    # Share of a round's time that the clock books on the round after it.
    smeared: float = 0.0

    def factor(self, chance: random.Random) -> float:
        if self.noise == "calm":
            return chance.uniform(0.97, 1.03)
        if self.noise == "lognormal":  # a standard deviation of 50 % either way
            return chance.lognormvariate(0.0, 0.5)
        if self.noise == "uniform":
            return chance.uniform(0.5, 1.5)
        # heavy-tailed: mostly on time, one in seven late, by anything up to 20 times
        return chance.uniform(0.9, 1.1) * (min(20.0, chance.paretovariate(1.2)) if chance.random() < 0.15 else 1.0)


def _machine(name: str, verify: Sequence[float], draft: float) -> Machine:
    """From the pass of 1 to 9 rows and a draft step, in passes of one row, which takes 10 ms."""
    return Machine(name, tuple(0.01 * (rows + draft * depth) for depth, rows in enumerate(verify)))


# A GPU: rows cost little up to five, then a lot; with a drafter of one layer. A CPU: every row costs nearly a pass.
GPU = _machine("GPU", (1.0, 1.02, 1.04, 1.07, 1.1, 1.75, 1.85, 1.95, 2.05), 0.06)
FLAT = _machine("flat", (1.0, 1.02, 1.04, 1.06, 1.08, 1.1, 1.12, 1.14, 1.16), 0.03)
CPU = _machine("CPU", (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0), 0.12)
MACHINES = (GPU, FLAT, CPU)


def always(share: float) -> Text:
    """The same chance all along."""
    return lambda _: share


def switching(one: float, other: float, every: int) -> Text:
    """Prose and code by turns of so many tokens."""
    return lambda tokens: (one, other)[tokens // every % 2]


@dataclass
class Record:
    """What a run came to: seconds and tokens after every round."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)

    def rate(self, after: int = 0) -> float:
        """Tokens per second of all rounds after the first `after`."""
        if not after:
            return self.tokens[-1] / self.seconds[-1]
        return (self.tokens[-1] - self.tokens[after - 1]) / (self.seconds[-1] - self.seconds[after - 1])


def simulate(policy: DepthPolicy, machine: Machine, text: Text, tokens: int, seed: int, reply: int = 400) -> Record:
    """Replies of `reply` tokens one after the other, until there are so many tokens in all."""
    chance, clock = random.Random(seed), Clock(machine)
    record, built = Record(), set[int]()
    while not record.tokens or record.tokens[-1] < tokens:
        begun = record.tokens[-1] if record.tokens else 0
        policy.begin()
        pending, alone, disturbed = policy.next(), True, True
        while not record.tokens or record.tokens[-1] < begun + reply:
            ahead = policy.next()
            so_far = record.tokens[-1] if record.tokens else 0
            accepted, share = 0, text(so_far)
            while accepted < pending and chance.random() < share:
                accepted += 1
            before, disturbed = disturbed, not {pending, ahead} <= built
            built |= {pending, ahead}
            seen = clock.round(pending, so_far, chance)
            timed = not alone and ahead == pending and not disturbed and not before
            policy.learn(pending, accepted, seen if timed else None)
            record.seconds.append(clock.now - clock.asleep)
            record.tokens.append(so_far + accepted + 1)
            record.depths.append(pending)
            pending, alone = ahead, False
    return record


class Clock:
    """Virtual seconds; those asleep are counted apart."""

    def __init__(self, machine: Machine) -> None:
        self._machine, self._rounds, self._owed = machine, 0, 0.0
        self.now = self.asleep = 0.0

    def round(self, depth: int, tokens: int, chance: random.Random) -> float:
        """Lets the round after so many tokens pass; the seconds it seems to take."""
        machine = self._machine
        slow = next((factor for start, end, factor in machine.busy if start <= tokens < end), 1.0)
        took = machine.seconds[depth] * slow * machine.factor(chance)
        if self._rounds in machine.sleeps:
            self.asleep += 1e4
            took += 1e4
        self._rounds += 1
        self.now += took
        seen = self._owed + (1.0 - machine.smeared) * took
        self._owed = machine.smeared * took
        return seen


@cache
def best_fixed(machine: Machine, text: Text, tokens: int) -> float:
    """Tokens per second of the best fixed depth, on the same machine and text; the best three are tried twice."""
    awake = replace(machine, sleeps=())
    rates = [[simulate(FixedDepth(depth), awake, text, tokens, 0).rate(50)] for depth in range(9)]
    for depth in sorted(range(9), key=lambda depth: rates[depth], reverse=True)[:3]:
        rates[depth].append(simulate(FixedDepth(depth), awake, text, tokens, 1).rate(50))
    return max(fmean(twice) for twice in rates if len(twice) == 2)
