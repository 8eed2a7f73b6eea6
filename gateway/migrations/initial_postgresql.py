"""Triggers and views of revision 0001 for PostgreSQL; they do what initial_sqlite.py does.

Each function keeps the search path of the migration, so that an edit from a session with another
one still finds config_state. A refusal has the class of an integrity error (23000), which drivers
tell apart from a failure. No percent sign is in here: the driver would read it.
"""

from __future__ import annotations

from gateway.migrations.initial_sqlite import (
    CONFIGURATION,
    ENHANCEMENT_LOGS,
    OWN,
    PROMPT_TEMPLATES,
    TEXTS,
)


def _function(name: str, body: str, declare: str = "") -> str:
    return (
        f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT"
        f" AS $body$ {declare} BEGIN\n{body}\nEND $body$"
    )


def _refuse(text: str) -> str:
    return f"RAISE EXCEPTION USING MESSAGE = '{text}', ERRCODE = '23000';"


def _refusal(name: str, text: str) -> str:
    return _function(name, _refuse(text))


FUNCTIONS = {
    "gateway_raise_revision": _function(
        "gateway_raise_revision",
        """    UPDATE config_state SET revision = revision + 1, changed_at = clock_timestamp()
        WHERE id = 1 RETURNING revision INTO raised;
    PERFORM pg_notify('gateway_config', raised::text);
    RETURN NULL;""",
        "DECLARE raised bigint;",
    ),
    "gateway_revision_rises": _function(
        "gateway_revision_rises",
        "    IF NEW.revision < OLD.revision OR NEW.id <> OLD.id THEN "
        + _refuse("the revision only rises: replicas would not see a change")
        + " END IF;\n    RETURN NEW;",
    ),
    "gateway_revision_stays": _refusal("gateway_revision_stays", "config_state keeps its row"),
    "gateway_version_never_changes": _function(
        "gateway_version_never_changes",
        # The only change allowed: a hash that SQL left open is filled in.
        "    IF left(OLD.content_hash, 8) = 'pending:' AND length(NEW.content_hash) = 64 AND "
        + " AND ".join(
            f"NEW.{name} IS NOT DISTINCT FROM OLD.{name}"
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
        + " THEN RETURN NEW; END IF;\n    "
        + _refuse("a template version never changes: make the next one, as prompt_templates does"),
    ),
    "gateway_version_never_goes": _refusal(
        "gateway_version_never_goes", "a template version is never deleted: logs refer to it"
    ),
    "gateway_template_never_goes": _function(
        "gateway_template_never_goes",
        "    IF EXISTS (SELECT 1 FROM template_versions WHERE template_id = OLD.id) THEN "
        + _refuse("a template with versions is not deleted: set is_active = false")
        + " END IF;\n    RETURN OLD;",
    ),
    "gateway_audit_only_grows": _refusal("gateway_audit_only_grows", "audit_log only grows"),
}

TRIGGERS = [
    *(
        f"CREATE TRIGGER revision_{table} AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON {table}"
        " FOR EACH STATEMENT EXECUTE FUNCTION gateway_raise_revision()"
        for table in CONFIGURATION
    ),
    "CREATE TRIGGER config_state_rises BEFORE UPDATE ON config_state FOR EACH ROW"
    " EXECUTE FUNCTION gateway_revision_rises()",
    "CREATE TRIGGER config_state_stays BEFORE DELETE OR TRUNCATE ON config_state"
    " FOR EACH STATEMENT EXECUTE FUNCTION gateway_revision_stays()",
    "CREATE TRIGGER template_versions_never_change BEFORE UPDATE ON template_versions"
    " FOR EACH ROW EXECUTE FUNCTION gateway_version_never_changes()",
    "CREATE TRIGGER template_versions_never_go BEFORE DELETE OR TRUNCATE ON template_versions"
    " FOR EACH STATEMENT EXECUTE FUNCTION gateway_version_never_goes()",
    "CREATE TRIGGER templates_never_go BEFORE DELETE ON templates FOR EACH ROW"
    " EXECUTE FUNCTION gateway_template_never_goes()",
    "CREATE TRIGGER audit_log_only_grows BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_log"
    " FOR EACH STATEMENT EXECUTE FUNCTION gateway_audit_only_grows()",
]

_CHANGED = " OR ".join(
    f"NEW.{name} IS DISTINCT FROM OLD.{name}" for name in (*TEXTS, "token_limit")
)
_SAME = " AND ".join(f"v.{name} IS NOT DISTINCT FROM NEW.{name}" for name in TEXTS)

VIEW_FUNCTIONS = {
    "gateway_update_prompt_template": _function(
        "gateway_update_prompt_template",
        "    IF "
        + " OR ".join(
            f"NEW.{name} IS DISTINCT FROM OLD.{name}"
            for name in ("id", "content_hash", "message", "created_by", "created_at")
        )
        + f""" THEN
        {_refuse("id, content_hash, message, created_by and created_at are not set here")}
    END IF;
    IF NEW.model_type IS DISTINCT FROM OLD.model_type THEN
        {_refuse("model_type follows api_models: change the default of the task there")}
    END IF;
    IF NEW.version IS DISTINCT FROM OLD.version
        AND NEW.version IS DISTINCT FROM OLD.version + 1 THEN
        {
            _refuse(
                "version is given by the store: leave it, or write version + 1; to go back to"
                " another version set live_version_id"
            )
        }
    END IF;
    changed := {_CHANGED};
    IF NEW.live_version_id IS DISTINCT FROM OLD.live_version_id THEN
        IF changed THEN
            {_refuse("set the text or live_version_id, not both")}
        END IF;
        IF NOT EXISTS (SELECT 1 FROM template_versions v
            WHERE v.id = NEW.live_version_id AND v.template_id = OLD.id) THEN
            {_refuse("live_version_id is no version of this template")}
        END IF;
    END IF;
    live := NEW.live_version_id;
    IF changed THEN
        IF NEW.token_limit IS DISTINCT FROM OLD.token_limit THEN
            IF OLD.target_token_limit IS NULL THEN
                IF NEW.max_output_tokens IS NOT DISTINCT FROM OLD.max_output_tokens THEN
                    NEW.max_output_tokens := NEW.token_limit;
                END IF;
            ELSIF NEW.target_token_limit IS NOT DISTINCT FROM OLD.target_token_limit THEN
                NEW.target_token_limit := NEW.token_limit;
            END IF;
        END IF;
        -- Two sessions that edit one template would take the same number.
        PERFORM 1 FROM templates t WHERE t.id = OLD.id FOR UPDATE;
        SELECT v.id INTO live FROM template_versions v
            WHERE v.template_id = OLD.id AND {_SAME} ORDER BY v.version DESC LIMIT 1;
        IF live IS NULL THEN
            SELECT COALESCE(MAX(v.version), 0) + 1 INTO number FROM template_versions v
                WHERE v.template_id = OLD.id;
            INSERT INTO template_versions (template_id, version, {", ".join(TEXTS)},
                content_hash, message, created_by)
            VALUES (OLD.id, number, {", ".join("NEW." + name for name in TEXTS)},
                'pending:' || number, 'edited in SQL', 'sql ' || session_user)
            RETURNING id INTO live;
        END IF;
    END IF;
    UPDATE templates SET {", ".join(f"{name} = NEW.{name}" for name in OWN)},
        live_version_id = live, updated_at = clock_timestamp() WHERE id = OLD.id;
    RETURN NEW;""",
        "DECLARE changed boolean; live integer; number integer;",
    ),
    "gateway_insert_prompt_template": _function(
        "gateway_insert_prompt_template",
        f"""    IF COALESCE(NEW.version, 1) <> 1 OR NEW.id IS NOT NULL
        OR NEW.live_version_id IS NOT NULL OR NEW.content_hash IS NOT NULL THEN
        {_refuse("the first version is 1: leave version, id, live_version_id and content_hash out")}
    END IF;
    IF NEW.token_limit IS NULL AND NEW.max_output_tokens IS NULL THEN
        {_refuse("a template needs token_limit or max_output_tokens")}
    END IF;
    INSERT INTO templates (template_name, target_model, job_type, use_case, content_mode,
        description, is_active)
    VALUES (NEW.template_name, COALESCE(NEW.target_model, NEW.model_type), NEW.job_type,
        NEW.use_case, NEW.content_mode, COALESCE(NEW.description, ''),
        COALESCE(NEW.is_active, true))
    RETURNING id INTO template;
    INSERT INTO template_versions (template_id, version, {", ".join(TEXTS)}, content_hash,
        message, created_by)
    VALUES (template, 1, NEW.system_prompt,
        COALESCE(NEW.user_template, '{{{{prompt}}}}'),
        COALESCE(NEW.negative_prompt, ''), COALESCE(NEW.variables, '[]'),
        COALESCE(NEW.max_output_tokens, CASE WHEN NEW.job_type IN ('image', 'video')
            THEN LEAST(2 * NEW.token_limit, 32768) ELSE NEW.token_limit END),
        COALESCE(NEW.target_token_limit, CASE WHEN NEW.job_type IN ('image', 'video')
            THEN NEW.token_limit END),
        NEW.hard_token_limit,
        COALESCE(NEW.target_tokenizer, CASE COALESCE(NEW.target_model, NEW.model_type)
            WHEN 'sdxl' THEN 'clip' WHEN 'wan' THEN 'umt5' END),
        COALESCE(NEW.params, '{{}}'), 'pending:1', COALESCE(NEW.message, 'made in SQL'),
        COALESCE(NEW.created_by, 'sql ' || session_user))
    RETURNING id INTO live;
    UPDATE templates SET live_version_id = live WHERE id = template;
    NEW.id := template;
    NEW.version := 1;
    NEW.live_version_id := live;
    RETURN NEW;""",
        "DECLARE template integer; live integer;",
    ),
    "gateway_delete_prompt_template": _refusal(
        "gateway_delete_prompt_template", "a template is not deleted: set is_active = false"
    ),
}

VIEW_TRIGGERS = [
    f"CREATE TRIGGER prompt_templates_{event} INSTEAD OF {event.upper()} ON prompt_templates"
    f" FOR EACH ROW EXECUTE FUNCTION gateway_{event}_prompt_template()"
    for event in ("update", "insert", "delete")
]

UP = [
    *FUNCTIONS.values(),
    *TRIGGERS,
    PROMPT_TEMPLATES,
    *VIEW_FUNCTIONS.values(),
    *VIEW_TRIGGERS,
    ENHANCEMENT_LOGS,
]
DOWN = [
    "DROP VIEW enhancement_logs",
    "DROP VIEW prompt_templates",
    *(
        f"DROP TRIGGER {statement.split()[2]} ON {statement.split(' ON ')[1].split()[0]}"
        for statement in TRIGGERS
    ),
    *(f"DROP FUNCTION {name}()" for name in (*FUNCTIONS, *VIEW_FUNCTIONS)),
]
