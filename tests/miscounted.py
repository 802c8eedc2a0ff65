"""Where the tallies are not what a count of the jobs finds."""

MISCOUNTED = """
    SELECT tenant, batch_id, priority, state, sum(jobs) AS tallied, sum(n) AS counted, sum(pixel_steps) AS work_too_much
    FROM (SELECT tenant, batch_id, priority, state, jobs, pixel_steps, 0 AS n FROM tallies
          UNION ALL SELECT tenant, batch_id, priority, state, 0, -round(work * 1e6), 1
          FROM jobs WHERE batch_id IS NOT NULL
          UNION ALL SELECT tenant, NULL, priority, state, 0, -round(work * 1e6), 1 FROM jobs) AS all_of_them
    GROUP BY tenant, batch_id, priority, state HAVING sum(jobs) <> sum(n) OR sum(pixel_steps) <> 0
"""
