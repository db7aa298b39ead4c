"""A bug is told to the person who met it by a number, under which its traceback is in the log."""

import logging
import traceback
import uuid

log = logging.getLogger("ldm.ui")


def told() -> str:
    """Log the exception that is being handled under a new number; returns what to say of it."""
    number = uuid.uuid4().hex[:8]
    log.error("bug %s\n%s", number, traceback.format_exc())
    return f"ldm: a bug in this program; please report it with the log of {number}"
