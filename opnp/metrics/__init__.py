"""Metrics of OOD detection and of classification, with intervals and ranks."""
