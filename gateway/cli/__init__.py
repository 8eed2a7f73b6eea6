"""Commands of `python -m gateway`, which work on the database and not over HTTP."""
