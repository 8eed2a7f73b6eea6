"""The schema's history, for both engines. Run by gateway/store/migration.py, never by hand.

A new revision goes into versions/; `alembic -c` needs no file: env.py takes a connection from its
caller. No revision that was released is changed again.
"""
