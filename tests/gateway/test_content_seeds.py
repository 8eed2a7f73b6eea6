"""The seeds, and the emergency file that is made of them.

    WRITE_EMERGENCY=1 python -m pytest tests/gateway/test_content_seeds.py

writes emergency_prompts.json again from seed.toml.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from gateway.content import emergency
from gateway.content.emergency import (
    EMERGENCY,
    emergency_text,
    load_emergency,
    load_seeds,
    snapshot_of,
)
from gateway.content.refusal import refusal
from gateway.content.terms import DATA
from gateway.errors import ConfigError
from gateway.prompts.assemble import assemble
from gateway.prompts.language import check_template, variables_of
from gateway.prompts.variables import CHARACTER
from gateway.store.canonical import snapshot_hash, version_hash
from gateway.store.database import open_database
from gateway.store.loading import load_snapshot
from gateway.store.migration import migrate
from gateway.store.seed import seed
from gateway.tokens.counters import TokenCounters
from gateway.values.assembly import AssembleRequest
from gateway.values.documents import row_of, table_of
from gateway.values.rows import ANY, MODES, UNIVERSAL, CharacterLora, Snapshot
from gateway.values.seeds import SeedCharacter, Seeds

# Name → target, job, use, output tokens, target limit, hard limit, tokenizer.
DESIGNED = {
    "enhancement_sdxl": ("sdxl", "image", "enhancement", 160, 75, 75, "clip"),
    "enhancement_wan": ("wan", "video", "enhancement", 200, 100, 511, "umt5"),
    "chat": ("qwen_instruct", "chat", "chat", 200, None, None, None),
    "generation_sdxl": ("sdxl", "image", "generation", 300, 150, 150, "clip"),
    "generation_wan": ("wan", "video", "generation", 400, 200, 511, "umt5"),
    "playground": ("qwen_instruct", "chat", "playground", 300, None, None, None),
}


@pytest.fixture(scope="module")
def seeds() -> Seeds:
    return load_seeds()


def made(seeds: Seeds) -> Snapshot:
    return snapshot_of(seeds, version_hash, snapshot_hash)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", DESIGNED)
def test_each_designed_template_is_there_with_its_limits(
    seeds: Seeds, name: str, mode: str
) -> None:
    (found,) = [one for one in seeds.templates if one.template_name == f"{name}_{mode}"]

    assert found.content_mode == mode
    assert DESIGNED[name] == (
        found.target_model,
        found.job_type,
        found.use_case,
        found.max_output_tokens,
        found.target_token_limit,
        found.hard_token_limit,
        found.target_tokenizer,
    )


def test_every_tuple_has_one_template_and_a_twin_in_the_other_mode(seeds: Seeds) -> None:
    tuples = [
        (one.target_model, one.job_type, one.use_case, one.content_mode) for one in seeds.templates
    ]

    assert len(set(tuples)) == len(tuples)
    assert {(*row[:3], mode) for row in tuples for mode in MODES} == set(tuples)
    for job_type in ("image", "video", ANY):
        assert (UNIVERSAL, job_type, "enhancement", "sfw") in tuples


def test_the_two_modes_have_different_texts(seeds: Seeds) -> None:
    texts = [one.system_prompt + one.user_template for one in seeds.templates]

    assert len(set(texts)) == len(texts)


def test_texts_are_in_the_template_language_and_take_known_variables(seeds: Seeds) -> None:
    for template in seeds.templates:
        for text in (template.system_prompt, template.user_template, template.negative_prompt):
            assert variables_of(text) <= {"prompt", *template.variables}
    for rule in seeds.rules:
        check_template(rule.body)

        assert variables_of(rule.body) <= set(CHARACTER)


def test_names_of_rows_refer_to_rows_that_are_there(seeds: Seeds) -> None:
    providers = {one.name for one in seeds.providers}
    models = {one.model_key for one in seeds.models}

    assert {one.provider for one in seeds.models} <= providers
    assert {one.model_key for one in seeds.assignments} <= models
    assert seeds.preferred in models
    assert {one.model_key for one in seeds.parameters} <= {ANY, *models}
    assert {one.character_id for one in seeds.parameters} <= {
        ANY,
        *(one.id for one in seeds.characters),
    }


def test_the_catalogue_has_the_models_of_the_refresh_mapping(seeds: Seeds) -> None:
    found = {one.external_id: one.model_name for one in seeds.models if one.provider == "matcha"}

    assert found == {
        "28": "Claude 3.7 Sonnet",
        "25": "Claude 3.5 Sonnet",
        "30": "Claude Opus 4.1",
        "35": "Gemini 2.5 Flash-Lite",
        "40": "GPT-4o",
    }


def test_a_task_has_at_most_one_default_and_enhancement_has_none_yet(seeds: Seeds) -> None:
    defaults = [(one.modality, one.task) for one in seeds.assignments if one.is_default]

    assert len(set(defaults)) == len(defaults)
    assert ("chat", "enhancement") not in defaults
    assert any(one.task == ANY for one in seeds.assignments)


def test_no_seed_text_makes_the_refusal_check_refuse_an_ordinary_prompt(seeds: Seeds) -> None:
    """A mode's template is checked together with the prompt; a word too many in it would refuse
    every prompt that has a child or a politician in it."""
    prompts = ("a mother and her 5 year old child at the beach", "Senator Example speaks")
    texts = [f"{one.system_prompt}\n{one.user_template}" for one in seeds.templates]
    texts += [rule.body for rule in seeds.rules if rule.slot != "negative"]
    for one in seeds.characters:
        card = " ".join(str(value) for value in one.card.values())
        texts.append(f"{one.name} {one.persona} {one.system_prompt} {card}")

    refused = [text for text in texts for prompt in prompts if refusal((text, prompt)) is not None]

    assert refused == []


def test_no_seed_text_is_refused_beside_an_adult_prompt(seeds: Seeds) -> None:
    texts = [one.system_prompt for one in seeds.templates if one.content_mode == "nsfw"]
    texts += [one.system_prompt for one in seeds.characters]

    assert [text for text in texts if refusal((text, "a nude adult couple")) is not None] == []


def test_the_emergency_file_is_what_the_seeds_give(seeds: Seeds) -> None:
    expected = emergency_text(made(seeds))
    if os.environ.get("WRITE_EMERGENCY"):
        (DATA / EMERGENCY).write_text(expected, "utf-8")

    assert (DATA / EMERGENCY).read_text("utf-8") == expected


def test_the_emergency_file_covers_every_active_tuple_of_the_seeds(seeds: Seeds) -> None:
    found = load_emergency()

    for one in seeds.templates:
        if one.is_active:
            template = found.template(
                one.target_model, one.job_type, one.use_case, one.content_mode
            )
            assert template is not None, one.template_name
            assert template.live.system_prompt == one.system_prompt


def test_the_emergency_snapshot_is_revision_0_with_the_hashes_of_the_store() -> None:
    found = load_emergency()

    assert found.revision == 0
    assert found.content_hash == snapshot_hash(found)
    assert all(one.live.content_hash == version_hash(one.live) for one in found.templates)


def test_the_emergency_snapshot_has_a_default_for_each_task_and_a_last_resort() -> None:
    found = load_emergency()
    worker = {one.id for one in found.providers if one.kind == "worker"}
    own = {one.model_key for one in found.models if one.provider_id in worker}

    tasks = {(one.modality, one.task) for one in found.assignments if one.task != ANY}
    defaults = {(one.modality, one.task) for one in found.assignments if one.is_default}

    assert tasks == defaults - {("chat", ANY)}
    assert all(one.model_key in own for one in found.assignments if one.is_default)
    assert [one.model_key in own for one in found.assignments if one.task == ANY] == [True]


@pytest.mark.parametrize("damage", ["cut", "changed", "format", "gone"])
def test_a_damaged_emergency_file_is_refused(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / EMERGENCY
    shutil.copy(DATA / EMERGENCY, copy)
    text = copy.read_text("utf-8")
    if damage == "cut":
        copy.write_text(text[: len(text) // 2], "utf-8")
    elif damage == "changed":
        copy.write_text(text.replace("in at most 50 words", "in at most 51 words"), "utf-8")
    elif damage == "format":
        copy.write_text(text.replace('"format": 1', '"format": 2'), "utf-8")
    else:
        copy.unlink()
    monkeypatch.setattr(emergency, "DATA", tmp_path)

    with pytest.raises(ConfigError, match=EMERGENCY):
        load_emergency()


def test_rows_survive_the_way_to_json_and_back() -> None:
    lora = CharacterLora(lora_ref="a", weight=1.0, trigger_words=("x",))
    row = SeedCharacter(id="1", name="A", loras=(lora,), tags=("t",), card={"list": ["a", 1]})

    assert row_of(SeedCharacter, json.loads(json.dumps(table_of(row)))) == row
    assert row_of(Snapshot, table_of(load_emergency())) == load_emergency()


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"templates": [{"template_nam": "x"}]}, "did you mean template_name"),
        ({"characters": [{"id": "1"}]}, "SeedCharacter lacks name"),
        ({"characters": [{"id": 1, "name": "A"}]}, "SeedCharacter.id is int"),
        ({"rules": {}}, "Seeds.rules is dict, not a list"),
        ({"assignments": ["x"]}, "Seeds.assignments is str, not a table"),
        ({"characters": [{"id": "1", "name": "A", "card": []}]}, "SeedCharacter.card is list"),
        ({"models": [{"provider": "p", "external_id": "1", "model_name": "m", "model_key": "k",
                      "display_order": True}]}, "SeedModel.display_order is a truth value"),
    ],
)  # fmt: skip
def test_a_table_that_is_no_row_is_refused_with_the_key(table: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        row_of(Seeds, table)


def test_a_seeded_database_has_the_emergency_configuration(seeds: Seeds, tmp_path: Path) -> None:
    database = open_database(f"sqlite:///{tmp_path / 'gateway.sqlite3'}")
    migrate(database)

    seed(database, seeds, "qwen_instruct", frozenset())
    with database.reading() as connection:
        found = load_snapshot(connection)
    database.dispose()

    assert found.content_hash == load_emergency().content_hash


@pytest.mark.parametrize("quality", ["fast", "high"])
def test_every_template_resolves_with_and_without_characters(quality: str) -> None:
    """Renders, chooses a model and passes the refusal check beside an ordinary prompt."""
    snapshot = load_emergency()
    counters = TokenCounters({})

    for template in snapshot.templates:
        for character_id in (None, *(one.id for one in snapshot.characters)):
            request = AssembleRequest(
                prompt="a mother and her 5 year old child at the beach",
                target_model=template.target_model,
                job_type=template.job_type,
                use_case=template.use_case,
                explicit_mode=template.content_mode,
                quality=quality,
                character_id=character_id,
                tags=("drawing", "film"),
                task="chat" if template.job_type == "chat" else "enhancement",
                variables={"limit": "75"} if "limit" in template.live.variables else {},
            )
            found = assemble(snapshot, request, counters)

            assert found.template == template
            assert found.models[0].model_key == "qwen_instruct"
            assert found.messages[-1].content.endswith(request.prompt)


def test_a_new_template_changes_the_emergency_file(seeds: Seeds) -> None:
    """What makes the suite fail when a template is added and the file is not written again."""
    more = replace(seeds.templates[0], template_name="new", use_case="new")

    changed = made(replace(seeds, templates=(*seeds.templates, more)))

    assert emergency_text(changed) != (DATA / EMERGENCY).read_text("utf-8")
    assert {one.name for one in fields(Seeds)} >= {"templates", "rules", "assignments"}
