"""The template of a request: its exact tuple, then the universal rows, never the other mode."""

from __future__ import annotations

from typing import Any

from gateway.errors import TemplateNotFound
from gateway.values.assembly import AssembleRequest, Step
from gateway.values.rows import ANY, UNIVERSAL, Snapshot, Template

NEAREST = 5  # templates that a refusal names

_FIELDS = ("target_model", "job_type", "use_case", "content_mode")


def find_template(
    snapshot: Snapshot, request: AssembleRequest, content_mode: str
) -> tuple[Template, tuple[Step, ...]]:
    """The active template, and a step for each place that was looked at.

    Raises TemplateNotFound: `fields` has what was wanted and the NEAREST rows that there are,
    with how each differs. A row of the other mode may be named there; it is never served.
    """
    steps: list[Step] = []
    for target_model, job_type in _places(request):
        template = snapshot.template(target_model, job_type, request.use_case, content_mode)
        looked_at = "/".join((target_model, job_type, request.use_case, content_mode))
        if template is None:
            steps.append(Step(step="template", outcome="missed", why=f"no active {looked_at}"))
            continue
        detail = {
            "id": template.id,
            "name": template.template_name,
            "version": template.live.version,
        }
        steps.append(
            Step(step="template", outcome="chosen", why=f"serves {looked_at}", detail=detail)
        )
        return template, tuple(steps)
    wanted = dict(
        zip(
            _FIELDS,
            (request.target_model, request.job_type, request.use_case, content_mode),
            strict=True,
        )
    )
    nearest = _nearest(snapshot, wanted)
    raise TemplateNotFound(
        f"no active template for {'/'.join(wanted.values())}, and no universal one; "
        f"the {len(nearest)} nearest are listed. Add or switch on a row of this tuple",
        fields={"wanted": wanted, "nearest": nearest},
    )


def _places(request: AssembleRequest) -> tuple[tuple[str, str], ...]:
    places = (
        (request.target_model, request.job_type),
        (UNIVERSAL, request.job_type),
        (UNIVERSAL, ANY),
    )
    return tuple(dict.fromkeys(places))


def _nearest(snapshot: Snapshot, wanted: dict[str, str]) -> list[dict[str, Any]]:
    """Rows by how few of the four fields differ; one that is switched off counts as a difference,
    and another mode is the last thing to differ in."""
    rated = []
    for template in snapshot.templates:
        found = dict(zip(_FIELDS, template.tuple4, strict=True))
        differs = [field for field in _FIELDS if found[field] != wanted[field]]
        if not template.is_active:
            differs.append("is_active")
        rating = (len(differs), "content_mode" in differs, template.id)
        rated.append(
            (rating, {"template_name": template.template_name, **found, "differs": differs})
        )
    rated.sort(key=lambda pair: pair[0])
    return [row for _, row in rated[:NEAREST]]
