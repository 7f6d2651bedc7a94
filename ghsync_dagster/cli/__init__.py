"""The ``ghsync`` command, one module a group. Holds arguments, exit codes and what is printed; decides nothing."""
