"""The paths of the farm as a whole: its counts and workers, and whether this process is alive and ready."""

from fastapi import APIRouter, Response

from producer.api.answers import PREFIX
from producer.api.documents import problems
from producer.api.problems import RETRY_AFTER_S
from producer.api.services import Here
from producer.jobs.contract import Farm

router = APIRouter(tags=["farm"])


@router.get(f"{PREFIX}/farm", responses=problems())
def farm(here: Here) -> Farm:
    """Counts by state, the backlog's age, the throughput and the workers, at one moment of the database's clock."""
    return here.store.farm(lease_s=here.settings.durations.lease_s)


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """Whether this process answers; asks nobody else, and waits for no thread."""
    return {"status": "ok"}


@router.get("/readyz", responses={503: {"description": "A dependency is away; the body names it."}})
def readyz(here: Here, response: Response) -> dict[str, str]:
    """Each dependency, asked now: 'ok' or what is wrong."""
    found = here.readiness()
    if any(answer != "ok" for answer in found.values()):
        response.status_code = 503
        response.headers["Retry-After"] = str(RETRY_AFTER_S)
    return found
