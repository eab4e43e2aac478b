"""Let a job offer the adapter of an earlier step than its last: the best one's."""

import sqlalchemy as sa
from alembic import op

revision = "a41c07d95e3b"
down_revision = "6dbb71e49726"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("adapter_step", sa.Integer(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "adapter_step")
