"""Where the rooms meet: the steps of a run, its report and page, latency, recipes."""
