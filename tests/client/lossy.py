"""A transport on which requests, or the answers to them, get lost."""

from gradpost import TransportError


class Lossy:
    """Delivers requests, except those it was told to lose.

    Attributes:
        sent: (method, path, headers) of every attempt.
        before: Called with the method before each request goes out.
        after: Called after each loss, where other workers do what they do meanwhile.
    """

    def __init__(self, transport):
        self._transport = transport
        self._method = ""
        self._losses = 0
        self._deliver = True
        self._error = None
        self._inside = False
        self.sent = []
        self.before = lambda method: None
        self.after = lambda: None

    def lose(self, method, count=1, *, deliver=True, error=TransportError):
        """The next `count` requests of a method: whether they arrive, and how it ends."""
        self._method, self._losses = method, count
        self._deliver, self._error = deliver, error

    def heal(self):
        self._losses = 0

    def request(self, method, path, headers, *arguments):
        self.sent.append((method, path, dict(headers)))
        self._meanwhile(lambda: self.before(method))
        lost = method == self._method and self._losses > 0
        if not lost:
            return self._transport.request(method, path, headers, *arguments)
        self._losses -= 1
        if self._deliver:
            self._transport.request(method, path, headers, *arguments).release()
        self._meanwhile(self.after)
        raise self._error("It was lost.")

    def paths(self, method):
        return [path for sent, path, _ in self.sent if sent == method]

    def close(self):
        pass

    def _meanwhile(self, call):
        if not self._inside:  # what is called may use this transport, and is not disturbed
            self._inside = True
            try:
                call()
            finally:
                self._inside = False
