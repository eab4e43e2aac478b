from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from service import clock
from service.queue.claim import Claim
from service.tables import Attempt, Event, Job, Project

MakeJob = Callable[..., str]
MakeClaim = Callable[..., Claim | None]


def ids(claims: list[Claim | None]) -> list[str | None]:
    return [None if claim is None else claim.job.id for claim in claims]


def test_a_queued_job_becomes_a_running_attempt_with_a_lease(
    make_job: MakeJob, make_claim: MakeClaim, session: Session
) -> None:
    job_id = make_job()

    claim = make_claim(lease_s=60)

    assert claim is not None
    job = session.get_one(Job, job_id)
    assert (job.status, job.attempt_no, job.lease_owner) == ("running", 1, "worker_a")
    assert job.lease_until is not None
    left = session.scalar(text("SELECT extract(epoch FROM lease_until - now()) FROM jobs"))
    assert 55 < left <= 60
    attempt = session.get_one(Attempt, (job_id, 1))
    assert (attempt.kind, attempt.worker_id, attempt.outcome) == ("train", "worker_a", None)
    assert session.scalars(select(Event.message)).all() == ["Fine-tuning job started"]


def test_a_validation_keeps_its_status_and_says_which_files(
    make_job: MakeJob, make_claim: MakeClaim, session: Session
) -> None:
    job_id = make_job(status="validating_files")

    claim = make_claim("validate")

    assert claim is not None
    job = session.get_one(Job, job_id)
    assert (job.status, job.lease_owner) == ("validating_files", "worker_a")
    messages = session.scalars(select(Event.message)).all()
    assert messages == [f"Validating training file: {job.training_file}"]


def test_each_kind_claims_only_its_own_and_nothing_twice(
    make_job: MakeJob, make_claim: MakeClaim
) -> None:
    waiting = make_job()
    checking = make_job(status="validating_files")

    claims = [make_claim("validate"), make_claim("validate"), make_claim(), make_claim()]

    assert ids(claims) == [checking, None, waiting, None]


def test_higher_priority_goes_first_then_the_older(
    make_job: MakeJob, make_claim: MakeClaim
) -> None:
    older, younger, urgent = make_job(), make_job(), make_job(priority=5)

    claims = [make_claim() for _ in range(3)]

    assert ids(claims) == [urgent, older, younger]


def test_a_project_that_runs_less_for_its_weight_goes_first(
    make_job: MakeJob, make_claim: MakeClaim, session: Session
) -> None:
    for _ in range(4):
        make_job(project_id="proj_one")
    for _ in range(4):
        make_job(project_id="proj_two")
    session.get_one(Project, "proj_two").weight = 2
    session.commit()

    claims = [make_claim() for _ in range(6)]

    projects = [claim.job.project_id for claim in claims if claim is not None]
    assert Counter(projects) == {"proj_one": 2, "proj_two": 4}


def test_a_job_that_must_wait_or_is_not_to_run_is_left_alone(
    make_job: MakeJob, make_claim: MakeClaim
) -> None:
    make_job(not_before=clock.now() + timedelta(hours=1))
    make_job(desired="cancel")
    ripe = make_job(not_before=clock.now() - timedelta(seconds=1))

    claims = [make_claim(), make_claim()]

    assert ids(claims) == [ripe, None]


def test_many_claimers_at_once_never_share_a_job(make_job: MakeJob, make_claim: MakeClaim) -> None:
    jobs = {make_job() for _ in range(12)}

    with ThreadPoolExecutor(8) as pool:
        claims = list(pool.map(lambda n: make_claim(worker_id=f"worker_{n}"), range(20)))

    taken = [claim.job.id for claim in claims if claim is not None]
    assert len(taken) == 12
    assert set(taken) == jobs


def test_a_job_that_somebody_has_locked_is_passed_over_for_the_next_one(
    make_job: MakeJob, make_claim: MakeClaim, session: Session
) -> None:
    first, second, third = make_job(), make_job(), make_job()
    locked = select(Job).where(Job.id.in_([first, second])).with_for_update()
    session.execute(locked)

    past_the_lock = make_claim()
    session.rollback()
    then = [make_claim(), make_claim()]

    assert ids([past_the_lock, *then]) == [third, first, second]


def test_a_job_that_was_trained_before_is_started_again_and_a_validated_one_is_not(
    make_job: MakeJob, make_claim: MakeClaim, session: Session
) -> None:
    for kind in ("validate", "train"):
        job_id = make_job(attempt_no=1)
        attempt = Attempt(
            job_id=job_id,
            attempt_no=1,
            project_id="proj_default",
            kind=kind,
            worker_id="worker_b",
            host="there",
            started_at=clock.now(),
            ended_at=clock.now(),
        )
        session.add(attempt)
        session.commit()

    claims = [make_claim(), make_claim()]

    assert [claim and claim.job.attempt_no for claim in claims] == [2, 2]
    assert session.scalars(select(Event.message).order_by(Event.created_at)).all() == [
        "Fine-tuning job started",
        "Fine-tuning job started again",
    ]
