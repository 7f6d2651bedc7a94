#!/bin/sh
# Back the stack up: stop it, so that all volumes are of one moment, write them into one archive, start it again.
# The archive holds all secrets: keep it as safe as the stack itself.
set -eu
: "${1:?Give the folder for the archive: deploy/backup.sh FOLDER}"
cd "$(dirname "$0")/.."
archive=$(cd "$1" && pwd)/volumes.tar
docker compose stop
(umask 077 && docker compose run --rm -T --no-deps prepare \
  sh -c 'cd /volumes && tar --create --numeric-owner vault settings secrets/* data/*' >"$archive.part")
mv "$archive.part" "$archive"
docker compose start
echo "backed up to $archive"
