"""Kills servers by the hundred, and says what was lost: `make crash`.

    python -m tests.crash.run --kills 1200 --seed 1

Each history has a data folder of its own and goes on over up to 150 kills; by turns it is one of
sessions that apply each push, and one of sessions with rounds or a bound. The table goes into
docs/reliability.md, between its two marks, and the exit status is 1 if there was any violation.
"""

import argparse
import shutil
import sys
import time
from itertools import cycle
from pathlib import Path

from tests.crash.campaign import ASYNC, ROUNDS, Campaign, reference_server, survey
from tests.crash.fleet import ROOT, Fleet
from tests.crash.plan import Plan
from tests.crash.table import Table, replaced
from tests.storage.counter import Scratch

PAGE = ROOT / "docs" / "reliability.md"
IN_ONE = 150


def main(arguments=None):
    options = parser().parse_args(arguments)
    if options.page.exists():
        replaced(options.page.read_text(), "")  # now, not after a quarter of an hour
    table, bad, began = Table(), 0, time.monotonic()
    pushes = 0
    with Scratch() as folder, Fleet(folder) as fleet, reference_server(fleet) as reference:
        plans = [(cast, Plan(options.seed)) for cast in casts(options.only)]
        for number, (_, plan) in enumerate(plans):
            survey(fleet, folder / f"survey-{number}", plan)
        turns = cycle(plans)
        while table.kills < options.kills:
            turn = f"{options.seed}.{table.kills}"
            cast, plan = next(turns)
            done = table.kills
            report = history(fleet, folder / turn, cast, plan, turn, reference, options, done)
            table.add(report)
            pushes += report.pushes
            for violation in report.violations[:20]:
                print(violation, file=sys.stderr)
            bad += len(report.violations)
            seconds = time.monotonic() - began
            print(f"{table.kills} kills, {pushes} pushes, {bad} violations, {seconds:.0f} s")
            if bad and options.keep:
                shutil.copytree(folder, options.keep)
                events = "\n".join(map(str, report.events))
                (options.keep / "history.txt").write_text(events)
                break
    print(table)
    if options.page.exists():
        options.page.write_text(replaced(options.page.read_text(), table))
    return 1 if bad else 0


def casts(only):
    """Who takes turns."""
    return {None: (ASYNC, ROUNDS), "async": (ASYNC,), "rounds": (ROUNDS,)}[only]


def history(fleet, folder, cast, plan, seed, reference, options, done):
    """One campaign; the very first one begins with kills where there is nothing yet."""
    given = {"forget": options.forget, "wait_cap": 2 if cast is ROUNDS else None}
    with Campaign(fleet, folder, plan, seed, cast, **given) as campaign:
        if not done:
            campaign.begin()
        campaign.stop(1.0)
        while campaign.kills < min(IN_ONE, options.kills - done):
            campaign.kill(plan.next())
        return campaign.finish(reference)


def parser():
    made = argparse.ArgumentParser(prog="python -m tests.crash.run")
    made.add_argument("--kills", type=int, default=1200)
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--only", choices=("async", "rounds"), help="sessions of one kind")
    made.add_argument("--page", type=Path, default=PAGE, help="where the table goes, if it exists")
    made.add_argument("--keep", type=Path, help="where the folder goes when something is wrong")
    made.add_argument("--forget", type=int, default=0, help="a disk that lies: see points.py")
    return made


if __name__ == "__main__":
    sys.exit(main())
