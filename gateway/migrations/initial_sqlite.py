"""Triggers and views of revision 0001 for SQLite. Nothing here needs a function of ours, so that
edits in the sqlite3 shell work; the shell has foreign keys off, which is why triggers repeat some.

An `OR REPLACE` deletes the row in its way without firing its delete trigger. The guards before an
insert stop that where a row must not go.
"""

from __future__ import annotations

CONFIGURATION = (
    "templates",
    "template_versions",
    "template_labels",
    "prompt_rules",
    "prompt_rule_tags",
    "providers",
    "llm_models",
    "api_models",
    "model_parameters",
    "characters",
    "character_loras",
    "negative_prompts",
)
# Microseconds, as the engine's own datetimes are written.
NOW = "strftime('%Y-%m-%d %H:%M:%f', 'now') || '000'"
TEXTS = (
    "system_prompt",
    "user_template",
    "negative_prompt",
    "variables",
    "max_output_tokens",
    "target_token_limit",
    "hard_token_limit",
    "target_tokenizer",
    "params",
)
OWN = (
    "template_name",
    "target_model",
    "job_type",
    "use_case",
    "content_mode",
    "description",
    "is_active",
)


def _trigger(name: str, when: str, *statements: str) -> str:
    body = "\n".join(f"    {one};" for one in statements)
    return f"CREATE TRIGGER {name} {when} BEGIN\n{body}\nEND"


def _refuse(text: str, where: str = "") -> str:
    return f"SELECT RAISE(ABORT, '{text}')" + (f" WHERE {where}" if where else "")


REVISION = [
    _trigger(
        f"revision_{table}_{event.lower()}",
        f"AFTER {event} ON {table}",
        f"UPDATE config_state SET revision = revision + 1, changed_at = {NOW} WHERE id = 1",
    )
    for table in CONFIGURATION
    for event in ("INSERT", "UPDATE", "DELETE")
]

GUARDS = [
    _trigger(
        "config_state_rises",
        "BEFORE UPDATE ON config_state WHEN NEW.revision < OLD.revision OR NEW.id <> OLD.id",
        _refuse("the revision only rises: replicas would not see a change"),
    ),
    _trigger(
        "config_state_stays",
        "BEFORE DELETE ON config_state",
        _refuse("config_state keeps its row"),
    ),
    _trigger(
        "config_state_is_one",
        "BEFORE INSERT ON config_state WHEN EXISTS (SELECT 1 FROM config_state)",
        _refuse("config_state has one row"),
    ),
    # The only change allowed: a hash that SQL left open is filled in.
    _trigger(
        "template_versions_never_change",
        "BEFORE UPDATE ON template_versions WHEN NOT (substr(OLD.content_hash, 1, 8) = 'pending:'"
        " AND length(NEW.content_hash) = 64 AND "
        + " AND ".join(
            f"NEW.{name} IS OLD.{name}"
            for name in (
                "id",
                "template_id",
                "version",
                *TEXTS,
                "message",
                "created_by",
                "created_at",
            )
        )
        + ")",
        _refuse("a template version never changes: make the next one, as prompt_templates does"),
    ),
    _trigger(
        "template_versions_never_go",
        "BEFORE DELETE ON template_versions",
        _refuse("a template version is never deleted: logs refer to it"),
    ),
    _trigger(
        "template_versions_are_not_replaced",
        "BEFORE INSERT ON template_versions WHEN EXISTS (SELECT 1 FROM template_versions"
        " WHERE id = NEW.id OR (template_id = NEW.template_id"
        " AND (version = NEW.version OR content_hash = NEW.content_hash)))",
        _refuse("this template has that version or that text already"),
    ),
    _trigger(
        "templates_never_go",
        "BEFORE DELETE ON templates WHEN EXISTS"
        " (SELECT 1 FROM template_versions WHERE template_id = OLD.id)",
        _refuse("a template with versions is not deleted: set is_active = false"),
    ),
    *(
        _trigger(
            f"templates_are_not_replaced_by_{event.lower()}",
            f"BEFORE {event} ON templates",
            _refuse(
                "another template has this id or template_name",
                "EXISTS (SELECT 1 FROM templates WHERE (id = NEW.id OR template_name ="
                f" NEW.template_name){but})",
            ),
            _refuse(
                "another template is active for this target_model, job_type, use_case and"
                " content_mode: deactivate it first",
                "NEW.is_active AND EXISTS (SELECT 1 FROM templates WHERE is_active"
                " AND target_model = NEW.target_model AND job_type = NEW.job_type"
                f" AND use_case = NEW.use_case AND content_mode = NEW.content_mode{but})",
            ),
        )
        for event, but in (("INSERT", ""), ("UPDATE", " AND id <> OLD.id"))
    ),
    _trigger(
        "audit_log_never_changes", "BEFORE UPDATE ON audit_log", _refuse("audit_log only grows")
    ),
    _trigger("audit_log_never_goes", "BEFORE DELETE ON audit_log", _refuse("audit_log only grows")),
    _trigger(
        "audit_log_is_not_replaced",
        "BEFORE INSERT ON audit_log WHEN EXISTS"
        " (SELECT 1 FROM audit_log WHERE id = NEW.id OR hash = NEW.hash)",
        _refuse("audit_log only grows"),
    ),
]

# model_type: the language model that reads the template now, which is what the column named when a
# template belonged to one. token_limit: the one number that older documents have, which is the
# encoder's limit where there is an encoder and the language model's budget elsewhere.
PROMPT_TEMPLATES = """CREATE VIEW prompt_templates AS
SELECT t.id, t.template_name,
    COALESCE(
        (SELECT a.model_key FROM api_models a
          WHERE a.modality = 'chat' AND a.task = t.use_case AND a.is_default),
        t.target_model) AS model_type,
    t.target_model, t.job_type, t.use_case, t.content_mode,
    v.system_prompt, v.user_template, v.negative_prompt,
    COALESCE(v.target_token_limit, v.max_output_tokens) AS token_limit,
    v.version, t.is_active, t.description, v.variables, v.max_output_tokens, v.target_token_limit,
    v.hard_token_limit, v.target_tokenizer, v.params, v.content_hash, t.live_version_id,
    v.message, v.created_by, t.created_at, t.updated_at
FROM templates t LEFT JOIN template_versions v ON v.id = t.live_version_id
    AND v.template_id = t.id"""

# The columns of an update with token_limit sorted to where it belongs.
_NEW = {name: f"NEW.{name}" for name in TEXTS} | {
    "max_output_tokens": "CASE WHEN NEW.token_limit IS NOT OLD.token_limit AND"
    " OLD.target_token_limit IS NULL AND NEW.max_output_tokens IS OLD.max_output_tokens"
    " THEN NEW.token_limit ELSE NEW.max_output_tokens END",
    "target_token_limit": "CASE WHEN NEW.token_limit IS NOT OLD.token_limit AND"
    " OLD.target_token_limit IS NOT NULL AND NEW.target_token_limit IS OLD.target_token_limit"
    " THEN NEW.token_limit ELSE NEW.target_token_limit END",
}
_CHANGED = (
    "(" + " OR ".join(f"NEW.{name} IS NOT OLD.{name}" for name in (*TEXTS, "token_limit")) + ")"
)
_SAME = "SELECT id FROM template_versions WHERE template_id = OLD.id AND " + " AND ".join(
    f"{name} IS ({value})" for name, value in _NEW.items()
)
_NEXT = (
    "(SELECT COALESCE(MAX(version), 0) + 1 FROM template_versions WHERE template_id = {template})"
)

VIEW_TRIGGERS = [
    _trigger(
        "prompt_templates_update",
        "INSTEAD OF UPDATE ON prompt_templates",
        _refuse(
            "id, content_hash, message, created_by and created_at are not set here",
            " OR ".join(
                f"NEW.{name} IS NOT OLD.{name}"
                for name in ("id", "content_hash", "message", "created_by", "created_at")
            ),
        ),
        _refuse(
            "model_type follows api_models: change the default of the task there",
            "NEW.model_type IS NOT OLD.model_type",
        ),
        _refuse(
            "version is given by the store: leave it, or write version + 1; to go back to"
            " another version set live_version_id",
            "NEW.version IS NOT OLD.version AND NEW.version IS NOT OLD.version + 1",
        ),
        _refuse(
            "set the text or live_version_id, not both",
            f"NEW.live_version_id IS NOT OLD.live_version_id AND {_CHANGED}",
        ),
        _refuse(
            "live_version_id is no version of this template",
            "NEW.live_version_id IS NOT OLD.live_version_id AND NOT EXISTS (SELECT 1 FROM"
            " template_versions WHERE id = NEW.live_version_id AND template_id = OLD.id)",
        ),
        f"INSERT INTO template_versions (template_id, version, {', '.join(TEXTS)}, content_hash,"
        " message, created_by, created_at)"
        f" SELECT OLD.id, {_NEXT.format(template='OLD.id')}, {', '.join(_NEW.values())},"
        f" 'pending:' || {_NEXT.format(template='OLD.id')}, 'edited in SQL', 'sql', {NOW}"
        f" WHERE {_CHANGED} AND NOT EXISTS ({_SAME})",
        "UPDATE templates SET "
        + ", ".join(f"{name} = NEW.{name}" for name in OWN)
        + f", live_version_id = CASE WHEN {_CHANGED} THEN ({_SAME} ORDER BY version DESC LIMIT 1)"
        f" ELSE NEW.live_version_id END, updated_at = {NOW} WHERE id = OLD.id",
    ),
    _trigger(
        "prompt_templates_insert",
        "INSTEAD OF INSERT ON prompt_templates",
        _refuse(
            "the first version is 1: leave version, id, live_version_id and content_hash out",
            "COALESCE(NEW.version, 1) <> 1 OR NEW.id IS NOT NULL OR NEW.live_version_id IS NOT"
            " NULL OR NEW.content_hash IS NOT NULL",
        ),
        _refuse(
            "a template needs token_limit or max_output_tokens",
            "NEW.token_limit IS NULL AND NEW.max_output_tokens IS NULL",
        ),
        "INSERT INTO templates (template_name, target_model, job_type, use_case, content_mode,"
        " description, is_active, created_at, updated_at) VALUES (NEW.template_name,"
        " COALESCE(NEW.target_model, NEW.model_type), NEW.job_type, NEW.use_case,"
        " NEW.content_mode, COALESCE(NEW.description, ''), COALESCE(NEW.is_active, 1),"
        f" {NOW}, {NOW})",
        f"INSERT INTO template_versions (template_id, version, {', '.join(TEXTS)}, content_hash,"
        " message, created_by, created_at)"
        " SELECT t.id, 1, NEW.system_prompt, COALESCE(NEW.user_template, '{{prompt}}'),"
        " COALESCE(NEW.negative_prompt, ''), COALESCE(NEW.variables, '[]'),"
        " COALESCE(NEW.max_output_tokens, CASE WHEN NEW.job_type IN ('image', 'video')"
        " THEN MIN(2 * NEW.token_limit, 32768) ELSE NEW.token_limit END),"
        " COALESCE(NEW.target_token_limit, CASE WHEN NEW.job_type IN ('image', 'video')"
        " THEN NEW.token_limit END),"
        " NEW.hard_token_limit,"
        " COALESCE(NEW.target_tokenizer, CASE COALESCE(NEW.target_model, NEW.model_type)"
        " WHEN 'sdxl' THEN 'clip' WHEN 'wan' THEN 'umt5' END),"
        " COALESCE(NEW.params, '{}'), 'pending:1', COALESCE(NEW.message, 'made in SQL'),"
        f" COALESCE(NEW.created_by, 'sql'), {NOW}"
        " FROM templates t WHERE t.template_name = NEW.template_name",
        "UPDATE templates SET live_version_id = (SELECT v.id FROM template_versions v"
        " WHERE v.template_id = templates.id AND v.version = 1)"
        " WHERE template_name = NEW.template_name",
    ),
    _trigger(
        "prompt_templates_delete",
        "INSTEAD OF DELETE ON prompt_templates",
        _refuse("a template is not deleted: set is_active = false"),
    ),
]

ENHANCEMENT_LOGS = """CREATE VIEW enhancement_logs AS
SELECT id, created_at, request_id, job_id, user_id, endpoint, template_id, template_name,
    template_version, character_id, model_key, model_source, content_mode, mode_source,
    fallback_level, config_revision, snapshot_age_ms, tokens_in, tokens_out, target_tokens,
    compressed, execution_time_ms, worker_ms, cache_hit, status, error_code
FROM prompt_logs"""

UP = [*REVISION, *GUARDS, PROMPT_TEMPLATES, *VIEW_TRIGGERS, ENHANCEMENT_LOGS]
_NAMES = [statement.split()[2] for statement in (*REVISION, *GUARDS)]
DOWN = [
    "DROP VIEW enhancement_logs",
    "DROP VIEW prompt_templates",
    *(f"DROP TRIGGER {name}" for name in _NAMES),
]
