"""Every table, as both engines have it. Migrations make them; triggers and views are only there.

Configuration tables (CONFIGURATION) raise config_state.revision on every change, by triggers, so
that edits in plain SQL are seen as well.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import TypeDecorator

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class UtcDateTime(TypeDecorator[datetime]):
    """Aware UTC datetimes. timestamptz on PostgreSQL; on SQLite text "YYYY-MM-DD HH:MM:SS.ffffff",
    which sorts and compares with datetime('now', …)."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time without a zone")
        utc = value.astimezone(UTC)
        return utc.replace(tzinfo=None) if dialect.name == "sqlite" else utc

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


Json = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
Time = UtcDateTime
NOW = text("CURRENT_TIMESTAMP")
# SQLite numbers only INTEGER keys by itself.
BigId = BigInteger().with_variant(Integer(), "sqlite")


def _in(column: str, *values: str) -> CheckConstraint:
    listed = ", ".join(f"'{value}'" for value in values)
    return CheckConstraint(f"{column} IN ({listed})", name=column)


def _times() -> list[Column[Any]]:
    return [
        Column("created_at", Time, nullable=False, server_default=NOW),
        Column("updated_at", Time, nullable=False, server_default=NOW),
    ]


# --- configuration ----------------------------------------------------------------------------

config_state = Table(
    "config_state",
    metadata,
    Column("id", Integer, CheckConstraint("id = 1", name="one"), primary_key=True),
    Column("revision", BigInteger, nullable=False, server_default="1"),
    Column("changed_at", Time, nullable=False, server_default=NOW),
)

templates = Table(
    "templates",
    metadata,
    # Said, since a column of a composite foreign key is else taken for one that is given.
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("template_name", String(120), nullable=False, unique=True),
    Column("target_model", String(120), nullable=False),
    Column("job_type", String(40), nullable=False),
    Column("use_case", String(60), nullable=False),
    Column("content_mode", String(4), _in("content_mode", "sfw", "nsfw"), nullable=False),
    Column("description", Text, nullable=False, server_default=""),
    Column("is_active", Boolean, nullable=False, server_default=text("true")),
    # NULL only between the insert of a template and of its first version.
    Column("live_version_id", Integer),
    *_times(),
    ForeignKeyConstraint(
        ["id", "live_version_id"],
        ["template_versions.template_id", "template_versions.id"],
        name="fk_templates_live_version",
        use_alter=True,
        deferrable=True,
        initially="DEFERRED",
    ),
    Index(
        "uq_templates_active_tuple",
        "target_model",
        "job_type",
        "use_case",
        "content_mode",
        unique=True,
        sqlite_where=text("is_active"),
        postgresql_where=text("is_active"),
    ),
)

# Rows never change and never go: triggers refuse.
template_versions = Table(
    "template_versions",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("template_id", Integer, ForeignKey("templates.id"), nullable=False),
    Column("version", Integer, CheckConstraint("version >= 1", name="version"), nullable=False),
    Column("system_prompt", Text, nullable=False),
    Column("user_template", Text, nullable=False, server_default="{{prompt}}"),
    Column("negative_prompt", Text, nullable=False, server_default=""),
    Column("variables", Json, nullable=False, server_default="[]"),
    Column(
        "max_output_tokens",
        Integer,
        CheckConstraint("max_output_tokens BETWEEN 1 AND 32768", name="max_output_tokens"),
        nullable=False,
    ),
    Column("target_token_limit", Integer),
    Column("hard_token_limit", Integer),
    Column("target_tokenizer", String(40)),
    Column("params", Json, nullable=False, server_default="{}"),
    Column("content_hash", String(64), nullable=False),
    Column("message", Text, nullable=False, server_default=""),
    Column("created_by", String(120), nullable=False, server_default=""),
    Column("created_at", Time, nullable=False, server_default=NOW),
    UniqueConstraint("template_id", "version"),
    UniqueConstraint("template_id", "content_hash"),
    UniqueConstraint("template_id", "id"),
)

template_labels = Table(
    "template_labels",
    metadata,
    Column("template_id", Integer, ForeignKey("templates.id"), primary_key=True),
    Column("label", String(60), primary_key=True),
    Column("version_id", Integer, nullable=False),
    ForeignKeyConstraint(
        ["template_id", "version_id"],
        ["template_versions.template_id", "template_versions.id"],
        name="fk_template_labels_version",
    ),
)

prompt_rules = Table(
    "prompt_rules",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String(120), nullable=False, unique=True),
    Column("rule_type", String(8), _in("rule_type", "prepend", "append"), nullable=False),
    Column("slot", String(8), _in("slot", "system", "user", "negative"), nullable=False),
    Column("body", Text, nullable=False),
    Column("match", Json, nullable=False, server_default="{}"),
    Column("priority", Integer, nullable=False, server_default="0"),
    Column("exclusive_group", String(60)),
    Column("max_tokens", Integer),
    Column("is_optional", Boolean, nullable=False, server_default=text("false")),
    Column("is_active", Boolean, nullable=False, server_default=text("true")),
    *_times(),
)

prompt_rule_tags = Table(
    "prompt_rule_tags",
    metadata,
    Column("rule_id", Integer, ForeignKey("prompt_rules.id", ondelete="CASCADE"), primary_key=True),
    Column("tag", String(60), primary_key=True),
)

providers = Table(
    "providers",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String(60), nullable=False, unique=True),
    Column("kind", String(12), _in("kind", "worker", "openai", "catalogue"), nullable=False),
    Column("base_url", Text),
    Column("secret_ref", String(120)),  # the name of an environment variable, never a secret
    Column("is_active", Boolean, nullable=False, server_default=text("true")),
    *_times(),
)

llm_models = Table(
    "llm_models",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("provider_id", Integer, ForeignKey("providers.id"), nullable=False),
    Column("external_id", String(200), nullable=False),
    Column("model_name", String(200), nullable=False),
    Column("model_key", String(200), nullable=False, unique=True),
    Column("capabilities", Json, nullable=False, server_default="{}"),
    Column("is_active", Boolean, nullable=False, server_default=text("true")),
    Column("display_order", Integer, nullable=False, server_default="0"),
    Column("first_seen_at", Time, nullable=False, server_default=NOW),
    Column("last_synced_at", Time),
    Column("missing_since", Time),
    UniqueConstraint("provider_id", "external_id"),
)

api_models = Table(
    "api_models",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("llm_model_id", Integer, ForeignKey("llm_models.id"), nullable=False),
    Column("display_name", String(200), nullable=False),
    Column("model_key", String(200), ForeignKey("llm_models.model_key"), nullable=False),
    Column("modality", String(8), _in("modality", "chat", "image", "video"), nullable=False),
    Column("task", String(40), nullable=False),
    Column("is_default", Boolean, nullable=False, server_default=text("false")),
    Column("is_active", Boolean, nullable=False, server_default=text("true")),
    Column("priority", Integer, nullable=False, server_default="0"),
    *_times(),
    UniqueConstraint("llm_model_id", "modality", "task"),
    CheckConstraint("is_active OR NOT is_default", name="default_is_active"),
    Index(
        "uq_api_models_default",
        "modality",
        "task",
        unique=True,
        sqlite_where=text("is_default"),
        postgresql_where=text("is_default"),
    ),
)

model_parameters = Table(
    "model_parameters",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("model_key", String(200), nullable=False, server_default="*"),
    Column("job_type", String(40), nullable=False, server_default="*"),
    Column("profile", String(8), _in("profile", "fast", "high", "*"), nullable=False),
    Column("user_tier", String(40), nullable=False, server_default="*"),
    Column("character_id", String(36), nullable=False, server_default="*"),
    Column("params", Json, nullable=False, server_default="{}"),
    *_times(),
    UniqueConstraint(
        "model_key",
        "job_type",
        "profile",
        "user_tier",
        "character_id",
        name="uq_model_parameters_case",  # PostgreSQL cuts names at 63 bytes
    ),
)

characters = Table(
    "characters",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("owner_id", String(36)),  # NULL: everybody's
    Column("name", String(120), nullable=False),
    Column("persona", Text, nullable=False, server_default=""),
    Column("tags", Json, nullable=False, server_default="[]"),
    Column("system_prompt", Text, nullable=False, server_default=""),
    Column("voice_tone", String(200), nullable=False, server_default=""),
    Column("mood", String(200), nullable=False, server_default=""),
    Column("content_rating", String(4), _in("content_rating", "sfw", "nsfw"), nullable=False),
    Column("defaults", Json, nullable=False, server_default="{}"),
    Column("card", Json, nullable=False, server_default="{}"),
    Column("is_active", Boolean, nullable=False, server_default=text("true")),
    *_times(),
)

character_loras = Table(
    "character_loras",
    metadata,
    Column("id", Integer, primary_key=True),
    Column(
        "character_id", String(36), ForeignKey("characters.id", ondelete="CASCADE"), nullable=False
    ),
    Column("lora_ref", String(200), nullable=False),
    Column(
        "weight",
        Float,
        CheckConstraint("weight BETWEEN -2 AND 2", name="weight"),
        nullable=False,
        server_default="1",
    ),
    Column("target_model", String(120), nullable=False, server_default="*"),
    Column("trigger_words", Json, nullable=False, server_default="[]"),
    UniqueConstraint("character_id", "lora_ref", "target_model"),
)

negative_prompts = Table(
    "negative_prompts",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("target_model", String(120), nullable=False),
    Column("content_mode", String(4), _in("content_mode", "sfw", "nsfw"), nullable=False),
    Column(
        "generation_mode",
        String(8),
        _in("generation_mode", "txt2img", "i2i"),
        nullable=False,
        server_default="txt2img",
    ),
    Column("negative_prompt", Text, nullable=False),
    Column("priority", Integer, nullable=False, server_default="0"),
    Column("is_active", Boolean, nullable=False, server_default=text("true")),
    *_times(),
    UniqueConstraint(
        "target_model",
        "content_mode",
        "generation_mode",
        "negative_prompt",
        name="uq_negative_prompts_text",
    ),
)

CONFIGURATION = (
    templates,
    template_versions,
    template_labels,
    prompt_rules,
    prompt_rule_tags,
    providers,
    llm_models,
    api_models,
    model_parameters,
    characters,
    character_loras,
    negative_prompts,
)

# --- replicas, people, workers ----------------------------------------------------------------

gateway_instances = Table(
    "gateway_instances",
    metadata,
    Column("instance_id", String(64), primary_key=True),
    Column("applied_revision", BigInteger, nullable=False),
    Column("applied_at", Time, nullable=False),
    Column("last_seen", Time, nullable=False),
    Column("url", Text),
)

# Held by one replica at a time: refresh, retention. A lease that ended may be taken.
leases = Table(
    "leases",
    metadata,
    Column("name", String(60), primary_key=True),
    Column("holder", String(64), nullable=False),
    Column("until", Time, nullable=False),
)

# Each row has the hash of the one before it, so a row that was changed or taken away shows.
audit_log = Table(
    "audit_log",
    metadata,
    Column("id", BigId, primary_key=True),
    Column("at", Time, nullable=False),
    Column("actor", String(120), nullable=False),
    Column("action", String(60), nullable=False),
    Column("subject", String(200), nullable=False),  # table/key
    Column("revision", BigInteger),
    Column("detail", Json, nullable=False),
    Column("previous_hash", String(64), nullable=False),
    Column("hash", String(64), nullable=False, unique=True),
)

users = Table(
    "users",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("email", String(320), unique=True),
    Column("tier", String(40), nullable=False, server_default="*"),
    Column("content_mode", String(4), _in("content_mode", "sfw", "nsfw")),  # own setting
    Column("may_use_nsfw", Boolean, nullable=False, server_default=text("false")),
    Column("is_admin", Boolean, nullable=False, server_default=text("false")),
    Column("is_active", Boolean, nullable=False, server_default=text("true")),
    *_times(),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String(120), nullable=False, unique=True),
    Column("prefix", String(16), nullable=False, index=True),  # shown; finds the row
    Column("key_hash", String(64), nullable=False, unique=True),  # SHA-256 (hex) of the whole key
    Column("scopes", Json, nullable=False),  # call | worker | viewer | editor | publisher | admin
    Column("user_id", String(36), ForeignKey("users.id")),  # whose rows it sees; NULL: of nobody
    Column("created_at", Time, nullable=False, server_default=NOW),
    Column("expires_at", Time),
    Column("revoked_at", Time),
    Column("last_used_at", Time),
)

workers = Table(
    "workers",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("worker_type", String(8), _in("worker_type", "chat", "sdxl", "wan"), nullable=False),
    Column("url", Text, nullable=False),
    Column("auto_registered", Boolean, nullable=False, server_default=text("false")),
    Column("registration_method", String(120), nullable=False, server_default=""),
    Column("registered_at", Time, nullable=False),
    Column("is_healthy", Boolean),  # NULL: never looked at
    Column("last_checked", Time),
    Column("response_time_ms", Float),
    Column("health_error", Text),
    Column("capabilities", Json, nullable=False, server_default="{}"),
    Column("endpoints", Json, nullable=False, server_default="[]"),
    UniqueConstraint("worker_type", "url"),
)

# --- what people made -------------------------------------------------------------------------

conversations = Table(
    "conversations",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("user_id", String(36), nullable=False, index=True),
    Column("character_id", String(36)),
    Column("title", Text, nullable=False, server_default=""),
    *_times(),
)

conversation_messages = Table(
    "conversation_messages",
    metadata,
    Column("id", BigId, primary_key=True),
    Column(
        "conversation_id",
        String(36),
        ForeignKey("conversations.id", ondelete="CASCADE"),
        nullable=False,
        index=True,
    ),
    Column("role", String(9), _in("role", "user", "assistant"), nullable=False),
    Column("content", Text, nullable=False),
    Column("request_id", String(64)),
    Column("created_at", Time, nullable=False, server_default=NOW),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("user_id", String(36), nullable=False),
    Column("job_type", String(60), nullable=False),
    Column(
        "status",
        String(10),
        _in("status", "queued", "processing", "completed", "failed", "cancelled"),
        nullable=False,
    ),
    Column("error_message", Text),
    Column("metadata", Json, nullable=False, server_default="{}"),
    Column("format", String(8)),
    Column("quality", String(8)),
    Column("model_type", String(60)),
    Column("original_prompt", Text, nullable=False, server_default=""),
    Column("enhanced_prompt", Text),
    Column("negative_prompt", Text),
    Column("template_name", String(120)),
    Column("enhancement_strategy", String(120)),
    Column("enhancement_time_ms", Float),
    Column("queue_name", String(60)),
    Column("payload", Json),  # what was pushed; for people, until the job ends
    Column("webhook_sequence", Integer, nullable=False, server_default="-1"),
    Column("request_id", String(64)),  # of the enhancement
    Column("created_at", Time, nullable=False),
    Column("started_at", Time),
    Column("completed_at", Time),
    Index("ix_jobs_user", "user_id", "created_at"),
)

workspace_assets = Table(
    "workspace_assets",
    metadata,
    Column("id", BigId, primary_key=True),
    Column("job_id", String(36), ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("user_id", String(36), nullable=False, index=True),
    Column("asset_index", Integer, nullable=False),
    Column("asset_type", String(8), _in("asset_type", "image", "video"), nullable=False),
    Column("temp_storage_path", Text, nullable=False),
    Column("thumbnail_path", Text),
    Column("mime_type", String(60), nullable=False),
    Column("file_size_bytes", BigInteger, nullable=False, server_default="0"),
    Column("duration_seconds", Float),
    Column("width", Integer),
    Column("height", Integer),
    Column("generation_seed", BigInteger),
    Column("original_prompt", Text, nullable=False, server_default=""),
    Column("model_used", String(120), nullable=False, server_default=""),
    Column("generation_settings", Json, nullable=False, server_default="{}"),
    Column("created_at", Time, nullable=False, server_default=NOW),
    UniqueConstraint("job_id", "asset_index"),
)

# --- logs -------------------------------------------------------------------------------------

prompt_logs = Table(
    "prompt_logs",
    metadata,
    Column("id", BigId, primary_key=True),
    Column("created_at", Time, nullable=False),
    Column("request_id", String(64), nullable=False, unique=True),
    Column("job_id", String(36)),
    Column("user_id", String(36)),
    Column("endpoint", String(80), nullable=False),
    Column("template_id", Integer),
    Column("template_name", String(120)),
    Column("template_version", Integer),
    Column("rule_ids", Json, nullable=False, server_default="[]"),
    Column("character_id", String(36)),
    Column("model_key", String(200)),  # that answered
    Column("model_source", String(12)),  # user | default | priority | last_resort
    Column("content_mode", String(4)),
    Column("mode_source", String(12)),  # explicit | user_setting | character | detected
    Column("fallback_level", Integer, nullable=False, server_default="0"),  # 0 … 2, of prompts
    Column("config_revision", BigInteger),
    Column("snapshot_age_ms", Float),
    Column("tokens_in", Integer),
    Column("tokens_out", Integer),
    Column("target_tokens", Integer),
    Column("compressed", Boolean, nullable=False, server_default=text("false")),
    Column("execution_time_ms", Float, nullable=False),
    Column("worker_ms", Float),
    Column("cache_hit", Boolean),
    Column("flags", Json, nullable=False, server_default="[]"),
    Column("messages_sha256", String(64)),
    Column("prompt_ids_sha256", String(64)),
    Column("status", Integer, nullable=False, server_default="200"),
    Column("error_code", String(60)),
    Index("ix_prompt_logs_created_at", "created_at"),
    Index("ix_prompt_logs_template", "template_name", "created_at"),
    Index("ix_prompt_logs_user", "user_id", "created_at"),
    # One for each column that lists are filtered by; those that are empty as a rule in part only.
    Index("ix_prompt_logs_endpoint", "endpoint", "created_at"),
    Index("ix_prompt_logs_model", "model_key", "created_at"),
    Index(
        "ix_prompt_logs_error",
        "error_code",
        "created_at",
        sqlite_where=text("error_code IS NOT NULL"),
        postgresql_where=text("error_code IS NOT NULL"),
    ),
    Index(
        "ix_prompt_logs_fallback",
        "fallback_level",
        "created_at",
        sqlite_where=text("fallback_level > 0"),
        postgresql_where=text("fallback_level > 0"),
    ),
)

# The flags of prompt_logs once more, since neither engine finds the newest rows with a flag in a
# JSON column by an index.
prompt_log_flags = Table(
    "prompt_log_flags",
    metadata,
    Column("flag", String(60), primary_key=True),
    Column("created_at", Time, primary_key=True),  # of the row
    Column(
        "log_id",
        BigId,
        ForeignKey("prompt_logs.id", ondelete="CASCADE"),
        primary_key=True,
        autoincrement=False,
        index=True,
    ),
)

# Texts, with a retention of their own; none where bodies are switched off.
prompt_log_bodies = Table(
    "prompt_log_bodies",
    metadata,
    Column("request_id", String(64), primary_key=True),
    Column("created_at", Time, nullable=False, index=True),
    Column("request", Json, nullable=False),  # AssembleRequest, for replay
    Column("messages", Json, nullable=False),
    Column("answer", Text),
    Column("trace", Json, nullable=False),
    # Hashes of config_objects: the rows that were used, as they were then.
    Column("config_refs", Json, nullable=False, server_default="[]"),
)

config_objects = Table(
    "config_objects",
    metadata,
    Column("content_hash", String(64), primary_key=True),
    Column("kind", String(40), nullable=False),
    Column("body", Json, nullable=False),
    # Last used, to the hour: retention takes what no body can refer to any more.
    Column("created_at", Time, nullable=False, server_default=NOW),
    Index("ix_config_objects_created_at", "created_at"),
)
