"""Formulas over features and images."""
