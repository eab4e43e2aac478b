"""The worker: claims work, runs each attempt in a child process, and tells PostgreSQL what comes of it.

The parent never loads torch; only `worker.child`, which runs as its own process, loads the engine.

    __main__.py    `python -m worker`
    app.py         Celery: hears the doorbell, nothing else
    crew.py        the slots of this process, its heartbeat, its place among the workers
    slot.py        one thread per slot: claim, supervise, again
    supervisor.py  one attempt from its claim to its end
    inputs.py      what an attempt starts from: files, model, resume point
    folder.py      the attempt's folder, where parent and child meet
    lease.py       keeps the lease of one attempt, and reads what is wished
    relay.py       events.jsonl into the job's story
    checkpoints.py the child's checkpoints into storage and rows
    outcome.py     how the child ended, and what that means for the job
    spawn.py       starting, signalling and ending child processes
    locks.py       what is held as long as a worker or its child lives
    gpu.py         which GPUs there are, without torch
    probe.py       whether a kernel runs on them
    sweep.py       disk that ended jobs no longer need
    reasons.py     reasons to fail that parent and child share
    context.py     what every part needs, and outlasting an outage
"""
