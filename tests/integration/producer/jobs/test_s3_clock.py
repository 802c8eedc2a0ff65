"""A host whose clock is wrong: another process, whose every look at the clock is off by this many seconds."""

import re
import subprocess
import sys
from email.utils import formatdate

import httpx
import pytest

from producer.jobs.errors import Unavailable
from producer.jobs.settings import Settings
from producer.jobs.storage import Storage
from tests.canned_s3 import answering
from tests.farm import environment

HOST_WITH_A_WRONG_CLOCK = """
import datetime, logging, sys, time
off_s, right_time, right_datetime = float(sys.argv[1]), time.time, datetime.datetime
class WrongClock(right_datetime):
    @classmethod
    def now(cls, tz=None):
        return right_datetime.now(tz) + datetime.timedelta(seconds=off_s)
datetime.datetime = WrongClock
time.time = lambda: right_time() + off_s

from producer.jobs.settings import load_settings
from producer.jobs.storage import Storage
logging.basicConfig(format="%(message)s")
storage = Storage(load_settings())
"""
PUT_AND_LINK = """
storage.put("banner.png", b"picture", "image/png")
assert storage.get("banner.png") == b"picture"
print(storage.link("banner.png", "banner.png"))
"""
LOOK_AND_LINK = """
storage.ensure_bucket()
print(storage.link("banner.png", "banner.png"))
"""
TOGETHER = """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(8) as pool:
    list(pool.map(lambda number: storage.put(f"{number}.png", b"picture", "image/png"), range(8)))
"""
HOUR_S = 3600


def on_a_host_that_is_off(off_s: int, settings: Settings, script: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", HOST_WITH_A_WRONG_CLOCK + script, str(off_s)]
    done = subprocess.run(command, env=environment(settings), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize(("off_s", "told"), [(HOUR_S, "ahead"), (-HOUR_S, "behind")])
def test_objects_and_links_are_right_although_the_clock_is_an_hour_off(
    settings: Settings, off_s: int, told: str
) -> None:
    done = on_a_host_that_is_off(off_s, settings, PUT_AND_LINK)
    assert httpx.get(done.stdout.strip()).content == b"picture"
    [(seconds, side)] = re.findall(r"this host's clock is (\d+) s (\w+)", done.stderr)
    assert (int(seconds), side) == (pytest.approx(HOUR_S, abs=30), told)


def test_a_link_is_right_once_the_bucket_was_looked_at_which_is_refused_without_a_word(
    settings: Settings, storage: Storage
) -> None:
    storage.put("banner.png", b"picture", "image/png")
    done = on_a_host_that_is_off(-HOUR_S, settings, LOOK_AND_LINK)
    assert httpx.get(done.stdout.strip()).content == b"picture"


def test_a_link_lasts_as_long_as_it_should_although_the_clock_is_too_little_off_to_be_refused(
    settings: Settings, storage: Storage
) -> None:
    storage.put("banner.png", b"picture", "image/png")
    short = settings.model_copy(update={"presign_s": 120})
    assert httpx.get(on_a_host_that_is_off(-600, short, LOOK_AND_LINK).stdout.strip()).content == b"picture"


def test_threads_that_are_refused_together_are_all_put_right(settings: Settings, storage: Storage) -> None:
    on_a_host_that_is_off(HOUR_S, settings, TOGETHER)
    assert [sorted(page) for page in storage.pages("")] == [[f"{number}.png" for number in range(8)]]


@pytest.mark.parametrize("date", ["yesterday", "", formatdate(0, usegmt=True)])
def test_a_senseless_date_ends_in_what_the_server_said(settings: Settings, date: str) -> None:
    with answering(f"HTTP/1.1 403 Forbidden\r\nDate: {date}\r\nContent-Length: 0\r\n\r\n".encode()) as url:
        storage = Storage(settings.model_copy(update={"s3_endpoint_url": url}))
        with pytest.raises(Unavailable, match="403"):
            storage.ping()
        storage.close()
