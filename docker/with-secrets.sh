#!/usr/bin/env bash
# Usage: with-secrets COMMAND [ARGUMENT ...]
#
# Turns mounted secrets into the private files that libpq and mergesearch accept, then becomes COMMAND. Secrets arrive
# with whatever owner and mode the engine gives them, and libpq ignores a password file that others may read. They never
# enter the environment or a command line, where `docker inspect` and `ps` would show them.
#
#   POSTGRES_PASSWORD_FILE   default /run/secrets/postgres_password    ->  $PGPASSFILE
#   POSTGRES_HOST, POSTGRES_USER   the server and role it is for, default postgres and mergesearch
#   DASHBOARD_TOKEN_FILE     default /run/secrets/dashboard_token      ->  beside $PGPASSFILE, named dashboard_token
set -euo pipefail
umask 077

password_file=${POSTGRES_PASSWORD_FILE:-/run/secrets/postgres_password}
token_file=${DASHBOARD_TOKEN_FILE:-/run/secrets/dashboard_token}
export PGPASSFILE=${PGPASSFILE:-/run/mergesearch/pgpass}

refuse() {
    printf 'with-secrets: %s\n' "$1" >&2
    exit 2
}

# The first line of a secret.
secret() {
    [[ -r $1 ]] || refuse "$1: expected a secret that uid $(id -u) can read, received mode $(stat -c '%a, owner %u' "$1"); see docker/README.md"
    local line=
    IFS= read -r line < "$1" || [[ -n $line ]] || refuse "$1: expected a secret, received an empty file; write it again"
    [[ -n $line ]] || refuse "$1: expected a secret in the first line, received an empty line; write it again"
    printf '%s' "$line"
}

# Moved into place, so that a reader never sees half a file.
keep() {
    local part
    part=$(mktemp "$1.XXXXXX")
    printf '%s\n' "$2" > "$part"
    mv -f "$part" "$1"
}

if [[ -e $password_file ]]; then
    password=$(secret "$password_file")
    password=${password//\\/\\\\}  # the file's own escapes: backslash first, then colon
    password=${password//:/\\:}
    # For that server alone: libpq must not offer it to another one that a study names.
    keep "$PGPASSFILE" "${POSTGRES_HOST:-postgres}:*:*:${POSTGRES_USER:-mergesearch}:$password"
    unset password
fi
if [[ -e $token_file ]]; then
    token=$(secret "$token_file")
    keep "$(dirname "$PGPASSFILE")/dashboard_token" "$token"
    unset token
fi

exec "$@"
