"""The comments of ``deletions`` tell that uploads are noted in it too, until their rows are there.

Revision: 0009, after 0008.
"""

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

ROWS_WENT = "What is still to go from the bucket, since its rows went; the sweep removes a row when it has."
OR_NEVER_CAME = (
    "What is to go from the bucket: its rows went, or never came, as of an upload that was broken off;"
    " the sweep removes a row when it has gone."
)
COLUMNS = (
    ("tenant", "Whose images they were.", "Whose objects they are."),
    ("deleted_at", "When the rows went; never changes.", "When that was noted; never changes."),
)


def upgrade() -> None:
    op.create_table_comment("deletions", OR_NEVER_CAME, existing_comment=ROWS_WENT)
    for column, before, after in COLUMNS:
        op.alter_column("deletions", column, comment=after, existing_comment=before)


def downgrade() -> None:
    op.create_table_comment("deletions", ROWS_WENT, existing_comment=OR_NEVER_CAME)
    for column, before, after in COLUMNS:
        op.alter_column("deletions", column, comment=before, existing_comment=after)
