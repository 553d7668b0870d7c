"""One update: from a validated gradient to new parameters and state, in the order of DESIGN §6."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from gradpost.protocol.dtypes import NUMPY
from kernels import average, cpu, reduce, tensorwise
from kernels import rows as by_row
from service.schemas import Terms
from service.schemas.around import Clip
from service.sessions import runs as stretches
from service.sessions import sparse
from service.sessions.arena import Arena, Array, Ruled
from service.sessions.lane import Program
from service.sessions.layout import Entry
from service.sessions.runs import Run
from service.sessions.sparse import Stretch
from service.wire.rows import Rows

Thunk = Callable[[], Any]
Runs = tuple[Run, ...]
_COSTLY = 16  # an element of a rule per tensor is the work of so many others, or of more
_LARGEST = float(np.finfo(np.float32).max)


class Sums(NamedTuple):
    """What the gradient amounts to, before anything is divided or clipped."""

    norm: float
    by_group: tuple[float, ...]
    largest: float


class Move(NamedTuple):
    """How one group takes its gradient in one update."""

    terms: Terms
    lr: float
    factor: float
    limit: float | None


class Part(NamedTuple):
    """What one stretch of a group takes, in numbers: all that an update has of its own.

    A log that keeps the bits of these repeats the update, whatever machine it is on.

    Attributes:
        group: Its number.
        first: The first entry of the stretch.
        last: The entry behind it.
        updates: How many it has had before.
        lr: The learning rate.
        values: Of an elementwise rule the coefficients, the bound of the gradient last where it is
            clipped by value; of a rule per tensor what the gradient is multiplied by, that bound
            (infinity: none), and the rule's numbers.
        scalars: Of the rule, after the update.
    """

    group: int
    first: int
    last: int
    updates: int
    lr: float
    values: tuple[float, ...]
    scalars: tuple[float, ...]


class Step(NamedTuple):
    """One kernel run, ready to start."""

    group: Ruled
    run: Run
    kernel: cpu.Kernel
    h: Array


class Some(NamedTuple):
    """Some rows of one tensor, ready to start."""

    group: Ruled
    run: Run
    rows: Rows
    kernel: by_row.Kernel
    h: Array


class Whole(NamedTuple):
    """One tensor under a rule that needs all of it at once, ready to start."""

    group: Ruled
    run: Run
    entry: Entry
    state: tuple[Array, ...]
    hyper: Mapping[str, Any]
    lr: float
    values: tuple[float, ...]
    dtypes: tuple[str, str]
    """Of the session, and of the gradient."""


class Work(NamedTuple):
    """A whole update: what runs, which stretches stay as they are, and the runs of each group."""

    steps: tuple[Step | Some | Whole, ...]
    kept: tuple[Run, ...]
    runs: tuple[Runs, ...]


class Done(NamedTuple):
    """What an update left behind."""

    finite: bool
    update_norm: float | None
    param_norm: float | None


Sized = tuple[int, Thunk]
"""A thunk, and about how many elements' work it is."""


def together(sized: Sequence[Sized]) -> Program[list[Any]]:
    """Runs thunks, small ones several in a row: a hop to a thread costs as much as 10 k elements.

    Returns:
        Their results, in their order.
    """
    batches: list[list[Thunk]] = []
    room = 0
    for size, thunk in sized:
        if not batches or size > room:
            batches.append([])
            room = cpu.ALONE
        batches[-1].append(thunk)
        room -= size
    found: list[list[Any]] = yield [partial(_in_a_row, batch) for batch in batches]
    return [one for row in found for one in row]


def _in_a_row(batch: Sequence[Thunk]) -> list[Any]:
    return [thunk() for thunk in batch]


def examining(
    arena: Arena,
    terms: Sequence[Terms],
    flat: Array,
    dtype: str,
    came: Sequence[Stretch] | None = None,
) -> list[tuple[int, Sized]]:
    """By group, thunks that give (sums of squares, largest element) of a part of it.

    What is frozen counts for nothing; the largest element is looked for only where it matters.

    Args:
        arena: Only read.
        terms: Of each group.
        flat: The gradient.
        dtype: Of the gradient.
        came: What counts of it; None: all of the vector.
    """
    found: list[tuple[int, Sized]] = []
    for index, values, _, _ in sparse.stretches(arena, terms, flat) if came is None else came:
        bounded = _bounded(terms[index])
        found += [
            (index, (hi - lo, partial(_examine, values, dtype, lo, hi, bounded=bounded)))
            for lo, hi in cpu.chunks(0, values.size)
        ]
    return found


def _bounded(one: Terms) -> bool:
    """Whether a group clips by value."""
    return one.clip is not None and one.clip.value is not None


def _examine(part: Array, dtype: str, lo: int, hi: int, *, bounded: bool) -> tuple[Array, float]:
    largest = reduce.largest(part[lo:hi], dtype) if bounded else 0.0
    return reduce.sumsq(part, dtype, lo, hi), largest


def summed(groups: int, parts: Sequence[tuple[int, tuple[Array, float]]]) -> Sums:
    """Norms of the whole gradient and of each group's, added in layout order."""
    sums: list[list[Array]] = [[] for _ in range(groups)]
    for index, (blocks, _) in parts:
        sums[index].append(blocks)
    largest = max([largest for _, (_, largest) in parts], default=0.0)
    if groups == 1:
        norm = _root(sums[0])
        return Sums(norm, (norm,), largest)
    every = [blocks for one in sums for blocks in one]
    return Sums(_root(every), tuple(_root(one) for one in sums), largest)


def _root(blocks: Sequence[Array]) -> float:
    if not blocks:
        return 0.0
    return math.sqrt(reduce.total(blocks[0] if len(blocks) == 1 else np.concatenate(blocks)))


def moves(
    terms: Sequence[Terms],
    sums: Sums,
    scale: float,
    lr_factor: float,
    shrink: float,
    *,
    turned: bool = False,
) -> tuple[Move, ...]:
    """What each group does: its learning rate, and what its gradient is multiplied by.

    Args:
        terms: Effective for this update.
        sums: Of the gradient as it came.
        scale: What the gradient is divided by.
        lr_factor: Of the schedule.
        shrink: What the learning rate is divided by, for staleness.
        turned: Whether the gradient is the opposite of what came.
    """
    found = []
    for index, one in enumerate(terms):
        lr = float(one.hyper["lr"]) * (1.0 if one.stated_lr else lr_factor) / shrink
        clip = one.clip
        factor, limit = 1.0 / scale, None
        if clip is not None and clip.value is not None:
            limit = clip.value * scale
        elif clip is not None:
            bound, norm = clip.group_norm, sums.by_group[index] / scale
            if isinstance(clip, Clip) and clip.global_norm is not None:
                bound, norm = clip.global_norm, sums.norm / scale
            assert bound is not None
            factor *= min(1.0, bound / (norm + 1e-6))
        found.append(Move(one, lr, -factor if turned else factor, limit))
    return tuple(found)


def clipped(chosen: Sequence[Move], sums: Sums, scale: float) -> bool:
    """Whether any gradient was made smaller."""
    for move in chosen:
        if move.terms.clip is None or move.terms.frozen:
            continue
        if abs(move.factor) < 1.0 / scale or (move.limit is not None and sums.largest > move.limit):
            return True
    return False


def kernel_of(one: Terms, group: Ruled, master: str, grad: str) -> tuple[str, str, str, bool]:
    """Which compiled loop a group needs: variant, dtypes, and whether it clips by value."""
    return group.rule.variant(one.hyper), master, grad, _bounded(one)


def ready(
    arena: Arena, terms: Sequence[Terms], master: str, grad: str, rows: Sequence[Rows] = ()
) -> bool:
    """Whether everything that an update runs is compiled, and runs at the price of a kernel."""
    for index in {arena.layout.entries[one.entry].group for one in rows}:
        variant, _, _, bounded = kernel_of(terms[index], arena.groups[index], master, grad)
        if not terms[index].frozen and not by_row.ready(variant, master, clamped=bounded):
            return False
    for group, one in zip(arena.groups, terms, strict=True):
        if group.rule.tensorwise:
            return False
        variant, _, _, bounded = kernel_of(one, group, master, grad)
        if not one.frozen and not cpu.ready(variant, master, grad, clamped=bounded):
            return False
    return reduce.ready(grad)


def compile_all(arena: Arena, terms: Sequence[Terms], master: str, *, norms: bool) -> None:
    """Loads what the next push is likely to need, so that it is not the one that waits."""
    for group, one in zip(arena.groups, terms, strict=True):
        _compile(one, group, master, master)
        if one.hyper.get("lazy"):
            _compile_rows(one, group, master)
    reduce.warm([master])
    if arena.average is not None:
        average.warm(master)
    if norms:
        reduce.warm_change(master)


def _compile(one: Terms, group: Ruled, master: str, grad: str) -> cpu.Kernel | None:
    """The loop of a group; None, with all its passes loaded, where its rule takes whole tensors."""
    if group.rule.tensorwise:
        tensorwise.warm(group.rule.name, master, grad)
        return None
    variant, _, _, bounded = kernel_of(one, group, master, grad)
    return cpu.kernel(variant, master, grad, clamped=bounded)


def _compile_rows(one: Terms, group: Ruled, master: str) -> by_row.Kernel:
    """The loop of a lazy group over rows."""
    variant, _, _, bounded = kernel_of(one, group, master, master)
    return by_row.kernel(variant, master, clamped=bounded)


def parts(
    arena: Arena,
    chosen: Sequence[Move],
    present: Sequence[bool] | None,
    runs: Sequence[Runs] | None = None,
) -> list[Part]:
    """The numbers of an update, in float64 on the host; nothing is written.

    Args:
        arena: Only read.
        chosen: For each group.
        present: For each entry of the layout, whether it came; None: all.
        runs: Of each group, before the update; None: those of now.
    """
    found: list[Part] = []
    for index, (group, move) in enumerate(zip(arena.groups, chosen, strict=True)):
        if move.terms.frozen:
            continue
        live: Sequence[Run] = group.runs if runs is None else runs[index]
        if present is not None:
            pieces = stretches.cut(live, present, arena.layout.entries)
            live = [run for run, came in pieces if came]
        found += [_part(index, group, run, move) for run in live]
    return found


def _part(index: int, group: Ruled, run: Run, move: Move) -> Part:
    rule, hyper, lr = group.rule, move.terms.hyper, move.lr
    if rule.tensorwise:
        limit = math.inf if move.limit is None else move.limit
        numbers = tensorwise.numbers(rule.name, hyper, run.updates)
        values: tuple[float, ...] = (move.factor, limit, *numbers)
        return Part(index, run.first, run.last, run.updates, lr, values, ())
    scalars = run.scalars if run.updates else rule.start(hyper, lr)
    *most, sign = rule.coefficients(hyper, run.updates, lr, scalars)
    # The gradient's own factor rides on the coefficient that turns its sign.
    values = (*most, sign * move.factor)
    if move.limit is not None:
        values = (*values, move.limit)
    scalars = rule.advance(hyper, run.updates, lr, scalars)
    return Part(index, run.first, run.last, run.updates, lr, values, scalars)


def prepare(
    arena: Arena, terms: Sequence[Terms], numbers: Sequence[Part], master: str, grad: str,
    runs: Sequence[Runs] | None = None, *, rows: Sequence[Rows] = (),
) -> Work:  # fmt: skip
    """Everything that may fail (a compiler, an allocation), before the first write.

    Args:
        arena: Only read, but for state that no update has reached.
        terms: Effective for this update, of each group.
        numbers: From `parts`, or from a log.
        master: The session's dtype.
        grad: Of the gradient.
        runs: As for `parts`.
        rows: Of the tensors of which only these came, none of them frozen.
    """
    steps: list[Step | Some | Whole] = []
    by_entry = {one.entry: one for one in rows}
    kept: list[Run] = []
    after: list[Runs] = []
    mine: list[list[Part]] = [[] for _ in arena.groups]
    for part in numbers:
        mine[part.group].append(part)
    for index, group in enumerate(arena.groups):
        before = group.runs if runs is None else runs[index]
        if not mine[index]:
            kept += before
            after.append(before)
            continue
        loop = _compile(terms[index], group, master, grad)
        taken = [_run(part, arena.layout.entries) for part in mine[index]]
        pairs = list(zip(mine[index], taken, strict=True))
        if loop is None:
            steps += _wholes(arena, group, pairs, terms[index].hyper, (master, grad))
        else:
            compiled = partial(_compile_rows, terms[index], group, master)
            for part, run in pairs:
                h = _coefficients(group, run, part, master)
                some, whole = _separate(run, by_entry, arena.layout.entries)
                steps += [Step(group, one, loop, h) for one in whole]
                steps += [Some(group, one, taken, compiled(), h) for one, taken in some]
        rest = stretches.without(before, taken, arena.layout.entries)
        kept += rest
        done = [Run(*run[:4], run.updates + 1, part.scalars) for part, run in pairs]
        after.append(stretches.joined(sorted([*rest, *done]) if rest else done))
    return Work(tuple(steps), tuple(kept), tuple(after))


def _run(part: Part, entries: Sequence[Entry]) -> Run:
    """The stretch of a part, before its update."""
    end = entries[part.last - 1]
    return Run(
        part.first, part.last, entries[part.first].offset, end.offset + end.size, part.updates
    )


def _separate(
    run: Run, rows: Mapping[int, Rows], entries: Sequence[Entry]
) -> tuple[list[tuple[Run, Rows]], list[Run]]:
    """The tensors of a run of which rows came, and what is left of it."""
    if not rows:
        return [], [run]
    taken = [one for one in stretches.singles(run, entries) if one.first in rows]
    some = [(one, rows[one.first]) for one in taken]
    return some, stretches.without([run], taken, entries)


def _coefficients(group: Ruled, run: Run, part: Part, master: str) -> Array:
    """What a kernel takes beside arrays."""
    values = part.values
    if master == "F32" and not (-_LARGEST <= min(values) and max(values) <= _LARGEST):
        with np.errstate(over="ignore"):  # as in torch: a product of hyperparameters may overflow
            h = np.array(values, np.float32)
    else:
        h = np.array(values, NUMPY[master])
    if not run.updates:
        _start_at(group, run, part.lr)
    return h


def _wholes(
    arena: Arena, group: Ruled, taken: Sequence[tuple[Part, Run]], hyper: Mapping[str, Any],
    dtypes: tuple[str, str],
) -> list[Whole]:  # fmt: skip
    """The tensors of some runs, one by one."""
    entries = arena.layout.entries
    state: dict[str, list[Array]] = {}
    for piece in group.pieces(arena.layout):
        state.setdefault(piece.entry.name, []).append(piece.flat)
    found = []
    for part, run in taken:
        for one in stretches.singles(run, entries):
            entry = entries[one.first]
            kept = tuple(state[entry.name])
            found.append(Whole(group, one, entry, kept, hyper, part.lr, part.values, dtypes))
    return found


def _start_at(group: Ruled, run: Run, lr: float) -> None:
    """Fills what begins at the learning rate of a tensor's first update; nobody has read it yet."""
    for slot, array in zip(group.slots, group.state, strict=True):
        if slot.initial is None:
            array[run.lo - group.span.lo : run.hi - group.span.lo] = lr


def perform(
    arena: Arena,
    work: Work,
    before: Array,
    after: Array,
    flat: Array,
    *,
    decay: float | None,
    norms: bool,
) -> Program[Done]:
    """Writes the next parameters and the state; once begun it must come to its end.

    Args:
        arena: Its state, runs and average are updated in place.
        work: As prepared.
        before: The parameters; may be `after` itself.
        after: Receives the new ones.
        flat: The gradient, in layout order.
        decay: Of the average, if one is kept.
        norms: Measure the change and the result.
    """
    some = [step.run for step in work.steps if isinstance(step, Some)]
    if some and before is not after:  # readers hold the one, so the other needs all rows
        yield from together(_copying(some, before, after))
    sized: list[Sized] = []
    for step in work.steps:
        if isinstance(step, Whole):
            thunk = partial(_whole, step, before, after, flat, norms=norms)
            sized.append((_COSTLY * (step.run.hi - step.run.lo), thunk))
        elif isinstance(step, Some):
            sized += _touching(step, after, norms=norms)
        else:
            sized += _running(step, before, after, flat, norms=norms)
    if before is not after:
        sized += _copying(work.kept, before, after)
    results = yield from together(sized)
    changes = [blocks for done in results if done is not None for blocks in done[1]]
    finite = all(done[0] for done in results if done is not None)
    for group, runs in zip(arena.groups, work.runs, strict=True):
        group.runs = runs
    dtype = "F64" if after.dtype == np.float64 else "F32"
    if arena.average is not None and decay is not None:
        yield [
            partial(average.ema, after, arena.average, decay, dtype, lo, hi)
            for lo, hi in cpu.chunks(0, arena.size)
        ]
    if not norms:
        return Done(finite, None, None)
    sums = yield [
        partial(reduce.sumsq, after, dtype, lo, hi) for lo, hi in cpu.chunks(0, arena.size)
    ]
    return Done(finite, _finite(_root(changes)), _finite(_root(sums)))


def _copying(runs: Sequence[Run], before: Array, after: Array) -> list[Sized]:
    return [
        (run.hi - run.lo, partial(np.copyto, after[run.lo : run.hi], before[run.lo : run.hi]))
        for run in runs
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _running(step: Step, before: Array, after: Array, flat: Array, *, norms: bool) -> list[Sized]:
    """The kernel over one run, in chunks; each thunk gives (finite, sums of squared changes)."""
    span = step.group.span
    source = before[span.lo : span.hi]
    target = source if before is after else after[span.lo : span.hi]
    grads = flat[span.lo : span.hi]
    run = _measured if norms else _plain
    return [
        (
            hi - lo,
            partial(run, step.kernel, source, target, grads, step.group.state, step.h, lo, hi),
        )
        for lo, hi in cpu.chunks(step.run.lo - span.lo, step.run.hi - span.lo)
    ]


def _plain(
    kernel: cpu.Kernel, source: Array, target: Array, grads: Array,
    state: tuple[Array, ...], h: Array, lo: int, hi: int,
) -> tuple[bool, list[Array]]:  # fmt: skip
    return kernel(source, target, grads, state, h, lo, hi), []


def _measured(
    kernel: cpu.Kernel, source: Array, target: Array, grads: Array,
    state: tuple[Array, ...], h: Array, lo: int, hi: int,
) -> tuple[bool, list[Array]]:  # fmt: skip
    """Block by block, while what was there before is still in the cache."""
    finite, changes = True, []
    for start in range(lo, hi, reduce.BLOCK):
        end = min(start + reduce.BLOCK, hi)
        was = source[start:end].copy()
        finite &= kernel(source, target, grads, state, h, start, end)
        changes.append(reduce.sumsq_change(target[start:end], was, kernel.master, 0, end - start))
    return finite, changes


def _touching(step: Some, after: Array, *, norms: bool) -> list[Sized]:
    """The kernel over some rows, in parts; each thunk gives (finite, sums of squared changes)."""
    (lo, hi), begin = (step.run.lo, step.run.hi), step.group.span.lo
    state = tuple(array[lo - begin : hi - begin] for array in step.group.state)
    count, width = step.rows.idx.size, step.rows.width
    return [
        (
            by_row.cost(last - first, width),
            partial(_touch, step, after[lo:hi], state, first, last, norms=norms),
        )
        for first, last in by_row.chunks(count, width)
    ]


def _touch(
    step: Some, p: Array, state: tuple[Array, ...], first: int, last: int, *, norms: bool
) -> tuple[bool, list[Array]]:
    _, width, idx, values = step.rows
    if not norms:
        return step.kernel(p, values, state, step.h, idx, width, first, last), []
    table, chosen = p.reshape(-1, width), idx[first:last]
    was = table[chosen].ravel()
    finite = step.kernel(p, values, state, step.h, idx, width, first, last)
    now = table[chosen].ravel()
    return finite, [reduce.sumsq_change(now, was, step.kernel.master, 0, now.size)]


def _whole(
    step: Whole, before: Array, after: Array, flat: Array, *, norms: bool
) -> tuple[bool, list[Array]]:
    """A whole tensor; its gradient is converted into scratch, which the rule may overwrite."""
    lo, hi, (master, grad) = step.run.lo, step.run.hi, step.dtypes
    source = before[lo:hi]
    target = source if before is after else after[lo:hi]
    hyper, rule = step.hyper, step.group.rule.name
    factor, limit, *numbers = step.values
    bound = None if limit == math.inf else limit
    g = tensorwise.gradient(flat[lo:hi], grad, master, hyper, factor, bound)
    was = source.copy() if norms and target is source else source
    finite = tensorwise.step(
        rule, source, target, g, step.state, step.entry.shape, hyper, step.lr, tuple(numbers)
    )
    return finite, [reduce.sumsq_change(target, was, master, 0, hi - lo)] if norms else []
