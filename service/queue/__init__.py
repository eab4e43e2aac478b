"""Who works on what: kick (the doorbell), claim, lease, fence, finish, reap. PostgreSQL decides; Celery rings.

broker.py      one Celery configuration, for those who ring and those who listen
kick.py        ring: wake up, nothing else
claim.py       take the next piece of work: attempt number, lease, event
fence.py       the right to write: only the newest attempt, only while it holds the lease
lease.py       renew it, read the wish (`desired`), give up what dead workers left
finish.py      every way an attempt ends
reap.py        leases that ran out
workers.py     the workers' own rows
fit.py         which jobs a GPU has room for
unfit.py       telling a job that none has
expectation.py a job's place in the line, and when it should start
overview.py    the queue and the workers as a project may see them
background.py  the loops of the API's process: reap, ring again, expire
repository.py  the SQL
"""
