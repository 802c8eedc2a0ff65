"""Server-sent events, line by line."""

from producer.client.frames import BATCH_ENDS, JOB_ENDS, Frames
from producer.client.models import Event

JOB = "00000000-0000-0000-0000-000000000001"


def events(frames: Frames, text: str) -> list[Event]:
    return [event for line in text.split("\n") if (event := frames.fed(line)) is not None]


def test_an_event_is_complete_at_the_empty_line_and_comments_are_passed_over() -> None:
    frames = Frames(JOB_ENDS)
    (event,) = events(
        frames,
        f': beat\n\nid: 7\nevent: job.running\ndata: {{"job_id": "{JOB}",\ndata: "extra": 1}}\n\nid: 8\ndata: {{',
    )
    assert (event.id, event.kind, str(event.job_id), event.data["extra"]) == ("7", "job.running", JOB, 1)
    assert (frames.last_id, frames.ended) == ("7", False)


def test_what_was_cut_off_is_forgotten_and_the_next_connection_goes_on_behind_the_last_whole_event() -> None:
    frames = Frames(JOB_ENDS)
    assert "Last-Event-ID" not in frames.headers()
    events(frames, 'retry: 50\nid: 7\nevent: job.running\ndata: {}\n\nid: 8\nevent: job.succeeded\ndata: {"st')
    assert frames.headers()["Last-Event-ID"] == "7"
    (event,) = events(frames, "event: job.progress\ndata: {}\n\n")
    assert (event.kind, event.id, frames.last_id, frames.wait_s) == ("job.progress", None, "7", 0.05)


def test_a_stream_has_ended_with_what_its_own_kind_ends_with() -> None:
    for ends, ended in ((JOB_ENDS, True), (BATCH_ENDS, False)):
        frames = Frames(ends)
        events(frames, "id: 1\nevent: job.failed\ndata: {}\n\n")
        assert frames.ended is ended
    events(frames, "id: 2\nevent: batch.finished\ndata: {}\n\n")
    assert frames.ended
