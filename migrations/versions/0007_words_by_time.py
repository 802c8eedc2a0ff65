"""Words of prompts in the order of submission, so that those of a time, a tenant or a batch are found without walking
past all others.

Revision: 0007, after 0006.
"""

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("prompt_words_submitted", "prompt_words", ["created_at", "id"], unique=False)
    op.create_index("prompt_words_submitted_by", "prompt_words", ["tenant", "created_at", "id"], unique=False)
    op.drop_index("prompt_words_batch", table_name="prompt_words")
    op.create_index("prompt_words_submitted_in", "prompt_words", ["batch_id", "created_at", "id"], unique=False)


def downgrade() -> None:
    op.drop_index("prompt_words_submitted_in", table_name="prompt_words")
    op.create_index("prompt_words_batch", "prompt_words", ["batch_id", "first_position"], unique=False)
    op.drop_index("prompt_words_submitted_by", table_name="prompt_words")
    op.drop_index("prompt_words_submitted", table_name="prompt_words")
