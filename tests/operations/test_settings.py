import dataclasses
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from gradpost.protocol import MAX_HEADER_BYTES
from kernels.registry import RULES
from service.__main__ import configuration
from service.limits import LIMITS, table
from service.settings import Settings, usable_cores, usable_memory

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| `(GRADPOST_[A-Z_]+)` \| (.*?) \| (.*?) \| (.*?) \|$", re.M)
# What the machine decides is documented in words.
COMPUTED = {"threads": "cores", "memory_bytes": "80 %"}


def rows():
    return {
        m[1]: m.groups()[1:] for m in ROW.finditer((ROOT / "docs/configuration.md").read_text())
    }


def unit(name):
    for suffix, word in (("_bytes_per_s", "bytes/s"), ("_s", "s"), ("_bytes", "bytes")):
        if name.endswith(suffix):
            return word
    return None


def test_every_setting_is_documented_and_no_other():
    assert set(rows()) == {"GRADPOST_" + name.upper() for name in Settings.model_fields}


@pytest.mark.parametrize("name", Settings.model_fields)
def test_the_documented_default_unit_and_meaning_are_the_real_ones(name):
    field = Settings.model_fields[name]
    default, shown_unit, meaning = rows()["GRADPOST_" + name.upper()]
    if name in COMPUTED:
        assert COMPUTED[name] in default
    else:
        value = field.default
        if isinstance(value, tuple):
            value = ",".join(value)
        text = {None: "none", "": "none", True: "1", False: "0"}.get(value, str(value))
        if isinstance(value, float) and value.is_integer():
            text = str(int(value))
        if isinstance(value, int) and not isinstance(value, bool):
            text = str(value)
        assert default == f"`{text}`"
    if unit(name):
        assert shown_unit == unit(name)
    assert meaning.startswith(field.description)


def test_every_field_has_a_description_and_numbers_have_bounds():
    for name, field in Settings.model_fields.items():
        assert field.description, name
        if field.annotation in (int, float):
            assert field.metadata, name


def test_every_limit_stands_in_one_documented_table():
    text = (ROOT / "docs/operations.md").read_text()
    shown = re.findall(r"^\| `([a-z_]+)` \|", text.split("## Limits")[1], re.M)
    assert shown == list(LIMITS)
    assert list(table(Settings())) == list(LIMITS)
    bounding = {n for n in Settings.model_fields if n.startswith("max_") or unit(n)}
    assert bounding <= set(LIMITS)


def test_environment(monkeypatch):
    monkeypatch.setenv("GRADPOST_PORT", "9001")
    monkeypatch.setenv("GRADPOST_CORS_ORIGINS", "http://a.example, https://b.example:8443")
    monkeypatch.setenv("GRADPOST_WARM_RULES", "")
    monkeypatch.setenv("GRADPOST_INSECURE", "1")
    settings = Settings()
    assert settings.port == 9001
    assert settings.cors_origins == ("http://a.example", "https://b.example:8443")
    assert settings.warm_rules == ()
    assert settings.insecure is True


def test_the_connection_gets_its_limits():
    given = {"head_bytes": 2048, "max_connections": 7, "body_min_bytes_per_s": 5.0}
    limits = configuration(None, Settings(**given)).http.limits
    assert {name: getattr(limits, name) for name in given} == given


def test_an_empty_key_is_no_key():
    assert Settings(api_key="").api_key is None


@pytest.mark.parametrize(
    "bad",
    [
        *({"port": -1}, {"port": 65536}, {"max_versions": 1}, {"max_versions": 65}, {"threads": 0}),
        *({"cors_origins": "example.org"}, {"cors_origins": ("http://a/b",)}, {"log_level": "all"}),
        *({"api_key": "two words"}, {"api_key": "é"}, {"memory_bytes": 5}, {"nope": 1}),
        *({"wait_cap_s": float("nan")}, {"header_timeout_s": 0}, {"keep_alive_s": "x"}),
        # 0 made a plain pull a 409 whenever all versions were held; the header is the protocol's.
        *({"wait_cap_s": 0}, {"max_header_bytes": 1 << 20}, {"warm_rules": "adam,adm"}),
    ],
)
def test_bad_values_are_refused(bad):
    with pytest.raises(ValidationError):
        Settings(**bad)


@pytest.mark.parametrize(
    ("given", "advice"),
    [("adm", "did you mean 'adam'?"), ("sgd, Adamw", "did you mean 'adamw'?"), ("?", "known: sgd")],
)
def test_a_misspelt_warm_rule_is_refused_with_the_nearest(given, advice):
    with pytest.raises(ValidationError, match=re.escape(advice)):
        Settings(warm_rules=given)


def test_every_rule_can_be_warmed():
    assert Settings(warm_rules=",".join(RULES)).warm_rules == tuple(RULES)


def test_every_limit_of_a_connection_is_a_setting_that_reaches_it():
    chosen = {"header_timeout_s": 1.5, "body_idle_timeout_s": 2.5, "body_min_bytes_per_s": 3.0,
              "reader_idle_timeout_s": 4.5, "reader_min_bytes_per_s": 5.0, "drain_timeout_s": 6.5,
              "drain_bytes": 7, "head_bytes": 2048, "max_connections": 8}  # fmt: skip
    protocol = configuration(None, Settings(**chosen)).http
    assert dataclasses.asdict(protocol.limits) == chosen


def test_what_the_protocol_fixes_is_told_as_a_limit_and_is_no_setting():
    assert table(Settings())["max_header_bytes"] == MAX_HEADER_BYTES
    assert "max_header_bytes" not in Settings.model_fields


def test_settings_are_frozen_and_hide_the_key():
    settings = Settings(api_key="abc")
    with pytest.raises(ValidationError):
        settings.port = 1
    assert "abc" not in repr(settings)


def test_machine_defaults():
    assert 1 <= usable_cores() == Settings().threads
    assert Settings().memory_bytes == usable_memory() > 1 << 20
