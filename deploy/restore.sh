#!/bin/sh
# Restore the stack's volumes from the archive of deploy/backup.sh. There must be no volumes: docker compose down --volumes.
set -eu
: "${1:?Give the folder of the archive: deploy/restore.sh FOLDER}"
archive=$(cd "$1" && pwd)/volumes.tar
cd "$(dirname "$0")/.."
[ -s "$archive" ] || { echo "there is no archive $archive" >&2; exit 2; }
if [ -n "$(docker volume ls --quiet --filter label=com.docker.compose.project=ghsync)" ]; then
  echo "the stack has volumes already; remove them, with all their data: docker compose down --volumes" >&2
  exit 2
fi
docker compose run --rm -T --no-deps prepare tar --extract --numeric-owner --same-owner --directory /volumes <"$archive"
echo "restored; start the stack: docker compose up --detach --wait"
