"""Keep with a job what memory it needs, and whether it was told that no GPU has it; index the queue by whose turn it is."""

import sqlalchemy as sa
from alembic import op

revision = "d83e1a6f40b7"
down_revision = "c5d2f80b1e64"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index(
        "ix_jobs_turn",
        "jobs",
        ["status", "project_id", sa.text("priority DESC"), "created_at", "id"],
        postgresql_where=sa.text("lease_owner IS NULL AND status IN ('validating_files','queued')"),
    )
    op.add_column("jobs", sa.Column("memory_needed_bytes", sa.BigInteger(), nullable=True))
    op.add_column("jobs", sa.Column("unfit_told_at", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    op.drop_index("ix_jobs_turn", table_name="jobs")
    op.drop_column("jobs", "unfit_told_at")
    op.drop_column("jobs", "memory_needed_bytes")
