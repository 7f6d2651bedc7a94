"""What several files of tests use.

Belongs here: builders of users and changes, the parts of a stream, stand-ins, models, and pytest plugins. Not here:
tests, and what one file alone uses.
"""
