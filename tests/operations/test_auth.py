import hmac

import pytest

from service import auth
from service.errors import OriginRefused
from service.settings import Settings

from .calls import SECRET, Site

STEP = "/v1/sessions/s/steps"
FAR = ("10.1.2.3", 4000)
KEY = {"Authorization": f"Bearer {SECRET}"}


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"])
def test_without_a_key_this_machine_is_answered(peer):
    assert Site().call("POST", STEP, client=(peer, 1)).status == 200


@pytest.mark.parametrize(
    "peer", ["10.1.2.3", "8.8.8.8", "::ffff:10.0.0.1", "fe80::1%eth0", "x", ""]
)
def test_without_a_key_other_machines_are_told_what_to_set(peer):
    answer = Site().call("POST", STEP, client=(peer, 1))
    assert (answer.status, answer.slug) == (403, "key-required")
    assert "GRADPOST_API_KEY" in answer.json()["detail"]
    assert "GRADPOST_INSECURE=1" in answer.json()["detail"]


def test_insecure_opens_it():
    assert Site(insecure=True).call("POST", STEP, client=FAR).status == 200


def test_a_unix_socket_peer_is_local_but_a_vanished_tcp_peer_is_not():
    site = Site()
    assert site.call("POST", STEP, client=None, server=("/run/g.sock", None)).status == 200
    assert site.call("POST", STEP, client=None, server=None).status == 200
    assert site.call("POST", STEP, client=None, server=("0.0.0.0", 8000)).slug == "key-required"


@pytest.mark.parametrize(
    "name",
    [
        *("X-Forwarded-For", "Forwarded", "X-Real-Ip", "Via"),
        *("X-Forwarded-Host", "X-Forwarded-Proto", "X-Forwarded-Client-Cert"),
    ],
)
def test_forwarding_headers_never_make_a_caller_local(name):
    site = Site()
    assert site.call("POST", STEP, client=FAR, headers={name: "127.0.0.1"}).status == 403
    # A proxy on this machine speaks for somebody else.
    assert site.call("POST", STEP, headers={name: "127.0.0.1"}).slug == "key-required"


@pytest.mark.parametrize("name", ["Host", "Authorization", "Origin"])
@pytest.mark.parametrize("settings", [{}, {"api_key": SECRET}])
def test_what_decides_is_sent_once(settings, name):
    first = {"Host": "localhost", "Origin": "http://localhost:8000", **KEY}[name]
    for second in (first, "evil.example", ""):
        answer = Site(**settings).call(
            "POST", STEP, headers={**KEY, name: second}, also=((name.lower(), first),)
        )
        assert (answer.status, answer.slug) == (400, "bad-request")
        assert name in answer.json()["detail"]


def test_other_headers_may_be_repeated():
    answer = Site().call("POST", STEP, headers={"Accept": "a/b"}, also=(("accept", "c/d"),))
    assert answer.status == 200


def test_a_key_is_required_from_everyone():
    site = Site(api_key=SECRET)
    for client, server in ((("127.0.0.1", 1), ("127.0.0.1", 8000)), (None, ("/g.sock", None))):
        answer = site.call("POST", STEP, client=client, server=server)
        assert (answer.status, answer.slug) == (401, "key-missing")
        assert answer.header("www-authenticate").startswith("Bearer")
    assert site.call("POST", STEP, headers=KEY, client=FAR).status == 200


@pytest.mark.parametrize("value", ["Basic abc", "Bearer", "Bearer ", SECRET, ""])
def test_no_bearer_key_is_a_missing_key(value):
    answer = Site(api_key=SECRET).call("POST", STEP, headers={"Authorization": value})
    assert answer.slug == "key-missing"


@pytest.mark.parametrize(
    "value", ["x", SECRET[:-1], SECRET + "x", SECRET.upper(), "\xe9\xff", "a" * 9000]
)
def test_a_wrong_key_is_403(value):
    site = Site(api_key=SECRET)
    answer = site.call("POST", STEP, headers={"Authorization": f"Bearer {value}"})
    assert (answer.status, answer.slug) == (403, "key-wrong")
    assert SECRET not in answer.body.decode()


def test_the_scheme_is_case_insensitive():
    site = Site(api_key=SECRET)
    assert site.call("POST", STEP, headers={"Authorization": f"bearer {SECRET}"}).status == 200


def test_keys_are_compared_in_constant_time(monkeypatch):
    seen = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: seen.append((a, b)) or a == b)
    Site(api_key=SECRET).call("POST", STEP, headers=KEY)
    assert seen == [(SECRET.encode(), SECRET.encode())]


def test_health_needs_no_key_but_metrics_and_docs_do():
    site = Site(api_key=SECRET)
    assert site.call("GET", "/health/live", client=FAR).status == 200
    assert site.call("GET", "/health/ready", client=FAR).status == 200
    for path in ("/metrics", "/v1/server", "/openapi.json", "/health", "/nothing"):
        assert site.call("GET", path, client=FAR).status == 401


@pytest.mark.parametrize(
    "origin",
    [
        *("http://evil.example", "null", "http://127.0.0.1:3000", "https://127.0.0.1:8000"),
        *("http://127.0.0.1", "file://", "", "http://[::bad", "http://127.0.0.1:99999999"),
    ],
)
def test_foreign_origins_are_refused(origin):
    # https on the same port is let through: TLS may end at a proxy before us.
    answer = Site().call("POST", STEP, headers={"Origin": origin})
    expected = 200 if origin == "https://127.0.0.1:8000" else 403
    assert answer.status == expected
    if expected == 403:
        assert answer.slug == "origin-refused"
        assert answer.header("access-control-allow-origin") is None


def test_a_foreign_origin_is_refused_even_with_the_key():
    headers = {**KEY, "Origin": "http://evil.example"}
    assert Site(api_key=SECRET).call("POST", STEP, headers=headers).slug == "origin-refused"


def test_our_own_origin_passes_without_cors_headers():
    answer = Site().call("POST", STEP, headers={"Origin": "http://127.0.0.1:8000"})
    assert answer.status == 200
    assert answer.header("access-control-allow-origin") is None


def test_a_named_origin_gets_cors_headers_also_on_a_refusal():
    site = Site(cors_origins=("https://app.example",), api_key=SECRET)
    headers = {"Origin": "https://app.example"}
    for answer in (
        site.call("POST", STEP, headers={**headers, **KEY}),
        site.call("POST", STEP, headers=headers),
    ):
        assert answer.header("access-control-allow-origin") == "https://app.example"
        assert answer.header("vary") == "Origin"
        assert "Gradpost-Version" in answer.header("access-control-expose-headers")
    assert answer.slug == "key-missing"


def test_a_preflight_is_answered_without_a_key():
    site = Site(cors_origins=("https://app.example",), api_key=SECRET)
    headers = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    answer = site.call("OPTIONS", STEP, headers=headers)
    assert answer.status == 204
    methods = answer.header("access-control-allow-methods").split(", ")
    assert methods == ["GET", "POST", "PUT", "PATCH", "DELETE"]  # HEAD is 405
    assert "Authorization" in answer.header("access-control-allow-headers")
    headers["Origin"] = "https://evil.example"
    assert site.call("OPTIONS", STEP, headers=headers).slug == "origin-refused"


def test_a_star_allows_every_origin():
    answer = Site(cors_origins=("*",)).call("POST", STEP, headers={"Origin": "null"})
    assert answer.header("access-control-allow-origin") == "null"


@pytest.mark.parametrize(
    "host",
    [
        *(
            "127.0.0.1:8000",
            "localhost:8000",
            "LOCALHOST",
            "[::1]:8000",
            "192.168.1.2",
            "gpu7:8000",
        ),
        *("a.localhost", "box.local", ""),
    ],
)
def test_hosts_that_no_stranger_can_own_pass(host):
    assert Site().call("POST", STEP, headers={"Host": host}).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:8000", "e.vil:999999", "a.b."]
)
def test_a_rebound_name_is_refused_where_only_the_address_guards(host):
    headers = {"Host": host, "Origin": f"http://{host}"}
    assert Site().call("POST", STEP, headers=headers).slug == "origin-refused"
    assert Site().call("POST", STEP, headers={"Host": host}).slug == "origin-refused"
    assert Site(api_key=SECRET).call("POST", STEP, headers={"Host": host, **KEY}).status == 200
    assert Site(insecure=True).call("POST", STEP, headers={"Host": host}).status == 200


def test_the_configured_host_name_passes():
    settings = Settings(host="train.example.org")
    auth.check_host(settings, {b"host": b"train.example.org:8000"})
    with pytest.raises(OriginRefused):
        auth.check_host(settings, {b"host": b"other.example.org:8000"})
