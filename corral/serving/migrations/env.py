"""Alembic's entry point: runs the migrations in `versions` on the connection it was given.

Migrations are written by hand and run in one transaction; `tests/serving/test_database.py` checks that they lose nothing and
produce the tables that the code declares.
"""

from alembic import context

from corral.serving.database import VERSION_TABLE

context.configure(
    connection=context.config.attributes["connection"],
    version_table=VERSION_TABLE,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
