"""Several processes that train together: which one this is, and what they tell each other."""
