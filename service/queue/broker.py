"""One Celery configuration, shared by those who ring (the API) and those who listen (the workers).

A message is a wake-up without a payload: losing or doubling one is harmless. So nothing is acknowledged late, no
result is stored, and nothing but JSON is understood.
"""

from typing import Any, Literal

from celery import Celery
from kombu import Queue

from service.settings import Settings

Kind = Literal["train", "validate"]
KINDS: tuple[Kind, ...] = ("train", "validate")

KICK_EXPIRES_S = 60
"""A wake-up nobody heard for this long wakes nobody later."""


class RedisUrlMissing(RuntimeError):
    """NIBBLE_REDIS_URL is not set; `nibble up` brings its own server."""


def task_name(kind: Kind) -> str:
    """Return the name of the kick for `kind`; the queue has the kind's own name."""
    return f"nibble.kick.{kind}"


def make_app(settings: Settings, *, answer_within_s: float) -> Celery:
    """Return a Celery app over the configured broker; it connects on first use.

    Args:
        settings: names the broker.
        answer_within_s: how long one call may wait for the broker; short for who rings, long for who listens.

    Raises:
        RedisUrlMissing: no broker is configured.
    """
    if settings.redis_url is None:
        msg = "NIBBLE_REDIS_URL is not set: set it, or start with `nibble up`, which brings its own Valkey"
        raise RedisUrlMissing(msg)
    app = Celery("nibble", broker=settings.redis_url.get_secret_value(), set_as_current=False)
    options: dict[str, Any] = {
        "visibility_timeout": 3600,
        "socket_keepalive": True,
        "socket_timeout": answer_within_s,
        "socket_connect_timeout": min(answer_within_s, 5),
        "health_check_interval": 25,
        "global_keyprefix": "nibble:",
    }
    app.conf.update(
        broker_transport_options=options,
        broker_connection_retry=True,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_connection_timeout=min(answer_within_s, 5),
        result_backend=None,
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        task_serializer="json",
        accept_content=["json"],
        event_serializer="json",
        task_acks_late=False,
        task_create_missing_queues=False,
        task_queues=[Queue(kind, routing_key=kind) for kind in KINDS],
        task_default_queue="train",
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_enable_remote_control=False,
    )
    return app
