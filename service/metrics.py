"""What is counted, in prometheus-client's terms; each application has a registry of its own."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_BUCKETS_S = (
    *(1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3),
    *(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
_ROUND_BUCKETS_S = (1e-3, 0.01, 0.1, 0.5, 1.0, 5.0, 30.0, 60.0, 300.0, 1800.0, 3600.0, 86_400.0)
_VERSIONS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)
# A label must not grow with what strangers send.
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class _Route:
    """The children of one method, route and status, looked up once instead of on each request."""

    __slots__ = ("received", "requests", "seconds", "sent")

    def __init__(self, metrics: "Metrics", method: str, route: str, status: int) -> None:
        self.requests = metrics.requests.labels(method, route, str(status))
        self.received = metrics.received.labels(method, route)
        self.sent = metrics.sent.labels(method, route)
        self.seconds = metrics.seconds.labels(method, route)


class Metrics:
    """The server's metrics; every method may be called from any thread."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        route = ("method", "route")
        self.requests = Counter(
            "gradpost_requests", "Requests answered.", (*route, "status"), registry=registry
        )
        self.received = Counter(
            "gradpost_received_bytes", "Body bytes received.", route, registry=registry
        )
        self.sent = Counter("gradpost_sent_bytes", "Body bytes sent.", route, registry=registry)
        self.seconds = Histogram(
            "gradpost_request_seconds",
            "Seconds from headers to the end of the answer.",
            route,
            registry=registry,
            buckets=_BUCKETS_S,
        )
        self.refusals = Counter(
            "gradpost_refusals",
            "Refused requests by problem type.",
            ("problem",),
            registry=registry,
        )
        self.steps = Counter("gradpost_steps", "Optimizer steps applied.", registry=registry)
        self.step_seconds = Histogram(
            "gradpost_step_seconds",
            "Seconds a step ran in its lane.",
            registry=registry,
            buckets=_BUCKETS_S,
        )
        self.queue_seconds = Histogram(
            "gradpost_queue_seconds",
            "Seconds a step waited for its lane.",
            registry=registry,
            buckets=_BUCKETS_S,
        )
        self.replays = Counter(
            "gradpost_replays", "Repeated pushes answered from the ledger.", registry=registry
        )
        self.skips = Counter(
            "gradpost_skipped_steps", "Pushes skipped as not finite.", registry=registry
        )
        self.nonfinite = Counter(
            "gradpost_nonfinite_params_steps",
            "Steps after which a parameter was not finite.",
            registry=registry,
        )
        self.rounds = Counter(
            "gradpost_rounds", "Rounds that ended, by how.", ("outcome",), registry=registry
        )
        self.round_seconds = Histogram(
            "gradpost_round_seconds",
            "Seconds from the first contribution of a round to its end.",
            registry=registry,
            buckets=_ROUND_BUCKETS_S,
        )
        self.lateness = Histogram(
            "gradpost_lateness_seconds",
            "Seconds by which a contribution came behind the first of its round.",
            registry=registry,
            buckets=_ROUND_BUCKETS_S,
        )
        self.staleness = Histogram(
            "gradpost_staleness_versions",
            "Versions by which the gradient of an applied push was behind.",
            registry=registry,
            buckets=_VERSIONS,
        )
        self._live = Gauge(
            "gradpost_live_workers", "Workers whose lease holds, over all sessions.",
            registry=registry,
        )  # fmt: skip
        self._waiting = Gauge(
            "gradpost_waiting_pushes", "Pushes whose answer waits for other workers.",
            registry=registry,
        )  # fmt: skip
        self._sessions = Gauge("gradpost_sessions", "Sessions alive.", registry=registry)
        self._reserved = Gauge(
            "gradpost_memory_reserved_bytes", "Bytes of the budget in use.", registry=registry
        )
        self._total = Gauge(
            "gradpost_memory_budget_bytes", "Bytes of the whole budget.", registry=registry
        )
        self._routes: dict[tuple[str, str, int], _Route] = {}

    def watch(
        self, sessions: Callable[[], int], reserved: Callable[[], int], total: Callable[[], int]
    ) -> None:
        """Names the functions that are asked at each scrape for the three gauges."""
        self._sessions.set_function(sessions)
        self._reserved.set_function(reserved)
        self._total.set_function(total)

    def watch_workers(self, live: Callable[[], int], waiting: Callable[[], int]) -> None:
        """Names the functions that are asked at each scrape for the gauges of workers."""
        self._live.set_function(live)
        self._waiting.set_function(waiting)

    def observe_request(
        self, method: str, route: str, status: int, received: int, sent: int, seconds: float
    ) -> None:
        """Counts one answered request. `route` is a template, never a path."""
        if method not in _METHODS:
            method = "OTHER"
        key = (method, route, status)
        found = self._routes.get(key)
        if found is None:
            found = self._routes[key] = _Route(self, *key)
        found.requests.inc()
        if received:
            found.received.inc(received)
        if sent:
            found.sent.inc(sent)
        found.seconds.observe(seconds)

    def observe_step(self, queue_s: float, step_s: float) -> None:
        """Counts one applied step."""
        self.steps.inc()
        self.queue_seconds.observe(queue_s)
        self.step_seconds.observe(step_s)

    def observe_staleness(self, versions: int) -> None:
        """Takes in how far behind the gradient of an applied push was."""
        self.staleness.observe(versions)

    def observe_lateness(self, seconds: float) -> None:
        """Takes in by how much a contribution came behind the first of its round."""
        self.lateness.observe(seconds)

    def round_ended(self, outcome: str, seconds: float) -> None:
        """Counts a round: applied, skipped or abandoned, after so many seconds."""
        self.rounds.labels(outcome).inc()
        self.round_seconds.observe(max(0.0, seconds))

    def replay(self) -> None:
        """Counts a repeated push that was answered from the ledger."""
        self.replays.inc()

    def refusal(self, slug: str) -> None:
        """Counts a refusal by its problem type."""
        self.refusals.labels(slug).inc()

    def skipped(self) -> None:
        """Counts a push that was skipped because its gradient was not finite."""
        self.skips.inc()

    def nonfinite_params(self) -> None:
        """Counts a step that left a parameter infinite or NaN."""
        self.nonfinite.inc()

    def render(self) -> bytes:
        """The exposition text that a scrape gets."""
        return generate_latest(self.registry)
