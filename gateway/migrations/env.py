"""What Alembic runs for every command: on the connection and in the transaction of its caller.

Alembic executes this file instead of importing it, so the call at its end is meant.
"""

from __future__ import annotations

from alembic import context

from gateway.store.tables import metadata


def run() -> None:
    context.configure(
        connection=context.config.attributes["connection"],
        target_metadata=metadata,
        compare_type=True,
        # The caller's transaction holds everything, on SQLite as well.
        transactional_ddl=True,
        transaction_per_migration=False,
    )
    context.run_migrations()


run()
