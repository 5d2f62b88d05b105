"""Evaluation: attacks over a test set, geometry of the features, records, and reports."""
