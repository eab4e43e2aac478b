"""Who works on what: kick (the doorbell), claim, lease, fence, finish, reap. PostgreSQL decides; Celery rings."""
