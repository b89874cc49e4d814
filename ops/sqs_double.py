"""moto's server as the double of SQS: sqs_double.py PORT, on this machine only.

Two things of moto's are mended here:

- Its threads share a queue without a lock. A deletion replaces the list of messages by a copy, and what another call has
  deleted or sent meanwhile is back, or lost; two receives get messages of one FIFO group.
- For every message that it sends or hands out, it counts all messages of the queue several times over, by a slow clock: a
  thousand messages take minutes. The two attributes that it is after are looked up, and the clock is the system's.
"""

import collections.abc
import functools
import sys
import threading
import time

from moto.server import main
from moto.sqs import models

LOCK = threading.RLock()
# Between two looks of a receive that waits.
PAUSE = 0.05


def one_at_a_time(method):
    @functools.wraps(method)
    def locked(*arguments, **more):
        with LOCK:
            return method(*arguments, **more)

    return locked


for name in ["send_message", "send_message_batch", "delete_message", "delete_message_batch", "change_message_visibility",
             "change_message_visibility_batch", "get_queue_attributes", "create_queue", "delete_queue", "purge_queue"]:
    setattr(models.SQSBackend, name, one_at_a_time(getattr(models.SQSBackend, name)))

receive_now = one_at_a_time(models.SQSBackend.receive_message)


def receive(self, queue_name, count, wait_seconds_timeout, *more, **named):
    """A receive that waits looks again and again, and holds nobody up between its looks."""
    end = time.time() + wait_seconds_timeout
    while not (found := receive_now(self, queue_name, count, 0, *more, **named)) and time.time() < end:
        time.sleep(PAUSE)
    return found


models.SQSBackend.receive_message = receive

models.unix_time = lambda *_: time.time()
models.unix_time_millis = lambda *_: time.time() * 1000
ALL = models.Queue.attributes.fget


class Attributes(collections.abc.Mapping):
    """A queue's attributes; two of them without the counts of messages that all of them bring along."""

    def __init__(self, queue):
        self.queue = queue

    def __getitem__(self, name):
        if name == "MessageRetentionPeriod":
            return self.queue.message_retention_period
        if name == "ContentBasedDeduplication" and self.queue.fifo_queue:
            return str(self.queue.content_based_deduplication).lower()
        if name == "ContentBasedDeduplication":
            raise KeyError(name)
        return ALL(self.queue)[name]

    def __iter__(self):
        return iter(ALL(self.queue))

    def __len__(self):
        return len(ALL(self.queue))


models.Queue.attributes = property(Attributes)
main(["-H", "127.0.0.1", "-p", sys.argv[1]])
