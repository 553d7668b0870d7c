import re
from pathlib import Path

import pytest
from pydantic import ValidationError

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


def test_an_empty_key_is_no_key():
    assert Settings(api_key="").api_key is None


@pytest.mark.parametrize(
    "bad",
    [
        *({"port": -1}, {"port": 65536}, {"max_versions": 1}, {"max_versions": 65}, {"threads": 0}),
        *({"cors_origins": "example.org"}, {"cors_origins": ("http://a/b",)}, {"log_level": "all"}),
        *({"api_key": "two words"}, {"api_key": "é"}, {"memory_bytes": 5}, {"nope": 1}),
        *({"wait_cap_s": float("nan")}, {"header_timeout_s": 0}, {"keep_alive_s": "x"}),
    ],
)
def test_bad_values_are_refused(bad):
    with pytest.raises(ValidationError):
        Settings(**bad)


def test_settings_are_frozen_and_hide_the_key():
    settings = Settings(api_key="abc")
    with pytest.raises(ValidationError):
        settings.port = 1
    assert "abc" not in repr(settings)


def test_machine_defaults():
    assert 1 <= usable_cores() == Settings().threads
    assert Settings().memory_bytes == usable_memory() > 1 << 20
