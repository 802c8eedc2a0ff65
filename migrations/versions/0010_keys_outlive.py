"""The idempotency key of a submission stays when what came of it is deleted, so that asking again submits nothing.

Revision: 0010, after 0009.
"""

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

WITH_IT = "what came of it."
OUTLIVES_IT = "what came of it; both NULL: it was deleted."


def upgrade() -> None:
    _refer("SET NULL")
    op.alter_column("submissions", "batch_id", comment=OUTLIVES_IT, existing_comment=WITH_IT)


def downgrade() -> None:
    op.execute("DELETE FROM submissions WHERE job_id IS NULL AND batch_id IS NULL")
    _refer("CASCADE")
    op.alter_column("submissions", "batch_id", comment=WITH_IT, existing_comment=OUTLIVES_IT)


def _refer(on_delete: str) -> None:
    """What becomes of a key when its job or batch is deleted."""
    for column, table in (("job_id", "jobs"), ("batch_id", "batches")):
        name = f"submissions_{column}_fkey"
        op.drop_constraint(name, "submissions", type_="foreignkey")
        op.create_foreign_key(
            name,
            "submissions",
            table,
            [column],
            ["id"],
            ondelete=on_delete,
            deferrable=True,
            initially="DEFERRED",
        )
