"""Create all tables: conversations, responses, items, API keys and their usage per day."""

import sqlalchemy as sa
from alembic import op

revision = "0001_initial"
down_revision = None

_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Create the tables."""
    _create_conversations()
    _create_keys()


def _create_conversations() -> None:
    op.create_table(
        "conversations",
        sa.Column("number", _NUMBER, nullable=False),
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("client", sa.String(64), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.Column("items", sa.Integer(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("lease_owner", sa.String(64), nullable=True),
        sa.Column("lease_until", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("number", name="pk_conversations"),
        sa.UniqueConstraint("id", name="uq_conversations_id"),
    )
    op.create_index("ix_conversations_lease_owner", "conversations", ["lease_owner"])
    columns = ["owner", "client", "number", "created_at", "items", "bytes"]
    op.create_index(f"ix_conversations_{'_'.join(columns)}", "conversations", columns)
    op.create_table(
        "responses",
        sa.Column("number", _NUMBER, nullable=False),
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("client", sa.String(64), nullable=False),
        sa.Column("conversation", _NUMBER, nullable=True),
        sa.Column("previous", sa.String(64), nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("lease_until", sa.Double(), nullable=True),
        sa.Column("body", sa.JSON(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
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
    columns = ["owner", "client", "number", "created_at", "bytes"]
    op.create_index(f"ix_responses_{'_'.join(columns)}", "responses", columns)
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


def _create_keys() -> None:
    op.create_table(
        "keys",
        sa.Column("id", sa.String(12), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("created", sa.BigInteger(), nullable=False),
        sa.Column("expires", sa.BigInteger(), nullable=True),
        sa.Column("revoked", sa.BigInteger(), nullable=True),
        sa.Column("is_admin", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("requests_per_minute", sa.BigInteger(), nullable=True),
        sa.Column("tokens_per_day", sa.BigInteger(), nullable=True),
        sa.Column("at_once", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_keys"),
    )
    working = sa.text("revoked IS NULL")
    op.create_index("ux_keys_name", "keys", ["name"], unique=True, sqlite_where=working, postgresql_where=working)
    op.create_table(
        "key_usage",
        sa.Column("key", sa.String(12), nullable=False),
        sa.Column("day", sa.String(10), nullable=False),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("completion_tokens", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["key"], ["keys.id"], name="fk_key_usage_key_keys"),
        sa.PrimaryKeyConstraint("key", "day", name="pk_key_usage"),
    )
