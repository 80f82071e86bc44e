"""What a learner does: fit, resume, predict and evaluate, check, find a learning rate, summarize."""
