"""Rewrites: one pass a file; base.py holds the Pass classes, runner.py runs them."""
