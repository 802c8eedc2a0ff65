"""Idempotency keys of submissions are kept for some days, and found by their age.

Revision: 0008, after 0007.
"""

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

FOR_GOOD = "One row per idempotency key, written in the submitting transaction; kept as long as what came of it."
FOR_DAYS = "One row per idempotency key, written in the submitting transaction; kept for some days."


def upgrade() -> None:
    op.create_index("submissions_created", "submissions", ["created_at"], unique=False)
    op.create_table_comment("submissions", FOR_DAYS, existing_comment=FOR_GOOD)


def downgrade() -> None:
    op.create_table_comment("submissions", FOR_GOOD, existing_comment=FOR_DAYS)
    op.drop_index("submissions_created", table_name="submissions")
