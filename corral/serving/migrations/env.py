"""What alembic runs to migrate: the revisions in `versions`, over the connection it was given. Knows no tables.

A migration is written by hand, runs in one transaction, and loses nothing; `tests/serving/test_database.py` holds that the
tables it leaves are those that the code declares.
"""

from alembic import context

from corral.serving.database import VERSIONS

context.configure(
    connection=context.config.attributes["connection"],
    version_table=VERSIONS,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
