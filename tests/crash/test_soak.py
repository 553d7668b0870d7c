"""`make soak` for a few seconds: worker processes and the server are killed at random."""

from tests.crash.soak import SESSIONS, Soak

SECONDS, WORKERS = 8, 12


def test_no_push_is_lost_when_workers_and_the_server_die(fleet, reference, scratch):
    report = Soak(fleet, scratch, WORKERS, seed=1).run(SECONDS, reference)
    found = [*map(str, report.violations[:20]), fleet.said()]
    assert not report.violations, "\n".join(found)
    servers, workers = report.kills
    assert servers
    assert workers
    for view in report.views:
        assert sum(fate.summary["applied"] for fate in view.applied) > 3, report
    assert len(report.views) == len(SESSIONS)
    assert report.repeats.total() > 20, report
    print(f"\n{report}")
