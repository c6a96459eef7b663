"""Add the size of responses, and indexes to sum up an owner's share of the store."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_ROW_BYTES = 256


def upgrade() -> None:
    """Add the column, filled for existing responses, and the indexes."""
    op.add_column("responses", sa.Column("bytes", sa.BigInteger(), nullable=False, server_default="0"))
    op.execute(
        "UPDATE responses SET bytes = "
        f"LENGTH(CAST(body AS TEXT)) + {_ROW_BYTES} + COALESCE((SELECT SUM(items.bytes + {_ROW_BYTES}) FROM items "
        "WHERE items.response = responses.number AND items.conversation IS NULL), 0)"
    )
    op.create_index("ix_responses_owner_number_bytes", "responses", ["owner", "number", "bytes"])
    op.create_index("ix_conversations_owner_items_bytes", "conversations", ["owner", "items", "bytes"])
