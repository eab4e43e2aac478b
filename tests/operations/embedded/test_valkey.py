"""The embedded Valkey: its queue survives, and it is never started twice or left behind."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from celery import Celery
from kombu import Connection

from operations.embedded import valkey
from operations.embedded.processes import DataFolderBusy


def test_what_it_held_for_a_second_survives_a_killed_server(tmp_path: Path) -> None:
    server = valkey.start(tmp_path)
    with server.client() as client:
        client.rpush("kicks", *range(100))
    time.sleep(1.5)  # appendfsync everysec
    server.process.kill()
    server.process.wait()
    server.stop()

    again = valkey.start(tmp_path)

    with again.client() as client:
        kept = client.llen("kicks")
    again.stop()
    assert kept == 100


def test_it_refuses_to_forget_under_memory_pressure(tmp_path: Path) -> None:
    server = valkey.start(tmp_path)
    with server.client() as client:
        policy = client.config_get("maxmemory-policy")
        synced = client.config_get("appendfsync")
        port = client.config_get("port")
    server.stop()

    assert policy == {"maxmemory-policy": "noeviction"}
    assert synced == {"appendfsync": "everysec"}
    assert port == {"port": "0"}


def test_celery_speaks_to_it_by_its_url(redis_url: str) -> None:
    app = Celery(broker=redis_url)

    with app.connection_for_write() as connection:
        assert isinstance(connection, Connection)
        queue = connection.SimpleQueue("bell")
        queue.put({"ring": 1})
        message = queue.get(timeout=60)
        message.ack()
        queue.close()

    assert message.payload == {"ring": 1}


def test_a_second_start_on_the_same_folder_is_refused_in_one_sentence(tmp_path: Path) -> None:
    server = valkey.start(tmp_path)
    try:
        with pytest.raises(DataFolderBusy, match=r"^Valkey already runs over .*\(process \d+\)$"):
            valkey.start(tmp_path)
    finally:
        server.stop()

    valkey.start(tmp_path).stop()


def test_a_folder_too_deep_for_a_socket_works(tmp_path: Path) -> None:
    server = valkey.start(tmp_path / ("d" * 100))

    with server.client() as client:
        assert client.ping()
    server.stop()
    server.socket.parent.rmdir()


def test_it_ends_when_its_launcher_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from operations.embedded import valkey\n"
        "print(valkey.start(Path(sys.argv[1])).process.pid, flush=True); time.sleep(60)"
    )
    launcher = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    with launcher:
        assert launcher.stdout is not None
        server = psutil.Process(int(launcher.stdout.readline()))
        launcher.send_signal(signal.SIGKILL)

    _, alive = psutil.wait_procs([server], timeout=60)

    assert alive == []
    valkey.start(tmp_path).stop()
