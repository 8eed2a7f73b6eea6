"""Lists and edits of the tables whose rows are edited as a whole: rules, parameters, negative
prompts, providers, the catalogue, and who does what.

Each is a Resource: which rows of a snapshot it lists, and which functions of gateway/store edit it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flask.typing import ResponseReturnValue
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import BaseModel, Field
from sqlalchemy import Table

from gateway.access.caller import Scope
from gateway.errors import Invalid, NotFound
from gateway.front import revision
from gateway.front.access import needs
from gateway.front.admin_bodies import (
    EditBody,
    PageQuery,
    create_body,
    given,
    patch_body,
    whole,
)
from gateway.front.admin_edit import allow_live, answer, editing, page
from gateway.front.services import Services
from gateway.models.provider_keys import may_be_sent
from gateway.store import model_edits, rule_edits, tables
from gateway.store.editing import Editor
from gateway.values import rows, seeds

INT32 = 2**31 - 1


class IdPath(BaseModel):
    id: int = Field(ge=1, le=INT32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """One table as /api/<name>."""

    name: str
    tag: str
    table: Table
    rows: Callable[[rows.Snapshot], Sequence[Any]]
    value: type  # of gateway/values/seeds, which a create body becomes
    create_model: type[EditBody]
    patch_model: type[EditBody]
    create: Callable[[Editor, Any], int]
    change: Callable[[Editor, int, Mapping[str, Any]], bool]
    remove: Callable[[Editor, int], None]
    scope: Scope = Scope.EDITOR  # of those who edit
    # Whether a row may lie in the table without being used; else every edit is live.
    has_switch: bool = True
    check: Callable[[Mapping[str, Any]], None] = lambda _values: None


def _resource(
    name: str,
    tag: str,
    table: Table,
    of: Callable[[rows.Snapshot], Sequence[Any]],
    value: type,
    edits: tuple[Callable[..., int], Callable[..., bool], Callable[..., None]],
    *,
    fixed: tuple[str, ...] = (),
    **more: Any,
) -> Resource:
    """fixed: columns that stay as they were made."""
    title = value.__name__.removeprefix("Seed")
    created = create_body(f"{title}Create", value)
    return Resource(
        name=name,
        tag=tag,
        table=table,
        rows=of,
        value=value,
        create_model=created,
        patch_model=patch_body(f"{title}Change", created, without=fixed),
        create=edits[0],
        change=edits[1],
        remove=edits[2],
        **more,
    )


def _check_provider(values: Mapping[str, Any]) -> None:
    reference = values.get("secret_ref")
    if reference is not None and not may_be_sent(reference):
        raise Invalid(
            "secret_ref is the name of a variable that ends in _API_KEY and is not the worker's or "
            "the gateway's own"
        )


def _change_assignment(editor: Editor, row_id: int, values: Mapping[str, Any]) -> bool:
    rest = {name: one for name, one in values.items() if (name, one) != ("is_default", True)}
    changed = model_edits.change_assignment(editor, row_id, rest)
    if len(rest) == len(values):
        return changed
    # After the others: what is switched on in the same edit may become the default.
    return model_edits.set_default(editor, row_id) or changed


RESOURCES: tuple[Resource, ...] = (
    _resource(
        "rules",
        "prompts",
        tables.prompt_rules,
        lambda snapshot: snapshot.rules,
        seeds.SeedRule,
        (rule_edits.create_rule, rule_edits.change_rule, rule_edits.remove_rule),
    ),
    _resource(
        "parameters",
        "prompts",
        tables.model_parameters,
        lambda snapshot: snapshot.parameters,
        seeds.SeedParameters,
        (
            rule_edits.create_parameters,
            rule_edits.change_parameters,
            rule_edits.remove_parameters,
        ),
        scope=Scope.PUBLISHER,
        has_switch=False,
    ),
    _resource(
        "negative-prompts",
        "prompts",
        tables.negative_prompts,
        lambda snapshot: snapshot.negatives,
        seeds.SeedNegative,
        (rule_edits.create_negative, rule_edits.change_negative, rule_edits.remove_negative),
    ),
    _resource(
        "providers",
        "models",
        tables.providers,
        lambda snapshot: snapshot.providers,
        seeds.SeedProvider,
        (model_edits.create_provider, model_edits.change_provider, model_edits.remove_provider),
        scope=Scope.ADMIN,
        check=_check_provider,
    ),
    _resource(
        "models",
        "models",
        tables.llm_models,
        lambda snapshot: snapshot.models,
        seeds.SeedModel,
        (model_edits.create_model, model_edits.change_model, model_edits.remove_model),
        fixed=("provider", "model_key"),
    ),
    _resource(
        "assignments",
        "models",
        tables.api_models,
        lambda snapshot: snapshot.assignments,
        seeds.SeedAssignment,
        (model_edits.create_assignment, _change_assignment, model_edits.remove_assignment),
        fixed=("model_key", "modality", "task"),
    ),
)


def blueprints() -> tuple[Callable[[Services], APIBlueprint], ...]:
    """One for each resource."""
    return tuple(_maker(resource) for resource in RESOURCES)


def _maker(resource: Resource) -> Callable[[Services], APIBlueprint]:
    return lambda services: _blueprint(services, resource)


def _blueprint(services: Services, resource: Resource) -> APIBlueprint:
    api = APIBlueprint(
        f"admin_{resource.name.replace('-', '_')}",
        __name__,
        url_prefix=f"/api/{resource.name}",
        abp_tags=[Tag(name=resource.tag)],
    )

    @api.get("", summary=f"The {resource.name}, by id")
    @needs(Scope.VIEWER)
    def listed(query: PageQuery) -> ResponseReturnValue:
        held = revision.held(services.prompts)
        found = page(resource.rows(held.snapshot), query, _id, asdict)
        return {**found, "revision": held.snapshot.revision}

    @api.get("/<int:id>", summary="One of them")
    @needs(Scope.VIEWER)
    def one(path: IdPath) -> ResponseReturnValue:
        held = revision.held(services.prompts)
        for row in resource.rows(held.snapshot):
            if row.id == path.id:
                return {"success": True, "row": asdict(row), "revision": held.snapshot.revision}
        raise NotFound(f"there is no row {path.id} in {resource.name}")

    def create(body: EditBody) -> ResponseReturnValue:
        value = whole(body, resource.value)
        resource.check(given(body))
        if resource.has_switch:
            allow_live(value.is_active)
        with editing(services, body) as editor:
            key = resource.create(editor, value)
        return answer(editor, id=key, changed=True), 201

    def change(path: IdPath, body: EditBody) -> ResponseReturnValue:
        values = given(body)
        resource.check(values)
        with editing(services, body) as editor:
            if resource.has_switch:
                before = editor.find(resource.table, path.id)
                allow_live(before["is_active"], values.get("is_active"))
            changed = resource.change(editor, path.id, values)
        return answer(editor, id=path.id, changed=changed)

    @api.delete("/<int:id>", summary="Delete one of them")
    @needs(resource.scope)
    def remove(path: IdPath) -> ResponseReturnValue:
        with editing(services) as editor:
            if resource.has_switch:
                allow_live(editor.find(resource.table, path.id)["is_active"])
            resource.remove(editor, path.id)
        return answer(editor, id=path.id, changed=True)

    # The library reads the models of bodies from annotations, and each resource has its own.
    create.__annotations__["body"] = resource.create_model
    change.__annotations__["body"] = resource.patch_model
    api.post("", summary=f"Add to the {resource.name}")(needs(resource.scope)(create))
    api.patch("/<int:id>", summary="Change one of them")(needs(resource.scope)(change))
    return api


def _id(row: Any) -> int:
    found: int = row.id
    return found
