"""``make e2e``: the compose stack from nothing, used, killed, restored, removed. Needs Docker.

Belongs here: what is tried on the stack from outside. Not here: anything that a machine without Docker can show.
"""
