"""``python -m ghsync_dagster.cli`` is the ``ghsync`` command."""

from ghsync_dagster.cli.app import main

if __name__ == "__main__":
    main()
