"""Metrics of OOD detection and of classification, their intervals, and ranks."""
