"""Which models a port serves, by which names, and which one is meant when none is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from worker.catalog import (
    NATIVE_FRAMES,
    NATIVE_SIZE,
    Catalog,
    ModelSpec,
    chat_catalog,
    media_catalog,
    preload_ids,
)
from worker.config import Kind, Settings, load_settings
from worker.errors import ConfigError, Unsupported

SHIPPED = """
[[models]]
id = "qwen"
kind = "chat"
path = "qwen"
aliases = ["qwen_instruct", "Org/Qwen-7B"]

[[models]]
id = "sdxl-one"
kind = "sdxl"
path = "sdxl.safetensors"
config_path = "sdxl-config"

[[models]]
id = "wan-one"
kind = "wan"
path = "wan"
"""


class Machine:
    """A folder with a catalog, profiles and a models folder."""

    def __init__(self, folder: Path):
        self.models = folder / "models"
        self.models.mkdir()
        self._configs = folder / "configs"
        self._configs.mkdir()
        (self._configs / "models.toml").write_text(SHIPPED)

    def settings(self, profile: str = "") -> Settings:
        (self._configs / "mine.toml").write_text(profile)
        env = {"VERBATIM_MODELS_DIR": str(self.models)}
        return load_settings("mine", env, self._configs)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def spec(model_id: str, *aliases: str, kind: Kind = "chat") -> ModelSpec:
    return ModelSpec(
        id=model_id,
        kind=kind,
        path=Path("/models") / model_id,
        shown_path=f"models/{model_id}",
        aliases=aliases,
        dtype="bfloat16",
        chat_template="chatml",
        config_path=None,
        display_name=model_id,
        default_size=NATIVE_SIZE[kind],
        default_frames=NATIVE_FRAMES,
    )


def entry(model_id: str, kind: str, more: str = "") -> str:
    return f'[[models]]\nid = "{model_id}"\nkind = "{kind}"\npath = "{model_id}"\n{more}\n'


def served(catalog: Catalog) -> list[str]:
    return [one.id for one in catalog.specs]


# --- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["one", "ONE", "Uno", "uno", "ORG/Uno-7B", "org/uno-7b"])
def test_a_model_answers_to_its_id_and_aliases_in_any_casing(name: str) -> None:
    catalog = Catalog([spec("one", "Uno", "Org/Uno-7B"), spec("two")])

    assert catalog.find(name).id == "one"


@pytest.mark.parametrize("name", ["three", "", "one ", "on"])
def test_an_unknown_model_is_refused_with_all_known_names(name: str) -> None:
    catalog = Catalog([spec("two"), spec("one", "uno")])

    with pytest.raises(Unsupported) as caught:
        catalog.find(name)

    assert str(caught.value) == "this model is not served here; known: one, two, uno"
    assert caught.value.status == 422


@pytest.mark.parametrize("alias", ["two", "Two", "zwei", "ZWEI"])
def test_two_models_that_answer_to_one_name_are_refused(alias: str) -> None:
    with pytest.raises(ConfigError, match=rf"models one and two both answer to (?i:{alias})"):
        Catalog([spec("one", alias), spec("two", "zwei")])


def test_an_alias_that_repeats_the_id_is_no_clash() -> None:
    catalog = Catalog([spec("One", "one", "ONE")])

    assert catalog.find("one").id == "One"


# --- defaults ----------------------------------------------------------------------------------


def test_the_default_of_a_kind_is_its_first_model() -> None:
    catalog = Catalog([spec("w", kind="wan"), spec("s1", kind="sdxl"), spec("s2", kind="sdxl")])

    assert catalog.default("sdxl").id == "s1"
    assert catalog.default("wan").id == "w"


def test_a_kind_without_models_has_no_default() -> None:
    with pytest.raises(Unsupported, match="no model of kind wan"):
        Catalog([spec("one")]).default("wan")


def test_the_named_default_wins_over_the_first() -> None:
    catalog = Catalog([spec("one"), spec("two", "zwei")], default_chat="Zwei")

    assert catalog.default("chat").id == "two"


def test_a_default_that_is_not_served_is_refused() -> None:
    with pytest.raises(ConfigError, match="default_model three"):
        Catalog([spec("one")], default_chat="three")


def test_chat_requests_without_a_model_mean_qwen_instruct_where_there_is_one(
    machine: Machine,
) -> None:
    settings = machine.settings(
        entry("first", "chat") + entry("second", "chat", 'aliases = ["qwen_instruct"]')
    )

    assert chat_catalog(settings).default("chat").id == "second"


def test_chat_requests_without_a_model_mean_the_first_where_there_is_no_qwen_instruct(
    machine: Machine,
) -> None:
    settings = machine.settings(entry("first", "chat") + entry("second", "chat"))

    assert chat_catalog(settings).default("chat").id == "first"


def test_the_profiles_default_model_wins(machine: Machine) -> None:
    settings = machine.settings(
        '[chat]\ndefault_model = "b"\n'
        + entry("a", "chat", 'aliases = ["qwen_instruct"]')
        + entry("b", "chat")
    )

    assert chat_catalog(settings).default("chat").id == "b"


# --- what is served ----------------------------------------------------------------------------


def test_without_any_word_about_it_the_catalogs_models_are_served(machine: Machine) -> None:
    settings = machine.settings()

    assert served(chat_catalog(settings)) == ["qwen"]
    assert served(media_catalog(settings)) == ["sdxl-one", "wan-one"]


def test_the_profiles_own_models_are_served_instead_of_the_catalogs_of_that_kind(
    machine: Machine,
) -> None:
    settings = machine.settings(entry("mine", "sdxl"))

    assert served(media_catalog(settings)) == ["mine", "wan-one"]
    assert served(chat_catalog(settings)) == ["qwen"]


def test_a_list_of_names_is_served_exactly_in_its_order(machine: Machine) -> None:
    settings = machine.settings(
        '[media]\nmodels = ["wan-one", "mine", "sdxl-one"]\n' + entry("mine", "sdxl")
    )

    assert served(media_catalog(settings)) == ["wan-one", "mine", "sdxl-one"]


def test_a_listed_model_that_is_not_declared_is_refused_with_the_known_ids(
    machine: Machine,
) -> None:
    settings = machine.settings('[media]\nmodels = ["sdxl-two"]')

    with pytest.raises(ConfigError) as caught:
        media_catalog(settings)

    assert "[media] models: sdxl-two" in str(caught.value)
    assert "sdxl-one, wan-one" in str(caught.value)


def test_a_served_model_with_an_unknown_template_is_refused(machine: Machine) -> None:
    text = "[[models]]\nid = 'mine'\nkind = 'chat'\npath = 'm'\nchat_template = 'llama'"

    with pytest.raises(ConfigError, match="chat_template llama is unknown; known: chatml"):
        chat_catalog(machine.settings(text))


def test_a_listed_model_of_another_kind_is_refused(machine: Machine) -> None:
    settings = machine.settings('[chat]\nmodels = ["wan-one"]')

    with pytest.raises(ConfigError, match="wan-one is not in the catalog with kind chat"):
        chat_catalog(settings)


def test_the_profiles_own_order_decides_which_model_is_the_default(machine: Machine) -> None:
    # Both replace or extend the catalog; the order that counts is the one in the profile.
    settings = machine.settings(entry("mine", "sdxl") + entry("sdxl-one", "sdxl"))

    assert media_catalog(settings).default("sdxl").id == "mine"


# --- preload -----------------------------------------------------------------------------------


def test_without_a_list_the_default_of_every_kind_is_preloaded() -> None:
    catalog = Catalog(
        [spec("s1", kind="sdxl"), spec("s2", kind="sdxl"), spec("w1", kind="wan")],
    )

    assert preload_ids(catalog, None) == ("s1", "w1")


def test_without_a_list_the_named_default_is_preloaded() -> None:
    catalog = Catalog([spec("one"), spec("two")], default_chat="two")

    assert preload_ids(catalog, None) == ("two",)


def test_an_empty_list_preloads_nothing() -> None:
    assert preload_ids(Catalog([spec("one")]), []) == ()


def test_a_list_preloads_by_id_or_alias() -> None:
    catalog = Catalog([spec("one", "uno"), spec("two")])

    assert preload_ids(catalog, ["two", "UNO"]) == ("two", "one")


def test_preloading_what_is_not_served_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="preload names a model that is not served"):
        preload_ids(Catalog([spec("one")]), ["two"])


# --- entries to specs --------------------------------------------------------------------------


def test_an_entry_that_says_little_gets_the_published_defaults(machine: Machine) -> None:
    catalog = media_catalog(machine.settings())

    wan = catalog.find("wan-one")

    assert (wan.default_size, wan.default_frames) == ((480, 832), 81)
    assert wan.display_name == "wan-one"
    assert wan.dtype == "bfloat16"
    assert catalog.find("sdxl-one").default_size == (1024, 1024)


def test_an_entry_that_says_more_gets_what_it_says(machine: Machine) -> None:
    more = 'default_size = "96x64"\ndefault_frames = 17\ndisplay_name = "W"\ndtype = "float32"'

    wan = media_catalog(machine.settings(entry("w", "wan", more))).find("w")

    assert (wan.default_size, wan.default_frames) == ((96, 64), 17)
    assert (wan.display_name, wan.dtype) == ("W", "float32")


def test_paths_lie_in_the_models_folder_and_are_shown_without_it(machine: Machine) -> None:
    qwen = chat_catalog(machine.settings()).find("qwen")
    sdxl = media_catalog(machine.settings()).find("sdxl-one")

    assert qwen.path == machine.models / "qwen"
    assert qwen.shown_path == "models/qwen"
    assert sdxl.config_path == machine.models / "sdxl-config"


def test_an_absolute_path_stays_as_it_is(machine: Machine, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    profile = f'[[models]]\nid = "m"\nkind = "chat"\npath = "{elsewhere}"'

    model = chat_catalog(machine.settings(profile)).find("m")

    assert model.path == elsewhere
    assert model.shown_path == str(elsewhere)


def test_of_several_paths_the_first_that_exists_is_used(machine: Machine) -> None:
    (machine.models / "second").mkdir()
    (machine.models / "third").mkdir()
    profile = '[[models]]\nid = "m"\nkind = "chat"\npath = ["first", "second", "third"]'

    model = chat_catalog(machine.settings(profile)).find("m")

    assert model.path == machine.models / "second"


def test_of_several_paths_the_first_is_meant_when_none_exists(machine: Machine) -> None:
    profile = '[[models]]\nid = "m"\nkind = "chat"\npath = ["first", "second"]'

    model = chat_catalog(machine.settings(profile)).find("m")

    assert model.path == machine.models / "first"


# --- the Hugging Face cache --------------------------------------------------------------------


def cache_folder(models: Path, *revisions: str) -> Path:
    folder = models / "models--Org--Name"
    for revision in revisions:
        (folder / "snapshots" / revision).mkdir(parents=True)
    return folder


def cached_path(machine: Machine) -> Path:
    profile = '[[models]]\nid = "m"\nkind = "chat"\npath = "models--Org--Name"'
    return chat_catalog(machine.settings(profile)).find("m").path


def test_a_cache_folder_stands_for_the_snapshot_that_main_points_to(machine: Machine) -> None:
    folder = cache_folder(machine.models, "aaa", "bbb", "ccc")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("bbb\n")

    assert cached_path(machine) == folder / "snapshots" / "bbb"


def test_a_cache_folder_without_main_stands_for_its_newest_snapshot(machine: Machine) -> None:
    folder = cache_folder(machine.models, "aaa", "bbb", "ccc")
    for revision, seconds in (("aaa", 100), ("bbb", 300), ("ccc", 200)):
        os.utime(folder / "snapshots" / revision, (seconds, seconds))

    assert cached_path(machine) == folder / "snapshots" / "bbb"


def test_a_main_that_points_nowhere_does_not_count(machine: Machine) -> None:
    folder = cache_folder(machine.models, "aaa")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("gone")

    assert cached_path(machine) == folder / "snapshots" / "aaa"


def test_a_cache_folder_without_snapshots_stands_for_itself(machine: Machine) -> None:
    folder = machine.models / "models--Org--Name"
    (folder / "snapshots").mkdir(parents=True)

    assert cached_path(machine) == folder


def test_a_folder_of_any_other_name_is_no_cache(machine: Machine) -> None:
    (machine.models / "qwen" / "snapshots" / "aaa").mkdir(parents=True)

    assert chat_catalog(machine.settings()).find("qwen").path == machine.models / "qwen"


@pytest.mark.parametrize(
    ("line", "cure"),
    [
        ("shipped = true", "restore this program's own models/mine: git checkout -- models"),
        ("source = {repository = 'a/b'}", "run python scripts/fetch_models.py mine"),
        ("", "put its files there, or correct its path"),
    ],
)
def test_the_cure_for_missing_files_is_how_the_model_comes_here(
    machine: Machine, line: str, cure: str
) -> None:
    text = f"[[models]]\nid = 'mine'\nkind = 'chat'\npath = 'm'\n{line}"

    assert chat_catalog(machine.settings(text)).default("chat").cure == cure


READS = """
[[adapters]]
id = "reads"
kind = "ip_adapter"
model = "sdxl-one"
path = "ip/reads.safetensors"
image_encoder = "ip/encoder"
"""
FETCHED = READS + "source = {repository = 'a/b'}\nimage_encoder_source = {repository = 'a/b'}\n"


def test_an_ip_adapter_that_nobody_has_fetched_is_none(machine: Machine) -> None:
    model = media_catalog(machine.settings(FETCHED)).find("sdxl-one")

    assert model.ip_adapter is None
    assert model.ip_adapter_cure == "to have reads, run python scripts/fetch_models.py reads"

    (machine.models / "ip").mkdir()
    (machine.models / "ip" / "reads.safetensors").touch()

    assert model.ip_adapter is not None  # the same catalog: nothing has to be started again


def test_an_ip_adapter_of_ones_own_is_one_even_if_its_file_is_missing(machine: Machine) -> None:
    """Whoever wrote it down is told that, not that there is none."""
    model = media_catalog(machine.settings(READS)).find("sdxl-one")

    assert model.ip_adapter is not None
    assert model.ip_adapter.cure == "put its files there, or correct its paths in the catalog"
    plain = media_catalog(machine.settings()).find("sdxl-one")
    assert plain.ip_adapter is None
    assert "add one to the profile as [[adapters]]" in plain.ip_adapter_cure


@pytest.mark.parametrize(
    "lines",
    [
        READS + "source = {repository = 'a/b'}",
        READS + "image_encoder_source = {repository = 'a/b'}",
        "[[adapters]]\nid = 'x'\nkind = 'lora'\nmodel = 'sdxl-one'\npath = 'x.safetensors'\n"
        "image_encoder_source = {repository = 'a/b'}",
    ],
)
def test_an_ip_adapter_comes_with_its_image_encoder_or_not_at_all(
    machine: Machine, lines: str
) -> None:
    with pytest.raises(ConfigError, match="image_encoder_source of an ip_adapter go together"):
        machine.settings(lines)
