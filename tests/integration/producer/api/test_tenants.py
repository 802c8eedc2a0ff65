"""Whose jobs they are, and what each tenant weighs."""

import httpx

from tests.integration.producer.api.test_jobs import assert_problem, submit

JOBS, BATCHES, TENANTS = "/api/v1/jobs", "/api/v1/batches", "/api/v1/tenants"
BATCH = {"name": "boats", "jobs": [{"prompt": "a boat"}]}
NO_LIMIT = {"max_queued": None, "max_a_day": None, "max_running": None, "max_requests_s": None}


def test_jobs_and_batches_say_whose_they_are(api: httpx.Client) -> None:
    assert submit(api)["tenant"] == "default"
    job = api.post(JOBS, json={"prompt": "a boat"}, params={"tenant": "acme"}).json()
    assert api.get(f"{JOBS}/{job['id']}").json()["tenant"] == "acme"
    for params, expected in (({}, ("default", 1.0)), ({"tenant": "a-Z_0.9", "weight": "0.5"}, ("a-Z_0.9", 0.5))):
        batch = api.post(BATCHES, json=BATCH, params=params).json()
        found = api.get(f"{BATCHES}/{batch['id']}").json()
        assert (found["tenant"], found["weight"]) == expected
        (job,) = api.get(f"{BATCHES}/{batch['id']}/jobs").json()["jobs"]
        assert job["tenant"] == expected[0]


def test_a_tenant_is_given_its_weight_and_listed(api: httpx.Client) -> None:
    assert api.get(TENANTS).json() == {"tenants": []}
    for weight in (3, 0.25):
        changed = api.put(f"{TENANTS}/acme", json={"weight": weight}).json()
        assert changed == {"name": "acme", "weight": weight} | NO_LIMIT
    assert api.get(TENANTS).json() == {"tenants": [{"name": "acme", "weight": 0.25} | NO_LIMIT]}


def test_what_is_not_named_stays_and_null_takes_a_limit_away(api: httpx.Client) -> None:
    whole = {"name": "acme", "weight": 2, "max_queued": 5, "max_a_day": 0, "max_running": 1, "max_requests_s": 0.5}
    assert api.put(f"{TENANTS}/acme", json={k: v for k, v in whole.items() if k != "name"}).json() == whole
    assert api.put(f"{TENANTS}/acme", json={}).json() == whole
    assert api.put(f"{TENANTS}/acme", json={"max_a_day": None}).json() == whole | {"max_a_day": None}
    assert api.put(f"{TENANTS}/new", json={"max_running": 4}).json() == (
        {"name": "new", "weight": 1} | NO_LIMIT | {"max_running": 4}
    )


def test_a_name_that_is_none_is_refused(api: httpx.Client) -> None:
    for name in ("", "a" * 101, "a b", "a/b", "名", "a\n", "..", ".a"):
        for path, json in ((JOBS, {"prompt": "a"}), (BATCHES, BATCH)):
            problem = assert_problem(api.post(path, json=json, params={"tenant": name}), 422)
            assert [error["field"] for error in problem["errors"]] == ["tenant"]
    assert_problem(api.put(f"{TENANTS}/.acme", json={"weight": 1}), 422)
    assert api.get(JOBS).json()["jobs"] == []


def test_a_weight_beyond_its_limits_is_refused(api: httpx.Client) -> None:
    for weight in ("0", "0.009", "100.1", "-1", "nan", "inf", "heavy", ""):
        problem = assert_problem(api.post(BATCHES, json=BATCH, params={"weight": weight}), 422)
        assert [error["field"] for error in problem["errors"]] == ["weight"]


BAD_WEIGHTS = {
    b'{"weight": 0}': 422,
    b'{"weight": 1e999}': 422,
    b'{"weight": "2"}': 422,
    b'{"weight": true}': 422,
    b'{"weight": 1, "name": "b"}': 422,
    b'{"weight": null}': 422,
    b'{"max_queued": -1}': 422,
    b'{"max_running": 1.5}': 422,
    b'{"max_requests_s": 0}': 422,
    b'{"max_a_day": 2147483648}': 422,
    b"2": 422,
    b'{"weight": NaN}': 400,
}


def test_a_tenant_is_given_no_weight_or_limit_that_is_none(api: httpx.Client) -> None:
    for body, status in BAD_WEIGHTS.items():
        assert_problem(api.put(f"{TENANTS}/acme", content=body, headers={"Content-Type": "application/json"}), status)
    assert api.get(TENANTS).json() == {"tenants": []}
