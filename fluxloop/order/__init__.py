"""Who may touch what, and so in which order callbacks run: declared access, views, the graph, delivery of events."""
