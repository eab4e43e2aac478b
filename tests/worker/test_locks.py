import subprocess
import sys
from pathlib import Path

from worker.locks import Incarnations, try_lock


def test_a_lock_is_held_until_the_last_child_that_inherited_it_is_dead(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    lock = try_lock(path)
    assert lock is not None
    with subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock.fd]
    ) as child:
        lock.release()  # as the death of the parent would
        while_it_lives = try_lock(path)
        child.kill()

    after = try_lock(path)

    assert while_it_lives is None
    assert after is not None
    after.release()


def test_only_workers_whose_lock_is_free_are_dead_and_each_is_buried_once(tmp_path: Path) -> None:
    incarnations = Incarnations(tmp_path, "host")
    alive, dying = incarnations.take("worker_alive"), incarnations.take("worker_dying")
    dying.release()

    dead = incarnations.dead()
    at_the_same_time = Incarnations(tmp_path, "host").dead()
    names = [incarnations.worker_id(lock) for lock in dead]
    for lock in dead:
        incarnations.bury(lock)

    assert names == ["worker_dying"]
    assert at_the_same_time == []
    assert incarnations.dead() == []
    alive.release()


def test_another_hosts_workers_are_none_of_our_business(tmp_path: Path) -> None:
    Incarnations(tmp_path, "there").take("worker_there").release()

    assert Incarnations(tmp_path, "here").dead() == []
