"""kill -9 at every named point, under load, over real sockets: no push is lost, none doubled.

`make crash` does the same a thousand times.
"""

import subprocess
import sys

from tests.crash.campaign import Campaign
from tests.crash.fleet import ROOT
from tests.crash.points import RUN
from tests.crash.table import Table

LEAST, MOST = 60, 190


def test_one_history_survives_a_kill_at_every_point(fleet, reference, plan, scratch):
    """The same folder all along; looked at after each kill, compared bit by bit at the end."""
    with Campaign(fleet, scratch / "data", plan, seed=1) as campaign:
        campaign.begin()
        campaign.stop(1.0)
        while (plan.missing and campaign.kills < MOST) or campaign.kills < LEAST:
            campaign.kill(plan.next())
        report = campaign.finish(reference)
    table = Table()
    table.add(report)
    found = [*map(str, report.violations[:50]), fleet.said()]
    assert not report.violations, "\n".join(found)
    assert not [point for point in plan.missing if point.startswith(RUN)]
    assert all(plan.kills[point] for point in plan.first)
    assert report.pushes > 10 * LEAST, table
    check = [sys.executable, "-m", "service", "check", "--data-dir", scratch / "data"]
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done
    print(f"\n{table}\n{report.pushes} pushes in {report.seconds:.0f} s")
