"""Profiles, the catalog file and the environment: what is taken, and what is refused with help."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from worker.config import (
    CONFIGS,
    KEY_NAMES,
    AdapterEntry,
    GatewayPlace,
    ModelEntry,
    Profile,
    Section,
    Settings,
    Source,
    check_exposure,
    find_profile,
    load_settings,
    parse_size,
    profile_names,
    read_keys,
    state_dir,
)
from worker.errors import ConfigError

CATALOG = """
[[models]]
id = "chat-a"
kind = "chat"
path = "a"

[[models]]
id = "chat-b"
kind = "chat"
path = "b"
path_env = "CHAT_B_PATH"
aliases = ["bee"]
"""


class Configs:
    """A folder of profiles with a catalog, and how to load one."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.write("models", CATALOG)

    def write(self, name: str, text: str) -> Path:
        path = self.folder / f"{name}.toml"
        path.write_text(text, "utf-8")
        return path

    def load(self, text: str = "", env: dict[str, str] | None = None) -> Settings:
        self.write("mine", text)
        return load_settings("mine", env or {}, self.folder)

    def refusal(self, text: str = "", env: dict[str, str] | None = None) -> str:
        with pytest.raises(ConfigError) as caught:
            self.load(text, env)
        return str(caught.value)


@pytest.fixture
def configs(tmp_path: Path) -> Configs:
    return Configs(tmp_path)


# --- what is shipped ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", profile_names())
def test_every_shipped_profile_loads(name: str) -> None:
    settings = load_settings(name, {})

    assert settings.profile_name == name
    assert settings.models


def test_the_demo_profile_is_shipped_and_the_catalog_is_no_profile() -> None:
    names = profile_names()

    assert "demo" in names
    assert "models" not in names


def _sections() -> list[tuple[str, str]]:
    """(section, key) of every table of a profile but [[models]]."""
    return [
        (section, key)
        for section, field in Profile.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        for key in field.annotation.model_fields
    ]


@pytest.mark.parametrize(("section", "key"), _sections())
def test_the_demo_profile_shows_every_key(section: str, key: str) -> None:
    shown = tomllib.loads((CONFIGS / "demo.toml").read_text("utf-8"))

    assert key in shown[section]


@pytest.mark.parametrize(("section", "key"), _sections())
def test_the_demo_profile_tells_the_default_that_a_key_really_has(section: str, key: str) -> None:
    default = getattr(getattr(Profile(), section), key)

    told = _told_default(section, key)

    if isinstance(default, list) or default is None:
        assert told  # in words
    elif isinstance(default, bool):
        assert told == str(default).lower()
    elif isinstance(default, str):
        assert told == default
    else:
        number = parse_size(told) if "iB" in told else float(told)
        assert number == default


def _told_default(section: str, key: str) -> str:
    """What the comment at a key of demo.toml, or right above it, calls its default."""
    lines = (CONFIGS / "demo.toml").read_text("utf-8").splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith(f"[{section}]"))
    at = next(
        number for number in range(begin, len(lines)) if re.match(rf"{key}\s*=", lines[number])
    )
    comment = lines[at].partition("#")[2]
    while lines[at - 1].startswith("#"):
        at -= 1
        comment = f"{lines[at].lstrip('# ')} {comment}"
    match = re.search(r'[Dd]efault:? (?:"([^"]+)"|([\w.]*\w))', comment)
    assert match is not None, f"[{section}] {key}: its comment tells no default"
    return match[1] or match[2]


@pytest.mark.parametrize("key", [*ModelEntry.model_fields, *Source.model_fields])
def test_the_shipped_files_show_every_key_of_a_model(key: str) -> None:
    text = "".join((CONFIGS / name).read_text("utf-8") for name in ("demo.toml", "models.toml"))

    assert re.search(rf"^(# )?{key}\s|^\[models\.(source\.)?{key}\]", text, re.MULTILINE)


@pytest.mark.parametrize("key", AdapterEntry.model_fields)
def test_the_shipped_catalog_shows_every_key_of_an_adapter(key: str) -> None:
    text = (CONFIGS / "models.toml").read_text("utf-8")
    _, _, text = text.partition("# [[adapters]]")

    assert re.search(rf"^{key}\s|^\[adapters\.{key}\]", text, re.MULTILINE)


# --- refusals that help ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown", "nearest"),
    [
        ("[server]\nchat_prot = 1", "server.chat_prot", "chat_port"),
        ("[sever]\nhost = '::'", "sever", "server"),
        ("[limits]\nimages_pixels = 1", "limits.images_pixels", "image_pixels"),
        (
            "[[models]]\nid = 'x'\nkind = 'chat'\npath = 'x'\nalias = ['y']",
            "models.0.alias",
            "aliases",
        ),
        (
            "[[models]]\nid = 'x'\nkind = 'chat'\npath = 'x'\n"
            "[models.source]\nrepository = 'a/b'\nrevison = 'main'",
            "models.0.source.revison",
            "revision",
        ),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(
    configs: Configs, text: str, shown: str, nearest: str
) -> None:
    said = configs.refusal(text)

    assert said == f"{configs.folder}/mine.toml: {shown} is not a key; did you mean {nearest}?"


def test_an_unknown_key_that_is_like_no_other_is_refused_with_all_known_ones(
    configs: Configs,
) -> None:
    said = configs.refusal("[access]\nzzz = 1")

    assert "access.zzz is not a key; known: keyless_inference" in said


def test_every_wrong_key_of_a_file_is_told_at_once(configs: Configs) -> None:
    said = configs.refusal("[server]\nchat_port = 0\n[limits]\nstepz = 1")

    assert len(said.splitlines()) == 2


@pytest.mark.parametrize("value", ["4194304", '"4194304"', '"4 MB"', '"-1MiB"', '"MiB"', "true"])
def test_a_size_without_a_unit_is_refused_with_an_example(configs: Configs, value: str) -> None:
    said = configs.refusal(f"[limits]\nbody_bytes = {value}")

    assert "limits.body_bytes" in said
    assert '"512MiB"' in said


@pytest.mark.parametrize(
    ("text", "size"),
    [("512B", 512), ("4KiB", 4096), ("1.5MiB", 3 << 19), ("22 GiB", 22 << 30), ("0B", 0)],
)
def test_a_size_with_a_unit_is_its_bytes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        '[server]\nchat_port = "7861"',
        "[access]\nkeyless_inference = 1",
        "[limits]\nsteps = 10.0",
        "[chat]\ndeadline_s = '85'",
        "[daemon]\ndevice = 'gpu'",
        "[daemon]\ngrace_s = -1",
        "[media]\nkeep_finished = 0",
        "[[models]]\nid = 'x'\nkind = 'sdxl'\npath = ''",
        "[[models]]\nid = 'x'\nkind = 'sdxl'\npath = 'x'\nchat_template = 'chatml'",
        "[[models]]\nid = 'x'\nkind = 'sdxl'\npath = 'x'\ndefault_size = '1024'",
        "[[models]]\nid = 'has a space'\nkind = 'chat'\npath = 'x'",
        "[[models]]\nid = 'x'\nkind = 'audio'\npath = 'x'",
        "[[models]]\nid = 'x'\nkind = 'chat'",
    ],
)
def test_a_value_of_a_wrong_type_or_amount_is_refused_with_its_file(
    configs: Configs, text: str
) -> None:
    said = configs.refusal(text)

    assert said.startswith(f"{configs.folder}/mine.toml: ")


def test_whole_seconds_are_seconds(configs: Configs) -> None:
    settings = configs.load("[chat]\ndeadline_s = 85\n[daemon]\ngrace_s = 5")

    assert (settings.chat.deadline_s, settings.daemon.grace_s) == (85.0, 5.0)


@pytest.mark.parametrize("text", ["[server", "a = 1\na = 2"])
def test_a_file_that_is_no_toml_is_refused_with_its_path(configs: Configs, text: str) -> None:
    said = configs.refusal(text)

    assert said.startswith(f"{configs.folder}/mine.toml: ")


def test_a_damaged_catalog_is_refused_with_its_path(configs: Configs) -> None:
    configs.write("models", "[[models]]\nid = 'x'")

    said = configs.refusal()

    assert said.startswith(f"{configs.folder}/models.toml: ")


def test_settings_cannot_be_changed(configs: Configs) -> None:
    settings = configs.load()

    with pytest.raises(ValueError, match="frozen"):
        settings.server.chat_port = 1
    with pytest.raises(ValueError, match="frozen"):
        settings.state_dir = Path("elsewhere")


# --- ports -------------------------------------------------------------------------------------


def test_ports_come_from_the_environment_first(configs: Configs) -> None:
    env = {"VERBATIM_CHAT_PORT": "9001", "VERBATIM_MEDIA_PORT": "9002"}

    settings = configs.load("[server]\nchat_port = 8001\nmedia_port = 8002", env)

    assert (settings.server.chat_port, settings.server.media_port) == (9001, 9002)


def test_an_empty_port_variable_is_as_good_as_none(configs: Configs) -> None:
    settings = configs.load("[server]\nchat_port = 8001", {"VERBATIM_CHAT_PORT": ""})

    assert settings.server.chat_port == 8001


@pytest.mark.parametrize("raw", ["http", "0", "65536", "-1", "7861.5", " "])
def test_a_port_variable_that_is_no_port_is_refused_by_its_name(configs: Configs, raw: str) -> None:
    said = configs.refusal(env={"VERBATIM_MEDIA_PORT": raw})

    assert "VERBATIM_MEDIA_PORT" in said
    assert "1 to 65535" in said


def test_one_port_for_both_is_refused(configs: Configs) -> None:
    said = configs.refusal("[server]\nchat_port = 8000\nmedia_port = 8000")

    assert "chat_port and media_port are both 8000" in said


def test_one_port_for_both_by_the_environment_is_refused(configs: Configs) -> None:
    said = configs.refusal(env={"VERBATIM_CHAT_PORT": "7860"})

    assert "chat_port and media_port are both 7860" in said


def test_the_environment_may_swap_the_two_ports(configs: Configs) -> None:
    env = {"VERBATIM_CHAT_PORT": "7860", "VERBATIM_MEDIA_PORT": "7861"}

    settings = configs.load(env=env)

    assert (settings.server.chat_port, settings.server.media_port) == (7860, 7861)


# --- who may listen where ----------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_this_machine_needs_no_key(configs: Configs, host: str) -> None:
    settings = configs.load(f"[server]\nhost = '{host}'")

    check_exposure(settings, ())

    assert settings.server.is_loopback


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "worker.example.org", ""])
def test_a_host_that_others_reach_is_refused_without_a_key(configs: Configs, host: str) -> None:
    settings = configs.load(f"[server]\nhost = '{host}'")

    with pytest.raises(ConfigError) as caught:
        check_exposure(settings, ())

    assert all(name in str(caught.value) for name in KEY_NAMES)


def test_a_host_that_others_reach_is_accepted_with_a_key(configs: Configs) -> None:
    settings = configs.load("[server]\nhost = '0.0.0.0'")

    check_exposure(settings, ("a key",))

    assert not settings.server.is_loopback


def test_keys_are_read_from_every_name_and_given_once() -> None:
    env = {KEY_NAMES[2]: "third", KEY_NAMES[0]: "first", KEY_NAMES[1]: "first", "OTHER": "no"}

    assert read_keys(env) == ("first", "third")


@pytest.mark.parametrize("blank", ["", " ", "\n"])
def test_a_blank_key_is_no_key(blank: str) -> None:
    assert read_keys(dict.fromkeys(KEY_NAMES, blank)) == ()


def test_settings_hold_no_keys(configs: Configs) -> None:
    settings = configs.load(env={KEY_NAMES[0]: "very-secret"})

    assert "very-secret" not in repr(settings)


# --- models of the catalog and of the profile --------------------------------------------------


def _ids(settings: Settings) -> list[str]:
    return [entry.id for entry in settings.models]


def _entry(settings: Settings, model_id: str) -> ModelEntry:
    return next(entry for entry in settings.models if entry.id == model_id)


def test_models_of_a_profile_extend_the_catalog(configs: Configs) -> None:
    settings = configs.load("[[models]]\nid = 'mine'\nkind = 'wan'\npath = 'm'")

    assert _ids(settings) == ["chat-a", "chat-b", "mine"]
    assert settings.declared_ids == ("mine",)


def test_a_model_of_a_profile_replaces_the_whole_entry_of_its_id(configs: Configs) -> None:
    settings = configs.load("[[models]]\nid = 'chat-b'\nkind = 'chat'\npath = 'other'")

    assert sorted(_ids(settings)) == ["chat-a", "chat-b"]
    assert _entry(settings, "chat-b").path == "other"
    assert _entry(settings, "chat-b").aliases == []


def test_the_profiles_own_models_come_last_and_in_its_own_order(configs: Configs) -> None:
    settings = configs.load(
        "[[models]]\nid = 'chat-b'\nkind = 'chat'\npath = 'b'\n"
        "[[models]]\nid = 'chat-a'\nkind = 'chat'\npath = 'a'"
    )

    assert _ids(settings) == ["chat-b", "chat-a"]


def test_one_id_twice_in_a_profile_is_refused(configs: Configs) -> None:
    twice = "[[models]]\nid = 'mine'\nkind = 'chat'\npath = 'm'\n" * 2

    said = configs.refusal(twice)

    assert said == f"{configs.folder}/mine.toml: model id mine is declared twice"


def test_one_id_twice_in_the_catalog_is_refused(configs: Configs) -> None:
    configs.write("models", CATALOG + CATALOG)

    said = configs.refusal()

    assert said == f"{configs.folder}/models.toml: model id chat-a is declared twice"


def test_a_models_path_comes_from_its_variable_first(configs: Configs) -> None:
    settings = configs.load(env={"CHAT_B_PATH": "/elsewhere/b"})

    assert _entry(settings, "chat-b").path == "/elsewhere/b"
    assert _entry(settings, "chat-a").path == "a"


def test_an_empty_path_variable_is_as_good_as_none(configs: Configs) -> None:
    settings = configs.load(env={"CHAT_B_PATH": ""})

    assert _entry(settings, "chat-b").path == "b"


# --- finding the profile and the folders -------------------------------------------------------


def test_a_profile_can_be_given_by_path(configs: Configs, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    path = folder / "special.toml"
    path.write_text("[server]\nchat_port = 8001")

    settings = load_settings(str(path), {}, configs.folder)

    assert settings.profile_name == "special"
    assert settings.profile_path == path
    assert settings.server.chat_port == 8001
    assert _ids(settings) == ["chat-a", "chat-b"]


def test_a_profile_path_that_is_not_there_is_refused(configs: Configs) -> None:
    with pytest.raises(ConfigError, match=r"no profile file nowhere/x\.toml"):
        find_profile("nowhere/x.toml", configs.folder)


def test_an_unknown_profile_is_refused_with_the_known_ones(configs: Configs) -> None:
    configs.write("demo", "")
    configs.write("gpu-24gb", "")

    with pytest.raises(ConfigError) as caught:
        find_profile("demmo", configs.folder)

    assert str(caught.value) == (
        "there is no profile demmo; known: demo, gpu-24gb; did you mean demo?"
    )


def test_the_catalog_file_is_no_profile(configs: Configs) -> None:
    with pytest.raises(ConfigError, match="there is no profile models"):
        find_profile("models", configs.folder)


def test_folders_come_from_the_environment_and_become_absolute(
    configs: Configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    env = {"VERBATIM_MODELS_DIR": "here/models", "VERBATIM_STATE_DIR": "/var/verbatim"}

    settings = configs.load(env=env)

    assert settings.models_dir == tmp_path / "here" / "models"
    assert settings.state_dir == Path("/var/verbatim")
    assert state_dir(env) == settings.state_dir


def _all_sections(model: type[BaseModel] = Profile) -> set[type[BaseModel]]:
    found: set[type[BaseModel]] = {model}

    def look(annotation: Any) -> None:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found.update(_all_sections(annotation))
        for part in getattr(annotation, "__args__", ()):
            look(part)

    for field in model.model_fields.values():
        look(field.annotation)
    return found


# [gateway] is checked by the program that it belongs to.
@pytest.mark.parametrize(
    "section", sorted(_all_sections() - {GatewayPlace}, key=lambda one: one.__name__)
)
def test_every_table_is_frozen_strict_and_closed(section: type[BaseModel]) -> None:
    assert issubclass(section, Section)
    assert section.model_config == {"frozen": True, "extra": "forbid", "strict": True}
