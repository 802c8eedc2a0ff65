"""What of Celery's own log is worth a line: an outage of Redis, once when it begins and once when it ends.

Celery tells every try to reach it again. Here it is told like that of any other server.
"""

import logging

from worker.outages import Outages

CONSUMER = "celery.worker.consumer.consumer"
CONNECTION = "celery.worker.consumer.connection"
REQUEST = "celery.worker.request"
WARNINGS = "py.warnings"  # where Celery sends them


def quieten(outages: Outages) -> None:
    """Of Celery's words on each message none are wanted: the executor says what is worth saying."""
    logging.getLogger("celery").setLevel(logging.WARNING)
    connection = logging.getLogger(CONNECTION)
    connection.setLevel(logging.INFO)  # where it says that it is connected
    connection.addFilter(Reconnecting(outages))
    for name in (CONSUMER, REQUEST):
        logging.getLogger(name).addFilter(Reconnecting(outages))
    # At each loss of the connection, a paragraph on a setting that queue.py makes on purpose.
    logging.getLogger(WARNINGS).addFilter(lambda record: "CPendingDeprecationWarning" not in record.getMessage())


class Reconnecting(logging.Filter):
    """Turns Celery's lines on its connection into what the process knows of Redis."""

    def __init__(self, outages: Outages) -> None:
        super().__init__()
        self._outages = outages

    def filter(self, record: logging.LogRecord) -> bool:
        words = record.getMessage()
        if words.startswith("Connected to "):
            self._outages.end("Redis")
            return False
        if words.startswith(("consumer: Connection to broker lost", "consumer: Cannot connect to ")):
            self._outages.begin("Redis", f"Redis: {_reason(record)}")
            return False
        if words.startswith("Couldn't ack "):  # that message is a duplicate from now on, and costs nothing
            record.exc_info = None
            return not self._outages.away("Redis")
        return True


def _reason(record: logging.LogRecord) -> str:
    """The exception among the record's arguments: beside it stands the address."""
    errors = [part for part in record.args or () if isinstance(part, BaseException)]
    return str(errors[0]) if errors else "does not answer"
