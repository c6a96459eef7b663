"""Create the tables of conversations, responses and items."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "conversations",
        sa.Column("number", _NUMBER, nullable=False),
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.Column("items", sa.Integer(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("turn", sa.String(64), nullable=True),
        sa.Column("turn_until", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("number", name="pk_conversations"),
        sa.UniqueConstraint("id", name="uq_conversations_id"),
    )
    op.create_index("ix_conversations_owner_number", "conversations", ["owner", "number"])
    op.create_table(
        "responses",
        sa.Column("number", _NUMBER, nullable=False),
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("conversation", _NUMBER, nullable=True),
        sa.Column("previous", sa.String(64), nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("until", sa.Double(), nullable=True),
        sa.Column("body", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_responses"),
        sa.UniqueConstraint("id", name="uq_responses_id"),
        sa.ForeignKeyConstraint(
            ["conversation"],
            ["conversations.number"],
            name="fk_responses_conversation_conversations",
            ondelete="CASCADE",
        ),
    )
    op.create_index("ix_responses_conversation", "responses", ["conversation"])
    op.create_index("ix_responses_created_at", "responses", ["created_at"])
    op.create_table(
        "items",
        sa.Column("number", _NUMBER, nullable=False),
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("conversation", _NUMBER, nullable=True),
        sa.Column("response", _NUMBER, nullable=True),
        sa.Column("is_output", sa.Boolean(), nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("texts", sa.JSON(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_items"),
        sa.UniqueConstraint("id", name="uq_items_id"),
        sa.ForeignKeyConstraint(
            ["conversation"], ["conversations.number"], name="fk_items_conversation_conversations", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["response"], ["responses.number"], name="fk_items_response_responses", ondelete="SET NULL"
        ),
    )
    op.create_index("ix_items_conversation", "items", ["conversation"])
    op.create_index("ix_items_response", "items", ["response"])
