"""Let a job be paused or preempted, and let the database itself hold that a job has one live attempt at most."""

import sqlalchemy as sa
from alembic import op

revision = "c5d2f80b1e64"
down_revision = "a41c07d95e3b"
branch_labels = None
depends_on = None

_STATUSES = "'validating_files','queued','running',{}'succeeded','failed','cancelled'"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("paused_at", sa.DateTime(timezone=True), nullable=True))
    _allow(statuses=_STATUSES.format("'paused',"), wishes="'run','pause','preempt','cancel'")
    _index_for_claims("'validating_files','queued','running','paused'")
    op.create_index(
        "uq_attempts_live",
        "attempts",
        ["job_id"],
        unique=True,
        postgresql_where=sa.text("ended_at IS NULL"),
    )


def downgrade() -> None:
    # What the older code does not know waits in the queue for it.
    op.execute("UPDATE jobs SET status = 'queued', desired = 'run' WHERE status = 'paused'")
    op.execute("UPDATE jobs SET desired = 'run' WHERE desired = 'preempt'")
    op.drop_index("uq_attempts_live", table_name="attempts")
    _index_for_claims("'validating_files','queued','running'")
    _allow(statuses=_STATUSES.format(""), wishes="'run','pause','cancel'")
    op.drop_column("jobs", "paused_at")


def _allow(*, statuses: str, wishes: str) -> None:
    for name, allowed in (("status", statuses), ("desired", wishes)):
        op.drop_constraint(op.f(f"ck_jobs_{name}"), "jobs", type_="check")
        op.create_check_constraint(op.f(f"ck_jobs_{name}"), "jobs", f"{name} IN ({allowed})")


def _index_for_claims(statuses: str) -> None:
    op.drop_index("ix_jobs_claim", table_name="jobs")
    op.create_index(
        "ix_jobs_claim",
        "jobs",
        ["status", "priority", "created_at"],
        postgresql_where=sa.text(f"status IN ({statuses})"),
    )
