"""Widths under a time limit: a model of the time and a knapsack over widths."""
