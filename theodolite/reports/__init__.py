"""Turns run directories into tables, figures and pages."""
