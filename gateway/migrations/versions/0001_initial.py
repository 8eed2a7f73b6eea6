"""The first schema: all tables, the triggers that guard them and the views for plain SQL.

A copy of gateway/store/tables.py as it was, so that a later change of that file cannot change what
this revision makes. Triggers and views are texts, one module for each engine.
"""

from __future__ import annotations

from typing import Any

from alembic import op
from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
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

from gateway.migrations import initial_postgresql, initial_sqlite

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)
Time = DateTime(timezone=True)
Json = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
NOW = text("CURRENT_TIMESTAMP")
BigId = BigInteger().with_variant(Integer(), "sqlite")


def _in(column: str, *values: str) -> CheckConstraint:
    listed = ", ".join(f"'{value}'" for value in values)
    return CheckConstraint(f"{column} IN ({listed})", name=column)


def _times() -> list[Column[Any]]:
    return [
        Column("created_at", Time, nullable=False, server_default=NOW),
        Column("updated_at", Time, nullable=False, server_default=NOW),
    ]


Table(
    "config_state",
    metadata,
    Column("id", Integer, CheckConstraint("id = 1", name="one"), primary_key=True),
    Column("revision", BigInteger, nullable=False, server_default="1"),
    Column("changed_at", Time, nullable=False, server_default=NOW),
)

Table(
    "templates",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("template_name", String(120), nullable=False, unique=True),
    Column("target_model", String(120), nullable=False),
    Column("job_type", String(40), nullable=False),
    Column("use_case", String(60), nullable=False),
    Column("content_mode", String(4), _in("content_mode", "sfw", "nsfw"), nullable=False),
    Column("description", Text, nullable=False, server_default=""),
    Column("is_active", Boolean, nullable=False, server_default=text("true")),
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

Table(
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

Table(
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

Table(
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

Table(
    "prompt_rule_tags",
    metadata,
    Column("rule_id", Integer, ForeignKey("prompt_rules.id", ondelete="CASCADE"), primary_key=True),
    Column("tag", String(60), primary_key=True),
)

Table(
    "providers",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String(60), nullable=False, unique=True),
    Column("kind", String(12), _in("kind", "worker", "openai", "catalogue"), nullable=False),
    Column("base_url", Text),
    Column("secret_ref", String(120)),
    Column("is_active", Boolean, nullable=False, server_default=text("true")),
    *_times(),
)

Table(
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

Table(
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

Table(
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
        name="uq_model_parameters_case",
    ),
)

Table(
    "characters",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("owner_id", String(36)),
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

Table(
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

Table(
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

Table(
    "gateway_instances",
    metadata,
    Column("instance_id", String(64), primary_key=True),
    Column("applied_revision", BigInteger, nullable=False),
    Column("applied_at", Time, nullable=False),
    Column("last_seen", Time, nullable=False),
    Column("url", Text),
)

Table(
    "leases",
    metadata,
    Column("name", String(60), primary_key=True),
    Column("holder", String(64), nullable=False),
    Column("until", Time, nullable=False),
)

Table(
    "audit_log",
    metadata,
    Column("id", BigId, primary_key=True),
    Column("at", Time, nullable=False),
    Column("actor", String(120), nullable=False),
    Column("action", String(60), nullable=False),
    Column("subject", String(200), nullable=False),
    Column("revision", BigInteger),
    Column("detail", Json, nullable=False),
    Column("previous_hash", String(64), nullable=False),
    Column("hash", String(64), nullable=False, unique=True),
)

Table(
    "users",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("email", String(320), unique=True),
    Column("tier", String(40), nullable=False, server_default="*"),
    Column("content_mode", String(4), _in("content_mode", "sfw", "nsfw")),
    Column("may_use_nsfw", Boolean, nullable=False, server_default=text("false")),
    Column("is_admin", Boolean, nullable=False, server_default=text("false")),
    Column("is_active", Boolean, nullable=False, server_default=text("true")),
    *_times(),
)

Table(
    "api_keys",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String(120), nullable=False, unique=True),
    Column("prefix", String(16), nullable=False, index=True),
    Column("key_hash", String(64), nullable=False, unique=True),
    Column("scopes", Json, nullable=False),
    Column("user_id", String(36), ForeignKey("users.id")),
    Column("created_at", Time, nullable=False, server_default=NOW),
    Column("expires_at", Time),
    Column("revoked_at", Time),
    Column("last_used_at", Time),
)

Table(
    "workers",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("worker_type", String(8), _in("worker_type", "chat", "sdxl", "wan"), nullable=False),
    Column("url", Text, nullable=False),
    Column("auto_registered", Boolean, nullable=False, server_default=text("false")),
    Column("registration_method", String(120), nullable=False, server_default=""),
    Column("registered_at", Time, nullable=False),
    Column("is_healthy", Boolean),
    Column("last_checked", Time),
    Column("response_time_ms", Float),
    Column("health_error", Text),
    Column("capabilities", Json, nullable=False, server_default="{}"),
    Column("endpoints", Json, nullable=False, server_default="[]"),
    UniqueConstraint("worker_type", "url"),
)

Table(
    "conversations",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("user_id", String(36), nullable=False, index=True),
    Column("character_id", String(36)),
    Column("title", Text, nullable=False, server_default=""),
    *_times(),
)

Table(
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

Table(
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
    Column("payload", Json),
    Column("webhook_sequence", Integer, nullable=False, server_default="-1"),
    Column("request_id", String(64)),
    Column("created_at", Time, nullable=False),
    Column("started_at", Time),
    Column("completed_at", Time),
    Index("ix_jobs_user", "user_id", "created_at"),
)

Table(
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

Table(
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
    Column("model_key", String(200)),
    Column("model_source", String(12)),
    Column("content_mode", String(4)),
    Column("mode_source", String(12)),
    Column("fallback_level", Integer, nullable=False, server_default="0"),
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
)

Table(
    "prompt_log_bodies",
    metadata,
    Column("request_id", String(64), primary_key=True),
    Column("created_at", Time, nullable=False, index=True),
    Column("request", Json, nullable=False),
    Column("messages", Json, nullable=False),
    Column("answer", Text),
    Column("trace", Json, nullable=False),
    Column("config_refs", Json, nullable=False, server_default="[]"),
)

Table(
    "config_objects",
    metadata,
    Column("content_hash", String(64), primary_key=True),
    Column("kind", String(40), nullable=False),
    Column("body", Json, nullable=False),
    Column("created_at", Time, nullable=False, server_default=NOW),
)


def upgrade() -> None:
    connection = op.get_bind()
    metadata.create_all(connection, checkfirst=False)
    initial = initial_postgresql if connection.dialect.name == "postgresql" else initial_sqlite
    for statement in initial.UP:
        connection.exec_driver_sql(statement)
    connection.exec_driver_sql("INSERT INTO config_state (id, revision) VALUES (1, 1)")


def downgrade() -> None:
    connection = op.get_bind()
    initial = initial_postgresql if connection.dialect.name == "postgresql" else initial_sqlite
    for statement in initial.DOWN:
        connection.exec_driver_sql(statement)
    metadata.drop_all(connection, checkfirst=False)
