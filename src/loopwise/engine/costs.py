"""What a tick of n rows costs: measured at start-up, for decisions about drafts."""

import bisect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from loopwise.engine.answer import Answer
from loopwise.engine.layout import layout_of
from loopwise.engine.request import Request, Row
from loopwise.engine.runner import Runner
from loopwise.engine.sampling import Sampling
from loopwise.loops.exits import Fixed
from loopwise.loops.planes import parse_policy
from loopwise.memory.paged import PagedMemory
from loopwise.models.looped_lm import LoopedLM
from loopwise.nn.kernels import linear


@dataclass(frozen=True, kw_only=True)
class CostCurve:
    """Seconds of a tick by its number of rows, measured."""

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def __call__(self, rows: int | float) -> float:
        """Between measurements a straight line; beyond the last, in proportion."""
        if rows >= self.rows[-1]:
            return self.seconds[-1] * rows / self.rows[-1]
        after = bisect.bisect_right(self.rows, rows)
        if after == 0:
            return self.seconds[0]
        (r0, r1), (s0, s1) = self.rows[after - 1 : after + 1], self.seconds[after - 1 : after + 1]
        return s0 + (s1 - s0) * (rows - r0) / (r1 - r0)


def measure_costs(run: Callable[[int], None], *, rows: Sequence[int], rounds: int = 4) -> CostCurve:
    """Time `run(n)` for each n, `rounds` times in turn after once for warming up.

    What else the machine does only adds time: the least counts, and no number of rows costs more than a larger one.
    """
    least = {count: float("inf") for count in rows}
    for turn in range(rounds + 1):
        for count in rows:
            began = time.perf_counter()
            run(count)
            if turn:
                least[count] = min(least[count], time.perf_counter() - began)
    seconds = [min(least[more] for more in rows if more >= count) for count in rows]
    return CostCurve(rows=tuple(rows), seconds=tuple(seconds))


@torch.inference_mode()
def measure_ticks(model: LoopedLM, most: int, *, context: int = 1, read: bool = True) -> CostCurve:
    """Seconds of one loop of n rows, by n, for about `most` rows.

    Args:
        context: positions that each row reads; with few of them attention hardly counts.
        read: whether each row is read out too.
    """
    counts = [count for count in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128) if count <= 2 * most + 8]
    config, weight = model.config, model.embed.weight
    layout = layout_of(model)
    most_rows = counts[-1]
    memory = PagedMemory(
        layout,
        parse_policy("per_loop"),
        planes=1,
        budget=most_rows * -(-context // layout.page) * layout.group_bytes(1),
        seats=most_rows,
        device=weight.device,
    )
    runner = Runner(model, memory)
    runner.seats.state = torch.randn(most_rows, config.width, dtype=torch.float32).to(weight)
    if runner.seats.injected is not None:
        runner.seats.injected = torch.randn_like(runner.seats.state)
    rows = [(_measured(memory, context), Row(context - 1, 0, seat=seat, started=True)) for seat in range(most_rows)]
    for table in (*memory.core.keys.values(), *memory.core.values.values()):
        table.zero_()

    def run(count: int) -> None:
        mine = rows[:count]
        for _, row in mine:
            row.loop = 0
        _, after = runner.launch(mine, [])
        if not read:
            after[:, 0].tolist()
        elif runner.say(mine, after) is None:
            linear(after, model.head_weight).argmax(-1).tolist()

    return measure_costs(run, rows=counts)


def _measured(memory: PagedMemory, context: int) -> Request:
    """A request that has read as many positions and has room for what it writes there."""
    pages = memory.open()
    for index in memory.missing(pages, 1, 0, context - 1):
        memory.place(pages, 1, index, memory.pool(1).take())
    memory.write_at(pages, 1, 0, context - 1, generated=True)
    sampling = Sampling()
    answer = Answer((0,), sampling, room=1, ends=(), tokenizer=None)
    request = Request(prompt=(0,), sampling=sampling, rule=Fixed(count=1), max_loops=1, answer=answer)
    request.pages = pages
    return request
