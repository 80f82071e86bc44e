"""A learner as plain data: gathered, compared, applied, and written to files that are complete or not there."""
