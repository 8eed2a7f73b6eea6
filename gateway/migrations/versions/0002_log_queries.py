"""What lists of log rows are found by: an index for each filter, and the flags as rows."""

from __future__ import annotations

from alembic import op
from sqlalchemy import (
    BigInteger,
    Column,
    DateTime,
    ForeignKeyConstraint,
    Integer,
    PrimaryKeyConstraint,
    String,
    text,
)

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

PARTIAL = {
    "ix_prompt_logs_error": ("error_code", "error_code IS NOT NULL"),
    "ix_prompt_logs_fallback": ("fallback_level", "fallback_level > 0"),
}
WHOLE = {"ix_prompt_logs_endpoint": "endpoint", "ix_prompt_logs_model": "model_key"}
# Flags of the rows that are there.
COPY = {
    "sqlite": "SELECT DISTINCT substr(one.value, 1, 60), created_at, prompt_logs.id"
    " FROM prompt_logs, json_each(prompt_logs.flags) AS one",
    "postgresql": "SELECT DISTINCT left(one.value, 60), created_at, prompt_logs.id"
    " FROM prompt_logs, jsonb_array_elements_text(prompt_logs.flags) AS one(value)",
}


def upgrade() -> None:
    for name, column in WHOLE.items():
        op.create_index(name, "prompt_logs", [column, "created_at"])
    for name, (column, where) in PARTIAL.items():
        op.create_index(
            name,
            "prompt_logs",
            [column, "created_at"],
            sqlite_where=text(where),
            postgresql_where=text(where),
        )
    op.create_table(
        "prompt_log_flags",
        Column("flag", String(60), nullable=False),
        Column("created_at", DateTime(timezone=True), nullable=False),
        Column("log_id", BigInteger().with_variant(Integer(), "sqlite"), nullable=False),
        PrimaryKeyConstraint("flag", "created_at", "log_id", name="pk_prompt_log_flags"),
        ForeignKeyConstraint(
            ["log_id"],
            ["prompt_logs.id"],
            ondelete="CASCADE",
            name="fk_prompt_log_flags_log_id",
        ),
    )
    copied = COPY[op.get_bind().dialect.name]
    op.execute(f"INSERT INTO prompt_log_flags (flag, created_at, log_id) {copied}")
    op.create_index("ix_prompt_log_flags_log_id", "prompt_log_flags", ["log_id"])
    op.create_index("ix_config_objects_created_at", "config_objects", ["created_at"])


def downgrade() -> None:
    op.drop_index("ix_config_objects_created_at", "config_objects")
    op.drop_table("prompt_log_flags")
    for name in (*PARTIAL, *WHOLE):
        op.drop_index(name, "prompt_logs")
