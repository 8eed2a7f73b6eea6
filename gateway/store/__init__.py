"""The gateway's database: SQLite by default, PostgreSQL by one URL. SQLAlchemy Core, no ORM."""
