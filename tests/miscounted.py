"""Where the tallies are not what a count of the jobs finds."""

MISCOUNTED = """
    SELECT tenant, batch_id, priority, state, sum(jobs) AS tallied, sum(work) AS tallied_work, sum(n) AS counted
    FROM (SELECT tenant, batch_id, priority, state, jobs, work, 0 AS n FROM tallies
          UNION ALL SELECT tenant, batch_id, priority, state, 0, -work, 1 FROM jobs WHERE batch_id IS NOT NULL
          UNION ALL SELECT tenant, NULL, priority, state, 0, -work, 1 FROM jobs) AS all_of_them
    GROUP BY tenant, batch_id, priority, state HAVING sum(jobs) <> sum(n) OR abs(sum(work)) > 1e-3
"""
