"""Work that one replica does at a time: whoever holds the lease does it.

A lease ends by itself, so a replica that dies holds nobody up for longer than it asked for. The
times are the replicas' own clocks: leases are minutes, clocks differ by less.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy import delete, or_, update
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from gateway.store.database import Database
from gateway.store.tables import leases


def take(database: Database, name: str, holder: str, now: datetime, for_s: float) -> bool:
    """Whether `holder` has the lease until `now` + `for_s`; taking it again prolongs it."""
    until = now + timedelta(seconds=for_s)
    with database.transaction() as connection:
        renewed = connection.execute(
            update(leases)
            .where(leases.c.name == name, or_(leases.c.holder == holder, leases.c.until <= now))
            .values(holder=holder, until=until)
        )
        if renewed.rowcount:
            return True
        insert = postgresql_insert if database.is_postgres else sqlite_insert
        # Two that find none at once: the second one's insert waits, and then does nothing.
        taken = connection.execute(
            insert(leases)
            .values(name=name, holder=holder, until=until)
            .on_conflict_do_nothing(index_elements=[leases.c.name])
            # Not the row count: psycopg tells none for an INSERT of this form.
            .returning(leases.c.name)
        )
        return taken.first() is not None


def give_back(database: Database, name: str, holder: str) -> None:
    """End the lease, if `holder` has it."""
    with database.transaction() as connection:
        connection.execute(delete(leases).where(leases.c.name == name, leases.c.holder == holder))
